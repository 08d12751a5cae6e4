"""Triton kernels for what no library serves, one a file, each beside its eager reference.

A kernel is an operator of its own (``torch.ops.fmecompile.*``), so that it stands in a graph, runs on fake tensors and
has axis rules like any other. On a CUDA device with Triton it runs the kernel, everywhere else the reference.
"""
