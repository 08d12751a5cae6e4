"""Every pass on small modules: the graph before and after as golden text, and both run on the same tensors.

``pytest tests/test_passes.py --update-golden`` writes tests/golden/ anew; read the difference before you commit it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import FACTS, Tape, assert_same, is_valid, module_of, region_of
from torch import fx, nn
from torch.nn import functional as F

from fmecompile.analysis.memory import project
from fmecompile.capture.export import capture
from fmecompile.graph import edit
from fmecompile.graph.group import Group
from fmecompile.graph.invariants import check
from fmecompile.graph.program import Binding, Coefficient, Constant, Input, Kept, Program, Weight, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec, tensor_spec
from fmecompile.operators.registry import tensor
from fmecompile.partition.partition import Partitioner
from fmecompile.passes.accept_strides import AcceptStrides
from fmecompile.passes.chunk_loops import ChunkLoops
from fmecompile.passes.drop_noops import DropNoops
from fmecompile.passes.eliminate_common import EliminateCommon
from fmecompile.passes.fold_constants import FoldConstants
from fmecompile.passes.fuse_norm import FuseNorm
from fmecompile.passes.fuse_runs import FuseRuns
from fmecompile.passes.kernels import Kernels
from fmecompile.passes.late_expand import LateExpand
from fmecompile.passes.one_key import OneKey
from fmecompile.passes.own_outputs import OwnOutputs, Returned
from fmecompile.passes.prologue import Prologue
from fmecompile.passes.reader_layout import ReaderLayout
from fmecompile.passes.recompute import Recompute
from fmecompile.passes.relax_views import RelaxViews
from fmecompile.passes.relax_writes import RelaxWrites
from fmecompile.passes.sink_producers import SinkProducers
from fmecompile.passes.spatial_layout import SpatialLayout
from fmecompile.passes.spill import Spill, Wait
from fmecompile.passes.step_reuse import Cut, StepReuse
from fmecompile.passes.two_pass_norm import TwoPassNorm
from fmecompile.passes.write_through import WriteThrough
from fmecompile.pipeline import PASSES, Compilation, finish, pass_name
from fmecompile.runtime.chunk_loop import ChunkLoop, LoopSpec, Narrow, Slicing
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.fused import FusedRun

aten = torch.ops.aten
ROOT = Path(__file__).parent
GOLDEN = ROOT / "golden"

# --------------------------------------------------------------------------------------------------- graphs as text


def shown(value: Any) -> str:
    """An argument: nodes as %name, no memory addresses."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(shown, value)) + "]"
    return str(value)


def shape_of(spec: Any) -> str:
    """``float64[4, 6]``, with strides where they are not those of a new tensor."""
    if isinstance(spec, TensorSpec):
        usual = torch.empty(spec.shape, device="meta").stride()
        strides = "" if spec.stride == usual else f" strides {list(spec.stride)}"
        return f"{str(spec.dtype).removeprefix('torch.')}{list(spec.shape)}{strides}"
    return "(" + ", ".join(map(shape_of, spec)) + ")" if isinstance(spec, tuple) else str(spec)


def line_of(node: fx.Node) -> str:
    """One node: name, target, arguments, shape."""
    if node.op == "output":
        return f"return {shown(node.args[0])}"
    if node.op == "placeholder":
        return f"%{node.name}: {shape_of(node_spec(node))} = input"
    named = [f"{name}={shown(value)}" for name, value in node.kwargs.items()]
    target = node.target if isinstance(node.target, (str, torch._ops.OpOverload)) else node.target.__name__
    arguments = ", ".join([*map(shown, node.args), *named])
    return f"%{node.name}: {shape_of(node_spec(node))} = {target}({arguments})"


def text_of(graph: fx.Graph, indent: str = "  ") -> str:
    return "".join(f"{indent}{line_of(node)}\n" for node in graph.nodes)


def slicing_text(slicing: Slicing | None) -> str:
    if slicing is None:
        return "whole"
    spans = ", ".join(map(narrow_text, slicing.narrows))
    return spans + (f", viewed as {list(slicing.shape)}" if slicing.shape else "")


def narrow_text(n: Narrow) -> str:
    start = " + ".join(f"axis {axis} * {step}" for axis, step in n.terms)
    halo = f" with a halo of {n.halo[0]} before and {n.halo[1]} behind of {n.extent}" if n.halo != (0, 0) else ""
    return f"dim {n.dim} from {start} for {n.unit}{' * rows' if n.inner else ''}{halo}"


def spec_text(spec: LoopSpec) -> str:
    lines = [f"  axes {', '.join(f'{axis.size} by {axis.chunk}' for axis in spec.axes)}\n"]
    lines += [f"  operand {k}: {slicing_text(slicing)}\n" for k, slicing in enumerate(spec.slicings)]
    for k, output in enumerate(spec.outputs):
        into = "a new tensor" if output.takes is None else f"operand {output.takes}"
        into = "host memory" if output.host_of is not None else into
        by = ", written by bodies" if output.is_written else ""
        lines.append(f"  output {k}: {slicing_text(output.slicing)}; {list(output.shape)} into {into}{by}\n")
    return "".join(lines)


