"""Exponentials of a block of exponents on a CPU, compiled by numba: in place, or summed on the way and not stored."""

from __future__ import annotations

import numpy as np

from iotsolve.kernels.numeric import LOG2E, compiled, exp2_double, exp2_single, exp_double, exp_single

__all__ = ["exponentials", "exponentiate", "weigh"]

_FLUSH = 128  # rows whose column sums float32 may add up


@compiled
def exponentiate(block):
    """``exp(block)`` in place."""
    n, m = block.shape
    if block.itemsize == 8:
        for i in range(n):
            for j in range(m):
                block[i, j] = exp_double(block[i, j])
        return
    for i in range(n):
        for j in range(m):
            block[i, j] = exp_single(block[i, j])


@compiled
def exponentials(block, into):
    """``into = exp(block)``, in its own precision; what is in range of neither end is kept finite."""
    n, m = block.shape
    if into.itemsize == 8:
        for i in range(n):
            for j in range(m):
                into[i, j] = exp2_double(np.float64(block[i, j]) * LOG2E)
        return
    for i in range(n):
        for j in range(m):
            into[i, j] = exp2_single(np.float64(block[i, j]) * LOG2E)


@compiled
def weigh(block, rows, columns, sums, totals):
    """``sums_i = sum_j exp(b_ij) columns_j``, and ``sum_i exp(b_ij) rows_i`` added to ``totals_j``, which are float64."""
    n, m = block.shape
    if block.itemsize == 8:
        for i in range(n):
            total, w = 0.0, rows[i]
            for j in range(m):
                e = exp_double(block[i, j])
                total += e * columns[j]
                totals[j] += e * w
            sums[i] = total
        return
    part = np.empty(m, np.float32)
    for begin in range(0, n, _FLUSH):
        part[:] = 0.0
        for i in range(begin, min(begin + _FLUSH, n)):
            total, w = np.float32(0.0), rows[i]
            for j in range(m):
                e = exp_single(block[i, j])
                total += e * columns[j]
                part[j] += e * w
            sums[i] = total
        for j in range(m):
            totals[j] += part[j]
