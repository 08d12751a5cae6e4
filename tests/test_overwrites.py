"""Calls that write over operands: where they may, that numbers stay the same, and that the search counts on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from chains import chains, dense
from conformance import FACTS, Tape, assert_same, module_of, tensor_of
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from fmecompile.analysis.overwrites import ALLOCATING, INTO, overwrites
from fmecompile.analysis.storages import storages
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.operators.registry import tensor
from fmecompile.partition.candidates import candidates
from fmecompile.partition.partition import Partitioner
from fmecompile.partition.tradeoffs import Limits
from fmecompile.passes.write_over import WriteOver
from fmecompile.pipeline import compile_module
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.norms import group_norm_laid_out, group_norm_moments, group_norm_statistics

aten = torch.ops.aten
X = tensor(4, 6)


def named(*outputs: fx.Node) -> dict[str, str]:
    """What writes over what, by name, in a graph that returns ``outputs``."""
    graph = outputs[0].graph
    graph.output(outputs)
    return {node.name: over.name for node, over in overwrites(compute_nodes(graph)).items()}


def test_a_value_that_nothing_reads_again_is_written_over() -> None:
    tape = Tape()
    made = tape.call(aten.clone.default, tape.input(X))
    active = tape.call(aten.silu.default, made)
    total = tape.call(aten.add.Tensor, tape.input(X), active)
    assert named(total) == {active.name: made.name, total.name: active.name}


Kept = Callable[[Tape, fx.Node], Sequence[fx.Node]]
"""Writes a call over a value that was made for it, and returns what the graph returns."""


def _read_later(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    return tape.call(aten.silu.default, x), tape.call(aten.tanh.default, x)


def _read_later_through_a_view(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    view = tape.call(aten.permute.default, x, [1, 0])
    return tape.call(aten.silu.default, x), tape.call(aten.tanh.default, view)


def _read_later_through_what_may_be_a_view(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    """With these strides ``reshape`` copies; with others it would not."""
    copy = tape.call(aten.reshape.default, tape.call(aten.permute.default, x, [1, 0]), [24])
    return tape.call(aten.silu.default, x), tape.call(aten.tanh.default, copy)


def _returned(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    return tape.call(aten.silu.default, x), x


def _read_twice_in_another_order(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    square = tape.call(aten.reshape.default, tape.call(aten.slice.Tensor, x, 1, 0, 4), [4, 4])
    other = tape.call(aten.clone.default, square)
    return (tape.call(aten.add.Tensor, other, tape.call(aten.permute.default, other, [1, 0])),)


def _broadcast(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    row = tape.call(aten.clone.default, tape.call(aten.slice.Tensor, x, 0, 0, 1))
    return (tape.call(aten.add.Tensor, row, tape.input(X)),)


def _of_another_dtype(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    return (tape.call(aten.add.Tensor, x, tape.input(X._replace(dtype=torch.complex128))),)


def _part_of_what_was_allocated(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    """It would keep all of it."""
    return (tape.call(aten.silu.default, tape.call(aten.slice.Tensor, x, 0, 0, 2)),)


def _what_may_be_an_input(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    return (tape.call(aten.silu.default, tape.call(aten.contiguous.default, tape.inputs[0])), x)


def _no_pointwise_call(tape: Tape, x: fx.Node) -> Sequence[fx.Node]:
    return (tape.call(aten.softmax.int, x, 1),)


@pytest.mark.parametrize(
    "kept",
    [
        _read_later,
        _read_later_through_a_view,
        _read_later_through_what_may_be_a_view,
        _returned,
        _read_twice_in_another_order,
        _broadcast,
        _of_another_dtype,
        _part_of_what_was_allocated,
        _what_may_be_an_input,
        _no_pointwise_call,
    ],
)
def test_what_is_needed_stays(kept: Kept) -> None:
    tape = Tape()
    made = tape.call(aten.clone.default, tape.input(X))
    assert named(*kept(tape, made)) == {}


def test_a_product_with_itself_is_written_over() -> None:
    tape = Tape()
    made = tape.call(aten.clone.default, tape.input(X))
    square = tape.call(aten.mul.Tensor, made, made)
    assert named(square) == {square.name: made.name}


def laid_out(draw: st.DrawFn, program: Program) -> list[torch.Tensor]:
    """Inputs in other memory orders than the program was planned for."""
    specs = [dense(draw, node_spec(node).shape) for node in program.placeholders]
    return [tensor_of(spec, seed) for seed, spec in enumerate(specs)]


@given(st.data())
def test_any_chain_returns_what_it_did(data: st.DataObject) -> None:
    """Also with inputs of other strides, where calls return views that were planned to copy, or the other way round."""
    program = data.draw(chains())
    tensors = data.draw(st.composite(laid_out)(program))
    before = [x.clone() for x in tensors]
    with torch.no_grad():
        want = module_of(program)(*tensors)
        written = WriteOver().apply(program.graph, FACTS)
        assert written == sum("out" in node.kwargs for node in program.graph.nodes)
        got = module_of(program)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "an input was written to"


@given(chains())
def test_a_chain_never_holds_more(program: Program) -> None:
    def peak() -> int:
        held = storages(compute_nodes(program.graph), program.outputs, FACTS)
        return max(map(sum, zip(held.live_bytes(), held.nbytes, held.hidden, strict=False)))

    before = peak()
    WriteOver().apply(program.graph, FACTS)
    assert peak() <= before


SAMPLES: dict[Any, tuple[Any, ...]] = {
    aten.addmm.default: (tensor(5), tensor(4, 6), tensor(6, 5)),
    aten.bmm.default: (tensor(2, 4, 6), tensor(2, 6, 5)),
    aten.clone.default: (X,),
    aten.conv1d.default: (tensor(2, 3, 5), tensor(4, 3, 1)),
    aten.conv2d.default: (tensor(2, 3, 5, 5), tensor(4, 3, 1, 1)),
    aten.conv3d.default: (tensor(2, 3, 5, 5, 5), tensor(4, 3, 1, 1, 1)),
    aten.group_norm.default: (tensor(2, 4, 5), 2),
    aten.layer_norm.default: (X, [6]),
    aten.linear.default: (X, tensor(5, 6)),
    aten.mm.default: (X, tensor(6, 5)),
    aten.scaled_dot_product_attention.default: (tensor(2, 4, 6),) * 3,
}


def _filled(value: Any) -> Any:
    return tensor_of(value) if isinstance(value, TensorSpec) else value


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


@pytest.mark.parametrize("target", sorted(ALLOCATING, key=_name), ids=_name)
def test_results_of_calls_that_allocate_are_no_views(target: Any) -> None:
    x, operands = tensor_of(tensor(2, 4, 5)), list(map(_filled, SAMPLES.get(target, ())))
    if target in INTO:
        operands = [x] * (1 if target in (aten.silu.default, aten.gelu.default) else 2)
    elif target is group_norm_laid_out:
        operands = [x, 2, None, None, 1e-5, [0, 2, 1]]
    elif not operands:  # the last part of a GroupNorm, ours and the kernel
        statistics = group_norm_statistics(group_norm_moments(x, 2), 1e-5)
        operands = [x, statistics, None, None]
    result = target(*operands)
    memory = {o.untyped_storage().data_ptr() for o in operands if isinstance(o, torch.Tensor)}
    assert result.untyped_storage().data_ptr() not in memory


def test_the_search_counts_on_it() -> None:
    """The estimate of a trip and the trip that is built hold one value where calls returned three."""
    tape = Tape()
    normed = tape.call(aten.group_norm.default, tape.input(tensor(8, 64, 128)), 2)
    active = tape.call(aten.silu.default, normed)
    program = tape.program(tape.call(aten.mul.Tensor, active, 2.0))
    partitioner = Partitioner(program, FACTS)
    nest = (partitioner.axes[active].axes[0][0],)
    loop = next(c for c in candidates(partitioner.region, partitioner.axes, 0) if (c.stop, c.nest) == (3, nest))
    built, value = partitioner.builder.build(0, 3, nest, 2), 2 * 64 * 128 * 8
    assert (loop.trip_bytes(2), built.body_bytes) == (pytest.approx(value, rel=0.01), pytest.approx(value, rel=0.01))


class Block(nn.Module):
    """A residual block that gets narrow: what it norms is read again behind the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 32)
        self.wide = nn.Conv2d(8, 32, 1)
        self.narrow = nn.Conv2d(32, 8, 1)
        self.shortcut = nn.Conv2d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(x)
        return self.shortcut(x) + self.narrow(F.silu(self.norm(x)))


def test_a_loop_writes_over_what_it_made() -> None:
    """One frame holds what it norms and the norm's result, in a budget too small for the activation's beside them."""
    torch.manual_seed(0)
    block, x = Block().double().eval(), torch.randn(16, 8, 32, 32, dtype=torch.float64)
    narrow, wide = x.nbytes, 4 * x.nbytes // 16
    with torch.no_grad():
        compiled, plan = compile_module(block, (x,), {}, limits=Limits(narrow + int(2.5 * wide)))
        assert_same([Executable(compiled, block)([x])], [block(x)])
    bodies = [loop.bodies[0] for loop in compiled.graph_module.children()]  # type: ignore[union-attr, index]
    assert ["silu.out" in body.code for body in bodies] == [True]  # type: ignore[operator]
    assert plan.projected_peak_bytes > narrow + 2 * wide
