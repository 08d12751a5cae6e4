"""A memory budget in the user's terms: everything a call keeps on the device, turned into a limit for activations."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from fmecompile.budget import Allowance, mib, parse_bytes
from fmecompile.capture.families import components
from fmecompile.capture.shell import Shell, inner_name
from fmecompile.errors import BudgetInfeasible, OptionError
from fmecompile.graph.plan import Plan
from fmecompile.partition.nests import MAX_TRIPS
from fmecompile.partition.tradeoffs import Limits
from fmecompile.passes.fuse_runs import Fuse
from fmecompile.pipeline import Observe, compile_module
from fmecompile.runtime.executable import Compiled

ASSUMED_WORKSPACE_BYTES = 96 * 2**20
"""What libraries hold on a CUDA device beside tensors, where it cannot be measured: cuBLAS takes 32 MiB on Hopper and 8
on older devices, 64 are left for what cuDNN chooses for convolutions. An assumption; a CPU is taken to need none."""

CONVOLUTION_BYTES = 64 * 2**20
"""The part of that which is added to a measured workspace: it differs from one convolution to the next."""

_NEXT_STEP = "give an amount ('8GiB', '512MiB', bytes), or a fraction of the device between 0.0 and 1.0"
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Wishes:
    """What a user asked of plans beside a budget. ``spill``: whether values may wait in host memory, None where the
    device has a memory of its own. ``max_trips``: in how many chunk trips a group may run. ``is_graphed``: whether CUDA
    graphs were asked for."""

    spill: bool | None = None
    max_trips: int = MAX_TRIPS
    is_graphed: bool = False


NO_WISHES = Wishes()


@dataclass(frozen=True)
class Budget:
    """An upper bound on what a module or a diffusion pipeline (``whole``) keeps on its device: bytes, or a fraction of
    what the device has.
    """

    amount: int | float
    whole: weakref.ref[Any] | None = None

    @classmethod
    def of(cls, value: object, target: object = None) -> Budget:
        """From what a user wrote. Raises OptionError for what is no amount and no fraction."""
        whole = None if target is None else weakref.ref(target)
        if isinstance(value, float):
            if not 0 < value <= 1:
                raise OptionError(f"memory_budget={value!r} is no fraction of a device", next_step=_NEXT_STEP)
            return cls(value, whole)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise OptionError(f"memory_budget={value!r} is no amount of memory", next_step=_NEXT_STEP)
        try:
            return cls(parse_bytes(value), whole)
        except OptionError as error:
            raise OptionError(f"memory_budget: {error.fact}", next_step=_NEXT_STEP) from error

    def bytes_on(self, device: torch.device) -> int:
        """Raises OptionError where a fraction was asked for of a device that does not tell its memory."""
        if isinstance(self.amount, int):
            return self.amount
        total = device_bytes(device)
        if total is None:
            raise OptionError(
                f"memory_budget={self.amount!r} is a fraction, and {device} does not tell how much memory it has",
                next_step="give bytes, as in '8GiB'",
            )
        return int(self.amount * total)

    def allowance(self, module: nn.Module, inputs: Any) -> Allowance:
        """What the budget is spent on when ``module`` runs on ``inputs`` now."""
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        device = device_of(module, tensors)
        weights = _storages(_weights(module), device)
        given = _storages(tensors, device)
        return Allowance(
            budget_bytes=self.bytes_on(device),
            weight_bytes=sum(weights.values()),
            input_bytes=sum(size for key, size in given.items() if key not in weights),
            residents=self._residents(device, set(weights)),
            workspace_bytes=workspace_bytes(device, is_real=not any(isinstance(t, FakeTensor) for t in tensors)),
        )

    def _residents(self, device: torch.device, counted: set[int]) -> tuple[tuple[str, int], ...]:
        """Bytes that every component has on ``device`` at this moment, beyond those that are counted already."""
        found: list[tuple[str, int]] = []
        for name, component in self._components():
            own = {k: size for k, size in _storages(_weights(component), device).items() if k not in counted}
            counted |= set(own)
            found.append((name, sum(own.values())))
        return tuple(sorted(((name, size) for name, size in found if size), key=lambda item: -item[1]))

    def _components(self) -> list[tuple[str, nn.Module]]:
        whole = None if self.whole is None else self.whole()
        if whole is None or isinstance(whole, nn.Module):
            return [] if whole is None else [(f"the rest of {type(whole).__name__}", whole)]
        return [(name, value) for name, value in components(whole).items() if isinstance(value, nn.Module)]

    def situation(self) -> Hashable:
        """What else a plan depends on: where the components are, and in which precision."""
        firsts = ((name, next(iter(component.parameters()), None)) for name, component in self._components())
        return tuple((name, first.device, first.dtype) for name, first in firsts if first is not None)

    def require_weights(self, parts: dict[str, nn.Module]) -> None:
        """Refuse what cannot hold even the weights of a part. Raises BudgetInfeasible, or OptionError for a fraction of
        a device without figures.
        """
        for path, module in parts.items():
            device = device_of(module, ())
            if device.type == "meta":
                continue
            needed, allowed = sum(_storages(_weights(module), device).values()), self.bytes_on(device)
            if needed >= allowed:
                raise BudgetInfeasible(
                    needed,
                    allowed,
                    fact=f"the weights alone take {mib(needed)}, and {mib(allowed)} are allowed",
                    place=f"{path}: {type(module).__name__}".lstrip(": "),
                    next_step="allow more, or load the weights in half precision: pipe.to(torch.float16)",
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Budget:
        """The budget of a copied pipeline counts the copy's components."""
        whole = None if self.whole is None else self.whole()
        copied = memo.get(id(whole)) if whole is not None else None
        return self if copied is None else Budget(self.amount, weakref.ref(copied))