def loop_text(name: str, loop: ChunkLoop) -> str:
    bodies = [body.graph for body in loop.bodies if isinstance(body, fx.GraphModule)]
    parts = [f" body {kind}\n{text_of(body, '    ')}" for kind, body in enumerate(bodies)]
    return f"{name}\n{spec_text(loop.spec)}{''.join(parts)}"


# -------------------------------------------------------------------------------------------------------------- cases


class Case(nn.Module):
    """A module that is one function of its inputs and its weights."""

    def __init__(self, function: Callable[..., Any], *weights: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight in weights])

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args, *self.weights)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Golden:
    """One golden file: ``first`` runs in front of ``item`` and is no part of it."""

    item: Any
    name: str
    function: Callable[..., Any]
    inputs: tuple[torch.Tensor, ...] = (noise(4, 6),)
    weights: tuple[torch.Tensor, ...] = ()
    first: tuple[Any, ...] = ()
    idle: bool = False

    @property
    def path(self) -> Path:
        return GOLDEN / pass_name(self.item) / f"{self.name}.txt"


X4 = (noise(2, 8, 6, 5),)
AFFINE = (noise(8, seed=1), noise(8, seed=2))


def sinusoids(x: torch.Tensor) -> torch.Tensor:
    places = torch.arange(3, dtype=torch.float64)
    angles = places[:, None] * torch.exp(torch.arange(3, dtype=torch.float64))[None]
    return x.view(4, 2, 3).sum(1) @ torch.cat([angles.sin(), angles.cos()], 1)


def every_split(x: torch.Tensor) -> Any:
    a, b = x.chunk(2, 1)
    c, d = x.split([1, 5], -1)
    e, f, g, h = x.split(1)
    i, _, j = x.tensor_split(3, 1)
    k, *_ = x.unbind(1)
    return a * b, c + d, e + f + g + h, i * j, k.exp()


def writes(x: torch.Tensor) -> torch.Tensor:
    """A column, rows in the middle, another dtype, and all of it."""
    y = F.silu(x)
    y[:, 1] = 2.0
    y[1:3].add_(y[:2])
    y[..., -2:].copy_(y[..., :2].float())
    return y.transpose(0, 1).mul_(0.5)


def slices_written(y: torch.Tensor) -> torch.Tensor:
    y[1:, ::2] += 1.0
    return y


def apart(outputs: int) -> tuple[Returned, ...]:
    """So many outputs as captured, each in a storage of its own."""
    return tuple(Returned(f"value_{k}", is_given=False, stride=()) for k in range(outputs))


SHARING = (FoldConstants(), EliminateCommon())


