"""The values that a policy measures to decide: what moves with the input and is cheap to have.

A probe is found like a cut, by a symbolic name or a pattern of module paths, and is a :class:`CutValue`: the value
itself, or with a source its difference to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from fmecompile.analysis.blocks import before, behind, is_large, time_input
from fmecompile.analysis.cuts import Cuts, CutValue, numbers
from fmecompile.analysis.mixing import called_in, clip_atoms
from fmecompile.errors import OptionError
from fmecompile.graph.specs import tensor_spec
from fmecompile.operators.contraction import all_products
from fmecompile.runtime.change import Frames


class Probes:
    """The values of one normalised program that may be measured."""

    def __init__(self, cuts: Cuts) -> None:
        self._cuts = cuts
        self._nodes = {node.name: node for node in cuts.program.graph.nodes}
        time = time_input(cuts.program)
        self._timely = behind([time]) - cuts.moving if time is not None else set()

    def named(self, name: str) -> list[CutValue]:
        """The values that a symbolic name of a policy stands for, or a pattern of module paths.

        Of the values of a symbolic name that stands for many, as ``temporal_attention`` does, the middle one is
        measured: AdaCache watches the 13th of 28 blocks. All of those that match a pattern are measured. Raises
        OptionError where there are none.
        """
        kind = name.partition(":")[0]
        if kind == "head_residual":
            return [self.head_residual(*numbers(name, 1))]
        if kind == "modulated_input":
            return [self.modulated_input()]
        if kind == "time_embedding":
            return [self.time_embedding()]
        found = [replace(value, source=None) for value in self._cuts.found(name)]
        is_pattern = any(value.module == name for value in found) or any(c in name for c in "*?[")
        return found if is_pattern else found[len(found) // 2 :][:1]

    def head_residual(self, count: int = 1) -> CutValue:
        """Out minus in of the first ``count`` blocks. What goes in is the earliest state of the shape that comes out;
        where there is none, as right behind a downsampler, the output itself is measured."""
        head = self._cuts.stack(count + 1)[:count]
        out = head[-1].returns[0]
        shape = tensor_spec(out).shape
        alike = [block.takes[0] for block in head if tensor_spec(block.takes[0]).shape == shape]
        return replace(self._cuts.cut_value(out, head[-1].path), source=alike[0].name if alike else None)

    def modulated_input(self) -> CutValue:
        """What the first module that sees the hidden state in the first block returns (its norm), with the scale and
        shift that the timestep gives it, if any."""
        block = self._cuts.stack(1)[0]
        path, value = self._first_result(block.path)
        while (modulated := self._modulated(value)) is not None:
            value = modulated
        return self._cuts.cut_value(value, path)

    def _first_result(self, block: str) -> tuple[str, fx.Node]:
        for node in self._cuts.nodes:
            paths = list(called_in(node))
            if node in self._cuts.moving and is_large(node) and block in paths[:-1]:
                inside = [n for n in self._cuts.nodes if paths[-1] in called_in(n) and n in self._cuts.moving]
                return paths[-1], next(n for n in inside if any(paths[-1] not in called_in(u) for u in n.users))
        raise OptionError(
            f"the first block, {block}, calls no module on its input", next_step="name the module to be measured"
        )

    def _modulated(self, value: fx.Node) -> fx.Node | None:
        """The next call, when it only scales or shifts by something that the timestep alone makes."""
        for user in value.users:
            others = [node for node in user.all_input_nodes if node is not value]
            if not all_products(user) and len(others) == 1 and others[0] in self._timely and is_large(user):
                return user
        return None

    def time_embedding(self) -> CutValue:
        """The last value that the timestep alone makes, with other numbers, and through which all of its ways go."""
        time = time_input(self._cuts.program)
        ways = [] if time is None else [n for n in self._cuts.chain(time) if n not in self._cuts.moving and is_large(n)]
        joined = [node for node in ways if len(node.all_input_nodes) > 1]
        if not joined:
            raise OptionError("this model has no time embedding of its own", next_step="name the value to be measured")
        return self._cuts.cut_value(joined[-1], next(iter(called_in(joined[-1])), ""))

    def frames(self, value: CutValue) -> Frames | None:
        """Where a value has its frames; None where it has none."""
        atoms = clip_atoms(self._cuts.program, self._cuts.axes)[0]
        table = self._cuts.axes.table
        for dim, axis in enumerate(self._cuts.axes[self._nodes[value.value]].axes):
            for place, atom in enumerate(axis):
                if atom in atoms:
                    outer, inner = table.extent(axis[:place]), table.extent(axis[place + 1 :])
                    return Frames(dim, outer, table.size(atom), inner)
        return None

    def head(self, values: list[CutValue]) -> set[fx.Node]:
        """Everything that must run to have ``values``: the head of a step."""
        wanted = list(self._ends(values))
        return {*before(wanted), *wanted}

    def _ends(self, values: list[CutValue]) -> Iterator[fx.Node]:
        for value in values:
            yield self._nodes[value.value]
            if value.source is not None:
                yield self._nodes[value.source]
