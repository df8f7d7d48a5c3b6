"""Second order: the Hessian of the dual, for every marginal.

:class:`Newton` maximises the dual with it; gradients through a plan and feasible roundings solve with it once. Neither holds it:
a product with the plan and one with its transpose is all that conjugate gradients ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iotsolve.kernels.precision import product
from iotsolve.marginals import Marginal, number
from iotsolve.plans import Plan, QuickPlan, plan_of
from iotsolve.problem import Potentials, Problem, in_double
from iotsolve.sinkhorn import answered, swept
from iotsolve.solver import Outcome, Status, dearness, judge, sobered
from iotsolve.validation import check_steps, check_tolerance, default_tolerance

__all__ = ["DualSystem", "Newton"]


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
        inverse, v, w, _ = self._eliminated(rows, columns, mass, enough)
        r = self._sums()[0]
        return inverse * (rows - self._times(v) - r * w.unsqueeze(-1)), v, w

    def corrections(
        self, rows: Tensor, columns: Tensor, *, enough: Tensor | float = 0.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """``u, v`` of :meth:`solve` between fixed sides, of a quick plan, and ``P v, P' u``, which the last pass gives as well.

        ``(u + t, v - t)`` for any ``t`` is another solution: of these the one with a mean of 0 over the columns. Left to itself,
        rounding leads to others, far away.
        """
        inverse, v, _, known = self._eliminated(rows, columns, torch.zeros_like(rows[..., 0]), enough, anchored=True)
        inverse, v = inverse.numpy(), v.numpy()
        image, pulled = self.plan.product(inverse, v, as_given=False)
        return inverse * (rows.numpy() - image), v, image, known.numpy() - pulled

    def _sums(self) -> tuple[Tensor, Tensor]:
        return self.plan.marginals() if isinstance(self.plan, Plan) else (self.plan.sum(-1), self.plan.sum(-2))

    def _eliminated(
        self, rows: Tensor, columns: Tensor, mass: Tensor, enough: Tensor | float, *, anchored: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``1 / R`` where kept, the solution's ``v`` and ``w``, and ``P' (rows / R)``; ``anchored``: of a mean of 0."""
        keep_u, keep_v = self.keep_rows.to(rows.dtype), self.keep_columns.to(rows.dtype)
        r, c = self._sums()
        inverse = keep_u / torch.where(self.keep_rows, self.row_diagonal, 1.0)
        diagonal = torch.where(self.keep_columns, self._diagonal(inverse, r, c), 1.0)
        border = corner = None
        known = self._times_back(inverse * rows)
        right = keep_v * (columns - known)
        if self.with_mass:
            border = keep_v * (c - self._times_back(inverse * r))
            corner = (r.sum(-1) - (inverse * r * r).sum(-1)).unsqueeze(-1)
            lacking = (mass - (r * inverse * rows).sum(-1)).unsqueeze(-1)
            right, diagonal = torch.cat([right, lacking], -1), torch.cat([diagonal, r.sum(-1, keepdim=True)], -1)
        enough = (enough**2 / r.sum(-1)).unsqueeze(-1)
        given = inverse, keep_v, self.column_diagonal, border, corner
        if isinstance(self.plan, QuickPlan) and self.plan.in_numpy:
            given = tuple(None if x is None else x.numpy() for x in given)
            schur = _schur(self.plan.normal_product, *given)
            if anchored:
                schur = _anchored(schur, given[1] * given[2])
            with np.errstate(over="ignore", invalid="ignore"):  # of iterates that rounding has led away, which are not kept
                x = _conjugate_gradients(schur, right.numpy(), 1.0 / diagonal.numpy(), enough.numpy())
            x = torch.from_numpy(x)
        else:
            x = _conjugate_gradients(_schur(self._normal, *given), right, 1.0 / diagonal, enough)
        v, w = (x[..., :-1], x[..., -1]) if self.with_mass else (x, torch.zeros_like(mass))
        return inverse, v * keep_v, w, known

    def _diagonal(self, inverse: Tensor, r: Tensor, c: Tensor) -> Tensor:
        """Of the system with its rows eliminated, ``S - sum_i P_ij^2 / R_i``, summed from terms that are not negative."""
        if isinstance(self.plan, Plan):
            spread = self.plan.spread(inverse, self.row_diagonal)
        else:
            spread = (self.plan * inverse.unsqueeze(-1) * (self.row_diagonal.unsqueeze(-1) - self.plan)).sum(-2)
        held = torch.zeros_like(c)  # by rows that do not move
        if not self.keep_rows.all():
            held = c - self._times_back(inverse * self.row_diagonal)
        own = (self.column_diagonal - c).clamp(min=0.0) + held.clamp(min=0.0) + spread
        return torch.maximum(own, 1e-8 * self.column_diagonal)

    def _normal(self, w: Tensor, v: Tensor) -> Tensor:
        return self.plan.normal(w, v) if isinstance(self.plan, Plan) else self._times_back(w * self._times(v))

    def _times(self, v: Tensor) -> Tensor:
        return self.plan.times(v) if isinstance(self.plan, Plan) else product(self.plan, v.unsqueeze(-1)).squeeze(-1)

    def _times_back(self, u: Tensor) -> Tensor:
        return self.plan.times_back(u) if isinstance(self.plan, Plan) else product(self.plan.mT, u.unsqueeze(-1)).squeeze(-1)


