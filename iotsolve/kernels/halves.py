"""Points as tensor cores read them: numbers in float16, times powers of two that bring them into its range.

One such number holds bfloat16 and float16 as they are; two hold 22 of float32's 24 bits, at three products for one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["PADDED", "Halved", "cdiv", "directions", "halved", "power_of_2", "pull_directions"]

PADDED = 256  # rows come in multiples of this, as every tile divides it
_WHOLE = 256, 128  # features up to which their number is a power of two: of one term, and of three
_PART = 64  # of more features, what they are a multiple of
_UNIT = tl.constexpr(2.0**13)  # brings numbers up to 1 into float16's range


def cdiv(whole: int, part: int) -> int:
    """How many parts make up the whole. Triton's own functions of sizes take a CPU longer than some launches."""
    return -(-whole // part)


def power_of_2(size: int) -> int:
    """The least that is no less than the size."""
    return 1 << (size - 1).bit_length()


@triton.jit
def _store_halves(x, into, WIDTH: tl.constexpr, TERMS: tl.constexpr, FIRST: tl.constexpr):
    high = x.to(tl.float16)
    if TERMS == 3:  # (l, h, h) against (h, l, h): every product but that of the two rests, the largest last
        low = (x - high.to(tl.float32)).to(tl.float16)
        tl.store(into, low if FIRST else high)
        tl.store(into + WIDTH, high if FIRST else low)
        tl.store(into + 2 * WIDTH, high)
    else:
        tl.store(into, high)


@triton.jit
def _halve_kernel(
    X, LARGEST, OUT, UNIT, n, d,
    EVEN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """``x`` times powers of two as float16, its second halves beside it, and what undoes them: one if EVEN, or of each row."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = i[:, None].to(tl.int64)
    if EVEN:
        largest = tl.load(LARGEST + tl.zeros((ROWS,), tl.int32))
    else:
        largest = tl.zeros((ROWS,), tl.float32)
        for start in range(0, d, PART):
            c = start + tl.arange(0, PART)[None, :]
            x = tl.load(X + row * d + c, mask=(i[:, None] < n) & (c < d), other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), 1))
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    power = tl.minimum(tl.maximum(13 - exponent, -100), 100)
    scale = ((127 + power) << 23).to(tl.float32, bitcast=True)
    tl.store(UNIT + i, ((127 - power) << 23).to(tl.float32, bitcast=True))
    for start in range(0, WIDTH, PART):
        c = start + tl.arange(0, PART)[None, :]
        x = tl.load(X + row * d + c, mask=(i[:, None] < n) & (c < d), other=0.0)
        _store_halves(x.to(tl.float32) * scale[:, None], OUT + row * D + c, WIDTH, TERMS, FIRST)
    for start in range(TERMS * WIDTH, D, 16):
        tl.store(OUT + row * D + start + tl.arange(0, 16)[None, :], tl.zeros((ROWS, 16), tl.float16))


@dataclass(frozen=True)
class Halved:
    """A cloud in half precision: ``terms`` times ``width`` features, padded, times powers of two that ``unit`` undoes."""

    numbers: Tensor
    unit: Tensor
    width: int
    terms: int
    first: bool
    even: bool

    @property
    def features(self) -> int:
        return self.numbers.shape[1]

    @property
    def halves(self) -> tuple[int, int]:
        """Where the first halves begin, and the second."""
        if self.terms == 1:
            return 0, 0
        return (self.width, 0) if self.first else (0, self.width)


_REMEMBERED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a solver comes back with the same points


def halved(x: Tensor, precise: bool, first: bool, even: bool) -> Halved:
    if x.is_inference():  # of which nobody tells whether they were changed
        return _made(x, 3 if precise else 1, first, even)
    key = (x._version, precise, first, even)
    known = _REMEMBERED.get(x, {})
    if key not in known:
        known = {other: found for other, found in known.items() if other[0] == x._version}
        known[key] = _made(x, 3 if precise else 1, first, even)
        _REMEMBERED[x] = known
    return known[key]


def _padded(d: int, terms: int) -> tuple[int, int]:
    """How many features a point of ``d`` has in each term, and in all of them."""
    width = cdiv(d, 16) * 16
    if (features := power_of_2(terms * width)) <= _WHOLE[terms == 3]:
        return features if terms == 1 else width, features
    width = cdiv(d, _PART) * _PART
    return width, terms * width


def _made(x: Tensor, terms: int, first: bool, even: bool) -> Halved:
    given = x.detach().contiguous()
    n, d = given.shape
    width, features = _padded(d, terms)
    rows = cdiv(n, PADDED) * PADDED
    out = torch.empty(rows, features, dtype=torch.float16, device=x.device)
    unit = torch.empty(rows, dtype=torch.float32, device=x.device)
    largest = torch.linalg.vector_norm(given, torch.inf, dtype=torch.float32) if even else given
    _halve_kernel[(rows // _TURNED,)](
        given, largest, out, unit, n, d, EVEN=even, D=features, WIDTH=width, TERMS=terms, FIRST=first,
        PART=min(_WIDEST, width & -width), ROWS=_TURNED,
    )  # fmt: skip
    return Halved(out, unit, width, terms, first, even)


# -- directions ----------------------------------------------------------------------------------------------------------


@triton.jit
def _directions_kernel(
    X, Y, EPSILON, OUT_X, OUT_Y, UNITS, LESS, PAIRS, n, d,
    LIVE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Points over their lengths as float16, one over these lengths (0 of a zero vector), and the pairs' cosines over epsilon."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = i[:, None].to(tl.int64)
    rate = 1.0 / tl.load(EPSILON) if LIVE else 1.0 / EPSILON
    xx, yy, xy = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, d, PART):
        c = start + tl.arange(0, PART)[None, :]
        inside = (i[:, None] < n) & (c < d)
        x = tl.load(X + row * d + c, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(Y + row * d + c, mask=inside, other=0.0).to(tl.float32)
        xx += tl.sum(x * x, 1)
        yy += tl.sum(y * y, 1)
        xy += tl.sum(x * y, 1)
    less_x = tl.where(xx == 0, 0.0, 1.0 / tl.sqrt_rn(tl.where(xx == 0, 1.0, xx)))
    less_y = tl.where(yy == 0, 0.0, 1.0 / tl.sqrt_rn(tl.where(yy == 0, 1.0, yy)))
    tl.store(LESS + i, less_x, mask=i < n)
    tl.store(LESS + n + i, less_y, mask=i < n)
    tl.store(PAIRS + i, xy * less_x * less_y * rate, mask=i < n)
    if tl.program_id(0) == 0:
        tl.store(UNITS, rate / _UNIT)
        tl.store(UNITS + 1, 1.0 / _UNIT)
    for start in range(0, WIDTH, PART):
        c = start + tl.arange(0, PART)[None, :]
        inside = (i[:, None] < n) & (c < d)
        x = tl.load(X + row * d + c, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(Y + row * d + c, mask=inside, other=0.0).to(tl.float32)
        _store_halves(x * (less_x * _UNIT)[:, None], OUT_X + row * D + c, WIDTH, TERMS, True)
        _store_halves(y * (less_y * _UNIT)[:, None], OUT_Y + row * D + c, WIDTH, TERMS, False)
    for start in range(TERMS * WIDTH, D, 16):
        c = start + tl.arange(0, 16)[None, :]
        nothing = tl.zeros((ROWS, 16), tl.float16)
        tl.store(OUT_X + row * D + c, nothing)
        tl.store(OUT_Y + row * D + c, nothing)


@triton.jit
def _together(G, row, c, n, d, shares, inside, ROWS: tl.constexpr, PART: tl.constexpr):
    """Some features of what is known in shares."""
    found = tl.zeros((ROWS, PART), tl.float32)
    for share in range(0, shares):
        found += tl.load(G + (tl.cast(share, tl.int64) * n + row) * d + c, mask=inside, other=0.0)
    return found


@triton.jit
def _turn(
    X, Y, G, OUT, RATES, i, n, d, shares, less_x, less_y, factor, up, pair,
    PART: tl.constexpr, ROWS: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """A derivative in directions as one in points: times ``1 / |x|``, without what goes along x."""
    row, inside_rows = i[:, None].to(tl.int64), i[:, None] < n
    along = tl.zeros((ROWS,), tl.float32)
    for start in range(0, d, PART):
        c = start + tl.arange(0, PART)[None, :]
        inside = inside_rows & (c < d)
        g = _together(G, row, c, n, d, shares, inside, ROWS, PART)
        x = tl.load(X + row * d + c, mask=inside, other=0.0).to(tl.float32)
        along += tl.sum(g * x, 1)
    along = along * less_x * factor
    if STORED:
        tl.store(RATES + i, up * pair - along, mask=i < n)
    all_along = along - up * pair
    for start in range(0, d, PART):
        c = start + tl.arange(0, PART)[None, :]
        inside = inside_rows & (c < d)
        g = _together(G, row, c, n, d, shares, inside, ROWS, PART)
        x = tl.load(X + row * d + c, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(Y + row * d + c, mask=inside, other=0.0).to(tl.float32)
        # the rate of a pair's cosine is up / epsilon: what the caller has put into less_y
        found = (g * factor - y * (up * less_y)[:, None] - x * (all_along * less_x)[:, None]) * less_x[:, None]
        tl.store(OUT + row * d + c, found, mask=inside)


@triton.jit
def _turn_kernel(
    X, Y, GX, GY, LESS, PAIRS, UP, EPSILON, OUT_X, OUT_Y, RATES, n, d, shares_x, shares_y,
    LIVE: tl.constexpr, BOTH: tl.constexpr, OF_X: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Derivatives of the cross-entropies in points, of those of their sums in directions; and the part of each row in that in
    epsilon, times ``epsilon``.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rate = 1.0 / tl.load(EPSILON) if LIVE else 1.0 / EPSILON
    less_x, less_y = tl.load(LESS + i, mask=i < n, other=0.0), tl.load(LESS + n + i, mask=i < n, other=0.0)
    pair = tl.load(PAIRS + i, mask=i < n, other=0.0)
    up = tl.load(UP + i, mask=i < n, other=0.0)
    if BOTH:
        up += tl.load(UP + n + i, mask=i < n, other=0.0)
    if OF_X:
        if tl.program_id(1) == 0:
            _turn(X, Y, GX, OUT_X, RATES, i, n, d, shares_x, less_x, less_y * rate, rate, up, pair, PART, ROWS, True)
        else:
            _turn(Y, X, GY, OUT_Y, RATES, i, n, d, shares_y, less_y, less_x * rate, 1.0, up, pair, PART, ROWS, False)
    else:
        _turn(Y, X, GY, OUT_Y, RATES, i, n, d, shares_y, less_y, less_x * rate, 1.0, up, pair, PART, ROWS, False)


def directions(x: Tensor, y: Tensor, epsilon: float | Tensor, precise: bool) -> tuple[Halved, Halved, Tensor, Tensor]:
    """Pairs of points on the unit sphere, those of ``x`` over ``epsilon`` besides, as tensor cores read them.

    Args:
        x: contiguous, shape ``(n, d)``.
        y: the same.
        epsilon: a number, or a tensor of one in float32.
        precise: 22 bits of a number, or 11.

    Returns:
        Both, one over their lengths, shape ``(2, n)``, and ``cos(x_i, y_i) / epsilon``, shape ``(n,)``.
    """
    (n, d), terms = x.shape, 3 if precise else 1
    width, features = _padded(d, terms)
    rows = cdiv(n, PADDED) * PADDED
    out = torch.empty(2, rows, features, dtype=torch.float16, device=x.device)
    units, less, pairs = torch.empty(3 * n + 2, dtype=torch.float32, device=x.device).split([2, 2 * n, n])
    _directions_kernel[(rows // _TURNED,)](
        x, y, epsilon, out[0], out[1], units, less, pairs, n, d, LIVE=isinstance(epsilon, Tensor), D=features,
        WIDTH=width, TERMS=terms, PART=min(_WIDEST, width & -width), ROWS=_TURNED,
    )  # fmt: skip
    one, other = (Halved(out[k], units[k:], width, terms, k == 0, True) for k in (0, 1))
    return one, other, less, pairs


def pull_directions(
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    less: Tensor,
    pairs: Tensor,
    pulled: tuple[Tensor | None, Tensor | None],
    up: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives in points, and times ``epsilon`` in it row by row, of sums of directions less ``pairs``.

    Args:
        x: as of :func:`directions`, as are ``y``, ``epsilon``, ``less`` and ``pairs``.
        pulled: the sums' derivatives in ``x_i / epsilon`` and in ``y_j``, in shares, shape ``(shares, n, d)``, or None.
        up: upstream derivatives of rows, or of rows and columns, contiguous, shape ``(1, n)`` or ``(2, n)``.
    """
    (n, d), (gx, gy) = x.shape, pulled
    out_x, out_y = None if gx is None else torch.empty_like(x), None if gy is None else torch.empty_like(y)
    rates = None if gx is None else torch.empty_like(pairs)
    fill = pairs  # for what nobody reads
    _turn_kernel[(cdiv(n, _TURNED), (gx is not None) + (gy is not None))](
        x, y, *(fill if z is None else z for z in (gx, gy)), less, pairs, up, epsilon,
        *(fill if z is None else z for z in (out_x, out_y, rates)), n, d, *(1 if z is None else len(z) for z in (gx, gy)),
        LIVE=isinstance(epsilon, Tensor), BOTH=len(up) == 2, OF_X=gx is not None,
        PART=min(_WIDEST, power_of_2(d)), ROWS=_TURNED,
    )  # fmt: skip
    return out_x, out_y, rates


_TURNED, _WIDEST = 16, 128  # points of a program, and their features read at once
