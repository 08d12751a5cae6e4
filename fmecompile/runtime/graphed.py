"""CUDA graphs: a program is recorded at its second call alike, and replayed from then on.

What changes between calls (inputs, kept values) is copied into static buffers before a replay; what a program returns
is copied out of static buffers behind it, so that no call overwrites what an earlier one returned. Weights are read
where they lie: changed in place they are seen, moved elsewhere they are recorded again. All programs of a module share
their buffers by layout and one pool of memory, for one runs at a time, and none leaves anything in the pool.

One interface (:class:`Recorder`) is all that knows of CUDA.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fmecompile.runtime.chunk_loop import ChunkLoop
from fmecompile.runtime.host import to_device, to_host

FREE_CAPTURES, LEAST_REPLAYS = 8, 4
"""So many programs are recorded whatever comes of it; then each record must have been replayed so often on average."""

STATIC = frozenset({"weight", "literal", "constant"})
"""Kinds of operands that are read where they lie; others are copied."""

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
Forward = Callable[..., Sequence[Any]]


class Recorder(Protocol):
    """Records on one device."""

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a record may read ``tensor``."""
        ...

    def alone(self) -> AbstractContextManager[object]:
        """In here no other thread records or replays, and what they asked for before is done before."""
        ...

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does ``run`` again, on the same memory. Whether ``run`` has been done already is left open."""
        ...

    def drain(self) -> None:
        """Wait until nothing is under way that reads a record or its buffers."""
        ...


class CudaRecorder:
    """Records CUDA graphs in one pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.RLock()
        self._last: torch.cuda.Event | None = None

    def takes(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self._device

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            try:
                yield
            finally:
                self._last = torch.cuda.Event()
                self._last.record(stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)


def cuda_recorder(device: torch.device) -> Recorder | None:
    """None where there are no CUDA graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Graphs:
    """The records of all programs of one module: their recorder, their buffers, and whether they are worth it."""

    def __init__(self, make: Callable[[torch.device], Recorder | None] = cuda_recorder) -> None:
        self._make = make
        self._recorders: dict[torch.device, Recorder | None] = {}
        self._buffers: weakref.WeakValueDictionary[tuple[Layout, int], torch.Tensor] = weakref.WeakValueDictionary()
        self.captures = self.replays = 0
        self.off = ""
        """Why nothing is recorded or replayed any more; empty while it is."""

    def graphed(self, module: fx.GraphModule, kinds: Sequence[str]) -> Forward:
        """``module.forward``, recorded where it can be; ``kinds`` says of each operand where it comes from."""
        reason = never(module)
        return module.forward if reason else Graphed(module.forward, kinds, self)

    def recorder(self, device: torch.device) -> Recorder | None:
        """None, with one warning, where there is none."""
        if device not in self._recorders:
            self._recorders[device] = self._make(device)
            if self._recorders[device] is None:
                self.stop(f"they need a CUDA device, and the module runs on {device}")
        return self._recorders[device]

    def may_capture(self) -> bool:
        """Whether another record is likely to pay; if not, that is the end of it."""
        if self.captures >= FREE_CAPTURES and self.replays < LEAST_REPLAYS * self.captures:
            self.stop(
                f"shapes or weights change too often: {self.captures} records were replayed {self.replays} times; "
                "call it with fewer shapes, and without an offload that moves weights at every call"
            )
        return not self.off

    def stop(self, reason: str) -> None:
        """Record and replay nothing from now on, with one warning."""
        if not self.off:
            self.off = reason
            warnings.warn(f"fmecompile runs without CUDA graphs: {reason}", UserWarning, stacklevel=2)

    def buffers(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A buffer of its own for each, of the same layout; other programs get the same ones."""
        used: Counter[Layout] = Counter()
        found = []
        for tensor in tensors:
            layout = layout_of(tensor)
            key = (layout, used[layout])
            used[layout] += 1
            shape, stride, dtype, device = layout
            buffer = self._buffers.get(key)
            if buffer is None:
                buffer = self._buffers[key] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            found.append(buffer)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        """A copied module records for itself."""
        return Graphs(self._make)

    def __str__(self) -> str:
        done = f"CUDA graphs: {self.captures} records, replayed {self.replays} times"
        return f"{done}; off, because {self.off}" if self.off else done


def never(module: fx.GraphModule) -> str:
    """Why a program can never be recorded, in words; empty where it can."""
    for part in module.modules():
        loops = isinstance(part, ChunkLoop) and any(output.host_of for output in part.spec.outputs)
        calls = isinstance(part, fx.GraphModule) and any(n.target in (to_host, to_device) for n in part.graph.nodes)
        if loops or calls:
            return "values wait in host memory"
    return ""


def layout_of(tensor: torch.Tensor) -> Layout:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


@dataclass(frozen=True)
class Record:
    """``key`` is what it was recorded for. ``results`` are what the program returns: tensors of buffers, or other
    values."""

    key: Any
    inputs: list[torch.Tensor]
    results: list[Any]
    replay: Callable[[], None]
    recorder: Recorder


class Graphed:
    """Called like ``forward``, whose operands are of ``kinds``."""

    def __init__(self, forward: Forward, kinds: Sequence[str], graphs: Graphs) -> None:
        self._forward, self._graphs = forward, graphs
        self._static = [i for i, kind in enumerate(kinds) if kind in STATIC]
        self._varying = [i for i, kind in enumerate(kinds) if kind not in STATIC]
        self._seen: Any = None
        self._record: Record | None = None

    def __call__(self, *operands: torch.Tensor) -> Sequence[Any]:
        recorder = self._recorder(operands)
        if recorder is None:
            self._drop()
            return self._forward(*operands)
        with recorder.alone():
            key = self._key(operands)
            if self._record is not None and self._record.key != key:
                self._drop()
            if self._record is None and (key != self._seen or not self._capture(recorder, operands, key)):
                self._seen = key  # the first call of its kind, which also sets up what libraries set up lazily
                return self._forward(*operands)
            return self._replayed(operands)

    def _drop(self) -> None:
        if self._record is not None:
            self._record.recorder.drain()
            self._record = None

    def _recorder(self, operands: Sequence[torch.Tensor]) -> Recorder | None:
        """None where this call has to run plainly."""
        given = [operands[i] for i in self._varying]
        if self._graphs.off or not given or any(isinstance(t, FakeTensor) or _overlaps_itself(t) for t in given):
            return None
        recorder = self._graphs.recorder(max(given, key=torch.Tensor.numel).device)
        return recorder if recorder is not None and all(map(recorder.takes, given)) else None

    def _key(self, operands: Sequence[torch.Tensor]) -> Any:
        """Where weights lie, and the layouts of the rest."""
        return [operands[i].data_ptr() for i in self._static], [layout_of(operands[i]) for i in self._varying]

    def _capture(self, recorder: Recorder, operands: Sequence[torch.Tensor], key: Any) -> bool:
        """Record the program; False where that is not worth it, or fails, which ends it for all programs."""
        if not all(recorder.takes(operands[i]) for i in self._static) or not self._graphs.may_capture():
            return False
        try:
            self._record = self._recorded(recorder, operands, key)
        except Exception as error:
            self._graphs.stop(f"recording failed: {type(error).__name__}: {error}")
            return False
        self._graphs.captures += 1
        return True

    def _recorded(self, recorder: Recorder, operands: Sequence[torch.Tensor], key: Any) -> Record:
        given = [operands[i] for i in self._varying]
        shapes = [value for value in self._forward(*operands) if isinstance(value, torch.Tensor)]
        every = self._graphs.buffers([*given, *shapes])
        inputs, outputs = every[: len(given)], every[len(given) :]
        del shapes
        _copy(given, inputs)
        placed = list(operands)
        for i, buffer in zip(self._varying, inputs, strict=True):
            placed[i] = buffer
        results: list[Any] = []

        def run() -> None:
            values = self._forward(*placed)
            _copy([value for value in values if isinstance(value, torch.Tensor)], outputs)
            rest = iter(outputs)
            results[:] = [next(rest) if isinstance(value, torch.Tensor) else value for value in values]

        return Record(key, inputs, results, recorder.record(run), recorder)

    def _replayed(self, operands: Sequence[torch.Tensor]) -> list[Any]:
        assert self._record is not None
        _copy([operands[i] for i in self._varying], self._record.inputs)
        self._record.replay()
        self._graphs.replays += 1
        return [_copied(value) if isinstance(value, torch.Tensor) else value for value in self._record.results]


def _copy(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _copied(value: torch.Tensor) -> torch.Tensor:
    """With the same strides, which later programs count on."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Expanded: a copy of the same strides could not be filled."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
