"""The documentation. ``make docs`` builds it; ``python -m docs.generate`` writes what is taken from the code."""
