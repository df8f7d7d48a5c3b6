"""A Triton kernel for many small transport problems in one launch: each is one program's, stays in its registers, and stops by
itself.

Sinkhorn's sweeps in the log domain, for sides whose answer is a clipped line, with the translation of exponential sides in closed
form. What it finds is a start: whoever asked judges it, and goes on where it falls short.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from iotsolve.kernels.halves import cdiv, power_of_2

__all__ = ["relaxed"]

_LOG2E = math.log2(math.e)
_HELD = {4: 16, 8: 4}  # entries of a matrix that a thread keeps, by their bytes


@triton.jit
def _answer(s, slope, low, up, down, high):
    """What a side answers to a soft-minimum."""
    s = slope * s
    return tl.maximum(tl.minimum(s + up, high), tl.maximum(s + down, low))


@triton.jit
def _soft_minimum(exponents, axis: tl.constexpr):
    """``-log2 sum 2^x``; +inf of nothing."""
    top = tl.max(exponents, axis)
    level = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(exponents - tl.expand_dims(level, axis)), axis)
    return tl.where(total > 0, -tl.log2(total) - level, float("inf"))


@triton.jit
def _demand(logs, potential, soft):
    """``log2`` of the mass that an exponential side asks for."""
    exponents = tl.where(logs > float("-inf"), logs - soft * potential, float("-inf"))
    top = tl.max(exponents, 0)
    return tl.log2(tl.sum(tl.exp2(exponents - top), 0)) + top


@triton.jit
def _moved(logs, potential, soft_minimum, slope, low, up, down, high):
    """The mass that would move if a side answered, and the mass that is there."""
    carries = (logs > float("-inf")) & (soft_minimum < float("inf"))
    here = tl.exp2(tl.where(carries, logs + potential - soft_minimum, float("-inf")))
    asked = _answer(soft_minimum, slope, low, up, down, high)
    there = tl.exp2(tl.where(carries, logs + asked - soft_minimum, float("-inf")))
    return tl.sum(tl.abs(here - there), 0), tl.sum(here, 0)


@triton.jit
def _relax_kernel(
    C, A, B, F, G, STEPS, n, m, stride, RULES, most,
    TRANSLATES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One problem: everything in units of ``epsilon log 2``."""
    k = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (i[:, None] < n) & (j[None, :] < m)
    scale, tolerance = tl.load(RULES), tl.load(RULES + 1)
    slope_r, low_r, up_r, down_r, high_r = (
        tl.load(RULES + 2), tl.load(RULES + 3), tl.load(RULES + 4), tl.load(RULES + 5), tl.load(RULES + 6)
    )  # fmt: skip
    slope_c, low_c, up_c, down_c, high_c = (
        tl.load(RULES + 7), tl.load(RULES + 8), tl.load(RULES + 9), tl.load(RULES + 10), tl.load(RULES + 11)
    )  # fmt: skip
    soft_r, soft_c = tl.load(RULES + 12), tl.load(RULES + 13)
    cost = tl.load(C + k * stride + i[:, None] * m + j[None, :], mask=inside, other=float("inf"))
    log_a = tl.log2(tl.load(A + k * n + i, mask=i < n, other=0.0))
    log_b = tl.log2(tl.load(B + k * m + j, mask=j < m, other=0.0))
    kernel = -cost * scale + (log_a[:, None] + log_b[None, :])  # of the weights too: -inf where one is 0
    kernel = tl.where(kernel == kernel, kernel, float("-inf"))
    f, g = tl.zeros((ROWS,), cost.dtype), tl.zeros((COLUMNS,), cost.dtype)
    less_a, less_b = tl.where(log_a > float("-inf"), log_a, 0.0), tl.where(log_b > float("-inf"), log_b, 0.0)
    s = _soft_minimum(kernel + g[None, :], 1) + less_a
    step, going, last = 0, True, tl.full((), float("inf"), cost.dtype)
    while going:
        f = tl.where(s < float("inf"), _answer(s, slope_r, low_r, up_r, down_r, high_r), f)
        t = _soft_minimum(kernel + f[:, None], 0) + less_b
        g = tl.where(t < float("inf"), _answer(t, slope_c, low_c, up_c, down_c, high_c), g)
        if TRANSLATES:
            shift = (_demand(log_a, f, soft_r) - _demand(log_b, g, soft_c)) / (soft_r + soft_c)
            f, g, t = f + shift, g - shift, t - shift
        s = _soft_minimum(kernel + g[None, :], 1) + less_a
        step += 1
        rows, mass = _moved(log_a, f, s, slope_r, low_r, up_r, down_r, high_r)
        columns, _ = _moved(log_b, g, t, slope_c, low_c, up_c, down_c, high_c)
        going = (rows + columns > tolerance * mass) & (step < most)
        if step % 64 == 0:  # where rounding or a slow problem leaves nothing to be won
            going = going & (rows + columns < 0.95 * last)
            last = rows + columns
    tl.store(F + k * n + i, f, mask=i < n)
    tl.store(G + k * m + j, g, mask=j < m)
    tl.store(STEPS + k, step)


def relaxed(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    rows: tuple[float, float, float, float, float],
    columns: tuple[float, float, float, float, float],
    soft: tuple[float, float] | None,
    tolerance: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials of every problem of a batch, and how many sweeps each took.

    Args:
        cost: shape ``(batch, n, m)``, float32 up to 128 x 128, or float64 up to 64 x 64 (or as many entries).
        a: weights, shape ``(batch, n)``.
        b: shape ``(batch, m)``.
        epsilon: positive.
        rows: ``(slope, low, up, down, high)`` of :meth:`iotsolve.marginals.Marginal.clipped_line`.
        columns: the same.
        soft: the rates at which the masses that the sides ask for decay, in units of ``1 / epsilon``, if both do so.
        tolerance: marginal error, relative to the mass, at which a problem is left.
        most: sweeps.
    """
    count, n, m = cost.shape
    unit = epsilon / _LOG2E
    lines = [[slope, *(x * _LOG2E for x in rest)] for slope, *rest in (rows, columns)]
    rules = torch.tensor([1.0 / unit, tolerance, *lines[0], *lines[1], *(soft or (0.0, 0.0))], dtype=cost.dtype, device="cpu")
    shape = power_of_2(n), power_of_2(m)
    warps = _warps(shape[0] * shape[1], cost.element_size())
    f, g = (torch.empty(count, size, dtype=cost.dtype, device=cost.device) for size in (n, m))
    steps = torch.empty(count, dtype=torch.int32, device=cost.device)
    given = cost.contiguous() if cost.stride(0) else cost[:1].contiguous()
    _relax_kernel[(count,)](
        given, a.contiguous(), b.contiguous(), f, g, steps, n, m, n * m if cost.stride(0) else 0, rules.to(cost.device), most,
        TRANSLATES=soft is not None, ROWS=shape[0], COLUMNS=shape[1], num_warps=warps,
    )  # fmt: skip
    return f * unit, g * unit, steps


def _warps(entries: int, size: int) -> int:
    """As many as keep a matrix in registers."""
    return min(32 if size == 4 else 16, power_of_2(cdiv(entries, 32 * _HELD[size])))
