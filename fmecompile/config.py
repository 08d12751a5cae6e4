"""The one module that reads the environment; and how files are written where others may read them meanwhile."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from fmecompile.errors import OptionError


def min_trip_bytes() -> int | None:
    """The least working set of one chunk trip, in bytes, where ``FMECOMPILE_MIN_TRIP_BYTES`` says it: loops are then
    chosen whatever time they take. None: time decides.
    """
    return _bytes_of("FMECOMPILE_MIN_TRIP_BYTES") if "FMECOMPILE_MIN_TRIP_BYTES" in os.environ else None


def min_fused_bytes() -> int:
    """The least that a kernel has to spare of what one call writes, in bytes: less is not worth compiling it.

    4 MiB by default; ``FMECOMPILE_MIN_FUSED_BYTES`` overrides it.
    """
    return _bytes_of("FMECOMPILE_MIN_FUSED_BYTES", 4 << 20)


def _bytes_of(name: str, default: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise OptionError(f"{name}={text!r} is not a number of bytes", next_step="unset it, or give a whole number")
    return int(text)


def may_measure() -> bool:
    """Whether the rates of devices are measured; ``FMECOMPILE_RATES=assumed`` plans alike on every machine."""
    text = os.environ.get("FMECOMPILE_RATES", "measured")
    if text not in ("measured", "assumed"):
        raise OptionError(f"FMECOMPILE_RATES={text!r} is not understood", next_step="unset it, or give 'assumed'")
    return text == "measured"


def kernels() -> str:
    """Where Triton kernels are used: ``FMECOMPILE_KERNELS=off`` nowhere, ``auto`` (the default) on CUDA devices,
    ``reference`` on every device, computed by their eager references where they do not run.
    """
    text = os.environ.get("FMECOMPILE_KERNELS", "auto")
    if text not in ("auto", "off", "reference"):
        raise OptionError(
            f"FMECOMPILE_KERNELS={text!r} is not understood", next_step="unset it, or give 'off' or 'reference'"
        )
    return text


def cache_folder() -> Path:
    """Where what was measured is written down: ``FMECOMPILE_CACHE``, else the user's folder for caches."""
    own = os.environ.get("FMECOMPILE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmecompile"


def write_whole(path: Path, text: str) -> None:
    """All or nothing, whoever else reads or writes: written beside ``path``, and moved there."""
    own = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        own.write_text(text, encoding="utf-8")
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
