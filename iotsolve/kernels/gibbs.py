"""The kernel of one large problem as a relaxation reads it: stored, of a matrix or of points, or made again at every sweep.

A kernel absorbs logarithms of scalings, base 2, and is swept: the sums of its rows, what a rule answers to them, and the sums of
the columns of the rows so scaled; see :mod:`iotsolve.kernels.dense` for rules and sides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from iotsolve.kernels import bilinear
from iotsolve.kernels.blocks import exponentials
from iotsolve.kernels.dense import SIDE, TAKE, WEIGH, stored_pass
from iotsolve.kernels.numeric import LOG2E
from iotsolve.kernels.passes import build_kernel, highest, spread
from iotsolve.kernels.threads import PIECES, pieces, summed

__all__ = ["Kernel", "OfPoints", "OverRanks", "Stored", "Streamed"]


class Kernel:
    """What both kinds have in common: products, of which a sweep is one."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def sweep(self, v: np.ndarray, rule: int, w: np.ndarray, *given: Any) -> None:
        """``y = K v``, ``u`` by the rule and ``columns = u K``; ``given`` are ``base, known, side, lam, y, u, columns``."""
        raise NotImplementedError

    def raised(self, alpha: np.ndarray, beta: np.ndarray, f: np.ndarray, deep: float) -> np.ndarray:
        """The rows' potentials, in units of epsilon, or others around which no row's entries all vanish, where that is seen."""
        return f

    def product(self, w: np.ndarray, v: np.ndarray, *, as_given: bool) -> tuple[np.ndarray, np.ndarray]:
        """``K v`` with ``K' (w K v)``, or with ``K' w`` if that is ``as_given``."""
        n, m = self.shape
        y, columns, none = np.empty(n), np.empty(m), np.empty(0)
        self.sweep(v.astype(self.dtype), TAKE if as_given else WEIGH, w, none, none, SIDE, 0.0, y, np.empty(n), columns)
        return y, columns

    def spread(self, w: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """``sum_i K_ij w_i (rows_i - K_ij)``, of batches of one; None where somebody else makes it."""


class Stored(Kernel):
    """``K = 2^(alpha + beta - scale C)`` of a matrix, in an array of its shape."""

    def __init__(self, array: np.ndarray, cost: np.ndarray, scale: float) -> None:
        self.array, self.cost, self.scale = array, cost, scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def absorb(self, alpha: np.ndarray, beta: np.ndarray) -> None:
        build_kernel(self.cost, alpha, beta, self.scale, self.array)

    def raised(self, alpha: np.ndarray, beta: np.ndarray, f: np.ndarray, deep: float) -> np.ndarray:
        tops = highest(self.cost, beta, self.scale, axis=-1)
        vanish = np.isfinite(alpha) & np.isfinite(tops) & (alpha + tops < deep)
        return np.where(vanish, -tops / LOG2E, f) if vanish.any() else f

    def sweep(self, v: np.ndarray, rule: int, w: np.ndarray, *given: Any) -> None:
        *shared, columns = (self.array, v, rule, w, *given)
        n, m = self.shape
        if len(pieces(n, n * m)) == 1:
            columns[:] = 0.0
            stored_pass(*shared, columns, 0, n)
            return
        columns[:] = summed(n, m, n * m, lambda total, first, last: stored_pass(*shared, total, first, last))


    def spread(self, w: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return spread(self.array[None], w, rows)


class OfPoints(Stored):
    """The same of points, ``-C_ij / epsilon = x_i . y_j + p_i + q_j``, whose costs nobody holds; exponents in their precision."""

    def __init__(self, array: np.ndarray, form: tuple[Tensor, Tensor, Tensor, Tensor], barred: Tensor | None) -> None:
        self.array, self.form, self.barred = array, form, barred

    def raised(self, alpha: np.ndarray, beta: np.ndarray, f: np.ndarray, deep: float) -> np.ndarray:
        return f

    def absorb(self, alpha: np.ndarray, beta: np.ndarray) -> None:
        x, y, *_ = self.form

        def visit(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
            exponentials(block.numpy(), self.array[part])

        added = _absorbed(self.form, alpha, beta)
        bilinear.each_block(bilinear.is_worth_compiling(x, y), x, y, self.barred, visit, added=added)


class Streamed(Kernel):
    """The same, of which a sweep makes block after block and keeps none; in the points' precision."""

    def __init__(self, form: tuple[Tensor, Tensor, Tensor, Tensor], barred: Tensor | None) -> None:
        self.form, self.barred = form, barred
        self.worth = bilinear.is_worth_compiling(*form[:2])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.form[0]), len(self.form[1])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.form[0].dtype == torch.float32 else np.float64)

    def absorb(self, alpha: np.ndarray, beta: np.ndarray) -> None:
        self.added = _absorbed(self.form, alpha, beta)

    def sweep(self, v: np.ndarray, rule: int, w: np.ndarray, *given: Any) -> None:
        """A block has rows enough for four at a time to be added to the columns while they are near."""
        base, known, side, lam, y, u, columns = given
        totals = np.zeros((PIECES if self.worth else 1, len(columns)))

        def visit(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
            kernel = bilinear.exponential(self.worth, block).numpy()
            own = w[part], base[part], known[part], side, lam, y[part], u[part], totals[k]
            stored_pass(kernel, v, rule, *own, 0, len(kernel))

        points = self.form[:2]
        least = max(4, min(max(_ROWS[0], points[0].shape[1]), _ROWS[1], _ENTRIES // len(columns)))
        bilinear.each_block(self.worth, *points, self.barred, visit, added=self.added, least=least)
        columns[:] = totals.sum(0)


class OverRanks(Kernel):
    """A kernel of ``rows`` of which each rank sweeps its own, a slice: all have whole vectors, and the first rank's are swept.

    ``ranks`` is a :class:`iotsolve.distributed.Ranks`.
    """

    def __init__(self, local: Kernel, rows: int, own: slice, ranks: Any) -> None:
        self.local, self.rows, self.own, self.ranks = local, rows, own, ranks

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.local.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.local.dtype

    def absorb(self, alpha: np.ndarray, beta: np.ndarray) -> None:
        self.local.absorb(alpha[self.own], beta)

    def sweep(self, v: np.ndarray, rule: int, w: np.ndarray, *given: Any) -> None:
        base, known, side, lam, y, u, columns = given
        own = y[self.own], u[self.own]
        v = self.ranks.first(torch.from_numpy(v)).numpy()
        self.local.sweep(v, rule, w[self.own], base[self.own], known[self.own], side, lam, *own, columns)
        y[:], u[:] = self.ranks.gather(torch.from_numpy(np.stack(own, 1))).numpy().T
        columns[:] = self.ranks.sum(torch.from_numpy(columns)).numpy()


_ROWS = 16, 64  # of a block at least: in few dimensions and in many, where a product of few rows would be slow
_ENTRIES = 2**23  # of it at most, but for four rows


def _absorbed(
    form: tuple[Tensor, Tensor, Tensor, Tensor], alpha: np.ndarray, beta: np.ndarray
) -> tuple[Tensor, Tensor]:
    """What is added to the products of rows and of columns, in base e."""
    _, _, *own = form
    return tuple(
        (torch.from_numpy(z / LOG2E) + known.double()).to(known.dtype) for z, known in zip((alpha, beta), own, strict=True)
    )
