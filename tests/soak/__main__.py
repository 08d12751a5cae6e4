"""``python -m tests.soak 374``: one random graph again, with what it is and what was made of it."""

from __future__ import annotations

import os
import sys
from random import Random

import torch


def main() -> None:
    os.environ.setdefault("FMECOMPILE_MIN_TRIP_BYTES", "0")
    os.environ.setdefault("FMECOMPILE_RATES", "assumed")
    from tests.soak.checks import check
    from tests.soak.graphs import written

    for number in map(int, sys.argv[1:]):
        torch.manual_seed(number)
        rng = Random(number)
        module = written(rng, number)
        print(module)
        for outcome in check(rng, module):
            print(outcome)


if __name__ == "__main__":
    main()
