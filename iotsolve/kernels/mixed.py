"""Triton kernels for :mod:`iotsolve.mixing`: a step of a whole batch in four launches, without waiting for the device.

What is remembered is overwritten. Sums are made of those over blocks of entries, in a fixed order. No number is written by two
programs, or by one and read by another of the same launch; within a program barriers keep writes behind reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from iotsolve.kernels.halves import cdiv, power_of_2

if TYPE_CHECKING:
    from iotsolve.mixing import Mixing

__all__ = ["mixed"]

_BLOCK = 256  # entries of a program
_CHUNK = 32  # partial sums read at once
_KNOWN, _CHOICE, _BETTER, _SHARES = (tl.constexpr(k) for k in range(4))  # what is noted of a problem for the later launches
_IMAGE, _MIXED, _BEST = (tl.constexpr(k) for k in range(3))  # choices


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _is_valid(j, place, known, WINDOW: tl.constexpr):
    """Whether differences are among the last ``known``, if the last stands at ``place``."""
    return (j < WINDOW) & ((place + WINDOW - j) % WINDOW < known)


@triton.jit
def _remember_kernel(
    AT, IMAGE, WEIGHTS, X, R, DX, DR, KNOWN, PLACE, SUMS, n,
    WINDOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new residual and differences, and a block's part of the products of the difference and the residual with all others."""
    k, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    i, j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside, place = i < n, tl.load(PLACE + k)
    at, image = tl.load(AT + k * n + i, mask=inside, other=0.0), tl.load(IMAGE + k * n + i, mask=inside, other=0.0)
    last_x, last_r = tl.load(X + k * n + i, mask=inside, other=0.0), tl.load(R + k * n + i, mask=inside, other=0.0)
    weights = tl.load(WEIGHTS + k * n + i, mask=inside, other=0.0).to(tl.float64)
    finite = _is_finite(at) & _is_finite(image)
    x, r = tl.where(finite, at, 0.0), tl.where(finite, tl.where(tl.load(KNOWN + k) >= 0, image - at, 0.0), 0.0)
    dx, dr = x - last_x, r - last_r
    tl.debug_barrier()
    tl.store(X + k * n + i, x, mask=inside)
    tl.store(R + k * n + i, r, mask=inside)
    tl.store(DX + (k * WINDOW + place) * n + i, dx, mask=inside)
    tl.store(DR + (k * WINDOW + place) * n + i, dr, mask=inside)
    older = (j < WINDOW) & (j != place)
    all_r = tl.load(DR + (k * WINDOW + j[:, None]) * n + i[None, :], mask=older[:, None] & inside[None, :], other=0.0)
    all_r = tl.where(j[:, None] == place, dr[None, :], tl.where(j[:, None] == WINDOW, r[None, :], all_r)).to(tl.float64)
    sums = SUMS + (k * blocks + tl.program_id(1)) * 2 * WIDTH + j
    tl.store(sums, tl.sum(all_r * (weights * dr)[None, :], 1))
    tl.store(sums + WIDTH, tl.sum(all_r * (weights * r)[None, :], 1))


