"""Compiled kernels, imported only where they run: numba for dense costs on a CPU."""