Array = np.ndarray | Tensor


def _schur(
    normal: Callable[[Array, Array], Array],
    inverse: Array,
    keep: Array,
    diagonal: Array,
    border: Array | None,
    corner: Array | None,
) -> Callable[[Array], Array]:
    """The system with its rows eliminated: ``diag(S) - P' diag(1/R) P`` on the kept columns, bordered by that of the mass."""

    def bordered(x: Array) -> Array:
        v, w = x[..., :-1], x[..., -1:]
        top = keep * (diagonal * v + border * w - normal(inverse, v))
        bottom = (border * v).sum(-1, keepdims=True) + corner * w
        return np.concatenate([top, bottom], -1) if isinstance(x, np.ndarray) else torch.cat([top, bottom], -1)

    return bordered if border is not None else lambda v: keep * (diagonal * v - normal(inverse, v))


def _anchored(system: Callable[[Array], Array], weights: Array) -> Callable[[Array], Array]:
    """A system that does not see a constant, and the mean in its place."""
    total = weights.sum(-1, keepdims=True)
    return lambda v: system(v) + weights * ((weights * v).sum(-1, keepdims=True) / total)


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


@dataclass(frozen=True)
class Newton:
    """Truncated Newton on the dual, for every pair of sides, with or without ``mass``, at ``epsilon > 0``.

    A step solves for all potentials that no kink holds, by conjugate gradients as far as the error asks for, and is shortened
    until the dual has risen; where it does not rise, a sweep takes its place. Close to the solution the error is squared in
    every step, which is what tight tolerances need; far from it first order is quicker.

    Args:
        tolerance: as :class:`Sinkhorn`'s; every marginal is also within it of what its potential asks for.
        max_steps: Newton steps; from a rough solution between 2 and 10 are usual.

    Raises:
        ValueError: on a tolerance or step count out of range.

    Example:
        >>> import numpy as np
        >>> from iotsolve import Problem, solve
        >>> solve(Problem(np.eye(3), epsilon=0.5), Newton(tolerance=1e-12)).status.name
        'CONVERGED'
    """

    tolerance: float | None = None
    max_steps: int = 50
    stationary: bool = True

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        check_steps(self.max_steps, default=50)

    def run(self, problem: Problem, start: Potentials | None = None) -> Outcome:
        """Solve every problem of a detached flat batch."""
        cold = start is None
        if cold:
            zero = torch.zeros_like(problem.a), torch.zeros_like(problem.b), torch.zeros_like(problem.a[:, 0])
            start = Potentials(*zero)
        found = []
        for k in range(problem.batch_shape[0]):
            own = Potentials(*(x[k : k + 1] for x in (start.f, start.g, start.lam)))
            found.append(self._one(problem.select(slice(k, k + 1)), own, cold))
        f, g, lam = (torch.cat([getattr(p, name) for p, _, _ in found]) for name in ("f", "g", "lam"))
        outcome = Outcome(Potentials(f, g, lam), [x[1] for x in found], [x[2] for x in found])
        return sobered(problem, outcome, self._threshold(problem))

    def _threshold(self, problem: Problem) -> float:
        return default_tolerance(problem.dtype) if self.tolerance is None else self.tolerance

    def _one(self, problem: Problem, p: Potentials, cold: bool) -> tuple[Potentials, Status, int]:
        tolerance, dtype, problem = self._threshold(problem), p.f.dtype, in_double(problem)
        aim = tolerance / float(dearness(problem)[0])
        p = _projected(problem, p.to(torch.float64))
        here = _Point.at(problem, swept(problem, p) if cold else p)
        if here.error > _FAR and not cold:
            here = _Point.at(problem, swept(problem, p))
        (best, error), status, trail = (here.p, here.error), Status.MAX_STEPS, []  # of a plan no longer looked at no copy
        for step in range(self.max_steps + 1):
            if here.error < error:
                best, error = here.p, here.error
            trail.append(error)
            if not math.isfinite(here.error):
                status = Status.NOT_FINITE
            elif error <= aim / 2:
                status = Status.CONVERGED
            if status is not Status.MAX_STEPS or step == self.max_steps:
                break
            if step >= _PATIENCE and trail[-1] > 0.7 * trail[-1 - _PATIENCE]:
                status = Status.STALLED
                break
            fresh = here.newton(aim)
            if fresh is None:
                fresh = _Point.at(problem, swept(problem, here.p))
                if not fresh.improves(here):
                    status = Status.STALLED
                    break
            here = fresh
        if error <= tolerance / 2:
            status = Status.CONVERGED
        return answered(problem, best).to(dtype), status, step


