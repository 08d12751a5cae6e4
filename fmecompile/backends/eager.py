"""The eager backend: loop bodies run operator by operator, as PyTorch runs them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fmecompile.backends.budgeted import NO_WISHES, Budget, Wishes, compile_budgeted
from fmecompile.capture.example import Example
from fmecompile.capture.shell import Shell
from fmecompile.graph.plan import Plan
from fmecompile.passes.fuse_runs import Fuse
from fmecompile.pipeline import Compilation, Observe, Record
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.graphed import Graphs

Progress = Callable[[str], AbstractContextManager[Callable[[str], None]]]
"""Given a module's class name, shows a compilation; what it yields is called with the name of each finished stage."""


def silent(_: str) -> AbstractContextManager[Callable[[str], None]]:
    return nullcontext(lambda stage: None)


@dataclass(frozen=True)
class EagerCompiler:
    """The compiler callback of a dispatcher. ``saved`` plans spare the search where they match and fit ``budget``;
    ``fuse`` makes kernels of runs of operators, programs are replayed by ``graphs``, if they are given, and
    ``watcher`` sees every stage."""

    saved: tuple[Plan, ...] = ()
    progress: Progress = silent
    budget: Budget | None = None
    wishes: Wishes = NO_WISHES
    graphs: Graphs | None = None
    fuse: Fuse | None = None
    watcher: Observe | None = None

    def watched(self, watcher: Observe, record: Record) -> EagerCompiler:
        """The same for another look at what was compiled: by its plan, shown to ``watcher`` stage by stage."""
        return replace(self, saved=(record.plan,), progress=silent, graphs=None, watcher=watcher)

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Executable, Record]:
        example = Example.of(args, kwargs)
        with self.observed(module) as (observe, notes):
            shell = Shell(module, forward)
            compiled, plan, allowance = compile_budgeted(
                shell, args, kwargs, self.budget, wishes=self.wishes, saved=self.saved, observe=observe, fuse=self.fuse
            )
        record = Record(plan, example, tuple(notes), allowance, graphs=self.graphs)
        return Executable(compiled, module, self.graphs), record

    @contextmanager
    def observed(self, module: nn.Module) -> Iterator[tuple[Observe, list[tuple[str, str]]]]:
        """Show the progress of a compilation; also the list that what its stages say is written to."""
        notes: list[tuple[str, str]] = []
        with self.progress(type(module).__name__) as shown:

            def observe(name: str, compilation: Compilation) -> None:
                notes.append(compilation.notes[-1])
                shown(name)
                if self.watcher is not None:
                    self.watcher(name, compilation)

            yield observe, notes

    def situation(self) -> Hashable:
        """What a program depends on apart from the call and the module."""
        return () if self.budget is None else self.budget.situation()
