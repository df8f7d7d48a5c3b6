"""Passes over a dense cost on a CPU, compiled by numba: serial, without the interpreter's lock, on a range of rows.

Every pass reads its matrix once. A block of four rows is summed against ``v``, a rule turns the four sums into scalings, and
while the block is still in the cache the scaled rows are added into the sums of the columns: one Sinkhorn iteration and one
product with the Hessian differ in the rule alone. That matrix is a stored kernel, in float32 as a rule, its column sums flushed
to float64 every 128 rows. A look at the marginals reads the cost itself, exponentiated in float64 on the way.

Kernels are in base 2: ``K_ij = 2^(alpha_i + beta_j - scale C_ij)``, ``scale = log2(e) / epsilon``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from iotsolve.kernels.numeric import FAST, LOG2E, NORMAL, compiled, exp2_double, exp2_single, log_double

__all__ = [
    *("MATCH", "RESPOND", "SIDE", "TAKE", "WEIGH"),
    *(
        "build",
        "column_sums",
        "exact_each",
        "exact_pass",
        "lowest_each",
        "raise_to",
        "row_sums",
        "row_tops",
        "spread_each",
        "spread_pass",
        "stored_each",
        "stored_pass",
    ),
]

MATCH, RESPOND, WEIGH, TAKE = range(4)
"""Rules for a row's scaling, given its sum y: ``w / y``; what the side's aprox answers; ``w y``; ``w``."""

_LANES = 64
_FLUSH, _LONG = 128, 2**13  # rows whose column sums, and columns whose row sums float32 may add up
SIDE = (1.0, -math.inf, 0.0, 0.0, 0.0)  # of a rule that asks no side: FIXED's


@compiled
def build(cost, alpha, beta, scale, kernel, first, last):
    """``kernel = 2^(alpha + beta - scale cost)``, in the kernel's precision from exponents in float64."""
    m = cost.shape[1]
    if kernel.itemsize == 8:
        for i in range(first, last):
            a = alpha[i]
            for j in range(m):
                kernel[i, j] = exp2_double(a + beta[j] - scale * np.float64(cost[i, j]))
        return
    for i in range(first, last):
        a = alpha[i]
        for j in range(m):
            kernel[i, j] = exp2_single(a + beta[j] - scale * np.float64(cost[i, j]))


@njit(inline="always", error_model="numpy")
def _matched(w, y):
    return w / y if w > 0 else 0.0


@njit(inline="always", error_model="numpy")
def _scaling(y, i, rule, w, base, known, side, lam):
    """The scaling of row ``i`` whose sum is ``y``: see the rules above.

    ``side`` is ``(slope, low, up, down, high)`` in units of epsilon: aprox ``max(min(high, slope s + up), max(low, slope s +
    down))``. ``base = log a + known``, ``known`` the potential in the kernel.
    """
    if rule == MATCH:
        return _matched(w[i], y)
    if rule == WEIGH:
        return w[i] * y
    if rule == TAKE:
        return w[i]
    if y <= 0.0:
        return 0.0
    slope, low, up, down, high = side
    s = slope * (base[i] - math.log(y) - lam)
    return math.exp(max(min(high, s + up), max(low, s + down)) - known[i] + lam)


@njit(inline="always", error_model="numpy")
def _is_normal(y):
    return y >= NORMAL and y < np.inf


@njit(fastmath=FAST, error_model="numpy")
def _respond_four(y, i, base, known, side, lam, u, t):
    """:func:`_scaling` by :data:`RESPOND` of four rows at once, whose sums are normal numbers."""
    (slope, low, up, down, high), small = side, 0
    for k in range(4):
        t[k] = slope * (base[i + k] - log_double(y[i + k]) - lam)
    for k in range(4):
        t[k] = (max(min(high, t[k] + up), max(low, t[k] + down)) - known[i + k] + lam) * LOG2E
    for k in range(4):
        u[i + k] = exp2_double(t[k])
        small += 1 if t[k] < 1000.0 else 0
    if small < 4:  # what is beyond a number must not pass for one
        for k in range(4):
            u[i + k] = math.exp(t[k] / LOG2E)


