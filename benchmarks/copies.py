"""draft"""

from __future__ import annotations
import sys, time
from collections import Counter
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import fmecompile
from benchmarks.cases import CASES, fake

aten = torch.ops.aten
_MOVES = {
    aten.clone.default,
    aten.copy_.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.repeat.default,
    aten.contiguous.default,
    aten.index_select.default,
    aten.repeat_interleave.self_int,
    aten._to_copy.default,
}


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.by = Counter()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func] += 1
        if func in _MOVES and isinstance(out, torch.Tensor):
            if func in (aten._to_copy.default, aten.copy_.default):
                src = args[0] if func is aten._to_copy.default else args[1]
                if src.dtype != out.dtype:
                    return out
            self.by[str(func)] += out.nbytes
        elif func is aten.native_layer_norm.default and not args[0].is_contiguous():
            self.by["hidden layer_norm"] += args[0].nbytes
        elif func is aten.native_group_norm.default and not args[0].is_contiguous():
            self.by["hidden group_norm"] += args[0].nbytes
        elif func is aten.convolution.default and not dense(args[0]):
            self.by["hidden conv"] += args[0].nbytes
        return out


def dense(x):
    return x.is_contiguous() or x.is_contiguous(
        memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    )


def count(m, inputs):
    with Copies() as c:
        m(*inputs)
    return c


if __name__ == "__main__":
    dev = sys.argv[1]
    case = CASES[int(sys.argv[2])]
    with fake(torch.float16), torch.device(dev):
        m, inputs = case.build(), case.inputs(torch.float16)

        def show(t, c):
            print(t, f"{sum(c.by.values()) / 2**30:.3f} GiB", {k: round(v / 2**30, 3) for k, v in c.by.items()})

        e = count(m, inputs)
        show("eager", e)
        t = time.time()
        print(e.calls.most_common(60))
        fmecompile.optimize(m, strict=True)
        m(*inputs)
        print(time.time() - t)
        o = count(m, inputs)
        show("opt", o)
        print(o.calls.most_common(60))
        p = fmecompile.explain(m).records[0]
        print(p.plan.projected_peak_bytes / 2**30, p.notes)
        print(e.by.total() and o.by.total() / e.by.total())
