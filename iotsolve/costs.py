"""Costs: the seam for size. A solver asks a cost for soft-minima and marginals, and never learns how it is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Dense", "calm"]

Scalar = float | Tensor


@dataclass(frozen=True)
class Dense:
    """A cost held as a matrix. ``+inf`` entries are forbidden arcs: they carry no mass and no gradient.

    Args:
        matrix: shape ``(..., n, m)``, finite or ``+inf``, in cost units.

    Example:
        >>> Dense(torch.tensor([[0.0, 1.0]])).softmin(torch.zeros(2), 1.0, axis=-1)
        tensor([-0.3133])
    """

    matrix: Float[Tensor, "*batch n m"]

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def dense(self) -> Float[Tensor, "*batch n m"]:
        """The cost as a matrix, shape ``(..., n, m)``."""
        return self.matrix

    def with_matrix(self, matrix: Tensor) -> Dense:
        return Dense(matrix)

    def entries(self, index: tuple[Tensor, ...]) -> Tensor:
        """``C`` at the given batch, row and column indices, shape ``(k,)``."""
        return self.matrix[index]

    def range(self) -> Float[Tensor, "*batch"]:
        """Largest minus smallest allowed entry."""
        allowed = self.matrix.isfinite()
        top = torch.where(allowed, self.matrix, -math.inf).amax((-2, -1))
        return (top - self.matrix.amin((-2, -1))).clamp(min=0.0).nan_to_num(0.0, posinf=0.0)

    def softmin(self, log_weights: Tensor, epsilon: Scalar, *, axis: int) -> Tensor:
        """``-epsilon log sum exp(log_weights - C / epsilon)`` over the given axis, ``+inf`` where nothing is allowed.

        Args:
            log_weights: for ``axis=-1`` shape ``(..., m)``, for ``axis=-2`` shape ``(..., n)``: ``log b + g / epsilon``.
            epsilon: positive, in cost units.
            axis: ``-1`` sums over columns and gives ``(..., n)``; ``-2`` sums over rows and gives ``(..., m)``.
        """
        exponent = self._less_cost(log_weights.unsqueeze(-2 if axis == -1 else -1), epsilon)
        return -epsilon * torch.logsumexp(exponent, axis)

    def _less_cost(self, x: Tensor, epsilon: Scalar) -> Tensor:
        """``x - C / epsilon``; in one pass over C where epsilon is a number."""
        if isinstance(epsilon, Tensor):
            return x - self.matrix / epsilon
        return torch.sub(x, self.matrix, alpha=1.0 / epsilon)

    def gibbs(self, log_rows: Tensor, log_columns: Tensor, epsilon: Scalar) -> Float[Tensor, "*batch n m"]:
        """``exp(log_rows + log_columns - C / epsilon)``, shape ``(..., n, m)``."""
        exponent = self._less_cost(log_rows.unsqueeze(-1) + log_columns.unsqueeze(-2), epsilon)
        return exponent.exp_()

    def spent(self, plan: Tensor) -> Float[Tensor, "*batch"]:
        """``<C, P>``, in which a forbidden arc without mass costs nothing."""
        return torch.where(plan > 0, plan * self.matrix, 0.0).sum((-2, -1))

    def reduced_min(self, potential: Tensor, weights: Tensor, *, axis: int) -> Tensor:
        """``min (C - potential)`` over the bins of positive weight along the axis: the c-transform."""
        other = -2 if axis == -1 else -1
        shift = torch.where((weights > 0) & potential.isfinite(), potential, -math.inf).unsqueeze(other)
        return (self.matrix - shift).nan_to_num(math.inf, posinf=math.inf, neginf=-math.inf).amin(axis)

    def slack(self, f: Tensor, g: Tensor) -> tuple[Float[Tensor, "*batch n m"], Bool[Tensor, "*batch n m"]]:
        """``f + g - C`` with 0 at arcs that can carry nothing, and the mask of the arcs that can."""
        allowed = self.matrix.isfinite() & f.isfinite().unsqueeze(-1) & g.isfinite().unsqueeze(-2)
        total = f.unsqueeze(-1) + g.unsqueeze(-2) - torch.where(allowed, self.matrix, 0.0)
        return torch.where(allowed, total, 0.0), allowed


@contextmanager
def calm(matrix: Tensor) -> Iterator[None]:
    """One thread for problems too small to gain from more.

    torch's threads spin between operations: beside any other load, two of them make a 200 x 200 problem a hundred times
    slower than one, and on an idle machine they gain nothing at that size.
    """
    threads = torch.get_num_threads()
    small = matrix.device.type == "cpu" and matrix.numel() < _WORTH_THREADS and threads > 1
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if small:
            torch.set_num_threads(threads)


_WORTH_THREADS = 2**20  # entries