@dataclass(frozen=True)
class _Point:
    """Potentials of one problem with what one look at their plan says."""

    problem: Problem
    p: Potentials
    plan: Plan
    r: Tensor
    c: Tensor
    error: float
    dual: float
    scale: float

    @classmethod
    def at(cls, problem: Problem, p: Potentials) -> _Point:
        plan = plan_of(problem, p)
        r, c = plan.marginals()
        error, dual, scale = (float(x) for x in judge(problem, p, r, c, stationary=True))
        error = error if math.isfinite(dual) and math.isfinite(scale) else math.inf
        return cls(problem, p, plan, r, c, error, dual, scale)

    def improves(self, other: _Point) -> bool:
        """Whether the dual has risen, or where rounding does not show that, the error fallen."""
        resolved = 16 * torch.finfo(torch.float64).eps * (self.scale + other.scale)
        return self.dual > other.dual + resolved or (
            self.dual >= other.dual - resolved and self.error < 0.9 * other.error
        )

    def newton(self, tolerance: float) -> _Point | None:
        """The point a Newton step leads to, shortened if it must be; None if that is nowhere."""
        problem, p, eps = self.problem, self.p, number(self.problem.epsilon)
        lam = p.lam.unsqueeze(-1)
        sides = (problem.rows, problem.a, p.f, self.r), (problem.columns, problem.b, p.g, self.c)
        (to_f, keep_f, bend_f, off_f), (to_g, keep_g, bend_g, off_g) = (_side(*side, lam, eps) for side in sides)
        piece_f, piece_g = _piece(problem.rows, p.f + to_f), _piece(problem.columns, p.g + to_g)
        held_f, held_g = (torch.where(keep, 0.0, to) for keep, to in ((keep_f, to_f), (keep_g, to_g)))
        lacking = torch.zeros_like(p.lam) if problem.mass is None else number(problem.mass) - self.r.sum(-1)
        if held_f.any() or held_g.any():  # what moves onto its kink changes what the others lack
            pull_f, pull_g = self.plan.times(held_g) / eps, self.plan.times_back(held_f) / eps
            off_f, off_g = off_f - pull_f, off_g - pull_g
            lacking = lacking - ((self.r * held_f).sum(-1) + (self.c * held_g).sum(-1)) / eps
        system = DualSystem(
            self.plan, self.r + eps * bend_f, self.c + eps * bend_g, keep_f, keep_g, problem.mass is not None
        )
        zero = torch.zeros_like(p.f), torch.zeros_like(p.g)
        off_f, off_g = torch.where(keep_f, off_f, zero[0]), torch.where(keep_g, off_g, zero[1])
        moved = float(self.r.sum())
        share = max(min(0.1, self.error**0.5), 0.1 * tolerance / self.error)
        u, v, w = system.solve(off_f, off_g, lacking, enough=torch.full_like(p.lam, share * self.error * moved))
        df, dg, dlam = held_f + eps * u, held_g + eps * v, eps * w
        largest = max(float(x.abs().max()) for x in (df, dg, dlam)) / eps
        length = min(1.0, _LONGEST / largest) if largest > 0 else 1.0
        for _ in range(_TRIES):
            f, g = (p.f + length * df).clamp(*piece_f), (p.g + length * dg).clamp(*piece_g)
            there = _projected(problem, Potentials(f, g, p.lam + length * dlam))
            point = _Point.at(problem, swept(problem, there) if self.error > _FAR else there)
            if point.improves(self):
                return point
            length /= 4
        return None


_PATIENCE = 10  # steps that must take the error somewhere
_LONGEST = 40.0  # of a step, in epsilons
_TRIES = 4
_FAR = 1e-2  # error from which on rows are made exact after a step: the dual in the columns' potentials alone is tamer


def _side(
    side: Marginal, weights: Tensor, f: Tensor, r: Tensor, lam: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By how much a sweep would change the potential, which bins move, their curvature and what their marginal lacks."""
    carries = (weights > 0) & (r > 0)
    s = torch.where(carries, f + lam - eps * (r / torch.where(weights > 0, weights, 1.0)).log(), 0.0)
    answer = torch.where(carries, side.aprox(s - lam, eps), f)
    there = answer if side.kinks else f  # between kinks nothing bends: the piece is that of the answer
    bend = side.curvature(there)
    keep = carries & bend.isfinite()
    bend = torch.where(keep, weights * bend, 0.0)
    asked = torch.where(keep, weights * side.response(there), r)
    return torch.where(carries, answer - f, 0.0), keep, bend, asked - r


def _piece(side: Marginal, f: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbouring kinks."""
    low, high = torch.full_like(f, -math.inf), torch.full_like(f, math.inf)
    for kink in side.kinks:
        low = torch.where(f >= kink, kink, low)
        high = torch.where((f <= kink) & high.isinf(), kink, high)
    return low, high


def _projected(problem: Problem, p: Potentials) -> Potentials:
    f = torch.zeros_like(p.f) if problem.rows.is_free else problem.rows.project(p.f)
    g = torch.zeros_like(p.g) if problem.columns.is_free else problem.columns.project(p.g)
    return Potentials(f, g, p.lam)
