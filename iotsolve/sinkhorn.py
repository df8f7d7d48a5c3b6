"""First order: alternating ``aprox`` updates in the log domain, one for every pair of marginals.

Differs from the textbook algorithm in that 1. the side's object, not the solver, knows how far to move; 2. a free side is
not visited, so that a semi-relaxed problem is one soft-min; 3. the translation ``(f + t, g - t)``, along which unbalanced
problems crawl, is solved in closed form after each sweep (Sejourne, Vialard, Peyre, AISTATS 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iotsolve.marginals import Marginal, Scalar, number
from iotsolve.problem import Potentials, Problem, log_scaling
from iotsolve.solver import default_tolerance

__all__ = ["Sinkhorn", "SinkhornState"]


@dataclass(frozen=True)
class SinkhornState:
    """Potentials with the soft-minima they give: ``s`` over columns at ``g``, ``t`` over rows at ``f``; None if not needed."""

    potentials: Potentials
    s: Tensor | None
    t: Tensor | None

    def marginals(self, problem: Problem) -> tuple[Tensor | None, Tensor | None]:
        """``P 1`` and ``P' 1`` at no further cost; None on a side nobody asks about."""
        p = self.potentials
        return (
            None if self.s is None else _marginal(problem.a, p.f + p.lam.unsqueeze(-1), self.s, problem.epsilon),
            None if self.t is None else _marginal(problem.b, p.g + p.lam.unsqueeze(-1), self.t, problem.epsilon),
        )

    def select(self, index: Tensor) -> SinkhornState:
        p = Potentials(self.potentials.f[index], self.potentials.g[index], self.potentials.lam[index])
        return SinkhornState(p, *(None if x is None else x[index] for x in (self.s, self.t)))


