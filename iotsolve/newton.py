"""Second order: the Hessian of the dual, for every marginal. Gradients through a plan and feasible roundings solve with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iotsolve.plans import Plan

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
        keep_w = float(self.with_mass)
        r, c = self.plan.marginals() if isinstance(self.plan, Plan) else (self.plan.sum(-1), self.plan.sum(-2))
        total = r.sum(-1)
        inverse = keep_u / torch.where(self.keep_rows, self.row_diagonal, 1.0)

        def eliminate(v: Tensor, w: Tensor) -> Tensor:
            return inverse * (_times(self.plan, v) + r * w.unsqueeze(-1))

        def schur(x: Tensor) -> Tensor:
            v, w = x[..., :-1] * keep_v, x[..., -1] * keep_w
            u = eliminate(v, w)
            top = keep_v * (self.column_diagonal * v + c * w.unsqueeze(-1) - _times_back(self.plan, u))
            bottom = keep_w * ((c * v).sum(-1) + total * w - (r * u).sum(-1))
            return torch.cat([top, bottom.unsqueeze(-1)], -1)

        u0 = inverse * rows
        right_columns = keep_v * (columns - _times_back(self.plan, u0))
        right_mass = keep_w * (mass - (r * u0).sum(-1))
        right = torch.cat([right_columns, right_mass.unsqueeze(-1)], -1)
        diagonal = torch.cat([torch.where(self.keep_columns, self.column_diagonal, 1.0), total.unsqueeze(-1)], -1)
        x = _conjugate_gradients(schur, right, 1.0 / diagonal, (enough**2 / total).unsqueeze(-1))
        v, w = x[..., :-1] * keep_v, x[..., -1] * keep_w
        return u0 - eliminate(v, w), v, w


def _times(plan: Plan | Tensor, v: Tensor) -> Tensor:
    return plan.times(v) if isinstance(plan, Plan) else (plan @ v.unsqueeze(-1)).squeeze(-1)


def _times_back(plan: Plan | Tensor, u: Tensor) -> Tensor:
    return plan.times_back(u) if isinstance(plan, Plan) else (plan.mT @ u.unsqueeze(-1)).squeeze(-1)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    preconditioner: Tensor,
    enough: Tensor,
    *,
    tolerance: float = 1e-14,
    max_steps: int = 2000,
) -> Tensor:
    """Preconditioned conjugate gradients for a batch of positive semidefinite systems; each stops for itself.

    Rounding leaves a little of a singular system's right-hand side outside its range, and iterating on that diverges: the
    best iterate is kept, and a system that has not bettered it for a while is left alone.
    """
    x, residual = torch.zeros_like(right), right
    z = preconditioner * residual
    direction, rz = z, (residual * z).sum(-1, keepdim=True)
    goal = torch.maximum(tolerance**2 * rz, enough)
    best, best_rz, age = x, rz, torch.zeros_like(rz)
    for _ in range(max_steps):
        image = apply(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        moving = (rz > goal) & (curvature > 0) & (age < _CG_PATIENCE)
        if not moving.any():
            break
        alpha = torch.where(moving, rz / torch.where(moving, curvature, 1.0), 0.0)
        x, residual = x + alpha * direction, residual - alpha * image
        z = preconditioner * residual
        fresh = (residual * z).sum(-1, keepdim=True)
        direction = z + torch.where(moving, fresh / torch.where(rz > 0, rz, 1.0), 0.0) * direction
        rz = torch.where(moving, fresh, 0.0)
        better = moving & (fresh < best_rz)
        best, best_rz, age = (
            torch.where(better, x, best),
            torch.where(better, fresh, best_rz),
            torch.where(better, 0.0, age + 1),
        )
    return best


_CG_PATIENCE = 100
