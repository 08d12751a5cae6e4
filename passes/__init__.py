"""The rewrites: one a file, file name = pass name (``drop_noops.py`` holds ``DropNoops``, logged as ``drop-noops``).

The folder stands at the top level of the repository and is imported only as ``fmecompile.passes``.
"""

if __name__ != "fmecompile.passes":
    raise ImportError(
        f"the folder passes/ was imported as {__name__!r}, but it is the package fmecompile.passes\n"
        "  next: write `from fmecompile.passes.drop_noops import DropNoops`"
    )