def used_late(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    context = c.repeat(4, 1)
    return torch.tanh(F.silu(x).exp()) + context


def reduced_early(x: torch.Tensor) -> torch.Tensor:
    """The sum is smaller than what it frees: moved down, it would keep the larger value waiting."""
    total = F.silu(x).sum()
    return x.exp().tanh() + total


def behind_a_convolution(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return F.group_norm(F.conv2d(F.silu(x), c, padding=1), 2).tanh()


def beside_a_shortcut(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """What the shortcut leaves of the value is less than the value, so it is read early."""
    h = F.conv2d(x, c, padding=1)
    return F.conv2d(F.group_norm(h, 2), s) + F.conv2d(h, s)


def read_whole_later(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The value is added to the result, so that it waits in any case."""
    h = F.conv2d(x, c, padding=1)
    return F.group_norm(h, 2).tanh() + h


def read_whole_twice(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """What the other reader leaves is no less than the value, so nothing is gained by reading early."""
    h = F.conv2d(x, c, padding=1)
    return F.group_norm(h, 2).tanh() + h.exp()


def read_late_as_views(x: torch.Tensor) -> Any:
    """The value, a view of it and a view of that are read late, the value itself by two calls."""
    h = F.silu(x)
    y = h.exp().sum(1)
    pairs = h.reshape(2, 2, 6)
    return y, pairs.tanh(), pairs[0] * 2, h + 1, h @ h.t()


def skipped(x: torch.Tensor) -> torch.Tensor:
    h = F.silu(x)
    return torch.cat([h.exp().tanh(), h], 1)


CONV, SHORTCUT = noise(8, 8, 3, 3, seed=3), noise(2, 8, 1, 1, seed=4)
CASES: list[Golden] = [
    Golden(
        DropNoops(),
        "what_returns_its_operand",
        lambda x: (
            (F.dropout(F.silu(x).to(torch.float64).contiguous().view(4, 6), 0.3, False)[:, :] * 1 / 1.0).expand(4, 6)
            + x.detach()
        ),
    ),
    Golden(
        DropNoops(),
        "what_only_looks_idle",
        lambda x, n: (
            x.t().contiguous() + 0,
            x.to(torch.float32) * 1,
            n * 1.0,
            n / 1,
            x.view(6, 4) * 2,
            x[:, 1:] * 1,
            x.expand(2, 4, 6) * 1.5,
        ),
        (noise(4, 6), torch.arange(3)),
    ),
    Golden(DropNoops(), "nothing", lambda x: F.silu(x) * 2, idle=True),
    Golden(
        Recompute(("group_norm_moments",)), "behind_a_convolution", behind_a_convolution, X4, (CONV,), (TwoPassNorm(),)
    ),
    Golden(
        Recompute(("group_norm_moments",)),
        "beside_a_shortcut",
        beside_a_shortcut,
        X4,
        (CONV, SHORTCUT),
        (TwoPassNorm(),),
    ),
    Golden(
        Recompute(("group_norm_moments",)),
        "read_whole_later",
        read_whole_later,
        X4,
        (CONV,),
        (TwoPassNorm(),),
        idle=True,
    ),
    Golden(
        Recompute(("group_norm_moments",)),
        "read_whole_twice",
        read_whole_twice,
        X4,
        (CONV,),
        (TwoPassNorm(),),
        idle=True,
    ),
    Golden(Recompute(()), "nothing_asked_for", behind_a_convolution, X4, (CONV,), (TwoPassNorm(),), idle=True),
    Golden(RelaxViews(), "views", lambda x: F.silu(x.view(2, 2, -1)).reshape(-1, 3).repeat_interleave(2, 0)),
    Golden(RelaxViews(), "splits", every_split),
    Golden(RelaxViews(), "nothing", lambda x: F.silu(x) * 2, idle=True),
    Golden(RelaxWrites(), "parts", writes),
    Golden(RelaxWrites(), "every_other_row", lambda x: slices_written(x.clone())),
    Golden(RelaxWrites(), "nothing", lambda x: F.silu(x) * 2, idle=True),
    Golden(OwnOutputs(apart(3)), "made_once", lambda x: (F.relu(x), F.relu(x), torch.arange(4.0)), first=SHARING),
    Golden(OwnOutputs((Returned("a", False, ()),) * 2), "views", lambda x: (y := F.relu(x), y[:1]), idle=True),
    Golden(FoldConstants(), "sinusoids", sinusoids),
    Golden(FoldConstants(), "a_tensor_made_of_numbers", lambda x: x * torch.tensor([2.0, 3.0], dtype=torch.float64)[0]),
    Golden(
        FoldConstants(limit_bytes=64),
        "large_ones_stay",
        lambda x: x + torch.ones(4, 6, dtype=torch.float64).exp(),
        idle=True,
    ),
    Golden(FoldConstants(), "random_numbers_stay", lambda x: x * 0 + torch.rand(6).to(torch.float64).ceil(), idle=True),
    Golden(
        EliminateCommon(),
        "twins",
        lambda x, w: F.silu(F.linear(x, w)) + torch.tanh(F.linear(x, w)) + F.silu(F.linear(x, w)),
        weights=(noise(6, 6),),
    ),
    Golden(
        EliminateCommon(),
        "almost_twins",
        lambda x: x * 1 + x * 1.0 + x.sum(0) + x.sum(0, keepdim=True) + x.to(torch.float32).to(torch.float64),
        idle=True,
    ),
    Golden(EliminateCommon(limit_bytes=64), "large_ones_stay", lambda x: (x.exp() + 1) * (x.exp() + 2), idle=True),
    Golden(
        EliminateCommon(), "random_numbers_stay", lambda x: (torch.rand_like(x) - torch.rand_like(x)) * 0, idle=True
    ),
    Golden(
        SinkProducers(),
        "a_value_used_late",
        used_late,
        (noise(4, 6), noise(6, seed=1)),
    ),
    Golden(SinkProducers(), "a_reduction_stays", reduced_early, idle=True),
    Golden(SinkProducers(), "nothing", lambda x: F.silu(x) * 2, idle=True),
    Golden(Spill((("silu", "cat"),)), "a_skip_connection", skipped),
    Golden(Spill((("silu", "reshape"),)), "views_are_taken_anew", read_late_as_views),
    Golden(Spill((("silu", "tanh"), ("exp", "tanh"))), "two_values", skipped),
    Golden(Spill(()), "nothing", skipped, idle=True),
    Golden(TwoPassNorm(), "spatial", lambda x, w, b: F.silu(F.group_norm(x, 2, w, b, 1e-6)), X4, AFFINE),
    Golden(TwoPassNorm(), "plain", lambda x: F.group_norm(x, 2), X4),
    Golden(TwoPassNorm(), "nothing_behind_the_channels", lambda x: F.group_norm(x, 2), idle=True),
    Golden(
        FuseNorm(), "left_together", lambda x, w, b: F.group_norm(x, 2, w, b, 1e-6), X4, AFFINE, first=(TwoPassNorm(),)
    ),
    Golden(FuseNorm(), "no_pair", lambda x: F.group_norm(x, 2), idle=True),
]


def attended(x: torch.Tensor, c: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two heads; of ``c`` there is one row."""
    queries, values = F.linear(x, q).view(1, 4, 2, 3).transpose(1, 2), F.linear(c, v).view(1, -1, 2, 3).transpose(1, 2)
    return F.scaled_dot_product_attention(queries, values, values).transpose(1, 2).reshape(4, 6) + x


def attended_in_clips(x: torch.Tensor, c: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    queries, values = (F.linear(t, w).view(2, -1, 2, 3).transpose(1, 2) for t, w in ((x, q), (c, v)))
    return F.scaled_dot_product_attention(queries, values, values).transpose(1, 2).reshape(2, 4, 6) + x


def conditioned(x: torch.Tensor, c: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What is made of ``c`` alone is the same at every step; its sine takes no work worth the bytes."""
    return F.silu(x) * F.linear(c.exp(), w) + c.sin()


def activated_norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(x, 2, w, b, 1e-6))


def gated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    value, gate = F.linear(x, w).chunk(2, -1)
    return value * F.gelu(gate, approximate="tanh")


def gated_by_the_first_half(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    gate, value = F.linear(x, w).chunk(2, -1)
    return F.gelu(gate) * value


def blended(a: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    alpha = a.sigmoid()
    return alpha * s + (1.0 - alpha) * (t.exp() + t)


def temporal_attention(h: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Two heads."""
    shape = (*h.shape[:-1], 2, h.shape[-1] // 2)
    rows, values = F.linear(h, q).view(shape).transpose(1, 2), h.view(shape).transpose(1, 2)
    return F.scaled_dot_product_attention(rows, values, values).transpose(1, 2).reshape(h.shape)


def temporal_layer(x: torch.Tensor, q: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """Two clips of three frames with four tokens."""
    h = x[None, :].reshape(2, 3, 4, 6).permute(0, 2, 1, 3).reshape(8, 3, 6)
    h = h + temporal_attention(F.layer_norm(h, (6,)), q)
    h = h + F.linear(F.silu(h), o)
    return h[None, :].reshape(2, 4, 3, 6).permute(0, 2, 1, 3).reshape(6, 4, 6)


def layer_read_elsewhere(x: torch.Tensor) -> Any:
    """A value in the layout of sequences is returned too, so moving the layer would make it twice."""
    h = F.silu(x.reshape(2, 3, 4, 6).permute(0, 2, 1, 3).reshape(8, 3, 6))
    return h, h.exp().reshape(2, 4, 3, 6).permute(0, 2, 1, 3).reshape(6, 4, 6)


ALL_KERNELS = Kernels(everywhere=True)
CLIPS = (noise(6, 4, 6),)
GATE = (noise(10, 6, seed=1),)
QUERY, OUT = noise(6, 6, seed=1), noise(6, 6, seed=2)
CASES += [
    Golden(
        ALL_KERNELS,
        "norm_and_silu",
        lambda x, w, b: F.silu(F.group_norm(x, 2, w, b, 1e-6)),
        X4,
        AFFINE,
        first=(TwoPassNorm(),),
    ),
    Golden(ALL_KERNELS, "norm_alone", lambda x: F.group_norm(x, 2) * 2, X4, first=(TwoPassNorm(),)),
    Golden(ALL_KERNELS, "gated_halves", gated, (noise(4, 6),), GATE, first=(RelaxViews(),)),
    Golden(ALL_KERNELS, "gated_the_other_way", gated_by_the_first_half, (noise(4, 6),), GATE, (RelaxViews(),), True),
    Golden(ALL_KERNELS, "blend_and_residual", blended, (noise(4, 1), noise(4, 6), noise(4, 6, seed=1))),
    Golden(ALL_KERNELS, "blend_of_a_smaller_branch", blended, (noise(4, 1), noise(6), noise(4, 6, seed=1)), idle=True),
    Golden(ALL_KERNELS, "few_frames", temporal_attention, (noise(4, 3, 6),), (QUERY,)),
    Golden(ALL_KERNELS, "many_frames", temporal_attention, (noise(2, 65, 6),), (QUERY,), idle=True),
    Golden(Kernels(), "on_a_cpu", gated, (noise(4, 6),), GATE, (RelaxViews(),), True),
    Golden(SpatialLayout(), "temporal_layer", temporal_layer, CLIPS, (QUERY, OUT), (RelaxViews(), ALL_KERNELS)),
    Golden(SpatialLayout(), "read_elsewhere", layer_read_elsewhere, CLIPS, first=(RelaxViews(),), idle=True),
    Golden(SpatialLayout(), "attention_of_a_library", temporal_layer, CLIPS, (QUERY, OUT), (RelaxViews(),), True),
]

SQUARES = (noise(6, 6, seed=5), noise(6, 6, seed=6))
ROWS = (noise(2, 1, 6),)
MIDDLE = (Cut("middle", "exp", "middle"),)
CASES += [
    Golden(OneKey(), "one_row", attended, (noise(4, 6), noise(1, 6, seed=1)), SQUARES),
    Golden(OneKey(), "two_rows", attended, (noise(4, 6), noise(2, 6, seed=1)), SQUARES, idle=True),
    Golden(
        Prologue(frozenset({0}), share=1.0), "conditions", conditioned, (noise(4, 6), noise(6, seed=1)), SQUARES[:1]
    ),
    Golden(
        Prologue(frozenset({0, 1})),
        "all_may_change",
        conditioned,
        (noise(4, 6), noise(6, seed=1)),
        SQUARES[:1],
        idle=True,
    ),
    Golden(OneKey(), "heads_are_joined", attended_in_clips, (noise(2, 4, 6), noise(2, 1, 6, seed=1)), SQUARES),
    Golden(LateExpand(), "equal_rows", lambda x, w: F.linear(x.expand(2, 4, 6), w).exp(), ROWS, SQUARES[:1]),
    Golden(
        LateExpand(),
        "twice_and_merged",
        lambda x, w, v: (
            F.linear(F.linear(x[:, None].expand(2, 3, 1, 6).reshape(6, 1, 6), w).expand(6, 4, 6), v).exp().contiguous()
        ),
        ROWS,
        SQUARES,
    ),
    Golden(
        LateExpand(), "features", lambda x, w: F.linear(x[..., :1].expand(2, 4, 6), w), ROWS, SQUARES[:1], idle=True
    ),
    Golden(AcceptStrides(), "a_residual", lambda x, r: x.mT.contiguous() + r, (noise(2, 4, 6), noise(2, 6, 4, seed=1))),
    Golden(
        AcceptStrides(),
        "a_product_of_another_layout",
        lambda x, r: x.mT.contiguous() * r.mT - x.mT.contiguous(),
        (noise(2, 4, 6), noise(2, 4, 6, seed=1)),
        idle=True,
    ),
    Golden(
        TwoPassNorm(),
        "permuted",
        lambda x, w, b: F.group_norm(x, 2, w, b, 1e-6).permute(0, 2, 3, 1).contiguous(),
        X4,
        AFFINE,
    ),
    Golden(
        FuseNorm(),
        "permuted",
        lambda x, w, b: F.group_norm(x, 2, w, b, 1e-6).permute(0, 2, 3, 1).contiguous(),
        X4,
        AFFINE,
        first=(TwoPassNorm(),),
    ),
    Golden(
        FuseNorm(),
        "of_a_permuted_operand",
        lambda x, w, b: F.group_norm(x.permute(0, 1, 3, 2), 2, w, b, 1e-6).sum(1),
        X4,
        AFFINE,
        first=(TwoPassNorm(),),
    ),
    Golden(StepReuse(MIDDLE), "full", skipped),
    Golden(StepReuse(MIDDLE, frozenset({"middle"})), "shallow", skipped),
    Golden(StepReuse((Cut("middle", "tanh", "middle", "silu"),), frozenset({"middle"})), "residual", skipped),
    Golden(StepReuse(MIDDLE, frozenset({"middle"}), order=2), "forecast", skipped),
]


def kept_before(golden: Golden, program: Program, case: Case) -> dict[tuple[str, int], torch.Tensor]:
    """What a full step on the same inputs keeps, and differences of zero."""
    if not isinstance(golden.item, StepReuse) or not golden.item.reused:
        return {}
    full = program.copy()
    StepReuse(golden.item.cuts).apply(full, FACTS)
    values = run(full, case, golden.inputs, everything=True)[-len(full.keeps) :]
    kept = {(name, 0): value for name, value in zip(full.keeps, values, strict=True)}
    return kept | {(n, k): torch.zeros_like(v) for (n, _), v in kept.items() for k in range(1, golden.item.order + 1)}


def captured(case: Case, inputs: Sequence[torch.Tensor], passes: Sequence[Any] = ()) -> Program:
    program = capture(case.eval(), tuple(inputs), {})
    edit.annotate(compute_nodes(program.graph), FACTS)
    for item in passes:
        item.apply(program, FACTS)
        edit.annotate(compute_nodes(program.graph), FACTS)
    return program


def run(
    program: Program,
    case: Case,
    inputs: Sequence[torch.Tensor],
    loops: dict[str, Any] | None = None,
    kept: dict[tuple[str, int], torch.Tensor] | None = None,
    *,
    everything: bool = False,
) -> list[Any]:
    """Run a copy of the program as it is now, its prologue first; with ``everything`` also return what it keeps."""
    made = run(program.prologue, case, inputs, everything=True) if program.prologue is not None else []
    first = {(f"prologue:{k}", 0): value for k, value in enumerate(made)} | (kept or {})
    constants = program.constants(*program.literals.values()) if program.constants is not None else ()

    def operand(binding: Binding) -> torch.Tensor:
        if isinstance(binding, Weight):
            return case.get_parameter(binding.name)
        if isinstance(binding, Input):
            return inputs[binding.leaf]
        if isinstance(binding, Kept):
            return first[binding.name, binding.order]
        if isinstance(binding, Coefficient):
            return torch.tensor(2.0, dtype=torch.float64)
        return constants[binding.index] if isinstance(binding, Constant) else program.literals[binding.name]

    torch.manual_seed(0)
    with torch.no_grad():
        values = list(module_of(program.copy(), loops)(*map(operand, program.bindings)))
    return values if everything else values[: len(values) - len(program.keeps)]


def compare(path: Path, text: str, update: bool) -> None:
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no golden file; run pytest --update-golden and read {path}"
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("golden", CASES, ids=lambda g: f"{pass_name(g.item)}/{g.name}")
def test_golden(golden: Golden, update_golden: bool) -> None:
    case = Case(golden.function, *golden.weights)
    program = captured(case, golden.inputs, golden.first)
    before, want = text_of(program.graph), run(program, case, golden.inputs)
    kept = kept_before(golden, program, case)
    note = golden.item.apply(program, FACTS)
    edit.annotate(compute_nodes(program.graph), FACTS)
    check(program)
    after = text_of(program.graph)
    assert_same(run(program, case, golden.inputs, kept=kept), want)
    constants = text_of(program.constants.graph) if program.constants is not None else ""
    prologue = text_of(program.prologue.graph) if program.prologue is not None else ""
    text = f"before\n{before}\nafter: {note}\n{after}" + (f"\nconstants\n{constants}" if constants else "")
    text += f"\nprologue\n{prologue}" if prologue else ""
    compare(golden.path, text, update_golden)
    assert (before == after) == golden.idle
    says_nothing = re.match(r"nothing |no |every value |0 \w+ \w+, 0 ", note) is not None
    assert says_nothing == golden.idle, "a pass with nothing to do says so"


BY_NAME = (Recompute, Spill, StepReuse)
"""What they are asked for names calls of the graph as it was before."""


@pytest.mark.parametrize(
    "golden",
    [g for g in CASES if not g.idle and not isinstance(g.item, BY_NAME)],
    ids=lambda g: f"{pass_name(g.item)}/{g.name}",
)
def test_a_pass_has_nothing_to_do_the_second_time(golden: Golden) -> None:
    case = Case(golden.function, *golden.weights)
    program = captured(case, golden.inputs, (*golden.first, golden.item))
    before = text_of(program.graph)
    golden.item.apply(program, FACTS)
    edit.annotate(compute_nodes(program.graph), FACTS)
    assert text_of(program.graph) == before


def test_every_pass_has_golden_files() -> None:
    """One folder a pass that changes graphs, and none of a pass that is gone."""
    files = {path.stem.replace("_", "-") for path in (ROOT.parent / "passes").glob("[a-z]*.py")} - {"pipeline-chunks"}
    assert {path.name for path in GOLDEN.iterdir()} == files
    assert {pass_name(item) for item in PASSES} <= files
    assert {path.relative_to(GOLDEN) for path in GOLDEN.rglob("*.txt")} == {
        *(golden.path.relative_to(GOLDEN) for golden in CASES),
        *(Path(case.folder) / f"{name}.txt" for name, case in LOOPS.items()),
        *(Path("fuse-runs") / f"{name}.txt" for name in FUSED),
    }


# -------------------------------------------------------------------------------------------------------- chunk-loops


def mlp(x: torch.Tensor, n: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (6,), n), w1)), w2)


def hoisting(x: torch.Tensor, c: torch.Tensor) -> Any:
    """The scale is no part of the loop; the reshaped result is a view of it and stays behind."""
    y = F.silu(x) * (c.exp() + 1)
    return y.reshape(2, 2, 6), y.reshape(2, 2, 6).tanh()


def resnet(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(F.silu(x) * 2, 2, w, b, 1e-6)) + x


def rows(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Trips at the borders have a row less of what they read, so that they run bodies of their own."""
    return torch.tanh(F.conv2d(F.silu(x), c, padding=1))


def in_place(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """The sum takes over the storage of the operand in front of it."""
    return mlp(x.exp(), *weights)


def read_again(x: torch.Tensor) -> Any:
    """Two results of the loop: the one that takes over the operand is not written before the other has read it."""
    h = x.exp()
    y = torch.sigmoid(h) * 2
    return y, torch.tanh(h) + y


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Each trip's result fills the bytes of its operand, and reads them in another order."""
    h = x.exp()
    return torch.tanh(h) + h.transpose(1, 2)


def norm_and_activation(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The activation writes over the norm's result, which nothing else reads; the sum leaves the loop."""
    return F.conv2d(F.silu(F.group_norm(x, 2, w, b)), c) + x


def to_sequences(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Frames, tokens and features to tokens, frames and features."""
    h = (x + 1).permute(1, 0, 2)
    return F.layer_norm(h, (6,), n) + h


SKIP = (("silu", "cat"),)


@dataclass(frozen=True)
class LoopCase:
    """Operators between two names, looped over parts ``(dimension, atom)`` of the last one, ``chunk`` rows a trip.
    ``spilled`` are the cuts of values that wait in host memory; ``folder`` is the pass that rewrites the bodies, or the
    one that puts the loop in place."""

    function: Callable[..., Any]
    inputs: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]
    first: str
    last: str
    axes: tuple[tuple[int, int], ...]
    chunk: int
    spilled: tuple[Wait, ...] = ()
    folder: str = "chunk-loops"


MLP = ((noise(5, 6),), (noise(6, seed=1), noise(9, 6, seed=2), noise(6, 9, seed=3)))
LOOPS: dict[str, LoopCase] = {
    "feed_forward": LoopCase(mlp, *MLP, "layer_norm", "add", ((0, 0),), 2),
    "hoisted_and_behind": LoopCase(hoisting, (noise(4, 6), noise(6)), (), "silu", "tanh", ((0, 0),), 1),
    "between_the_passes_of_a_norm": LoopCase(resnet, X4, AFFINE, "group_norm", "add", ((0, 0), (2, 0)), 4),
    "around_a_whole_norm": LoopCase(resnet, X4, AFFINE, "silu", "add", ((0, 0),), 1),
    "rows_through_a_convolution": LoopCase(rows, (noise(1, 2, 9, 4),), (CONV[:2, :2],), "silu", "tanh", ((2, 0),), 3),
    "writes_to_host_memory": LoopCase(skipped, (noise(4, 6),), (), "silu", "tanh", ((0, 0),), 3, SKIP),
    "reads_back_from_host_memory": LoopCase(skipped, (noise(4, 6),), (), "tanh", "cat", ((0, 0),), 3, SKIP),
    "last_call": LoopCase(mlp, *MLP, "layer_norm", "add", ((0, 0),), 2, folder="write-through"),
    "over_its_operand": LoopCase(in_place, *MLP, "layer_norm", "add", ((0, 0),), 2, folder="write-through"),
    "read_again_later": LoopCase(
        read_again, (noise(4, 4),), (), "sigmoid", "add", ((0, 0),), 2, folder="write-through"
    ),
    "over_a_transposed_operand": LoopCase(
        transposed, (noise(3, 4, 4),), (), "tanh", "add", ((0, 0),), 2, folder="write-through"
    ),
    "norm_and_activation": LoopCase(
        norm_and_activation, X4, (*AFFINE, CONV[..., :1, :1]), "group_norm", "add", ((0, 0),), 1, folder="write-over"
    ),
    "frames_to_sequences": LoopCase(
        to_sequences, (noise(3, 4, 6),), (noise(6, seed=1),), "add", "add_1", ((0, 0),), 2, folder="reader-layout"
    ),
}


def grouped(program: Program, case: LoopCase) -> Group:
    partitioner = Partitioner(program, FACTS)
    names = [node.name for node in partitioner.region.nodes]
    start, stop = names.index(case.first), names.index(case.last) + 1
    axes = partitioner.axes[partitioner.region.nodes[stop - 1]].axes
    return partitioner.builder.build(start, stop, tuple(axes[dim][part] for dim, part in case.axes), case.chunk)


@pytest.mark.parametrize("name", LOOPS)
def test_golden_loops(name: str, update_golden: bool) -> None:
    spec = LOOPS[name]
    case = Case(spec.function, *spec.weights)
    passes = (DropNoops(), RelaxViews(), EliminateCommon(), TwoPassNorm(), Spill(spec.spilled))
    program = captured(case, spec.inputs, passes)
    before, want = text_of(program.graph), run(program, case, spec.inputs)
    groups = [grouped(program, spec)]
    if spec.folder == "reader-layout":
        groups, _ = ReaderLayout(groups).apply(FACTS)
    if spec.folder == "write-through":
        groups, _ = WriteThrough(groups).apply(program, FACTS)
    loops = ChunkLoops(groups).apply(program)
    check(program)
    assert_same(run(program, case, spec.inputs, loops), want)
    bodies = "".join(f"\n{loop_text(*item)}" for item in loops.items())
    text = f"before\n{before}\nafter: {len(loops)} loops\n{text_of(program.graph)}{bodies}"
    compare(GOLDEN / spec.folder / f"{name}.txt", text, update_golden)


def gate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The second product reads one value, where three were written."""
    value, gate = F.linear(x, w).chunk(2, -1)
    return F.linear(value * F.gelu(gate), w.view(12, 9))


def read_again(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The sum is a result too, be it through a view; the second run reads what the first one made."""
    total = x + F.silu(x)
    return F.linear(F.layer_norm(total.view(2, 2, 6), (6,)), w[:6]).view(4, 6).tanh() * total


def apart(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two runs of one structure side by side, and a single operator."""
    return x.exp() * 2, x.tanh() + 1, w.exp() * 2, F.linear(x, w).sin()


FUSED = {"gate": gate, "read_again": read_again, "apart": apart}


@pytest.mark.parametrize("name", FUSED)
def test_golden_runs(name: str, update_golden: bool) -> None:
    case, inputs, fused = Case(FUSED[name], noise(18, 6, seed=1)), (noise(4, 6),), []

    def fuse(operators: fx.GraphModule, room_bytes: int) -> FusedRun:
        fused.append(f"\nkernel, room for {room_bytes} bytes\n{text_of(operators.graph)}")
        specs = [tensor_spec(node) for node in operators.graph.output_node().args[0]]  # type: ignore[union-attr]
        return FusedRun(
            operators, lambda given: operators(*given), (), [(s.shape, s.stride, s.dtype) for s in specs], 0
        )

    program = captured(case, inputs, (DropNoops(),))
    before, want = text_of(program.graph), run(program, case, inputs)
    loops: dict[str, nn.Module] = {}
    note = FuseRuns(fuse, peak_bytes=1 << 20, min_bytes=0).apply(program, {}, loops, project(program, {}, FACTS), FACTS)
    check(program)
    assert_same(run(program, case, inputs, loops), want)
    compare(
        GOLDEN / "fuse-runs" / f"{name}.txt",
        f"before\n{before}\nafter: {note}\n{text_of(program.graph)}{''.join(fused)}",
        update_golden,
    )


def test_a_norm_inside_a_body_is_joined_again() -> None:
    """Over the batch both passes run in one trip; over rows the first runs outside."""
    joined, apart = (
        text_of(grouped(captured(Case(s.function, *s.weights), s.inputs, (TwoPassNorm(),)), s).bodies[0])
        for s in (LOOPS["around_a_whole_norm"], LOOPS["between_the_passes_of_a_norm"])
    )
    assert "aten.group_norm.default" in joined and "group_norm_apply" not in joined
    assert "group_norm_apply" in apart and "aten.group_norm.default" not in apart


def test_no_groups_no_change() -> None:
    program = captured(Case(mlp, *MLP[1]), MLP[0])
    before = text_of(program.graph)
    assert ChunkLoops([]).apply(program) == {}
    assert text_of(program.graph) == before


def test_a_group_that_the_roles_refuse_is_not_built() -> None:
    """A loop over rows of a GroupNorm in one pass."""
    program = captured(Case(resnet, *AFFINE), X4)
    region = region_of(program)
    rows = {atom for p in range(len(region.nodes)) for atom in region.barred[p]}
    assert rows
    assert not any(is_valid(region, 0, len(region.nodes), (atom,)) for atom in rows)


# --------------------------------------------------------------------------------------------------------- known bugs


def passed(item: Any, function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """``item`` leaves what the module returns as it is, random numbers of one seed included."""
    case = Case(function)
    program = captured(case, inputs)
    want = run(program, case, inputs)
    item.apply(program, FACTS)
    edit.annotate(compute_nodes(program.graph), FACTS)
    got = run(program, case, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_stage_with_a_literal_runs() -> None:
    """After any pass the program runs; torch.tensor([...]) in a module is a literal until fold-constants."""
    case = Case(lambda x: x * torch.tensor([2.0, 3.0], dtype=torch.float64)[0])
    program = captured(case, (noise(4, 6),))
    want = run(program, case, (noise(4, 6),))
    assert_same([Executable(finish(Compilation(program.copy())), case)([noise(4, 6)])], want)


def test_a_copy_of_an_expanded_input_sinks() -> None:
    """What the pass says it does: context = expand-and-copy(c), read late."""

    def function(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        context = c.expand(4, 6).contiguous()
        return torch.tanh(F.silu(x).exp()) + context

    program = captured(Case(function), (noise(4, 6), noise(6)))
    SinkProducers().apply(program, FACTS)
    assert compute_nodes(program.graph)[-2].target is aten.contiguous.default


def test_sinking_keeps_the_order_of_random_numbers() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        a, b = torch.randn_like(x), torch.randn_like(x)
        return (b * 2 + x) * a

    passed(SinkProducers(), function, noise(4, 6))


def test_minus_zero_is_another_argument() -> None:
    passed(EliminateCommon(), lambda x: (x / 0.0, x / -0.0), noise(4, 6).abs())


def test_repeat_interleave_keeps_its_dimension() -> None:
    tape = Tape()
    program = tape.program(tape.call(aten.repeat_interleave.self_int, tape.input(tensor(4, 6)), 2, dim=1))
    RelaxViews().apply(program, FACTS)
    (result,) = module_of(program)(noise(4, 6))
    assert result.shape == (4, 12)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.group_norm(x, 2),
        lambda x: torch.group_norm(x, 2, torch.ones(8, dtype=torch.float64)),
        lambda x: torch.group_norm(x, 2, None, torch.ones(8, dtype=torch.float64)),
    ],
    ids=["2 arguments", "3 arguments", "4 arguments"],
)
def test_two_passes_of_a_norm_with_default_arguments(function: Callable[..., Any]) -> None:
    """F.group_norm passes all six; torch.group_norm leaves defaults out."""
    case = Case(function)
    program = captured(case, X4)
    want = run(program, case, X4)
    TwoPassNorm().apply(program, FACTS)
    assert_same(run(program, case, X4), want)