@triton.jit
def _solve_kernel(
    SUMS, GRAM, KNOWN, PLACE, LEAST, LOWEST, IDLE, NOTES, n,
    GROWTH: tl.constexpr, FALLEN: tl.constexpr, PATIENCE: tl.constexpr, RIDGE: tl.constexpr,
    WINDOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One problem: how much of each difference to take back, and what to do."""
    k, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK)
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    new, right = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float64)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)[:, None]
        sums = SUMS + (k * blocks + block) * 2 * WIDTH + j
        new += tl.sum(tl.load(sums, mask=block < blocks, other=0.0), 0)
        right += tl.sum(tl.load(sums + WIDTH, mask=block < blocks, other=0.0), 0)
    known, place, idle = tl.load(KNOWN + k), tl.load(PLACE + k), tl.load(IDLE + k)
    least, lowest = tl.load(LEAST + k), tl.load(LOWEST + k)
    tl.debug_barrier()
    begun = known >= 0
    size = tl.sum(tl.where(tl.arange(0, WIDTH) == WINDOW, right, 0.0), 0).to(least.dtype)
    size = tl.where(begun, size, float("inf"))
    grown = size > GROWTH * least
    known = tl.where(grown, 0.0, known)

    inside, fresh = (i < WINDOW) & (j < WINDOW), (i == place) | (j == place)
    gram = GRAM + k * WINDOW * WINDOW + i * WINDOW + j
    both = tl.load(gram, mask=inside & ~fresh, other=0.0)
    both = tl.where(i == place, new[None, :], tl.where(j == place, new[:, None], both))
    tl.store(gram, both, mask=inside & fresh)
    valid = _is_valid(i, place, known, WINDOW)
    both = tl.where(valid & _is_valid(j, place, known, WINDOW), both, 0.0)
    largest = tl.max(tl.max(tl.where(i == j, both, 0.0), 1), 0)
    both += tl.where(i == j, tl.where(valid, RIDGE * largest, 1.0) + tl.where(largest > 0, 0.0, 1.0), 0.0)
    both = tl.where(j == WINDOW, tl.where(valid, right[:, None], 0.0), both)
    for c in range(WINDOW):  # Gauss and Jordan
        row, column = tl.sum(tl.where(i == c, both, 0.0), 0)[None, :], tl.sum(tl.where(j == c, both, 0.0), 1)[:, None]
        row /= tl.sum(tl.where(j == c, row, 0.0), 1)[:, None]
        both = tl.where(i == c, row, both - column * row)
    notes, share = NOTES + k * (_SHARES + WINDOW), tl.arange(0, WIDTH)
    tl.store(notes + _SHARES + share, tl.sum(tl.where(j == WINDOW, both, 0.0), 1), mask=share < WINDOW)

    better, hopeful = size < FALLEN * lowest, idle <= PATIENCE * WINDOW
    lowest = tl.where(better, size, lowest)
    idle = tl.where(better & hopeful, 0.0, idle + 1.0)
    last = tl.where(hopeful & _is_finite(lowest), _BEST, _IMAGE)
    tl.store(notes + _KNOWN, known.to(tl.float64))
    tl.store(notes + _CHOICE, tl.where(idle > PATIENCE * WINDOW, last, tl.where(begun, _MIXED, _IMAGE)).to(tl.float64))
    tl.store(notes + _BETTER, better.to(tl.float64))
    tl.store(LEAST + k, tl.where(grown, size, tl.where((least < size) | (least != least), least, size)))
    tl.store(LOWEST + k, lowest)
    tl.store(IDLE + k, idle)
    tl.store(PLACE + k, (place + 1) % WINDOW)


@triton.jit
def _back_kernel(
    R, WEIGHTS, DX, DR, PLACE, NOTES, BACK, PEAKS, n,
    WINDOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is taken back, and its largest entry with a weight in a block; infinite where a step would not be finite."""
    k, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside, notes = i < n, NOTES + k * (_SHARES + WINDOW)
    valid = _is_valid(j, tl.load(PLACE + k) + (WINDOW - 1), tl.load(notes + _KNOWN), WINDOW)
    shares = tl.load(notes + _SHARES + j, mask=j < WINDOW, other=0.0)
    r = tl.load(R + k * n + i, mask=inside, other=0.0)
    weights = tl.load(WEIGHTS + k * n + i, mask=inside, other=0.0)
    entries, wanted = (k * WINDOW + j[:, None]) * n + i[None, :], valid[:, None] & inside[None, :]
    taken = tl.load(DX + entries, mask=wanted, other=0.0) + tl.load(DR + entries, mask=wanted, other=0.0)
    back = tl.sum(shares.to(r.dtype)[:, None] * taken, 0)
    tl.store(BACK + k * n + i, back, mask=inside)
    sound = _is_finite(back) & _is_finite(r - back)
    peak = tl.max(tl.where(sound, tl.where(weights > 0, tl.abs(back), 0.0), float("inf")), 0)
    tl.store(PEAKS + k * tl.num_programs(1) + tl.program_id(1), peak)


@triton.jit
def _follow_kernel(
    AT, IMAGE, R, BEST, KNOWN, NOTES, PEAKS, MOST, FOLLOWING, n, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):
    """The next iterate, where what is taken back stands."""
    k, blocks, block = tl.program_id(0).to(tl.int64), tl.num_programs(1), tl.arange(0, BLOCK)
    i, notes = tl.program_id(1) * BLOCK + block, NOTES + k * (_SHARES + WINDOW)
    inside, most = i < n, tl.load(MOST)
    peaks = tl.zeros((BLOCK,), most.dtype)
    for start in range(0, blocks, BLOCK):
        peaks = tl.maximum(peaks, tl.load(PEAKS + k * blocks + start + block, mask=start + block < blocks, other=0.0))
    longest = tl.max(peaks, 0)
    sound = _is_finite(longest)
    known, choice, better = tl.load(notes + _KNOWN), tl.load(notes + _CHOICE), tl.load(notes + _BETTER) > 0
    at, image = tl.load(AT + k * n + i, mask=inside, other=0.0), tl.load(IMAGE + k * n + i, mask=inside, other=0.0)
    r, back = tl.load(R + k * n + i, mask=inside, other=0.0), tl.load(FOLLOWING + k * n + i, mask=inside, other=0.0)
    best = tl.where(better, image, tl.load(BEST + k * n + i, mask=inside, other=0.0))
    step = r - tl.where(longest > most, back * (most / longest), back)
    following = tl.where(_is_finite(at) & _is_finite(image), at + tl.where(sound, step, r), image)
    tl.debug_barrier()
    following = tl.where(choice == _MIXED, following, tl.where(choice == _BEST, best, image))
    tl.store(FOLLOWING + k * n + i, following, mask=inside)
    tl.store(BEST + k * n + i, best, mask=inside)
    if tl.program_id(1) == 0:
        known += 1.0
        tl.store(KNOWN + k, tl.minimum(tl.where(sound, known, tl.minimum(known, 0.0)), WINDOW))


def mixed(
    memory: Mixing,
    image: Tensor,
    weights: Tensor,
    most: float | Tensor,
    *,
    growth: float,
    fallen: float,
    patience: int,
    ridge: float,
) -> Tensor:
    """The iterate that follows ``image``; the rest of the memory is overwritten with what is then to be remembered.

    Args:
        memory: as of :class:`iotsolve.mixing.Mixing`, of contiguous tensors in float32 or float64, none of which is another.
        image: shape ``(b, n)``, as are the weights, and what is returned.
        weights: those of every step.
        most: a number, or one on the device.
        growth: of the squared residual since its least, from which on the past is forgotten.
        fallen: what is left of a squared residual that is better than the lowest.
        patience: windows without a better one, after which mixing is given up.
        ridge: of the Gram matrix, relative to its largest entry.
    """
    (b, window, n), new = memory.dx.shape, image.new_empty
    at, image, weights = memory.at.contiguous(), image.contiguous(), weights.contiguous()
    most = most.to(image) if isinstance(most, Tensor) else image.new_full((), most)
    blocks, width = cdiv(n, _BLOCK), power_of_2(window + 1)
    sums, notes = (new(b, size, dtype=torch.float64) for size in (blocks * 2 * width, _SHARES.value + window))
    peaks, following = new(b, blocks), torch.empty_like(image)
    tiles = {"WINDOW": window, "WIDTH": width, "BLOCK": _BLOCK}
    ring = memory.dx, memory.dr
    _remember_kernel[(b, blocks)](
        at, image, weights, memory.x, memory.r, *ring, memory.known, memory.place, sums, n, **tiles, num_warps=_warps(width)
    )
    _solve_kernel[(b,)](
        sums, memory.gram, memory.known, memory.place, memory.least, memory.lowest, memory.idle, notes, n, GROWTH=growth,
        FALLEN=fallen, PATIENCE=patience, RIDGE=ridge, CHUNK=_CHUNK, **tiles, num_warps=1,
    )  # fmt: skip
    _back_kernel[(b, blocks)](
        memory.r, weights, *ring, memory.place, notes, following, peaks, n, **tiles, num_warps=_warps(width)
    )
    _follow_kernel[(b, blocks)](
        at, image, memory.r, memory.best, memory.known, notes, peaks, most, following, n, WINDOW=window, BLOCK=_BLOCK
    )
    return following


def _warps(width: int) -> int:
    """As many as keep the differences of a block in registers."""
    return 4 if width <= 16 else 8
