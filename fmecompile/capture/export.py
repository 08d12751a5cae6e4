"""From an ``nn.Module`` and a call to a :class:`Program`, through ``torch.export``'s training IR.

Composite operators stay whole there (linear, group_norm, scaled_dot_product_attention), there is no control flow left,
and every node keeps its module path and source line. The default decompositions are never run: attention would
materialise its scores.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind

from fmecompile.capture.shell import Shell, inner_name, stripped
from fmecompile.capture.unchanged import unchanged
from fmecompile.errors import CaptureError
from fmecompile.graph.program import Binding, Input, Literal, Program, Weight
from fmecompile.graph.specs import SPEC, spec_of
from fmecompile.runtime.autocast import as_called, autocast_state

_NEXT = "rewrite the line so that it does not depend on tensor values; without strict=True the module runs eager"

_BY_STRIDES = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default)


def capture(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Capture one call of ``module``. Works on real and on fake tensors; nothing is computed.

    Of a :class:`Shell`, weights and module paths are named as in the module inside it.

    Raises:
        CaptureError: control flow that depends on data, a mutated buffer or input, or any other failure of export.
    """
    program = program_of(export(module, args, kwargs))
    if isinstance(module, Shell):
        _strip(program)
    return program


def export(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """``torch.export`` without gradients and with nothing but calls, its errors turned into :class:`CaptureError`; but
    not a lack of memory, which says nothing about the module."""
    try:
        with as_called(), torch.no_grad(), unchanged(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _functional(torch.export.export(module, args, kwargs, strict=False))
    except Exception as error:
        lack = next((e for e in _causes(error) if isinstance(e, (torch.OutOfMemoryError, MemoryError))), None)
        if lack is not None:
            raise lack from None
        name = inner_name(module)
        raise CaptureError(
            f"torch.export could not capture {name}: {_first_line(error)}",
            place=source_line(error) or name,
            next_step=_NEXT,
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Make in-place operators functional and the casts of autocast calls; composite operators stay whole (an empty
    decomposition table)."""
    is_done = not autocast_state() and not any(_mutates(node) or _is_region(node) for node in exported.graph.nodes)
    return exported if is_done else exported.run_decompositions({})


def _mutates(node: fx.Node) -> bool:
    target = node.target
    is_detach = target is torch.ops.aten.detach_.default
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and not is_detach


def _is_region(node: fx.Node) -> bool:
    """Whether the module itself turns autocast or gradients on or off around some lines."""
    regions = torch.ops.higher_order
    return node.target in (regions.wrap_with_autocast, regions.wrap_with_set_grad_enabled)


def program_of(exported: ExportedProgram) -> Program:
    """The graph with one placeholder a used tensor, each with its spec and its binding."""
    signature = exported.graph_signature
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    values = graph.graph_copy(exported.graph, copies)
    _refuse_effects(signature)
    _refuse_layouts(graph)
    graph.output(values)
    leaf = 0
    bindings: list[Binding] = []
    originals = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for original, spec in zip(originals, signature.input_specs, strict=True):
        node, position = copies[original], leaf
        leaf += spec.kind == InputKind.USER_INPUT
        if not node.users:
            graph.erase_node(node)
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise CaptureError(f"the graph reads the input {node.name}, which is not a tensor")
        node.meta[SPEC] = spec_of(value)
        bindings.append(_binding(spec, position))
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    literals = {name: value for name, value in exported.constants.items() if isinstance(value, torch.Tensor)}
    return Program(graph, bindings, out_spec, literals)


def _strip(program: Program) -> None:
    """Names in the shell become names in the module."""
    program.bindings[:] = [Weight(stripped(b.name)) if isinstance(b, Weight) else b for b in program.bindings]
    for node in program.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {key: (stripped(path), kind) for key, (path, kind) in stack.items()}


def _binding(spec: InputSpec, leaf: int) -> Binding:
    if spec.kind == InputKind.USER_INPUT:
        return Input(leaf)
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        return Weight(str(spec.target))
    if spec.kind == InputKind.CONSTANT_TENSOR:
        return Literal(str(spec.target))
    raise CaptureError(f"the module has an input of kind {spec.kind.name.lower()}, which is not supported")


def _refuse_effects(signature: ExportGraphSignature) -> None:
    for spec in signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"the module changes {spec.target or 'a value'} in place ({spec.kind.name.lower()})",
                next_step="return the new value instead of storing it, or leave this module eager",
            )


def _refuse_layouts(graph: fx.Graph) -> None:
    """Calls that read memory as it lies, whatever the value is: a compiled program may lay it out otherwise."""
    for node in graph.nodes:
        if node.target in _BY_STRIDES and node.all_input_nodes[0].op != "placeholder":
            raise CaptureError(
                f"{node.target} depends on how its operand lies in memory",
                place=str(node.meta.get("stack_trace", "")).strip(),
                next_step="take the part by slices or unfold, or leave this module eager",
            )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def source_line(error: BaseException) -> str:
    """The innermost frame of ``error`` outside torch, as ``file:line in function``; empty where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f"{os.sep}torch{os.sep}" not in f.filename and "fmecompile" not in f.filename]
    return f"{theirs[-1].filename}:{theirs[-1].lineno} in {theirs[-1].name}: {theirs[-1].line}" if theirs else ""
