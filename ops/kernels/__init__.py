"""Triton kernels; each copies the name and the signature of its formula in ``ops.reference``."""