@dataclass(frozen=True)
class Sinkhorn:
    """Sinkhorn's algorithm for any pair of marginals (Chizat et al., Math. Comp. 2018).

    Args:
        tolerance: relative marginal error (hard sides, ``mass``) and relative duality gap at which to stop; by default
            1e-8 in float64 and 1e-5 in float32.
        max_steps: sweeps over both sides, annealing included.
        stationary: also require that the L1 distance of every marginal from what its potential asks for is within tolerance.
            On soft sides the gap is of second order in the plan's error; this is the first-order condition that gradients of
            the plan need, and ``gradient=Implicit()`` switches it on.
        annealing: ratio of successive epsilons on the way down from the cost range, in ``(0, 1)``; None starts at epsilon.

    Raises:
        ValueError: on a tolerance, step count or ratio out of range.

    Example:
        >>> import numpy as np
        >>> from iotsolve import Problem, solve
        >>> solve(Problem(np.eye(3), epsilon=0.5), Sinkhorn(tolerance=1e-10)).status.name
        'CONVERGED'
    """

    tolerance: float | None = None
    max_steps: int = 10_000
    annealing: float | None = 0.5
    stationary: bool = False

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(
                f"tolerance = {self.tolerance}: is relative, so must lie in [0, 1); 1e-8 is the default in float64."
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps = {self.max_steps}: must be at least 1; the default is 10,000.")
        if self.annealing is not None and not 0 < self.annealing < 1:
            raise ValueError(
                f"annealing = {self.annealing}: is the ratio of successive epsilons, so must lie in (0, 1); None switches it off."
            )

    def threshold(self, problem: Problem) -> float:
        return default_tolerance(problem.dtype) if self.tolerance is None else self.tolerance

    def schedule(self, problem: Problem, start: Potentials | None) -> list[Scalar]:
        """The epsilons of the annealing sweeps, all above the problem's own; none on a warm start."""
        one_sided = problem.rows.is_free or problem.columns.is_free
        if self.annealing is None or start is not None or one_sided:
            return []
        target, top = number(problem.epsilon), float(problem.cost.range().max())
        if target >= _EASY * top:
            return []
        count = min(math.floor(math.log(target / top) / math.log(self.annealing)), self.max_steps - 1)
        return [top * self.annealing**k for k in range(1, count + 1) if top * self.annealing**k > target]

    def init(self, problem: Problem, start: Potentials | None) -> SinkhornState:
        if start is None:
            lam = problem.a.new_zeros(problem.batch_shape)
            start = Potentials(torch.zeros_like(problem.a), torch.zeros_like(problem.b), lam)
        s = None if problem.rows.is_free else _softmin(problem, start.g, problem.epsilon, axis=-1)
        return SinkhornState(start, s, None)

    def step(self, problem: Problem, state: SinkhornState, epsilon: Scalar) -> SinkhornState:
        p, s, t = state.potentials, state.s, None
        rows, columns = problem.rows, problem.columns
        if s is not None:
            p = replace(p, f=rows.aprox(s - p.lam.unsqueeze(-1), epsilon))
        if not columns.is_free or (rows.is_free and problem.mass is not None):
            t = _softmin(problem, p.f, epsilon, axis=-2)
            p = replace(p, g=columns.aprox(t - p.lam.unsqueeze(-1), epsilon))
        if problem.mass is not None:
            log_moved = _log_mass(problem.a, p.f, s, epsilon) if t is None else _log_mass(problem.b, p.g, t, epsilon)
            p = replace(p, lam=epsilon * (_log(problem.mass) - log_moved))
        p, shift = translate(problem, p)
        if s is not None and not columns.is_free:
            s = _softmin(problem, p.g, epsilon, axis=-1)
        return SinkhornState(p, s, t if t is None or shift is None else t - shift.unsqueeze(-1))


_EASY = 0.05  # epsilon, in cost ranges, above which annealing only costs sweeps


def translate(problem: Problem, p: Potentials) -> tuple[Potentials, Tensor | None]:
    """The best ``(f + t, g - t)``, or with ``mass`` ``(f + t, g + u, lam - t - u)``: the plan stays, the dual rises.

    Returns the potentials and the shift ``t`` of the rows (what a soft-min over rows falls by), None if nothing moved.
    """
    softness = problem.rows.softness, problem.columns.softness
    rows = None if softness[0] is None else _log_demand(problem.rows, problem.a, p.f)
    columns = None if softness[1] is None else _log_demand(problem.columns, problem.b, p.g)
    if problem.mass is not None:
        t = u = torch.zeros_like(p.lam)
        if rows is not None and softness[0]:
            t = (rows - _log(problem.mass)) / softness[0]
        if columns is not None and softness[1]:
            u = (columns - _log(problem.mass)) / softness[1]
        return Potentials(p.f + t.unsqueeze(-1), p.g + u.unsqueeze(-1), p.lam - t - u), t
    if rows is None or columns is None or not (softness[0] or softness[1]):
        return p, None
    t = (rows - columns) / (softness[0] + softness[1])
    return Potentials(p.f + t.unsqueeze(-1), p.g - t.unsqueeze(-1), p.lam), t


def _log_demand(side: Marginal, weights: Tensor, potential: Tensor) -> Tensor:
    """``log sum a phi'(f)``: the total mass the side asks for."""
    return torch.logsumexp(weights.log() - side.softness * potential, -1) + (
        side.bounds[0] and math.log(number(side.bounds[0]))
    )


def _softmin(problem: Problem, potential: Tensor, epsilon: Scalar, *, axis: int) -> Tensor:
    weights = problem.b if axis == -1 else problem.a
    return problem.cost.softmin(log_scaling(weights, potential, epsilon), epsilon, axis=axis)


def _log_marginal(weights: Tensor, potential: Tensor, softmin: Tensor, epsilon: Scalar) -> Tensor:
    """``log(a exp((f - s) / epsilon))``, ``-inf`` where nothing arrives."""
    reached = (weights > 0) & softmin.isfinite() & potential.isfinite()
    return torch.where(reached, weights.log() + torch.where(reached, potential - softmin, 0.0) / epsilon, -math.inf)


def _marginal(weights: Tensor, potential: Tensor, softmin: Tensor, epsilon: Scalar) -> Tensor:
    return _log_marginal(weights, potential, softmin, epsilon).exp()


def _log_mass(weights: Tensor, potential: Tensor, softmin: Tensor, epsilon: Scalar) -> Tensor:
    return torch.logsumexp(_log_marginal(weights, potential, softmin, epsilon), -1)


def _log(x: Scalar) -> Scalar:
    return x.log() if isinstance(x, Tensor) else math.log(x)
