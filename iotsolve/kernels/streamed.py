"""Triton kernels for the passes of :mod:`iotsolve.kernels.bilinear`: one family, for every loss and every marginal.

The matrix of exponents exists in registers only, and no number is written by two programs: no atomics, and the same bits at
every run. There are three passes: the sums of rows (asked with the roles exchanged, of columns), the sums of both at once
where exponentials stay in range, and the derivative.

Products are made by tensor cores from numbers in float16, of which a power of two for each point has brought the largest into
its range, and summed in float32. One such number holds bfloat16 and float16 as they are; two hold 22 of float32's 24 bits,
at three products for one. Nothing is ever rounded to tf32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from iotsolve.kernels import tiled
from iotsolve.kernels.halves import PADDED, Halved, cdiv, directions, halved, pull_directions
from iotsolve.kernels.precision import in_full

__all__ = ["cross_entropies", "log_sums", "pull", "pull_cross_entropies", "soft_minimum"]


@dataclass(frozen=True)
class _Tiles:
    """Rows and columns of a tile, features read at once (0: all, and then a program's own only once), features of a gradient
    kept at once, and what the compiler is told.
    """

    rows: int
    columns: int
    depth: int
    width: int
    warps: int
    stages: int
    resident: int = 1
    """Programs that a multiprocessor has room for."""

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# the one table: of each pass, tiles for so many features (of all products) or fewer
_TABLE = {
    "sums": {
        128: _Tiles(128, 128, 0, 0, 8, 2, 2),
        10**9: _Tiles(128, 256, 64, 0, 8, 3),
    },
    "both": {
        128: _Tiles(64, 128, 0, 0, 4, 3, 2),
        256: _Tiles(64, 64, 0, 0, 4, 2, 2),
        10**9: _Tiles(128, 128, 64, 0, 8, 3, 2),
    },
    "pull": {
        128: _Tiles(64, 64, 0, 128, 4, 4, 2),
        256: _Tiles(64, 64, 0, 256, 4, 2),
        512: _Tiles(64, 64, 0, 512, 8, 2),
        10**9: _Tiles(64, 128, 64, 256, 8, 3),
    },
    "pull of three": {
        256: _Tiles(128, 64, 0, 64, 8, 2),
        1024: _Tiles(64, 64, 64, 128, 4, 4, 2),
        10**9: _Tiles(128, 32, 64, 256, 8, 2),
    },
    "weights": {10**9: _Tiles(128, 128, 64, 0, 8, 3)},
}
_ROOM = 224 * 1024  # bytes that the programs of a multiprocessor share, which these tiles need; and for any less:
_SMALL_TABLE = {
    "sums": {128: _Tiles(64, 64, 0, 0, 4, 2, 2), 10**9: _Tiles(64, 64, 64, 0, 4, 2, 2)},
    "both": {128: _Tiles(64, 64, 0, 0, 4, 2, 2), 10**9: _Tiles(64, 64, 64, 0, 4, 2, 2)},
    "pull": {128: _Tiles(64, 64, 0, 128, 4, 2), 10**9: _Tiles(64, 64, 64, 128, 4, 2)},
    "pull of three": {128: _Tiles(64, 64, 0, 64, 4, 2), 10**9: _Tiles(64, 64, 64, 64, 4, 2)},
    "weights": {10**9: _Tiles(64, 64, 64, 0, 4, 2)},
}
_BARRED_TILES = (  # nothing barred, a mask, which takes registers, and lists
    {},
    {"sums": (64, 64), "both": (64, 64), "pull": (64, 32), "pull of three": (64, 32), "weights": (64, 64)},
    *2 * ({"both": (64, 64)},),
)
_MOST = 8  # programs that share a row
_ALONE = 2**15  # columns that one program can be left alone with
_JOINED = 2**14  # columns up to which a potential is read where exponents are made
_WIDE = 512, 256  # features beyond which derivatives are made of stored weights; the second of large matrices of one term
_SCRATCH = 2**25, 2**26  # weights stored at a time; the second of large matrices
_LARGE = 2**28  # entries of these, with which a device is longer at work than a CPU at asking
_STRIPES = 32  # of columns, for each of which a sum of every row is kept
_SAFE = 60.0  # exponents up to which, of either sign, plain exponentials and their sums stay in range

_FREE, _MASKED, _LISTED_OWN, _LISTED_OTHERS = range(4)  # what is barred, and whose list it is


def log_sums(
    x: Tensor,
    y: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    barred: Tensor | None,
    *,
    precise: bool = True,
    even: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`iotsolve.kernels.bilinear.log_sums`, without derivatives.

    Args:
        precise: products of 22 bits of a number, or of 11.
        even: the points of a cloud are about as large as each other, and share their power of two.
    """
    rows = None if v is None else x.new_empty(len(x), dtype=torch.float32)
    columns = None if u is None else x.new_empty(len(y), dtype=torch.float32)
    _sums(halved(x, precise, True, even), halved(y, precise, False, even), u, v, barred, rows, columns)
    return None if v is None else rows.to(v.dtype), None if u is None else columns.to(u.dtype)


def _sums(
    x: Halved,
    y: Halved,
    u: Tensor | None,
    v: Tensor | None,
    barred: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    sure: bool = False,
) -> None:
    """The sums of rows, of columns, or of both, into what is given for them; ``sure``: plain exponentials stay in range."""
    doubt = None
    if rows is not None and columns is not None:
        doubt = _both_sums(x, y, _single(u), _single(v), barred, rows, columns)
        if sure:
            return
    if rows is not None:
        _row_sums(x, y, _single(v), barred, False, rows, doubt)
    if columns is not None:
        _row_sums(y, x, _single(u), barred, True, columns, doubt)


def soft_minimum(
    x: Tensor,
    y: Tensor,
    logs: Tensor,
    potential: Tensor,
    p: Tensor,
    q: Tensor,
    barred: Tensor | None,
    epsilon: float,
    *,
    turned: bool,
    precise: bool = True,
    even: bool = False,
) -> Tensor:
    """``-epsilon (log sum_j exp(logs_j + potential_j / epsilon + x_i . y_j + q_j) + p_i)``; if ``turned``, of columns, with the
    roles of all exchanged. Without derivatives, and for few points by two launches.
    """
    given = halved(x, precise, True, even), halved(y, precise, False, even)
    if turned:
        given, p, q = given[::-1], q, p
    out = torch.empty_like(p)
    if len(logs) > min(_JOINED, _ALONE):
        _row_sums(*given, _single(torch.add(logs, potential, alpha=1.0 / epsilon).add_(q)), barred, turned, out, None)
        return out.add_(p).mul_(-epsilon)
    _row_sums(*given, _single(logs), barred, turned, out, None, (_single(potential), p, q, epsilon))
    return out


def _row_sums(
    x: Halved,
    y: Halved,
    v: Tensor,
    barred: Tensor | None,
    turned: bool,
    out: Tensor,
    doubt: Tensor | None,
    at: tuple[Tensor, Tensor, Tensor, float] | None = None,
) -> None:
    """The sums of rows into ``out``, or ``at`` potentials, with what comes to these and epsilon, soft-minima."""
    found, n, m = _Barred.of(barred, turned), len(out), len(v)
    tiles = _tiles("sums", x, found.kind)
    down, doubted = cdiv(n, tiles.rows), doubt is not None
    share, shares = (len(y.numbers), 1) if doubted else _shared(m, tiles, down, v.device)
    parts, raw = out if shares == 1 else out.new_empty(shares, n), doubted or m <= _ALONE
    doubt = doubt if doubted else x.unit
    if not raw:
        log_v = v.new_empty(len(y.numbers))
        tiled.columns_kernel[(len(y.numbers) // PADDED,)](
            v, v, v, v, v, log_v, v, v, v, m, OF_ROWS=True, OF_COLUMNS=False, EVEN=True, BLOCK=PADDED
        )
        v = log_v
    g, p, q, epsilon = (v, v, v, 1.0) if at is None else at
    tiled.sums_kernel[(down, shares)](
        x.numbers, y.numbers, v, g, p, q, x.unit, y.unit, *found.tables(len(x.numbers), tiles.rows, x.unit), parts, doubt, n, m,
        *found.strides, share, epsilon, D=x.features, DEPTH=tiles.depth or x.features, EVEN=x.even, BARRED=found.kind,
        DOUBTED=doubted, RAW=raw, AT=at is not None, WHOLE=shares == 1, ROWS=tiles.rows, COLUMNS=tiles.columns, **tiles.options,
    )  # fmt: skip
    if shares > 1:
        tiled.merge_kernel[(cdiv(n, 256),)](parts, p, out, n, shares, epsilon, AT=at is not None, ROWS=256)


def _both_sums(
    x: Halved, y: Halved, u: Tensor, v: Tensor, barred: Tensor | None, rows: Tensor, columns: Tensor
) -> Tensor:
    """Sums of both sides where plain exponentials stay in range; whether they did not is returned."""
    found, n, m = _Barred.of(barred, False), len(u), len(v)
    tiles = _tiles("both", x, found.kind)
    high_n, high_m = len(x.numbers), len(y.numbers)
    per_column, across = _shares(high_m // tiles.columns, _STRIPES)
    per_row, down = _shares(high_n // tiles.rows, max(1, tiles.resident * _processors(u.device) // across))
    of_rows, of_columns = (
        torch.empty(size, dtype=torch.float32, device=u.device) for size in ((across, high_n), (down, high_m))
    )
    doubt = torch.zeros((), dtype=torch.int32, device=u.device)
    tiled.both_kernel[(across, down)](
        x.numbers, y.numbers, u, v, x.unit, y.unit, *found.tables(high_n, tiles.rows, x.unit), of_rows, of_columns, n, m,
        *found.strides, high_n, high_m, per_row * tiles.rows, per_column * tiles.columns, D=x.features,
        DEPTH=tiles.depth or x.features, EVEN=x.even, BARRED=found.kind, ROWS=tiles.rows, COLUMNS=tiles.columns,
        **tiles.options,
    )  # fmt: skip
    tiled.finish_kernel[(cdiv(max(n, m), 256), 2)](
        of_rows, of_columns, rows, columns, doubt, n, m, high_n, high_m, across, down, ROWS=256
    )
    return doubt


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _shared(columns: int, tiles: _Tiles, programs: int, device: torch.device) -> tuple[int, int]:
    """The columns of a program, and how many share a row, where there are few rows for a whole device."""
    each, shares = _shares(
        cdiv(columns, tiles.columns), max(1, min(_MOST, tiles.resident * _processors(device) // programs))
    )
    return each * tiles.columns, shares


def _shares(tiles: int, programs: int) -> tuple[int, int]:
    """Tiles for each of about so many programs, and how many those are."""
    each = cdiv(tiles, min(tiles, programs))
    return each, cdiv(tiles, each)


def pull(
    x: Tensor,
    y: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    barred: Tensor | None,
    sums: tuple[Tensor | None, Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None],
    needed: tuple[bool, bool, bool, bool],
    *,
    precise: bool = True,
    even: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives of :func:`log_sums` in ``x, y, u, v``, at its results and for upstream derivatives of any sign."""
    (r, c), (gr, gc) = sums, upstream
    rows, columns = v is not None and gr is not None, u is not None and gc is not None
    given = halved(x, precise, True, even), halved(y, precise, False, even)
    of_weights = needed[2] and columns, needed[3] and rows
    gx, gy, gu, gv = _pulled(
        *given, x.shape[1], (u, v, r, c, gr, gc), (rows, columns), needed[:2], of_weights, (len(x), len(y)), barred
    )
    found = (z if wanted else None for z, wanted in zip((gx, gy, gu, gv), (*needed[:2], *of_weights), strict=True))
    found = [None if z is None else z[0] if len(z) == 1 else z.sum(0) for z in found]
    return tuple(None if z is None else z.to(like.dtype) for z, like in zip(found, (x, y, u, v), strict=True))


def cross_entropies(
    x: Tensor, y: Tensor, epsilon: float | Tensor, *, both: bool, precise: bool
) -> tuple[Tensor, tuple[Any, ...]]:
    """As of :func:`iotsolve.kernels.directions.cross_entropies`, and what their derivative has to know."""
    one, other, less, pairs = directions(x, y, epsilon, precise)
    even = x.new_zeros(len(x), dtype=torch.float32)
    sums = torch.empty(1 + both, len(x), dtype=torch.float32, device=x.device)
    sure = not isinstance(epsilon, Tensor) and epsilon * _SAFE >= 1.0  # cosines over epsilon
    _sums(one, other, even if both else None, even, None, sums[0], sums[1] if both else None, sure)
    return sums - pairs, (one, other, less, pairs, even, sums)


def pull_cross_entropies(
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    known: tuple[Any, ...],
    up: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives in ``x``, ``y`` and ``epsilon`` at upstream derivatives of the shape of the result."""
    one, other, less, pairs, even, sums = known
    up, both, (n, d) = _single(up), len(up) == 2, x.shape
    u, c, gc = (even, sums[1], up[1]) if both else (None, None, None)
    vectors, wanted = (u, even, sums[0], c, up[0], gc), (needed[0] or needed[2], needed[1])
    gx, gy, _, _ = _pulled(one, other, d, vectors, (True, both), wanted, (False, False), (n, n), None)
    gx, gy, rates = pull_directions(x, y, epsilon, less, pairs, (gx, gy), up)
    return gx, gy, rates.sum() / epsilon if needed[2] else None


def _pulled(
    x: Halved,
    y: Halved,
    d: int,
    vectors: tuple[Tensor | None, ...],
    parts: tuple[bool, bool],
    of_points: tuple[bool, bool],
    of_weights: tuple[bool, bool],
    sizes: tuple[int, int],
    barred: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Derivatives in the points of both sides and in their weights, as asked for, in shares that are to be added up.

    Args:
        d: features of a point.
        vectors: u, v, the sums of rows and of columns, and the upstream derivatives of both.
        parts: whether these have a part of the rows' sums, and of the columns'.
    """
    n, m = sizes
    if _is_wide(x, n * m) and any(parts) and not any(of_weights):
        return *_wide_pull(x, y, (n, m, d), vectors, parts, of_points, _Barred.of(barred, False)), None, None
    u, v, r, c, gr, gc = vectors
    gx = gy = gu = gv = None
    if of_points[0] or of_weights[0]:
        gx, gu = _half_pull(x, y, (n, m, d), vectors, parts, of_weights[0], _Barred.of(barred, False))
    if of_points[1] or of_weights[1]:
        turned, sides = (v, u, c, r, gc, gr), parts[::-1]
        gy, gv = _half_pull(y, x, (m, n, d), turned, sides, of_weights[1], _Barred.of(barred, True))
    return gx, gy, gu, gv


def _is_wide(x: Halved, entries: int) -> bool:
    """Whether a tile cannot well hold what the derivatives of so many features add up to."""
    return x.features > _WIDE[x.terms == 1 and entries >= _LARGE] and _stores_well(x.numbers.device)


@cache
def _stores_well(device: torch.device) -> bool:
    """Whether stored weights give there what tiles give; torch before 2.8 makes no float32 products of float16 matrices."""
    draw = torch.Generator("cpu").manual_seed(0)
    sizes = (40, 9), (70, 9), 40, 70, 40, 70
    x, y, u, v, gr, gc = (torch.randn(size, generator=draw, device="cpu").to(device) for size in sizes)
    given = halved(x, True, True, False), halved(y, True, False, False)
    vectors = (u, v, *log_sums(x, y, u, v, None), gr, gc)
    try:
        found = _wide_pull(*given, (40, 70, 9), vectors, (True, True), (True, True), _Barred.of(None, False))
    except Exception:  # whatever a compiler, a driver or an older torch may raise: tiles serve too
        return False
    turned = [vectors[k] for k in (1, 0, 3, 2, 5, 4)]
    expected = (
        _half_pull(*given, (40, 70, 9), vectors, (True, True), False, _Barred.of(None, False)),
        _half_pull(*given[::-1], (70, 40, 9), turned, (True, True), False, _Barred.of(None, True)),
    )
    return all(torch.allclose(a[0], b.sum(0), rtol=1e-4, atol=1e-5) for a, (b, _) in zip(found, expected, strict=True))


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """``into + a b`` of matrices in half precision, in place and in float32."""
    if into.device.type == "cuda":
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    else:
        into += a.float() @ b.float()


def _wide_pull(
    x: Halved,
    y: Halved,
    shape: tuple[int, int, int],
    vectors: tuple[Tensor | None, ...],
    parts: tuple[bool, bool],
    needed: tuple[bool, bool],
    barred: _Barred,
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`_half_pull` of both sides, of points with many features: the weights of some rows are made once and for both, and
    their products with points are torch's.
    """
    n, m, d = shape
    high_n, high_m = len(x.numbers), len(y.numbers)
    which = {"OF_ROWS": parts[0], "OF_COLUMNS": parts[1], "EVEN": x.even}
    (u, log_v, r, less_c, gr, up, of_y), scales = _prepared(x, y, (n, m), vectors, which)
    of_x, unit_x = None, x.unit[0]
    if not x.even:
        v_u = [vectors[k] for k in (1, 0, 3, 2, 5, 4)]
        turned = {"OF_ROWS": parts[1], "OF_COLUMNS": parts[0], "EVEN": False}
        (*_, of_x), other = _prepared(y, x, (m, n), v_u, turned)
        unit_x = other[3]
    back = scales[0] / 4096.0

    def parts_of(z: Halved, share: Tensor | None) -> list[Tensor]:
        """The first halves of a cloud's numbers, and the second, in its largest unit."""
        cut = [z.numbers[:, start : start + z.width] for start in z.halves[: 1 if z.terms == 1 else 2]]
        return cut if share is None else [numbers * share.half()[:, None] for numbers in cut]

    own, others = parts_of(x, of_x), parts_of(y, None if x.even else of_y)
    gx, gy = (
        z.unit.new_zeros(len(z.numbers), z.width) if wanted else None for z, wanted in zip((x, y), needed, strict=True)
    )
    down, across = _blocks(high_n, high_m)
    high = torch.empty(down * across, dtype=torch.float16, device=x.unit.device)
    low = torch.empty_like(high) if x.terms == 3 else high
    tiles = _tiles("weights", x, barred.kind)
    table = barred.tables(high_n, tiles.rows, x.unit)
    with in_full():
        for top, left in product(range(0, high_n, down), range(0, high_m, across)):
            rows, columns = slice(top, min(top + down, high_n)), slice(left, min(left + across, high_m))
            size = rows.stop - top, columns.stop - left
            tiled.weights_kernel[(size[0] // tiles.rows, size[1] // tiles.columns)](
                x.numbers, y.numbers, u, log_v, r, less_c, gr, up, x.unit, y.unit, scales, *table, high, low, n, m,
                *barred.strides, top, left, size[1], **which, BARRED=barred.kind, TERMS=x.terms, D=x.features,
                DEPTH=min(tiles.depth, x.features), ROWS=tiles.rows, COLUMNS=tiles.columns, **tiles.options,
            )  # fmt: skip
            weights = [w[: math.prod(size)].view(size) for w in (high, low)]
            for k, w in ((0, 0), (0, 1), (1, 0))[: x.terms]:  # which halves; that of the two rests is nothing
                if needed[0]:
                    _add_product(gx[rows], weights[w], others[k][columns])
                if needed[1]:
                    _add_product(gy[columns], weights[w].mT, own[k][rows])
    sides = (gx, scales[3], n), (gy, unit_x, m)
    return tuple(None if z is None else z.mul_(back * unit)[:size, :d].contiguous()[None] for z, unit, size in sides)


def _blocks(n: int, m: int) -> tuple[int, int]:
    """Rows and columns of a block of weights: so that what is added up is read as seldom as there is room for."""
    count = cdiv(n * m, _SCRATCH[n * m >= _LARGE])
    down = min(max(1, round(math.sqrt(count * n / m))), count)
    return tuple(cdiv(size, parts * PADDED) * PADDED for size, parts in ((n, down), (m, cdiv(count, down))))


def _prepared(
    x: Halved, y: Halved, sizes: tuple[int, int], vectors: Sequence[Tensor | None], which: dict[str, bool]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What a pass reads of every row and of every column, and the scales of it all."""
    n, m = sizes
    high, device = len(y.numbers), x.unit.device
    scales = torch.empty(4, dtype=torch.float32, device=device)
    log_v, less_c, up, each = torch.empty(4, high, dtype=torch.float32, device=device)
    u, v, r, c, gr, gc = (scales if z is None else _single(z) for z in vectors)
    alone = m <= _ALONE
    tiled.scales_kernel[(1,)](
        u, v, r, c, gr, gc, y.unit, scales, log_v, less_c, up, each, n, m, high, **which, WITH_COLUMNS=alone, BLOCK=4096
    )
    if not alone:
        tiled.columns_kernel[(high // PADDED,)](
            v, c, gc, y.unit, scales, log_v, less_c, up, each, m, **which, BLOCK=PADDED
        )
    return (u, log_v, r, less_c, gr, up, each), scales


def _half_pull(
    x: Halved,
    y: Halved,
    shape: tuple[int, int, int],
    vectors: tuple[Tensor | None, ...],
    parts: tuple[bool, bool],
    spread: bool,
    barred: _Barred,
) -> tuple[Tensor, Tensor]:
    """Derivatives in the points and weights of one side, in shares that are to be added up."""
    n, m, d = shape
    if not any(parts):
        return x.unit.new_zeros(1, n, d), x.unit.new_zeros(1, n)
    which = {"OF_ROWS": parts[0], "OF_COLUMNS": parts[1], "EVEN": x.even}
    tiles = _tiles("pull" if x.terms == 1 else "pull of three", x, barred.kind)
    depth, width = tiles.depth or x.features, min(tiles.width, y.width & -y.width)  # a divisor
    grid = cdiv(n, tiles.rows), cdiv(d, width)
    share, shares = _shared(m, tiles, grid[0] * grid[1], x.unit.device)
    gx, gu = x.unit.new_empty(shares, n, d), x.unit.new_empty(shares, n)
    (u, log_v, r, less_c, gr, up, each), scales = _prepared(x, y, (n, m), vectors, which)
    tiled.pull_kernel[(*grid, shares)](
        x.numbers, y.numbers, u, log_v, r, less_c, gr, up, each, x.unit, y.unit, scales,
        *barred.tables(len(x.numbers), tiles.rows, x.unit), gx, gu, n, m, d, *barred.strides, *y.halves, share, **which,
        SPREAD=parts[1] and spread, BARRED=barred.kind, TERMS=x.terms, D=x.features, DEPTH=depth,
        OWN=depth == x.features == width, ROWS=tiles.rows, COLUMNS=tiles.columns, WIDTH=width, **tiles.options,
    )  # fmt: skip
    return gx, gu


def _tiles(which: str, x: Halved, kind: int) -> _Tiles:
    odd = x.features & (x.features - 1)  # no power of two, as numbers read at once have to be
    table = (_SMALL_TABLE if _is_small(x.numbers.device) else _TABLE)[which]
    found = next(tiles for most, tiles in table.items() if x.features <= most and (tiles.depth or not odd))
    if which == "both" and not x.even:  # a factor for each point takes registers
        found = replace(found, columns=min(64, found.columns))
    if which in _BARRED_TILES[kind]:
        rows, columns = _BARRED_TILES[kind][which]
        found = replace(found, rows=min(rows, found.rows), columns=min(columns, found.columns))
    return found


@cache
def _is_small(device: torch.device) -> bool:
    """Whether the larger tiles do not fit, as on GPUs that are not a data centre's."""
    if device.type != "cuda":
        return False
    known = torch.cuda.get_device_properties(device)
    return getattr(known, "shared_memory_per_block_optin", _ROOM if known.major in (9, 10) else 0) < _ROOM


def _single(x: Tensor) -> Tensor:
    return x.float().contiguous()


@dataclass(frozen=True)
class _Barred:
    """What is barred, as kernels read it.

    Attributes:
        kind: nothing, a mask, or lists, of the program's own rows or of the others.
        table: the mask or the lists.
        strides: length of a list, and a mask's strides along own rows and others.
    """

    kind: int
    table: Tensor | None
    strides: tuple[int, int, int]

    @staticmethod
    def of(barred: Tensor | None, turned: bool) -> _Barred:
        """For a pass over rows or, ``turned``, over columns."""
        if barred is None:
            return _Barred(_FREE, None, (0, 0, 0))
        if barred.dtype == torch.bool:
            strides = barred.stride()
            return _Barred(_MASKED, barred.view(torch.uint8), (0, *(strides[::-1] if turned else strides)))
        return _Barred(_LISTED_OTHERS if turned else _LISTED_OWN, barred.contiguous(), (barred.shape[1], 0, 0))

    def tables(self, n: int, rows: int, nothing: Tensor) -> tuple[Tensor, Tensor]:
        """The table, and for lists first and last of the others that are barred to one of the rows of a tile."""
        if self.kind in (_FREE, _MASKED):
            return nothing if self.table is None else self.table, nothing
        if self.table.is_inference():
            return self.table, self._ends(n, rows)
        key, known = (self.table._version, self.kind, n, rows), _ENDS.setdefault(self.table, {})
        if key not in known:
            known[key] = self._ends(n, rows)
        return self.table, known[key]

    def _ends(self, n: int, rows: int) -> Tensor:
        lister = torch.arange(len(self.table), device=self.table.device)[:, None].expand_as(self.table)
        own, other = (lister, self.table) if self.kind == _LISTED_OWN else (self.table, lister)
        tile, other = (own // rows).flatten(), other.flatten()
        ends = (
            torch.full((cdiv(n, rows),), start, device=own.device).scatter_reduce(0, tile, other, how)
            for start, how in ((2**31 - 1, "amin"), (-1, "amax"))
        )
        return torch.stack(list(ends), 1).int()


_ENDS: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a solver comes back with the same lists