def compile_budgeted(
    shell: Shell,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    budget: Budget | None,
    *,
    wishes: Wishes = NO_WISHES,
    saved: Sequence[Plan] = (),
    observe: Observe | None = None,
    fuse: Fuse | None = None,
) -> tuple[Compiled, Plan, Allowance | None]:
    """Compile one call of the module in ``shell`` within ``budget``; without one, by the default plan.

    Values may wait in host memory where the device has a memory of its own, or where ``wishes`` say so.

    Raises:
        BudgetInfeasible: with everything counted, and the owners named.
        CaptureError, OptionError: as ``compile_module`` and :meth:`Budget.bytes_on` do.
    """

    def make(limits: Limits) -> tuple[Compiled, Plan]:
        return compile_module(shell, args, kwargs, saved=saved, limits=limits, observe=observe, fuse=fuse)

    return within_budget(shell, (args, kwargs), budget, wishes, make)


def within_budget(
    shell: Shell,
    inputs: Any,
    budget: Budget | None,
    wishes: Wishes,
    make: Callable[[Limits], tuple[Compiled, Plan]],
    kept_bytes: int = 0,
) -> tuple[Compiled, Plan, Allowance | None]:
    """What ``make`` compiles for a call with ``inputs``, within what ``budget`` leaves for activations beside
    ``kept_bytes``. Raises as :func:`compile_budgeted` does.
    """
    on_gpu = device_of(shell.module, [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]).type == "cuda"
    limits = Limits(max_trips=wishes.max_trips, is_graphed=wishes.is_graphed and on_gpu)
    if budget is None:
        return *make(limits), None
    allowance = replace(budget.allowance(shell.module, inputs), kept_bytes=kept_bytes)
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    spill = device_of(shell.module, tensors).type != "cpu" if wishes.spill is None else wishes.spill
    try:
        meeting = replace(limits, activation_bytes=max(allowance.activation_bytes, 0), may_spill=spill)
        return *make(meeting), allowance
    except BudgetInfeasible as error:
        raise _in_users_terms(error, allowance, make(limits)[1], inner_name(shell)) from error


def _in_users_terms(error: BudgetInfeasible, allowance: Allowance, leanest: Plan, name: str) -> BudgetInfeasible:
    """Everything that is held at the floor, by owner. ``leanest`` is the default plan, which lies near it."""
    floor = error.floor_bytes + allowance.taken_bytes
    top = ", ".join(f"{owner.name} {mib(owner.nbytes)}" for owner in leanest.owners[:3])
    held = ", ".join(f"{owner} {mib(size)}" for owner, size in allowance.owners)
    wish = f"allow {mib(floor)}, or make the clip smaller: fewer frames, or a smaller height and width"
    offload = "call pipe.enable_model_cpu_offload(), so that only the running model is on the device; or "
    return BudgetInfeasible(
        floor,
        allowance.budget_bytes,
        fact=(
            f"{name} needs {mib(floor)} at least, and {mib(allowance.budget_bytes)} are allowed: "
            f"{held}, activations {mib(error.floor_bytes)} (at their peak: {top})"
        ),
        place=name,
        next_step=(offload if allowance.residents else "") + wish,
    )


def device_of(module: nn.Module, tensors: Iterable[torch.Tensor]) -> torch.device:
    """Where a call runs: where its inputs are; else the module's weights; else the CPU."""
    return next((t.device for source in (tensors, _weights(module)) for t in source if t.dim()), torch.device("cpu"))


def device_bytes(device: torch.device) -> int | None:
    """All memory of ``device``, or None where it does not tell. Of a CPU: what this process may use."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        limits = [_installed_bytes(), *map(_container_bytes, _CONTAINER_LIMITS)]
        return min((limit for limit in limits if limit is not None), default=None)
    return None


def _installed_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def _container_bytes(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def workspace_bytes(device: torch.device, *, is_real: bool) -> int:
    """What libraries hold on ``device`` beside tensors: measured for cuBLAS on a real CUDA device, else assumed."""
    if device.type == "cpu":
        return 0
    if device.type != "cuda" or not is_real or not torch.cuda.is_available():
        return ASSUMED_WORKSPACE_BYTES
    return _cublas_bytes(device) + CONVOLUTION_BYTES


@functools.cache
def _cublas_bytes(device: torch.device) -> int:
    """How much more the allocator has given out after a first product of matrices, beyond its operands and result."""
    with torch.cuda.device(device), torch.no_grad():
        torch._C._cuda_clearCublasWorkspaces()
        factor = torch.zeros(64, 64, device=device)
        before = torch.cuda.memory_allocated(device)
        product = factor @ factor
        return torch.cuda.memory_allocated(device) - before - product.nbytes


def _weights(module: nn.Module) -> Iterable[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _storages(tensors: Iterable[torch.Tensor], device: torch.device) -> dict[int, int]:
    """Bytes of each storage on ``device``; tensors that share one count once."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device == device)
    return {storage._cdata: storage.nbytes() for storage in storages}
