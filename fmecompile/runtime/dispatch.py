"""What stands in for ``module.forward``: one compiled program an input signature, in a bounded cache.

This is the one place that holds run-time state of an optimized module. Nothing here knows how programs are made: a
``compiler`` callback is given, and called at the first call of each signature.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fmecompile.errors import BudgetInfeasible, CaptureError, FmeError, GradientError
from fmecompile.runtime.autocast import autocast_state, set_aside
from fmecompile.runtime.exclusion import EXCLUSION, traced_here_only
from fmecompile.runtime.fingerprint import Fingerprint
from fmecompile.runtime.hooks import HOOK_PLACES, hook_inside, innermost, places
from fmecompile.runtime.signature import Call, fake_mode_of, flatten_call

MAX_PROGRAMS = 8
"""Programs kept for one module; the least recently used goes first. As many refusals are remembered."""

Program = Callable[[list[Any]], Any]
"""Runs on the flattened arguments of a call."""

Compiler = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], tuple[Program, Any]]
"""``compiler(module, forward, args, kwargs)`` compiles one call of ``forward``, the plain method of ``module``."""

_COMPILED_ONLY: ContextVar[bool] = ContextVar("compiled_only", default=False)


@contextmanager
def compiled_only() -> Iterator[None]:
    """Calls of optimized modules in here run compiled or raise, as with ``strict``."""
    token = _COMPILED_ONLY.set(True)
    try:
        yield
    finally:
        _COMPILED_ONLY.reset(token)


class Dispatcher:
    """Callable that runs the compiled program of a call's signature, compiling at the first call of each.

    Falls back to the eager ``forward`` with one warning when the module cannot be captured, when hooks act inside it,
    when gradients are needed, or while something else traces the module; ``strict`` turns all but the last into errors.
    ``situation`` tells what else a program depends on, apart from the call and the module.
    """

    # No __dict__: functools.update_wrapper would copy it into the hooks that wrap this.
    __slots__ = (
        "__weakref__",
        "_compiler",
        "_fingerprint",
        "_lock",
        "_programs",
        "_scalars",
        "_situation",
        "_warned",
        "_was_absent",
        "eager",
        "module",
        "records",
        "refused",
        "strict",
    )

    def __init__(
        self,
        module: nn.Module,
        eager: Callable[..., Any],
        compiler: Compiler,
        *,
        strict: bool = False,
        scalars: frozenset[str] = frozenset(),
        situation: Callable[[], Hashable] = tuple,
    ) -> None:
        self.module = module
        self.eager = eager
        self.strict = strict
        self.records: OrderedDict[Any, Any] = OrderedDict()
        self.refused: OrderedDict[Any, FmeError] = OrderedDict()
        self._compiler = compiler
        self._situation = situation
        self._scalars = _scalar_places(eager, scalars)
        self._was_absent = "forward" not in vars(module)
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self._fingerprint: Fingerprint | None = None
        self._lock = threading.RLock()
        self._warned: set[str] = set()

    @property
    def compiler(self) -> Compiler:
        """What makes the programs."""
        return self._compiler

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Gives this the signature of the module's own ``forward``."""
        return self.eager

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if EXCLUSION.is_capturing_here:
            with traced_here_only():
                return self.eager(*args, **kwargs)
        if torch.compiler.is_compiling() and not EXCLUSION.is_capturing:
            return self.eager(*args, **kwargs)
        if self.module.training or (torch.is_grad_enabled() and self._needs_gradients(args, kwargs)):
            return self._pass_through(args, kwargs)
        args, kwargs = self._as_tensors(args, kwargs)
        autocast = autocast_state()
        call = flatten_call(args, kwargs, (self._situation(), autocast, torch.get_default_dtype()))
        with set_aside(autocast) if autocast else nullcontext():
            program = self._program(call, args, kwargs)
            if program is not None:
                with EXCLUSION.run(), torch.no_grad():
                    return program(call.leaves)
        return self._eagerly(call, args, kwargs)

    def _program(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program | None:
        """The program for ``call``, compiled when it is not there; None when the module stays eager."""
        with self._lock:
            if self._is_current() and (call.key in self._programs or call.key in self.refused):
                return self._known(call)
        with EXCLUSION.capture(), self._lock:
            if not self._is_current():
                self.forget()
            if call.key in self._programs or call.key in self.refused:
                return self._known(call)
            return self._compile(call, args, kwargs)

    def _is_current(self) -> bool:
        return self._fingerprint is not None and self._fingerprint.holds()

    def _known(self, call: Call) -> Program | None:
        program = self._programs.get(call.key)
        if program is not None:
            self._programs.move_to_end(call.key)
            self.records.move_to_end(call.key)
        return program

    def _compile(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program | None:
        try:
            self._refuse_hooks()
            program, record = self._compiler(self.module, self.eager, args, kwargs)
        except (CaptureError, BudgetInfeasible) as error:
            self.refused[call.key] = error.detached()
            _keep_latest(self.refused)
            if self._may_not_be_eager(error):
                raise
            return None
        finally:
            self._fingerprint = Fingerprint(self.module, HOOK_PLACES)
        self._programs[call.key] = program
        self.records[call.key] = record
        _keep_latest(self._programs)
        for gone in self.records.keys() - self._programs.keys():
            del self.records[gone]
        return program

    def _refuse_hooks(self) -> None:
        hook = hook_inside(self.module)
        if hook:
            raise CaptureError(
                f"{hook}, which a compiled program would not call",
                next_step="remove the hooks; to offload, call enable_model_cpu_offload(), which hooks whole models",
            )

    @property
    def _must_compile(self) -> bool:
        return self.strict or _COMPILED_ONLY.get()

    def _may_not_be_eager(self, error: FmeError) -> bool:
        """Eager, the module would take more memory than any plan: a budget is no reason to run so."""
        return self._must_compile or isinstance(error, BudgetInfeasible)

    def _eagerly(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that could not be captured. One that fails eagerly too was a wrong call: nothing to warn of."""
        error = self.refused.get(call.key)
        if error is not None and self._may_not_be_eager(error):
            raise error.detached()
        try:
            with EXCLUSION.run():
                output = self.eager(*args, **kwargs)
        except BaseException:
            self.refused.pop(call.key, None)
            raise
        if error is not None:
            self._warn("capture", f"fmecompile leaves {type(self.module).__name__} eager: {error}")
        return output

    def patch(self) -> None:
        """Stand in for ``module.forward``, inside the hooks around it; takes the place of an earlier dispatcher."""
        place = innermost(self.module)
        if isinstance(place.held, Dispatcher):
            self._was_absent = place.held._was_absent
        else:
            self._was_absent = place.name not in place.table
        self._put(self)

    def unpatch(self) -> None:
        """Put back the ``forward`` that was there before; hooks around it stay."""
        if find(self.module) is self:
            self._put(self.eager)

    def _put(self, stand_in: Callable[..., Any]) -> None:
        *around, place = places(self.module)
        held = place.held
        if stand_in is self.eager and self._was_absent and place.name == "forward" and place.table is vars(self.module):
            del place.table[place.name]
        else:
            place.table[place.name] = stand_in
        for hook in around:
            if isinstance(getattr(hook.held, "__wrapped__", None), Dispatcher) and hook.held.__wrapped__ is held:
                hook.held.__wrapped__ = stand_in

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        """A copied module gets a dispatcher of its own, with nothing compiled."""
        twin = Dispatcher(
            memo[id(self.module)],
            copy.deepcopy(self.eager, memo),
            copy.deepcopy(self._compiler, memo),
            strict=self.strict,
            scalars=frozenset(self._scalars),
            situation=copy.deepcopy(self._situation, memo),
        )
        twin._was_absent = self._was_absent
        return twin

    def __reduce__(self) -> Any:
        raise TypeError(
            f"an optimized {type(self.module).__name__} cannot be pickled: its programs belong to this process\n"
            "  next: call fmecompile.restore(module), or save its state_dict()"
        )

    def forget(self) -> None:
        """Drop every program; the next call of each signature compiles again."""
        with self._lock:
            self._programs.clear()
            self.records.clear()
            self.refused.clear()
            self._fingerprint = Fingerprint(self.module, HOOK_PLACES)

    def _as_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn numbers that change at every call (timesteps) into 0-d tensors, else each step would recapture."""
        found = list(args)
        for name, place in self._scalars.items():
            if place < len(found) and _is_number(found[place]):
                found[place] = _scalar_tensor(found[place], args, kwargs)
            elif _is_number(kwargs.get(name)):
                kwargs = kwargs | {name: _scalar_tensor(kwargs[name], args, kwargs)}
        return tuple(found), kwargs

    def _needs_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            return True
        return any(p.requires_grad for p in self.module.parameters())

    def _pass_through(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        why = "is in training mode" if self.module.training else "was called with gradients enabled"
        next_step = "call module.eval() and wrap the call in torch.no_grad()"
        if self._must_compile:
            raise GradientError(f"the optimized {type(self.module).__name__} {why}", next_step=next_step)
        self._warn("gradients", f"fmecompile runs eagerly because {type(self.module).__name__} {why}; {next_step}")
        with EXCLUSION.run():
            return self.eager(*args, **kwargs)

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, UserWarning, stacklevel=4)


def find(module: nn.Module) -> Dispatcher | None:
    """The dispatcher in the chain of ``module.forward``; the module itself is the only register there is."""
    held = innermost(module).held
    return held if isinstance(held, Dispatcher) else None


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The ``forward`` that computes, without hooks around it and without a dispatcher in its place."""
    held = innermost(module).held
    if held is None:
        return module.forward
    return held.eager if isinstance(held, Dispatcher) else held


def _keep_latest(kept: OrderedDict[Any, Any]) -> None:
    while len(kept) > MAX_PROGRAMS:
        kept.popitem(last=False)


def _scalar_places(forward: Callable[..., Any], names: frozenset[str]) -> dict[str, int]:
    parameters = list(inspect.signature(forward).parameters)
    return {name: parameters.index(name) for name in names if name in parameters}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scalar_tensor(value: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """A 0-d tensor beside the other inputs, in the dtype Python's number has."""
    leaves = tree_leaves((args, kwargs))
    device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
    dtype = torch.int64 if isinstance(value, int) else torch.float64
    mode = fake_mode_of(leaves)
    with mode if mode is not None else nullcontext():
        return torch.tensor(value, dtype=dtype, device=device)