@compiled
def stored_pass(kernel, v, rule, w, base, known, side, lam, y, u, columns, first, last):
    """``y = K v``, ``u`` by the rule, and ``columns += u K`` over some rows; ``v`` in the kernel's precision."""
    m = kernel.shape[1]
    part, scale, four = np.zeros(m, kernel.dtype), np.zeros(4, kernel.dtype), np.zeros(4)
    since = 0
    for i in range(first, last - 3, 4):
        k0, k1, k2, k3 = kernel[i], kernel[i + 1], kernel[i + 2], kernel[i + 3]
        y[i], y[i + 1], y[i + 2], y[i + 3] = 0.0, 0.0, 0.0, 0.0
        for begin in range(0, m, _LONG):
            y0, y1, y2, y3 = scale.dtype.type(0), scale.dtype.type(0), scale.dtype.type(0), scale.dtype.type(0)
            for j in range(begin, min(begin + _LONG, m)):
                x = v[j]
                y0 += k0[j] * x
                y1 += k1[j] * x
                y2 += k2[j] * x
                y3 += k3[j] * x
            y[i] += y0
            y[i + 1] += y1
            y[i + 2] += y2
            y[i + 3] += y3
        if rule == MATCH:
            u[i], u[i + 1] = _matched(w[i], y[i]), _matched(w[i + 1], y[i + 1])
            u[i + 2], u[i + 3] = _matched(w[i + 2], y[i + 2]), _matched(w[i + 3], y[i + 3])
        elif rule == RESPOND and _is_normal(y[i]) and _is_normal(y[i + 1]) and _is_normal(y[i + 2]) and _is_normal(y[i + 3]):
            _respond_four(y, i, base, known, side, lam, u, four)
        else:
            for k in range(4):
                u[i + k] = _scaling(y[i + k], i + k, rule, w, base, known, side, lam)
        scale[0], scale[1], scale[2], scale[3] = u[i], u[i + 1], u[i + 2], u[i + 3]
        u0, u1, u2, u3 = scale[0], scale[1], scale[2], scale[3]
        for j in range(m):
            part[j] += (u0 * k0[j] + u1 * k1[j]) + (u2 * k2[j] + u3 * k3[j])
        since += 4
        if since >= _FLUSH:
            since = 0
            for j in range(m):
                columns[j] += part[j]
                part[j] = 0
    for i in range(last - (last - first) % 4, last):
        k0 = kernel[i]
        y[i] = 0.0
        for begin in range(0, m, _LONG):
            y0 = scale.dtype.type(0)
            for j in range(begin, min(begin + _LONG, m)):
                y0 += k0[j] * v[j]
            y[i] += y0
        u[i] = _scaling(y[i], i, rule, w, base, known, side, lam)
        scale[0] = u[i]
        u0 = scale[0]
        for j in range(m):
            part[j] += u0 * k0[j]
    for j in range(m):
        columns[j] += part[j]


