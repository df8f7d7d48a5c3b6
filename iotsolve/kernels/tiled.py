"""Triton kernels over tiles of a matrix of exponents, which exists in registers only: what ``streamed.py`` launches.

The sums of rows (asked with the roles exchanged, of columns), those of both at once where exponentials stay in range, and the
derivative; what prepares them and puts shares together; and the weights of a derivative alone.
"""

# ruff: noqa: SIM102, SIM108 - a branch on a constant is compiled or is not, and must stand alone
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "both_kernel",
    "columns_kernel",
    "finish_kernel",
    "merge_kernel",
    "pull_kernel",
    "scales_kernel",
    "sums_kernel",
    "weights_kernel",
]

_CHUNK = tl.constexpr(1024)
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(-1e30)  # the exponent of an empty sum: finite, so that differences are
_LEAST = tl.constexpr(2.0**-90)  # a sum of exponentials that is less has lost some of them


@triton.jit
def _at(X, start, count: tl.constexpr, D: tl.constexpr, c):
    """Where the features ``c`` of some rows are."""
    return X + tl.cast(start, tl.int64) * D + (tl.arange(0, count)[:, None] * D + c[None, :])


@triton.jit
def _rest(tile, X, Y, first, start, D: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of products whose features are read in parts."""
    for begin in range(0, D, DEPTH):
        c = begin + tl.arange(0, DEPTH)
        x = tl.load(_at(X, first, ROWS, D, c))
        y = tl.load(_at(Y, start, COLUMNS, D, c))
        tile = tl.dot(x, tl.trans(y), tile)
    return tile


@triton.jit
def _less_barred(
    tile, B, i, j, n, m, k, low, high, start, stride_i, stride_j, BARRED: tl.constexpr, COLUMNS: tl.constexpr
):
    """The tile, ``-inf`` where barred."""
    if BARRED == 1:
        inside = (i[:, None] < n) & (j[None, :] < m)
        where = i[:, None].to(tl.int64) * stride_i + j[None, :].to(tl.int64) * stride_j
        barred = tl.load(B + where, mask=inside, other=0)
        tile = tl.where(barred == 0, tile, float("-inf"))
    if BARRED >= 2:
        if (start <= high) & (start + COLUMNS > low):  # few tiles have any
            for place in range(0, k):
                if BARRED == 2:
                    c = tl.load(B + i.to(tl.int64) * k + place, mask=i < n, other=-1)
                    tile = tl.where(j[None, :] == c[:, None], float("-inf"), tile)
                else:
                    c = tl.load(B + j.to(tl.int64) * k + place, mask=j < m, other=-1)
                    tile = tl.where(i[:, None] == c[None, :], float("-inf"), tile)
    return tile


@triton.jit
def sums_kernel(
    X, Y, V, G, P, Q, UNIT_X, UNIT_Y, B, ENDS, OUT, DOUBT, n, m, k, stride_i, stride_j, share, epsilon,
    D: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, BARRED: tl.constexpr, DOUBTED: tl.constexpr, RAW: tl.constexpr,
    AT: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``log sum_j exp(v_j + x_i . y_j)``, of a share of the columns; if DOUBTED, only where there is doubt of what is known.

    V is padded and in units of log 2, or if RAW as it came. If AT potentials G, ``g_j / epsilon + q_j`` is added to it; and if
    the share is WHOLE, ``-epsilon (sum + p_i)`` comes out.
    """
    if DOUBTED:
        if tl.load(DOUBT) == 0:
            return
    first = tl.program_id(0) * ROWS
    i = first + tl.arange(0, ROWS)
    x = tl.load(_at(X, first, ROWS, D, tl.arange(0, DEPTH)))
    if EVEN:
        scale = tl.load(UNIT_X) * tl.load(UNIT_Y) * _LOG2E
    else:
        scale = (tl.load(UNIT_X + i) * _LOG2E)[:, None]
    low, high = 0, 0
    if BARRED >= 2:
        low, high = tl.load(ENDS + 2 * tl.program_id(0)), tl.load(ENDS + 2 * tl.program_id(0) + 1)
    top = tl.full((ROWS,), _NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    lost = tl.zeros((ROWS,), tl.float32)  # by rounding (Kahan)
    rate = _LOG2E / epsilon
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, m), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        if RAW:
            v = tl.load(V + j, mask=j < m, other=float("-inf"))
            if AT:
                v += tl.load(Q + j, mask=j < m, other=0.0)
            v = v * _LOG2E
            if AT:
                v += tl.load(G + j, mask=j < m, other=0.0) * rate
        else:
            v = tl.load(V + j)
        tile = tl.zeros((ROWS, COLUMNS), tl.float32)
        if DEPTH == D:
            tile = tl.dot(x, tl.trans(tl.load(_at(Y, start, COLUMNS, D, tl.arange(0, D)))))
        else:
            tile = _rest(tile, X, Y, first, start, D, DEPTH, ROWS, COLUMNS)
        if not EVEN:
            tile = tile * tl.load(UNIT_Y + j)[None, :]
        tile = tile * scale + v[None, :]
        tile = _less_barred(tile, B, i, j, n, m, k, low, high, start, stride_i, stride_j, BARRED, COLUMNS)
        higher = tl.maximum(top, tl.max(tile, 1))
        shrunk = tl.exp2(top - higher)
        more = tl.sum(tl.exp2(tile - higher[:, None]), 1) - lost * shrunk
        old = total * shrunk
        total = old + more
        lost = (total - old) - more
        top = higher
    out = tl.where(total > 0, (tl.log2(total) + top) * _LN2, float("-inf"))
    out = tl.where(total == total, out, total)  # NaN stays
    if AT and WHOLE:
        out = -epsilon * (out + tl.load(P + i, mask=i < n, other=0.0))
    tl.store(OUT + tl.program_id(1).to(tl.int64) * n + i, out, mask=i < n)


@triton.jit
def merge_kernel(PARTS, P, OUT, n, count, epsilon, AT: tl.constexpr, ROWS: tl.constexpr):
    """The logarithm of a sum of which shares are known by theirs; if AT potentials, what :func:`sums_kernel` makes of it."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top = tl.full((ROWS,), _NOTHING, tl.float32)
    for part in range(0, count):
        top = tl.maximum(top, tl.load(PARTS + tl.cast(part, tl.int64) * n + i, mask=i < n, other=0.0))
    total = tl.zeros((ROWS,), tl.float32)
    for part in range(0, count):
        total += tl.exp(tl.load(PARTS + tl.cast(part, tl.int64) * n + i, mask=i < n, other=0.0) - top)
    out = tl.where(total > 0, tl.log(total) + top, tl.where(total == total, float("-inf"), total))
    if AT:
        out = -epsilon * (out + tl.load(P + i, mask=i < n, other=0.0))
    tl.store(OUT + i, out, mask=i < n)


@triton.jit
def both_kernel(
    X, Y, U, V, UNIT_X, UNIT_Y, B, ENDS, OF_ROWS, OF_COLUMNS, n, m, k, stride_i, stride_j, high_n, high_m,
    per_row, per_column,
    D: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, BARRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``sum_j e^v_j E_ij`` and ``sum_i e^u_i E_ij`` of ``E = exp(x_i . y_j)``, in parts: for the columns of a program, and for
    its rows. A tile of columns stays while rows pass, and its sums are made once.
    """
    if EVEN:
        scale = tl.load(UNIT_X) * tl.load(UNIT_Y) * _LOG2E
    begin, end = tl.program_id(1) * per_row, tl.minimum(tl.program_id(1) * per_row + per_row, high_n)
    left, right = tl.program_id(0) * per_column, tl.minimum(tl.program_id(0) * per_column + per_column, high_m)
    for start in range(left, right, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        ev = tl.exp(tl.load(V + j, mask=j < m, other=float("-inf")))
        y = tl.load(_at(Y, start, COLUMNS, D, tl.arange(0, DEPTH)))
        if not EVEN:
            scale = (tl.load(UNIT_Y + j) * _LOG2E)[None, :]
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(begin, end, ROWS):
            i = first + tl.arange(0, ROWS)
            eu = tl.exp(tl.load(U + i, mask=i < n, other=float("-inf")))
            tile = tl.zeros((ROWS, COLUMNS), tl.float32)
            if DEPTH == D:
                tile = tl.dot(tl.load(_at(X, first, ROWS, D, tl.arange(0, D))), tl.trans(y))
            else:
                tile = _rest(tile, X, Y, first, start, D, DEPTH, ROWS, COLUMNS)
            tile = tile * scale
            if not EVEN:
                tile = tile * tl.load(UNIT_X + i)[:, None]
            if BARRED > 0:
                low, high = 0, 0
                if BARRED >= 2:
                    low, high = tl.load(ENDS + 2 * (first // ROWS)), tl.load(ENDS + 2 * (first // ROWS) + 1)
                tile = _less_barred(tile, B, i, j, n, m, k, low, high, start, stride_i, stride_j, BARRED, COLUMNS)
            tile = tl.exp2(tile)
            sums += tile * eu[:, None]
            into = OF_ROWS + tl.program_id(0).to(tl.int64) * high_n + i
            before = tl.load(into, mask=tl.zeros((ROWS,), tl.int32) + start > left, other=0.0)
            tl.store(into, before + tl.sum(tile * ev[None, :], 1))
        tl.store(OF_COLUMNS + tl.program_id(1).to(tl.int64) * high_m + j, tl.sum(sums, 0))
        tl.debug_barrier()  # what was stored is read by other threads of the program


@triton.jit
def finish_kernel(
    OF_ROWS, OF_COLUMNS, OUT_ROWS, OUT_COLUMNS, DOUBT, n, m, high_n, high_m, across, down, ROWS: tl.constexpr
):  # fmt: skip
    """``log`` of sums in parts, of rows and of columns, and whether one is too small or too large to be believed."""
    if tl.program_id(1) == 0:
        _finished(OF_ROWS, OUT_ROWS, DOUBT, n, high_n, across, ROWS)
    else:
        _finished(OF_COLUMNS, OUT_COLUMNS, DOUBT, m, high_m, down, ROWS)


@triton.jit
def _finished(PARTS, OUT, DOUBT, n, stride, count, ROWS: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float64)
    for part in range(0, count):
        total += tl.load(PARTS + tl.cast(part, tl.int64) * stride + i, mask=i < n, other=1.0).to(tl.float64)
    total = total.to(tl.float32)
    fine = (total > _LEAST) & (total < float("inf"))
    if tl.min(tl.where(fine | (i >= n), 1, 0)) == 0:
        tl.store(DOUBT, 1)  # by whoever finds one: all store the same
    tl.store(OUT + i, tl.log(total), mask=i < n)


@triton.jit
def _pull_columns(
    gradient, spread, x, X, Y, V, C, UP, SHARE, UNIT_Y, B, i, first, own, scale, rows, up_rows, u, ratio, begin, end,
    low, high, n, m, k, stride_i, stride_j, high_half, low_half, TOGETHER: tl.constexpr,
    OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, SPREAD: tl.constexpr, BARRED: tl.constexpr, TERMS: tl.constexpr,
    EVEN: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What some columns add to a program of :func:`pull_kernel`."""
    for start in range(begin, end, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        tile = tl.zeros((ROWS, COLUMNS), tl.float32)
        y = tl.load(_at(Y, start, COLUMNS, D, tl.arange(0, DEPTH)))
        if DEPTH == D:
            tile = tl.dot(x, tl.trans(y))
        else:
            tile = _rest(tile, X, Y, first, start, D, DEPTH, ROWS, COLUMNS)
        if not EVEN:
            tile = tile * tl.load(UNIT_Y + j)[None, :]
        each = scale
        if BARRED > 0:  # what is barred is so whatever the scale, which may be 0
            tile, each = tile * scale, 1.0
            tile = _less_barred(tile, B, i, j, n, m, k, low, high, start, stride_i, stride_j, BARRED, COLUMNS)
        v, up = 0.0, 0.0
        if OF_ROWS:
            v = tl.load(V + j)
        if OF_COLUMNS:
            up = tl.load(UP + j)
        weights, spread = _weighed(
            tile, each, C + j, v, up, u, rows, up_rows, ratio, TOGETHER, spread, OF_ROWS, OF_COLUMNS, SPREAD
        )
        if not OWN:
            y = tl.load(_at(Y, start, COLUMNS, D, high_half + own))
        if not EVEN:
            weights = weights * tl.load(SHARE + j)[None, :]
        half = weights.to(tl.float16)
        gradient = tl.dot(half, y, gradient)
        if TERMS == 3:
            gradient = tl.dot((weights - half.to(tl.float32)).to(tl.float16), y, gradient)
            gradient = tl.dot(half, tl.load(_at(Y, start, COLUMNS, D, low_half + own)), gradient)
    return gradient, spread


@triton.jit
def pull_kernel(
    X, Y, U, V, R, C, GR, UP, SHARE, UNIT_X, UNIT_Y, SCALES, B, ENDS, GX, GU,
    n, m, d, k, stride_i, stride_j, high_half, low_half, share,
    OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, SPREAD: tl.constexpr, BARRED: tl.constexpr, TERMS: tl.constexpr,
    EVEN: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, OWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``sum_j W_ij y_j`` and ``sum_j`` of the columns' part of W, the sum of ``exp(v_j + x_i . y_j - r_i) gr_i`` and
    ``exp(u_i + x_i . y_j - c_j) gc_j``: some features of the first, and a share of the columns, for each program.

    One exponential serves both parts where their ratio, a matrix of rank one, stays in range.
    """
    first = tl.program_id(0) * ROWS
    i = first + tl.arange(0, ROWS)
    own = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(_at(X, first, ROWS, D, tl.arange(0, DEPTH)))
    if EVEN:
        scale = tl.load(UNIT_X) * tl.load(UNIT_Y) * _LOG2E
    else:
        scale = (tl.load(UNIT_X + i) * _LOG2E)[:, None]
    size, widest, together = tl.load(SCALES), tl.load(SCALES + 1), True
    if OF_ROWS and OF_COLUMNS:
        together = tl.load(SCALES + 2) > 0
    norm = tl.where(size > 0, 4096.0 / size, 0.0)
    low, high = 0, 0
    if BARRED >= 2:
        low, high = tl.load(ENDS + 2 * tl.program_id(0)), tl.load(ENDS + 2 * tl.program_id(0) + 1)
    gradient = tl.zeros((ROWS, WIDTH), tl.float32)
    spread = tl.zeros((ROWS,), tl.float32)
    rows, up_rows, u, ratio = _of_row(U, R, GR, i, n, norm, widest, together, OF_ROWS, OF_COLUMNS)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, m)
    if together:  # two loops: a branch in one keeps the registers of both
        gradient, spread = _pull_columns(
            gradient, spread, x, X, Y, V, C, UP, SHARE, UNIT_Y, B, i, first, own, scale, rows, up_rows, u, ratio, begin, end,
            low, high, n, m, k, stride_i, stride_j, high_half, low_half, True,
            OF_ROWS, OF_COLUMNS, SPREAD, BARRED, TERMS, EVEN, D, DEPTH, OWN, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        gradient, spread = _pull_columns(
            gradient, spread, x, X, Y, V, C, UP, SHARE, UNIT_Y, B, i, first, own, scale, rows, up_rows, u, ratio, begin, end,
            low, high, n, m, k, stride_i, stride_j, high_half, low_half, False,
            OF_ROWS, OF_COLUMNS, SPREAD, BARRED, TERMS, EVEN, D, DEPTH, OWN, ROWS, COLUMNS,
        )  # fmt: skip
    back = size / 4096.0
    place = tl.program_id(2).to(tl.int64) * n + i
    into = GX + place[:, None] * d + own[None, :]
    tl.store(into, gradient * (back * tl.load(SCALES + 3)), mask=(i[:, None] < n) & (own[None, :] < d))
    if SPREAD and tl.program_id(1) == 0:
        tl.store(GU + place, spread * back, mask=i < n)


@triton.jit
def weights_kernel(
    X, Y, U, V, R, C, GR, UP, UNIT_X, UNIT_Y, SCALES, B, ENDS, HIGH, LOW, n, m, k, stride_i, stride_j, top, left, width,
    OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, BARRED: tl.constexpr, TERMS: tl.constexpr, EVEN: tl.constexpr,
    D: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weights of :func:`pull_kernel` as float16, and what that leaves, of a block; 0 beyond the last point. Programs that
    run together share rows and columns.
    """
    first, start = top + tl.program_id(0) * ROWS, left + tl.program_id(1) * COLUMNS
    i, j = first + tl.arange(0, ROWS), start + tl.arange(0, COLUMNS)
    tile = _rest(tl.zeros((ROWS, COLUMNS), tl.float32), X, Y, first, start, D, DEPTH, ROWS, COLUMNS)
    if EVEN:
        tile = tile * (tl.load(UNIT_X) * tl.load(UNIT_Y) * _LOG2E)
    else:
        tile = tile * tl.load(UNIT_Y + j)[None, :] * (tl.load(UNIT_X + i) * _LOG2E)[:, None]
    low, high = 0, 0
    if BARRED >= 2:
        low, high = tl.load(ENDS + 2 * (first // ROWS)), tl.load(ENDS + 2 * (first // ROWS) + 1)
    tile = _less_barred(tile, B, i, j, n, m, k, low, high, start, stride_i, stride_j, BARRED, COLUMNS)
    size, widest, together = tl.load(SCALES), tl.load(SCALES + 1), tl.load(SCALES + 2) > 0
    norm = tl.where(size > 0, 4096.0 / size, 0.0)
    rows, up_rows, u, ratio = _of_row(U, R, GR, i, n, norm, widest, together, OF_ROWS, OF_COLUMNS)
    v, up, spread = 0.0, 0.0, 0.0
    if OF_ROWS:
        v = tl.load(V + j)
    if OF_COLUMNS:
        up = tl.load(UP + j)
    weights, spread = _weighed(tile, 1.0, C + j, v, up, u, rows, up_rows, ratio, together, spread, OF_ROWS, OF_COLUMNS, False)
    weights = tl.where((i[:, None] < n) & (j[None, :] < m), weights, 0.0)
    half = weights.to(tl.float16)
    at = (i - top)[:, None].to(tl.int64) * width + (j - left)[None, :]
    tl.store(HIGH + at, half)
    if TERMS == 3:
        tl.store(LOW + at, (weights - half.to(tl.float32)).to(tl.float16))


@triton.jit
def _of_row(U, R, GR, i, n, norm, widest, together, OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr):
    """What the weights of a row depend on, in units of log 2."""
    rows, up_rows, u, ratio = 0.0, 0.0, 0.0, 0.0
    if OF_ROWS:
        rows = _held(tl.load(R + i, mask=i < n, other=0.0)) * _LOG2E
        up_rows = tl.load(GR + i, mask=i < n, other=0.0) * norm
    if OF_COLUMNS:
        u = tl.load(U + i, mask=i < n, other=float("-inf")) * _LOG2E
    if OF_ROWS and OF_COLUMNS:
        ratio = tl.exp2(tl.where(together, u + rows + widest, float("-inf")))
    return rows, up_rows, u, ratio


@triton.jit
def _weighed(
    tile, scale, C, v, up, u, rows, up_rows, ratio, together, spread,
    OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Weights of a tile of exponents over their ``scale``, and the sums of the columns' part of them."""
    if OF_ROWS and OF_COLUMNS:
        if together:
            weights = tl.exp2(tile * scale + v[None, :] - rows[:, None])
            part = ratio[:, None] * up[None, :]
            if SPREAD:
                spread += tl.sum(weights * part, 1)
            weights = weights * (part + up_rows[:, None])
        else:
            part = tl.exp2(tile * scale + tl.load(C)[None, :] + u[:, None]) * up[None, :]
            if SPREAD:
                spread += tl.sum(part, 1)
            weights = part + tl.exp2(tile * scale + v[None, :] - rows[:, None]) * up_rows[:, None]
    elif OF_ROWS:
        weights = tl.exp2(tile * scale + v[None, :] - rows[:, None]) * up_rows[:, None]
    else:
        weights = tl.exp2(tile * scale + tl.load(C)[None, :] + u[:, None]) * up[None, :]
        if SPREAD:
            spread += tl.sum(weights, 1)
    return weights, spread


@triton.jit
def _held(x):
    """0 for the logarithm of nothing: what is divided by it is nothing too."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def scales_kernel(
    U, V, R, C, GR, GC, UNIT, SCALES, LOG_V, LESS_C, UP, SHARE, n, m, high,
    OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, EVEN: tl.constexpr, WITH_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest upstream derivative, the largest ``-c_j - v_j``, whether one exponential can serve both parts, and the largest
    unit of a column that carries anything; of few columns also what :func:`columns_kernel` makes.
    """
    at = tl.arange(0, BLOCK)
    size = tl.zeros((BLOCK,), tl.float32)
    widest, tallest = tl.full((BLOCK,), _NOTHING, tl.float32), tl.full((BLOCK,), _NOTHING, tl.float32)
    if OF_ROWS:
        for start in range(0, n, BLOCK):
            inside = start + at < n
            size = tl.maximum(size, tl.abs(tl.load(GR + start + at, mask=inside, other=0.0)))
            if OF_COLUMNS:
                tall = tl.load(U + start + at, mask=inside, other=_NOTHING)
                tallest = tl.maximum(tallest, tall + _held(tl.load(R + start + at, mask=inside, other=0.0)))
    if OF_COLUMNS:
        for start in range(0, m, BLOCK):
            inside = start + at < m
            size = tl.maximum(size, tl.abs(tl.load(GC + start + at, mask=inside, other=0.0)))
            if OF_ROWS:
                wide = -tl.load(V + start + at, mask=inside, other=-_NOTHING)
                widest = tl.maximum(widest, wide - _held(tl.load(C + start + at, mask=inside, other=0.0)))
    largest = tl.max(size, 0)
    wide, tall = tl.max(widest, 0) * _LOG2E, tl.max(tallest, 0) * _LOG2E
    together = wide + tall < 86.0
    tl.store(SCALES, largest)
    tl.store(SCALES + 1, wide)
    tl.store(SCALES + 2, tl.where(together, 1.0, 0.0))
    most = 1.0
    if EVEN:
        tl.store(SCALES + 3, tl.load(UNIT))
    else:
        unit = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, m, BLOCK):
            carries = _carries(V, GC, start + at, m, OF_ROWS, OF_COLUMNS)
            unit = tl.maximum(unit, tl.where(carries, tl.load(UNIT + start + at, mask=start + at < m, other=0.0), 0.0))
        most = tl.max(unit, 0)
        tl.store(SCALES + 3, most)
    if WITH_COLUMNS:
        for start in range(0, high, _CHUNK):
            j = start + tl.arange(0, _CHUNK)
            _column(
                V, C, GC, UNIT, LOG_V, LESS_C, UP, SHARE, j, m, high, largest, wide, together, most, OF_ROWS, OF_COLUMNS, EVEN
            )


@triton.jit
def _carries(V, GC, j, m, OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr):
    """Which columns a derivative may have something of."""
    found = j < 0
    if OF_ROWS:
        found = found | (tl.load(V + j, mask=j < m, other=float("-inf")) > float("-inf"))
    if OF_COLUMNS:
        found = found | (tl.load(GC + j, mask=j < m, other=0.0) != 0)
    return found


@triton.jit
def columns_kernel(
    V, C, GC, UNIT, SCALES, LOG_V, LESS_C, UP, SHARE, m,
    OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a loop over columns reads of each, in units of log 2, padded with what adds nothing."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size, widest, together, most = 0.0, 0.0, True, 1.0
    if OF_COLUMNS:
        size, widest, together = tl.load(SCALES), tl.load(SCALES + 1), tl.load(SCALES + 2) > 0
    if not EVEN:
        most = tl.load(SCALES + 3)
    high = tl.num_programs(0) * BLOCK
    _column(V, C, GC, UNIT, LOG_V, LESS_C, UP, SHARE, j, m, high, size, widest, together, most, OF_ROWS, OF_COLUMNS, EVEN)


@triton.jit
def _column(
    V, C, GC, UNIT, LOG_V, LESS_C, UP, SHARE, j, m, high, size, widest, together, most,
    OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    if not EVEN:
        carries = _carries(V, GC, j, m, OF_ROWS, OF_COLUMNS)
        unit = tl.load(UNIT + j, mask=j < high, other=0.0)
        tl.store(SHARE + j, tl.where(carries, unit / most, 0.0), mask=j < high)
    if OF_ROWS:
        v = tl.load(V + j, mask=j < m, other=float("-inf")) * _LOG2E
        tl.store(LOG_V + j, v, mask=j < high)
    if OF_COLUMNS:
        c = _held(tl.load(C + j, mask=j < m, other=0.0)) * _LOG2E
        up = tl.load(GC + j, mask=j < m, other=0.0) * tl.where(size > 0, 4096.0 / size, 0.0)
        tl.store(LESS_C + j, -c, mask=j < high)
        if OF_ROWS:
            up = tl.where(together, up * tl.exp2(-c - tl.where(j < m, v, 0.0) - widest), up)
        tl.store(UP + j, up, mask=j < high)
