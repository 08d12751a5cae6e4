"""``frames=8:64``: many sizes of one axis, some planned, the others estimated between them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fmecompile.errors import OptionError
from fmecompile.offline.largest import width_of
from fmecompile.offline.model import Size

AXES = {"frames": 8, "height": 64, "width": 64, "size": 64}
"""What can be swept, and the usual step. ``size`` gives heights and keeps the aspect ratio."""

MOST_ROWS = 64
_SPEC = re.compile(r"\s*(\w+)\s*=\s*(\d+)\s*:\s*(\d+)\s*(?::\s*(\d+)\s*)?", re.ASCII)


@dataclass(frozen=True)
class Sweep:
    """The values of one axis, ascending."""

    axis: str
    values: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """``frames=8:64`` or ``frames=8:64:4``: from, to and, if given, step; the last value is always there.

        Raises OptionError when it is not understood, or too long.
        """
        example = "give axis=from:to or axis=from:to:step, such as frames=8:64 or size=256:1024:128"
        found = _SPEC.fullmatch(text)
        if found is None or found[1] not in AXES:
            raise OptionError(f"{text!r} is no sweep over {', '.join(AXES)}", next_step=example)
        start, stop, step = int(found[2]), int(found[3]), int(found[4] or AXES[found[1]])
        if start < 1 or stop < start or step < 1:
            raise OptionError(f"{text!r} has no values", next_step=example)
        if (stop - start) // step >= MOST_ROWS:
            raise OptionError(f"{text!r} has more than {MOST_ROWS} values", next_step="take a larger step")
        return cls(found[1], tuple(dict.fromkeys((*range(start, stop, step), stop))))

    def sizes(self, size: Size) -> list[Size]:
        """``size`` with every value of the axis in its place."""
        if self.axis == "size":
            return [Size(size.frames, value, width_of(size, value)) for value in self.values]
        return [replace(size, **{self.axis: value}) for value in self.values]

    def planned(self, size: Size, exact: bool) -> list[Size]:
        """The sizes that are planned: all where ``exact``, else both ends and, of five and more, the middle."""
        sizes = self.sizes(size)
        if exact:
            return sizes
        picked = (0, len(sizes) // 2, -1) if len(sizes) >= 5 else (0, -1)
        return list(dict.fromkeys(sizes[place] for place in picked))