@compiled
def exact_pass(cost, alpha, beta, scale, y, columns, kept, first, last):
    """Row and column sums of ``2^(alpha + beta - scale cost)`` over some rows, in float64, the latter added to ``columns``.

    Its entries are copied to ``kept`` if that is not empty.
    """
    m, copies = cost.shape[1], kept.shape[0] > 0
    for i in range(first, last - 1, 2):
        c0, c1, a0, a1 = cost[i], cost[i + 1], alpha[i], alpha[i + 1]
        y0, y1 = 0.0, 0.0
        if copies:
            k0, k1 = kept[i], kept[i + 1]
            for j in range(m):
                x0 = exp2_double(a0 + beta[j] - scale * np.float64(c0[j]))
                x1 = exp2_double(a1 + beta[j] - scale * np.float64(c1[j]))
                y0 += x0
                y1 += x1
                columns[j] += x0 + x1
                k0[j] = x0
                k1[j] = x1
        else:
            for j in range(m):
                x0 = exp2_double(a0 + beta[j] - scale * np.float64(c0[j]))
                x1 = exp2_double(a1 + beta[j] - scale * np.float64(c1[j]))
                y0 += x0
                y1 += x1
                columns[j] += x0 + x1
        y[i], y[i + 1] = y0, y1
    for i in range(last - (last - first) % 2, last):
        y0 = 0.0
        for j in range(m):
            x0 = exp2_double(alpha[i] + beta[j] - scale * np.float64(cost[i, j]))
            y0 += x0
            columns[j] += x0
            if copies:
                kept[i, j] = x0
        y[i] = y0


@compiled
def exact_each(cost, alpha, beta, scale, y, columns, kept, first, last):
    """Marginals of the plans of some problems of a batch, by :func:`exact_pass`."""
    for k in range(first, last):
        exact_pass(cost[k], alpha[k], beta[k], scale, y[k], columns[k], kept[k], 0, cost.shape[1])


@compiled
def stored_each(kernel, v, rule, w, y, columns, first, last):
    """``y = K v`` and ``columns = (w y) K`` for some problems of a batch, or ``w K``, by the rule."""
    n, m = kernel.shape[1:]
    none, u, single = np.empty(0), np.empty(n), np.empty(m, kernel.dtype)
    for k in range(first, last):
        for j in range(m):
            single[j] = v[k, j]
        stored_pass(kernel[k], single, rule, w[k], none, none, SIDE, 0.0, y[k], u, columns[k], 0, n)


@compiled
def spread_pass(kernel, w, rows, columns, first, last):
    """``columns_j += sum_i K_ij w_i (rows_i - K_ij)`` over some rows."""
    m = kernel.shape[1]
    for i in range(first, last):
        row, share, whole = kernel[i], w[i], rows[i]
        for j in range(m):
            x = np.float64(row[j])
            columns[j] += x * share * (whole - x)


@compiled
def spread_each(kernel, w, rows, columns, first, last):
    """:func:`spread_pass` for some problems of a batch."""
    for k in range(first, last):
        spread_pass(kernel[k], w[k], rows[k], columns[k], 0, kernel.shape[1])


@njit(inline="always", error_model="numpy")
def _less(beta, scale, row, j):
    return beta[j] - scale * np.float64(row[j])


@njit(inline="always", error_model="numpy")
def _larger(x, y):
    return x if x > y else y


@compiled
def row_tops(cost, beta, scale, found, first, last):
    """``max_j beta_j - scale C_ij`` for some rows of a problem.

    A row is read in eight places at once, which a processor fetches sooner than one after the other, and folded.
    """
    m = cost.shape[1]
    part = m // 8
    tops = np.empty(part + 1)
    for i in range(first, last):
        row = cost[i]
        for j in range(part):
            a = _larger(_less(beta, scale, row, j), _less(beta, scale, row, j + part))
            b = _larger(_less(beta, scale, row, j + 2 * part), _less(beta, scale, row, j + 3 * part))
            c = _larger(_less(beta, scale, row, j + 4 * part), _less(beta, scale, row, j + 5 * part))
            d = _larger(_less(beta, scale, row, j + 6 * part), _less(beta, scale, row, j + 7 * part))
            tops[j] = _larger(_larger(a, b), _larger(c, d))
        size = part
        while size > 16:
            half = (size + 1) // 2
            for j in range(size - half):
                tops[j] = _larger(tops[j + half], tops[j])
            size = half
        top = -np.inf
        for j in range(size):
            top = _larger(tops[j], top)
        for j in range(8 * part, m):
            top = _larger(_less(beta, scale, row, j), top)
        found[i] = top


