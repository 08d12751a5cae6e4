"""What stands in for ``module.forward``: one compiled program an input signature, in a bounded cache.

This is the one place that holds run-time state of an optimized module. Nothing here knows how programs are made: a
``compiler`` callback is given, and called at the first call of each signature.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fmecompile.errors import CaptureError, GradientError
from fmecompile.runtime.exclusion import EXCLUSION, traced_here_only
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.fingerprint import Fingerprint
from fmecompile.runtime.signature import Call, fake_mode_of, flatten_call

MAX_PROGRAMS = 8
"""Programs kept for one module; the least recently used goes first."""

Compiler = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Executable, Any]]


class Dispatcher:
    """Callable that runs the compiled program of a call's signature, compiling at the first call of each.

    Falls back to the eager ``forward`` with one warning when the module cannot be captured, when gradients are needed,
    or while something else traces the module; ``strict`` turns the first two into errors.
    """

    def __init__(
        self,
        module: nn.Module,
        eager: Callable[..., Any],
        compiler: Compiler,
        *,
        strict: bool = False,
        scalars: frozenset[str] = frozenset(),
    ) -> None:
        self.module = module
        self.eager = eager
        self.strict = strict
        self.records: OrderedDict[Any, Any] = OrderedDict()
        self.refused: OrderedDict[Any, CaptureError] = OrderedDict()
        self._compiler = compiler
        self._scalars = _scalar_places(eager, scalars)
        self._previous = vars(module).get("forward")
        self._programs: OrderedDict[Any, Executable] = OrderedDict()
        self._fingerprint: Fingerprint | None = None
        self._lock = threading.RLock()
        self._warned: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if EXCLUSION.is_capturing_here:
            with traced_here_only():
                return self.eager(*args, **kwargs)
        if torch.compiler.is_compiling() and not EXCLUSION.is_capturing:
            return self.eager(*args, **kwargs)
        if self.module.training or (torch.is_grad_enabled() and self._needs_gradients(args, kwargs)):
            return self._pass_through(args, kwargs)
        args, kwargs = self._as_tensors(args, kwargs)
        call = flatten_call(args, kwargs)
        program = self._program(call, args, kwargs)
        if program is None:
            return self._eagerly(call, args, kwargs)
        with EXCLUSION.run(), torch.no_grad():
            return program(call.leaves)

    def _program(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Executable | None:
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

    def _known(self, call: Call) -> Executable | None:
        program = self._programs.get(call.key)
        if program is not None:
            self._programs.move_to_end(call.key)
        return program

    def _compile(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Executable | None:
        patched = vars(self.module).get("forward")
        vars(self.module)["forward"] = self._as_function()
        try:
            program, record = self._compiler(self.module, args, kwargs)
        except CaptureError as error:
            if self.strict:
                raise
            self.refused[call.key] = error
            return None
        finally:
            self._put_back(patched)
            self._fingerprint = Fingerprint(self.module, frozenset({"forward"}))
        self._programs[call.key] = program
        self.records[call.key] = record
        while len(self._programs) > MAX_PROGRAMS:
            oldest, _ = self._programs.popitem(last=False)
            self.records.pop(oldest, None)
        return program

    def _eagerly(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that could not be captured. One that fails eagerly too was a wrong call: nothing to warn of."""
        try:
            with EXCLUSION.run():
                output = self.eager(*args, **kwargs)
        except BaseException:
            self.refused.pop(call.key, None)
            raise
        if (error := self.refused.get(call.key)) is not None:
            self._warn("capture", f"fmecompile leaves {type(self.module).__name__} eager: {error}")
        return output

    def patch(self) -> None:
        """Stand in for ``module.forward``."""
        vars(self.module)["forward"] = self

    def unpatch(self) -> None:
        """Put back the ``forward`` that was there before."""
        self._put_back(self._previous)

    def _put_back(self, forward: Any) -> None:
        if forward is None:
            vars(self.module).pop("forward", None)
        else:
            vars(self.module)["forward"] = forward

    def _as_function(self) -> Callable[..., Any]:
        """What torch captures: it wants a function; and a call from another thread must still find this dispatcher."""

        @functools.wraps(self.eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        """A copied module gets a dispatcher of its own, with nothing compiled."""
        module = memo[id(self.module)]
        eager = copy.deepcopy(self._previous, memo) or MethodType(type(module).forward, module)
        twin = Dispatcher(module, eager, self._compiler, strict=self.strict, scalars=frozenset(self._scalars))
        twin._previous = None if self._previous is None else eager
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
            self._fingerprint = Fingerprint(self.module, frozenset({"forward"}))

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
        if self.strict:
            raise GradientError(f"the optimized {type(self.module).__name__} {why}", next_step=next_step)
        self._warn("gradients", f"fmecompile runs eagerly because {type(self.module).__name__} {why}; {next_step}")
        with EXCLUSION.run():
            return self.eager(*args, **kwargs)

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, UserWarning, stacklevel=4)


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
