"""Kernels for CUDA devices. One file per idea; `scalar.py` is the operator for one decay per head, or none."""