@compiled
def row_sums(cost, beta, scale, found, first, last):
    """``log2 sum_j 2^(beta_j - scale C_ij)`` for some rows of a problem."""
    m = cost.shape[1]
    exponent, tops = np.empty(m + _LANES), np.empty(_LANES)
    exponent[m:] = -np.inf
    for i in range(first, last):
        row = cost[i]
        for j in range(m):
            exponent[j] = beta[j] - scale * np.float64(row[j])
        tops[:] = -np.inf
        for j in range(0, m, _LANES):
            for lane in range(_LANES):
                x = exponent[j + lane]
                tops[lane] = x if x > tops[lane] else tops[lane]
        top = tops.max()
        if not top > -np.inf:
            found[i] = -np.inf
            continue
        total = 0.0
        for j in range(m):
            total += exp2_double(exponent[j] - top)
        found[i] = top + math.log2(total)


@compiled
def raise_to(cost, alpha, scale, tops, first, last):
    """``tops_j`` at least ``alpha_i - scale C_ij`` for some rows."""
    m = cost.shape[1]
    for i in range(first, last):
        row, a = cost[i], alpha[i]
        for j in range(m):
            x = a - scale * np.float64(row[j])
            tops[j] = x if x > tops[j] else tops[j]


@compiled
def tops_each(cost, potential, scale, of_rows, found, first, last):
    """``max (potential - scale C)`` over the columns, of every row, or over the rows, for some problems that may share a cost."""
    n = cost.shape[1]
    for k in range(first, last):
        each = cost[k if len(cost) > 1 else 0]
        if of_rows:
            row_tops(each, potential[k], scale, found[k], 0, n)
        else:
            found[k] = -np.inf
            raise_to(each, potential[k], scale, found[k], 0, n)


@compiled
def column_sums(cost, alpha, scale, tops, total, first, last):
    """``total_j += 2^(alpha_i - scale C_ij - tops_j)`` for some rows."""
    m = cost.shape[1]
    for i in range(first, last):
        row, a = cost[i], alpha[i]
        for j in range(m):
            total[j] += exp2_double(a - tops[j] - scale * np.float64(row[j]))


@compiled
def softmin_each(cost, logs, scale, of_rows, found, first, last):
    """``log2 sum 2^(logs - scale C)`` over the columns or, unless ``of_rows``, over the rows, for some problems that may share a
    cost.
    """
    n, m = cost.shape[1:]
    tops = np.empty(m)
    for k in range(first, last):
        each = cost[k if len(cost) > 1 else 0]
        if of_rows:
            row_sums(each, logs[k], scale, found[k], 0, n)
            continue
        tops[:] = -np.inf
        raise_to(each, logs[k], scale, tops, 0, n)
        for j in range(m):
            found[k, j], tops[j] = 0.0, tops[j] if abs(tops[j]) < np.inf else 0.0
        column_sums(each, logs[k], scale, tops, found[k], 0, n)
        for j in range(m):
            found[k, j] = tops[j] + math.log2(found[k, j])


@compiled
def lowest_each(cost, rows, columns, f, g, first, last):
    """``f_i = min_j C_ij`` over columns that count, then ``g_j = min_i C_ij - f_i`` over rows, for some problems of a batch.

    0 where nothing is allowed.
    """
    n, m = cost.shape[1:]
    alpha, beta, tops = np.empty(n), np.empty(m), np.empty(m)
    for k in range(first, last):
        for j in range(m):
            beta[j] = 0.0 if columns[k, j] else -np.inf
        row_tops(cost[k], beta, 1.0, alpha, 0, n)
        for i in range(n):
            f[k, i] = -alpha[i] if abs(alpha[i]) < np.inf else 0.0
            alpha[i] = f[k, i] if rows[k, i] else -np.inf
        tops[:] = -np.inf
        raise_to(cost[k], alpha, 1.0, tops, 0, n)
        for j in range(m):
            g[k, j] = -tops[j] if abs(tops[j]) < np.inf else 0.0
