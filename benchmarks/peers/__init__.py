"""Every alternative beside this one: ``python -m benchmarks.peers``."""

from benchmarks.peers.command import main as main
