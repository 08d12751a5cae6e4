"""``python -m benchmarks.copies``: bytes that calls only move, of eager and of the optimized program, on fake tensors.

A copy is a call whose result is new bytes, or bytes written, without arithmetic: clones (of ``contiguous``, of a
``reshape`` that is no view, of a ``linear`` or GroupNorm that lays out its operand), concatenations, repetitions,
padding, and what a loop writes back. A LayerNorm copies an operand that is not contiguous, and a convolution one in
neither of its two layouts, where no operator shows; they are counted too. With kernels means with their references:
what a kernel itself moves is no copy.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fmecompile
from benchmarks.cases import CASES, GIB, Case, fake
from benchmarks.report import save, table

aten = torch.ops.aten

_KINDS = {
    aten.clone.default: "layouts",
    aten._to_copy.default: "layouts",
    aten.copy_.default: "written back",
    aten.cat.default: "joined",
    aten.repeat.default: "joined",
    aten.repeat_interleave.self_int: "joined",
    aten.constant_pad_nd.default: "joined",
}
_MEASURED = ("SVD, 14 frames, 576x1024", "AnimateDiff, 16 frames, 512x512")


class Copies(TorchDispatchMode):
    """Bytes of copies by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _KINDS:
            source = args[1] if func is aten.copy_.default else args[0]
            if not isinstance(source, torch.Tensor) or source.dtype == result.dtype:  # a cast is arithmetic
                self.nbytes[_KINDS[func]] += result.nbytes
        elif func is aten.native_layer_norm.default and not args[0].is_contiguous():
            self.nbytes["within norms"] += args[0].nbytes
        elif func is aten.convolution.default and not _is_dense(args[0]):
            self.nbytes["within convolutions"] += args[0].nbytes
        return result


def _is_dense(x: torch.Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    return x.is_contiguous() or x.is_contiguous(memory_format=last)


def _copied(module: nn.Module, inputs: Any) -> Counter[str]:
    with Copies() as copies:
        module(*inputs)
    return copies.nbytes


def rows(case: Case) -> list[dict[str, Any]]:
    """Eager, the optimized program, and the same with kernels."""
    found = []
    with fake(torch.float16):
        module, inputs = case.build(), case.inputs(torch.float16)
        eager = _copied(module, inputs)
        found.append(_row(case, "eager", eager, eager))
        for kernels, name in (("off", "optimized"), ("reference", "optimized, with kernels")):
            os.environ["FMECOMPILE_KERNELS"] = kernels
            case.optimize(module, inputs)
            module(*inputs)
            found.append(_row(case, name, _copied(module, inputs), eager))
            found[-1]["projected GiB"] = fmecompile.explain(module).records[0].plan.projected_peak_bytes / GIB
            fmecompile.restore(module)
    return found


def _row(case: Case, program: str, nbytes: Counter[str], eager: Counter[str]) -> dict[str, Any]:
    kinds = ("joined", "layouts", "written back", "within norms", "within convolutions")
    return {
        "case": case.name,
        "program": program,
        "copies GiB": nbytes.total() / GIB,
        "of eager": nbytes.total() / eager.total(),
        **{f"{kind} GiB": nbytes[kind] / GIB for kind in kinds},
        "projected GiB": None,
    }


def main() -> None:
    found = [row for case in CASES if case.name in _MEASURED for row in rows(case)]
    print(table(found))
    print(save("copies", "python -m benchmarks.copies", found))


if __name__ == "__main__":
    main()
