"""Facts of one operator call, measured once on fake tensors for each distinct call.

Composite operators hide allocations: a linear on a permuted input copies it, attention keeps a log-sum-exp. So no table
of formulas: each distinct (operator, shapes, strides, dtypes) is run once on fake tensors under the storage meter, and
what it allocates, aliases and holds while it runs is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from fmecompile.errors import CaptureError
from fmecompile.graph.specs import TensorSpec, spec_of
from fmecompile.runtime.autocast import autocast_state
from fmecompile.runtime.measure import StorageMeter, storage_bytes


@dataclass(frozen=True)
class CallFacts:
    """What one call returns and costs.

    ``result`` mirrors the returned structure in specs. ``alias`` is, per returned tensor, the index of the tensor
    operand whose storage it shares, or None for a new storage of ``nbytes``. ``hidden_bytes`` is what the call holds
    at most beyond its operands and results.
    """

    result: Any
    alias: tuple[int | None, ...]
    nbytes: tuple[int, ...]
    hidden_bytes: int


MAX_FACTS = 50_000
"""Calls that are remembered in a process, some thirty programs of video UNets."""

_KNOWN: dict[tuple[Any, ...], dict[Any, CallFacts]] = {}


def _settings() -> tuple[Any, ...]:
    """What the same call may answer otherwise under: dtypes and layouts of results, and what attention holds."""
    cuda = torch.backends.cuda
    attention = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    libraries = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, cuda.cudnn_sdp_enabled())
    chosen = (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    return (*chosen, *libraries, *attention, autocast_state())


class FactTable:
    """Runs and remembers calls. One table is for one compilation; what it learns, later ones under the same settings
    of torch know."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        if sum(map(len, _KNOWN.values())) > MAX_FACTS:
            _KNOWN.clear()
        self._known = _KNOWN.setdefault(_settings(), {})

    def __call__(self, target: Callable[..., Any], args: Any, kwargs: Any) -> CallFacts:
        """Facts of ``target(*args, **kwargs)`` where tensors are given as :class:`TensorSpec`."""
        key = (target, _frozen(args), _frozen(kwargs) if kwargs else ())
        facts = self._known.get(key)
        if facts is None:
            facts = self._known[key] = self._run(target, args, kwargs)
        return facts

    def _run(self, target: Callable[..., Any], args: Any, kwargs: Any) -> CallFacts:
        operands: list[torch.Tensor] = []

        def make(value: Any) -> Any:
            if isinstance(value, TensorSpec):
                tensor = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
                operands.append(tensor)
                return tensor
            if isinstance(value, (list, tuple)):
                return type(value)(make(item) for item in value)
            return value

        with self._mode, torch.no_grad():
            fake_args = make(tuple(args))
            fake_kwargs = {name: make(value) for name, value in kwargs.items()}
            meter = StorageMeter(operands)
            with meter:
                result = _call(target, fake_args, fake_kwargs)
        owner = {t.untyped_storage()._cdata: i for i, t in reversed(list(enumerate(operands)))}
        tensors = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if _is_tensor(t)]
        alias = tuple(owner.get(t.untyped_storage()._cdata) for t in tensors)
        nbytes = tuple(0 if a is not None else storage_bytes(t) for t, a in zip(tensors, alias, strict=True))
        hidden = meter.peak_bytes - sum(nbytes)
        return CallFacts(_specs(result), alias, nbytes, max(hidden, 0))


def _call(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return target(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise CaptureError(
            f"what {target} returns depends on the values of tensors",
            next_step="the module stays eager; compute this value outside the module",
        ) from error
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(
            f"{target} does not take its operands as the compiler would lay them out: {error}",
            next_step="the module stays eager; call contiguous() on them, or report this",
        ) from error


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _specs(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return spec_of(result)
    if isinstance(result, (tuple, list)):
        return tuple(_specs(item) for item in result)
    return result


def _frozen(value: Any) -> Any:
    kind = type(value)
    if kind is tuple or kind is list:
        return tuple(map(_frozen, value))
    if kind is dict:
        return tuple((name, _frozen(item)) for name, item in value.items())
    if kind is int or kind is float or kind is bool:
        return (kind, value)  # 1, 1.0 and True are equal but mean different calls
    return value
