"""Triton kernels for the passes of :mod:`iotsolve.kernels.bilinear`: two of them, for every loss and every marginal.

A program keeps a tile of rows and reads all columns, so that no number is written by two programs: no atomics, and the
same bits at every run. What is asked of columns is asked with the roles exchanged. The matrix exists in registers only.

Products are in the inputs' precision and summed in float32: full float32 for float32, never a silent tf32. In the
gradient of half-precision inputs the weights are rounded to 11 bits, no more than the inputs are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["log_sums", "pull"]


@dataclass(frozen=True)
class _Tiles:
    """Rows and columns of a tile, features read at once, features of a gradient kept at once, and what the compiler is told."""

    rows: int
    columns: int
    depth: int
    width: int
    warps: int
    stages: int


# the one table: by whether inputs are in half precision, and arcs barred, which takes registers
_SUMS = {
    (True, False): _Tiles(128, 128, 64, 0, 8, 3),
    (True, True): _Tiles(128, 64, 64, 0, 8, 3),
    (False, False): _Tiles(64, 64, 32, 0, 4, 2),
    (False, True): _Tiles(32, 32, 32, 0, 4, 2),
}
_PULL = {True: _Tiles(64, 64, 64, 128, 8, 2), False: _Tiles(32, 32, 32, 64, 4, 2)}

_FREE, _MASKED, _LISTED_OWN, _LISTED_OTHERS = range(4)  # what is barred, and whose list it is


@triton.jit
def _exponents(
    X, Y, B, i, j, n, m, d, k, stride_i, stride_j,
    BARRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of ``x_i . y_j``, ``-inf`` where barred and outside."""
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, d, DEPTH):
        c = start + tl.arange(0, DEPTH)
        x = tl.load(X + i[:, None] * d + c[None, :], mask=(i[:, None] < n) & (c[None, :] < d), other=0.0)
        y = tl.load(Y + j[:, None] * d + c[None, :], mask=(j[:, None] < m) & (c[None, :] < d), other=0.0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        tile = tl.dot(x, tl.trans(y), tile, input_precision="ieee")
    inside = (i[:, None] < n) & (j[None, :] < m)
    if BARRED == 1:
        barred = tl.load(B + i[:, None] * stride_i + j[None, :] * stride_j, mask=inside, other=0)
        inside = inside & (barred == 0)
    if BARRED == 2:
        for place in range(0, k):
            c = tl.load(B + i * k + place, mask=i < n, other=-1)
            inside = inside & (j[None, :] != c[:, None])
    if BARRED == 3:
        for place in range(0, k):
            c = tl.load(B + j * k + place, mask=j < m, other=-1)
            inside = inside & (i[:, None] != c[None, :])
    return tl.where(inside, tile, float("-inf"))


@triton.jit
def _sums_kernel(
    X, Y, V, B, OUT, n, m, d, k, stride_i, stride_j,
    BARRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``log sum_j exp(v_j + x_i . y_j)``."""
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, m, COLUMNS):
        j = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        tile = _exponents(X, Y, B, i, j, n, m, d, k, stride_i, stride_j, BARRED, ROWS, COLUMNS, DEPTH, UPCAST)
        tile += tl.load(V + j, mask=j < m, other=float("-inf"))[None, :]
        higher = tl.maximum(top, tl.max(tile, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - level) + tl.sum(tl.exp(tile - level[:, None]), 1)
        top = higher
    level = tl.where(top == float("-inf"), 0.0, top)
    tl.store(OUT + i, tl.log(total) + level, mask=i < n)


@triton.jit
def _pull_kernel(
    X, Y, U, V, R, C, GR, GC, B, GX, GU, n, m, d, k, stride_i, stride_j,
    OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, BARRED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``sum_j W_ij y_j`` and ``sum_j`` of the columns' part of W, the sum of ``exp(v_j + x_i . y_j - r_i) gr_i`` and
    ``exp(u_i + x_i . y_j - c_j) gc_j``: some features of the first for each program of a row of them.
    """
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    own = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gradient = tl.zeros((ROWS, WIDTH), tl.float32)
    spread = tl.zeros((ROWS,), tl.float32)
    rows, up_rows, u = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    if OF_ROWS:
        rows = tl.load(R + i, mask=i < n, other=0.0)
        rows = tl.where(rows == float("-inf"), 0.0, rows)
        up_rows = tl.load(GR + i, mask=i < n, other=0.0)
    if OF_COLUMNS:
        u = tl.load(U + i, mask=i < n, other=float("-inf"))
    for start in range(0, m, COLUMNS):
        j = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        tile = _exponents(X, Y, B, i, j, n, m, d, k, stride_i, stride_j, BARRED, ROWS, COLUMNS, DEPTH, UPCAST)
        weights = tl.zeros((ROWS, COLUMNS), tl.float32)
        if OF_ROWS:
            v = tl.load(V + j, mask=j < m, other=float("-inf"))
            weights += tl.exp(tile + v[None, :] - rows[:, None]) * up_rows[:, None]
        if OF_COLUMNS:
            columns = tl.load(C + j, mask=j < m, other=0.0)
            columns = tl.where(columns == float("-inf"), 0.0, columns)
            up_columns = tl.load(GC + j, mask=j < m, other=0.0)
            part = tl.exp(tile + u[:, None] - columns[None, :]) * up_columns[None, :]
            spread += tl.sum(part, 1)
            weights += part
        y = tl.load(Y + j[:, None] * d + own[None, :], mask=(j[:, None] < m) & (own[None, :] < d), other=0.0).to(
            tl.float32
        )
        gradient = tl.dot(weights, y, gradient, input_precision="tf32" if HALF else "ieee")
    tl.store(GX + i[:, None] * d + own[None, :], gradient, mask=(i[:, None] < n) & (own[None, :] < d))
    if OF_COLUMNS and tl.program_id(1) == 0:
        tl.store(GU + i, spread, mask=i < n)


def log_sums(
    x: Tensor, y: Tensor, u: Tensor | None, v: Tensor | None, barred: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`iotsolve.kernels.bilinear.log_sums`, without derivatives."""
    return (
        None if v is None else _row_sums(x, y, v, barred, False),
        None if u is None else _row_sums(y, x, u, barred, True),
    )


def _row_sums(x: Tensor, y: Tensor, v: Tensor, barred: Tensor | None, turned: bool) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    (n, d), m = x.shape, len(y)
    tiles = _SUMS[x.dtype != torch.float32, barred is not None]
    out = torch.empty(n, dtype=torch.float32, device=x.device)
    which, table, k, strides = _of_barred(barred, x, turned)
    _sums_kernel[(triton.cdiv(n, tiles.rows),)](
        x, y, _single(v), table, out, n, m, d, k, *strides,
        BARRED=which, ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, UPCAST=_upcast(x),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out.to(v.dtype)


def pull(
    x: Tensor,
    y: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    barred: Tensor | None,
    sums: tuple[Tensor | None, Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None],
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives of :func:`log_sums` in ``x, y, u, v``, at its results and for upstream derivatives of any sign."""
    (r, c), (gr, gc) = sums, upstream
    rows, columns = v is not None and gr is not None, u is not None and gc is not None
    gx = gy = gu = gv = None
    if needed[0] or (needed[2] and columns):
        gx, gu = _half_pull(x, y, (u, v, r, c, gr, gc), rows, columns, barred, False)
    if needed[1] or (needed[3] and rows):
        gy, gv = _half_pull(y, x, (v, u, c, r, gc, gr), columns, rows, barred, True)
    gu, gv = gu if columns else None, gv if rows else None
    found = (z if wanted else None for z, wanted in zip((gx, gy, gu, gv), needed, strict=True))
    return tuple(None if z is None else z.to(like.dtype) for z, like in zip(found, (x, y, u, v), strict=True))


def _half_pull(
    x: Tensor,
    y: Tensor,
    given: tuple[Tensor | None, ...],
    of_rows: bool,
    of_columns: bool,
    barred: Tensor | None,
    turned: bool,
) -> tuple[Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    (n, d), m = x.shape, len(y)
    tiles = _PULL[x.dtype != torch.float32]
    gx, gu = (torch.zeros(size, dtype=torch.float32, device=x.device) for size in ((n, d), (n,)))
    which, table, k, strides = _of_barred(barred, x, turned)
    vectors = [gu if z is None else _single(z) for z in given]
    _pull_kernel[(triton.cdiv(n, tiles.rows), triton.cdiv(d, tiles.width))](
        x, y, *vectors, table, gx, gu, n, m, d, k, *strides,
        OF_ROWS=of_rows, OF_COLUMNS=of_columns, BARRED=which,
        ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, WIDTH=tiles.width, HALF=x.dtype != torch.float32,
        UPCAST=_upcast(x), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return gx, gu


def _of_barred(barred: Tensor | None, x: Tensor, turned: bool) -> tuple[int, Tensor, int, tuple[int, int]]:
    """Which kind, the table, the length of a list, and a mask's strides along own rows and others."""
    if barred is None:
        return _FREE, x, 0, (0, 0)
    if barred.dtype == torch.bool:
        strides = barred.stride()
        return _MASKED, barred.view(torch.uint8), 0, (strides[1], strides[0]) if turned else strides
    return (_LISTED_OTHERS if turned else _LISTED_OWN), barred.contiguous(), barred.shape[1], (0, 0)


def _single(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _upcast(x: Tensor) -> bool:
    """The interpreter multiplies bfloat16 as if its bits were integers."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"
