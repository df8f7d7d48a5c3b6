"""Second order: the Hessian of the dual, for every marginal. Gradients through a plan and feasible roundings solve with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iotsolve.plans import Plan, StoredPlan

__all__ = ["DualSystem"]


@dataclass(frozen=True)
class DualSystem:
    """The symmetric system ``[[diag(R), P, r], [P', diag(S), c], [r', c', sum P]]`` restricted to the bins that move.

    With ``R = r`` it changes a plan's marginals by ``P o (u + v)``; with ``R = r + eps a curvature`` it is ``eps`` times the
    Hessian of the dual. Held bins (``keep`` False) have ``u = 0``.

    Args:
        plan: ``P``, shape ``(B, n, m)``, float64; a tensor, or a :class:`Plan` that is only read.
        row_diagonal, column_diagonal: ``R (B, n)`` and ``S (B, m)``, positive where kept.
        keep_rows, keep_columns: bins that move.
        with_mass: whether the multiplier of ``mass`` moves.
    """

    plan: Plan | Tensor
    row_diagonal: Float[Tensor, "b n"]
    column_diagonal: Float[Tensor, "b m"]
    keep_rows: Bool[Tensor, "b n"]
    keep_columns: Bool[Tensor, "b m"]
    with_mass: bool

    def solve(
        self, rows: Tensor, columns: Tensor, mass: Tensor, *, enough: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(u, v, w)`` by conjugate gradients on the Schur complement of the columns and the mass.

        The system is singular along ``(1, -1)`` when nothing anchors it; conjugate gradients stay in the range, so that a
        consistent right-hand side needs no special case. ``enough`` is a residual, in the unit of the marginals, below which
        nothing is gained.
        """
        keep_u, keep_v = self.keep_rows.to(rows.dtype), self.keep_columns.to(rows.dtype)
        r, c = self.plan.marginals() if isinstance(self.plan, Plan) else (self.plan.sum(-1), self.plan.sum(-2))
        inverse = keep_u / torch.where(self.keep_rows, self.row_diagonal, 1.0)
        diagonal = torch.where(self.keep_columns, self.column_diagonal, 1.0)
        border = corner = None
        right = keep_v * (columns - self._times_back(inverse * rows))
        if self.with_mass:
            border = keep_v * (c - self._times_back(inverse * r))
            corner = (r.sum(-1) - (inverse * r * r).sum(-1)).unsqueeze(-1)
            lacking = (mass - (r * inverse * rows).sum(-1)).unsqueeze(-1)
            right, diagonal = torch.cat([right, lacking], -1), torch.cat([diagonal, r.sum(-1, keepdim=True)], -1)
        enough = (enough**2 / r.sum(-1)).unsqueeze(-1)
        given = inverse, keep_v, self.column_diagonal, border, corner
        if isinstance(self.plan, StoredPlan):  # small vectors cost a tenth in NumPy
            given = tuple(None if x is None else x.numpy() for x in given)
            schur = _schur(lambda w, v: self.plan.product(w, v, as_given=False)[1], *given)
            x = _conjugate_gradients(schur, right.numpy(), 1.0 / diagonal.numpy(), enough.numpy())
            x = torch.from_numpy(x)
        else:
            x = _conjugate_gradients(_schur(self._normal, *given), right, 1.0 / diagonal, enough)
        v, w = (x[..., :-1], x[..., -1]) if self.with_mass else (x, torch.zeros_like(mass))
        v = v * keep_v
        return inverse * (rows - self._times(v) - r * w.unsqueeze(-1)), v, w

    def _normal(self, w: Tensor, v: Tensor) -> Tensor:
        return self._times_back(w * self._times(v))

    def _times(self, v: Tensor) -> Tensor:
        return self.plan.times(v) if isinstance(self.plan, Plan) else (self.plan @ v.unsqueeze(-1)).squeeze(-1)

    def _times_back(self, u: Tensor) -> Tensor:
        return self.plan.times_back(u) if isinstance(self.plan, Plan) else (self.plan.mT @ u.unsqueeze(-1)).squeeze(-1)


Array = np.ndarray | Tensor


def _schur(
    normal: Callable[[Array, Array], Array], inverse: Array, keep: Array, diagonal: Array, border: Array | None, corner: Array | None
) -> Callable[[Array], Array]:
    """The system with its rows eliminated: ``diag(S) - P' diag(1/R) P`` on the kept columns, bordered by that of the mass."""

    def bordered(x: Array) -> Array:
        v, w = x[..., :-1], x[..., -1:]
        top = keep * (diagonal * v + border * w - normal(inverse, v))
        bottom = (border * v).sum(-1, keepdims=True) + corner * w
        return np.concatenate([top, bottom], -1) if isinstance(x, np.ndarray) else torch.cat([top, bottom], -1)

    return bordered if border is not None else lambda v: keep * (diagonal * v - normal(inverse, v))


def _conjugate_gradients(
    apply: Callable[[Array], Array],
    right: Array,
    preconditioner: Array,
    enough: Array,
    *,
    tolerance: float = 1e-14,
    max_steps: int = 2000,
) -> Array:
    """Preconditioned conjugate gradients for a batch of positive semidefinite systems, of NumPy or torch; each stops for itself.

    Rounding leaves a little of a singular system's right-hand side outside its range, and iterating on that diverges: the
    best iterate is kept, and a system that has not bettered it for a while is left alone.
    """
    xp = np if isinstance(right, np.ndarray) else torch
    x, residual = xp.zeros_like(right), right
    z = preconditioner * residual
    direction, rz = z, (residual * z).sum(-1, keepdims=True)
    goal = xp.maximum(tolerance**2 * rz, enough)
    best, best_rz, age = x, rz, xp.zeros_like(rz)
    for _ in range(max_steps):
        if not ((rz > goal) & (age < _CG_PATIENCE)).any():
            break
        image = apply(direction)
        curvature = (direction * image).sum(-1, keepdims=True)
        moving = (rz > goal) & (curvature > 0) & (age < _CG_PATIENCE)
        if not moving.any():
            break
        alpha = xp.where(moving, rz / xp.where(moving, curvature, 1.0), 0.0)
        x, residual = x + alpha * direction, residual - alpha * image
        z = preconditioner * residual
        fresh = (residual * z).sum(-1, keepdims=True)
        direction = z + xp.where(moving, fresh / xp.where(rz > 0, rz, 1.0), 0.0) * direction
        rz = xp.where(moving, fresh, 0.0)
        better = moving & (fresh < best_rz)
        best, best_rz = xp.where(better, x, best), xp.where(better, fresh, best_rz)
        age = xp.where(better, 0.0, age + 1)
    return best


_CG_PATIENCE = 100
