"""Whole passes over batches of dense kernels, on threads: what the rest of the library calls. NumPy in, NumPy out."""

from __future__ import annotations

import numpy as np

from iotsolve.kernels.dense import (
    SIDE,
    TAKE,
    WEIGH,
    build,
    column_sums,
    exact_each,
    exact_pass,
    lowest_each,
    raise_to,
    row_sums,
    row_tops,
    softmin_each,
    spread_each,
    spread_pass,
    stored_each,
    stored_pass,
    tops_each,
)
from iotsolve.kernels.numeric import LOG2E
from iotsolve.kernels.threads import each_piece, pieces, summed

__all__ = [
    "LOG2E",
    "build_kernel",
    "highest",
    "logs",
    "lowest",
    "marginals",
    "product",
    "softmin",
]

_NONE = np.empty(0)
_CUT = 2**19  # entries of a problem of which the rows are cut into pieces, and not the batch into problems


def logs(weights: np.ndarray, potential: np.ndarray) -> np.ndarray:
    """``log2(weights) + potential log2(e)``, of a potential in units of epsilon; ``-inf`` where there is no weight or no way."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (np.log(weights) + potential) * LOG2E
    if np.isfinite(found).all():
        return found
    return np.where((weights > 0) & np.isfinite(potential), found, -np.inf)


def build_kernel(cost: np.ndarray, alpha: np.ndarray, beta: np.ndarray, scale: float, kernel: np.ndarray) -> None:
    """``kernel = 2^(alpha + beta - scale cost)`` of one problem."""
    n, m = cost.shape
    each_piece(n, n * m, lambda k, first, last: build(cost, alpha, beta, scale, kernel, first, last))


def marginals(
    cost: np.ndarray, alpha: np.ndarray, beta: np.ndarray, scale: float, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Row and column sums in float64 of ``2^(alpha + beta - scale cost)``, ``(B, n, m)``, which is copied to ``kept``."""
    count, n, m = cost.shape
    r = np.empty((count, n))
    if count == 1:
        shared = cost[0], alpha[0], beta[0], scale, r[0]
        c = summed(n, m, n * m, lambda total, first, last: exact_pass(*shared, total, kept[0], first, last))
        return r, c[None]
    c = np.zeros((count, m))
    each_piece(count, cost.size, lambda k, first, last: exact_each(cost, alpha, beta, scale, r, c, kept, first, last))
    return r, c


def product(kernel: np.ndarray, v: np.ndarray, w: np.ndarray, *, as_given: bool) -> tuple[np.ndarray, np.ndarray]:
    """``K v`` with ``K' (w K v)``, or with ``K' w`` if that is ``as_given``, of a batch in one pass; both in float64."""
    count, n, m = kernel.shape
    y, rule = np.empty((count, n)), TAKE if as_given else WEIGH
    if count == 1:
        shared = (kernel[0], v[0].astype(kernel.dtype), rule, w[0], _NONE, _NONE, SIDE, 0.0, y[0], np.empty(n))
        columns = summed(n, m, n * m, lambda total, first, last: stored_pass(*shared, total, first, last))
        return y, columns[None]
    columns = np.zeros((count, m))
    each_piece(count, kernel.size, lambda k, first, last: stored_each(kernel, v, rule, w, y, columns, first, last))
    return y, columns


def spread(kernel: np.ndarray, w: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``sum_i K_ij w_i (rows_i - K_ij)`` of a batch, ``(B, m)``."""
    count, n, m = kernel.shape
    if count == 1:
        return summed(n, m, n * m, lambda total, *part: spread_pass(kernel[0], w[0], rows[0], total, *part))[None]
    columns = np.zeros((count, m))
    each_piece(count, kernel.size, lambda k, *part: spread_each(kernel, w, rows, columns, *part))
    return columns


def highest(cost: np.ndarray, potential: np.ndarray, scale: float, *, axis: int) -> np.ndarray:
    """``max (potential - scale C)`` of one problem, over its columns (``axis=-1``) or its rows, in float64; or of a batch,
    ``(B, n, m)``, or ``(1, n, m)`` for all of them, with potentials ``(B, .)``.
    """
    n, m = cost.shape[-2:]
    if cost.ndim == 3:
        count = len(potential)
        if count == 1 or n * m >= _CUT:
            return np.stack([highest(cost[k % len(cost)], x, scale, axis=axis) for k, x in enumerate(potential)])
        found = np.empty((count, n if axis == -1 else m))
        shared = cost, potential, scale, axis == -1, found
        each_piece(count, 2 * count * n * m, lambda k, *part: tops_each(*shared, *part))
        return found
    if axis == -1:
        found = np.empty(n)
        each_piece(n, 2 * n * m, lambda k, first, last: row_tops(cost, potential, scale, found, first, last))
        return found
    tops = np.full((len(pieces(n, n * m)), m), -np.inf)
    each_piece(n, n * m, lambda k, first, last: raise_to(cost, potential, scale, tops[k], first, last))
    return tops.max(0)


def lowest(cost: np.ndarray, rows: np.ndarray, columns: np.ndarray, f: np.ndarray, g: np.ndarray) -> None:
    """``f = min C`` over the columns given, then ``g = min C - f`` over the rows given; 0 if nothing is allowed; ``(B, .)``."""
    if len(cost) > 1:
        each_piece(len(cost), cost.size, lambda k, *part: lowest_each(cost, rows, columns, f, g, *part))
        return
    for found, given, other, axis in ((f, columns, g, -1), (g, rows, f, -2)):
        top = highest(cost[0], np.where(given[0], other[0], -np.inf), 1.0, axis=axis)
        found[0] = np.where(np.isfinite(top), -top, 0.0)


def softmin(cost: np.ndarray, log_weights: np.ndarray, epsilon: float, *, axis: int) -> np.ndarray:
    """``-epsilon log sum exp(log_weights - C / epsilon)`` of one problem, over its columns (``axis=-1``) or its rows, in float64;
    or of a batch, as :func:`highest`.
    """
    n, m = cost.shape[-2:]
    if cost.ndim == 3 and (len(log_weights) == 1 or n * m >= _CUT):
        return np.stack([softmin(cost[k % len(cost)], x, epsilon, axis=axis) for k, x in enumerate(log_weights)])
    logs, scale, size = log_weights * LOG2E, LOG2E / epsilon, n if axis == -1 else m
    if cost.ndim == 3:
        count = len(logs)
        found = np.empty((count, size))
        shared = cost, logs, scale, axis == -1, found
        each_piece(count, 4 * count * n * m, lambda k, *part: softmin_each(*shared, *part))
    elif axis == -1:
        found = np.empty(n)
        each_piece(n, n * m, lambda k, first, last: row_sums(cost, logs, scale, found, first, last))
    else:  # a pass for the largest exponents and one for the sums
        top = highest(cost, logs, scale, axis=-2)
        finite = np.where(np.isfinite(top), top, 0.0)
        total = summed(n, m, n * m, lambda sums, first, last: column_sums(cost, logs, scale, finite, sums, first, last))
        with np.errstate(divide="ignore"):
            found = np.where(np.isfinite(top), finite + np.log2(total), -np.inf)
    return -epsilon / LOG2E * found
