"""One observed coupling at given coefficients: the loss, its gradient and its Hessian, from the forward problem's solution.

    loss(theta) = max_P { <Phi, P> - eps KL(P | a x b) - D_rows - D_columns } - <Phi, Phat>
    gradient    = <phi, P - Phat>
    Hessian     = 1 / eps (<phi, phi'>_P + r' F + c' G),   [[R, P], [P', S]] (F, G) = -(r, c),

``r = sum_j P phi``, ``c = sum_i P phi``, ``R = P 1 + eps a curvature``, ``S`` likewise; bins that a kink holds have ``F = 0``.
``phi~ = phi + F + G`` is what of a feature the sides cannot take up (Dupuy, Galichon, 2014; Correia, Guimaraes, Zylkin, Stata J.
2020, for fixed sides).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from iotsolve.costs import Dense
from iotsolve.gradient import Implicit
from iotsolve.inverse.data import Table
from iotsolve.inverse.features import FeatureMap
from iotsolve.marginals import Marginal, number
from iotsolve.problem import Potentials, Problem
from iotsolve.solution import Solution
from iotsolve.solve import attainable, solve

__all__ = ["Market", "Point", "check_totals"]


def check_totals(table: Table, rows: Marginal, columns: Marginal) -> None:
    """Fixed sides can only be met by as much as was observed."""
    observed = float(table.plan.sum())
    for name, side, weights in (("a", rows, table.a), ("b", columns, table.b)):
        if side.is_fixed and abs(weights.sum() - observed) > 1e-9 * observed:
            raise ValueError(
                f"{name} has total {weights.sum() * table.unit:.10g} but {observed * table.unit:.10g} was observed, and the side "
                "is fixed: both must be the same, in the same unit. Nothing is rescaled for you; or relax the side with KL(rho)."
            )


@dataclass(frozen=True, eq=False)
class Market:
    """An observed coupling with its features and the forward problem around it."""

    features: FeatureMap
    table: Table
    epsilon: float
    rows: Marginal
    columns: Marginal

    def problem(self, theta: np.ndarray) -> Problem:
        """The forward problem at these coefficients; what does not depend on them is validated once."""
        ground, cost = self._ground, self._cost(theta)
        dense = Dense(torch.from_numpy(cost), (float(cost.min()), float(cost.max())))
        sides = {"rows": self.rows, "columns": self.columns}
        problem = Problem.unchecked(dense, ground.a, ground.b, epsilon=ground.epsilon, **sides)
        for name in ("as_numpy", "forgiven", "is_checked"):
            object.__setattr__(problem, name, getattr(ground, name))
        problem.__dict__["is_attained"] = self._attained
        return problem

    def _cost(self, theta: np.ndarray) -> np.ndarray:
        cost = -np.asarray(self.features.apply(theta), dtype=np.float64)
        if not np.isfinite(cost).all():
            raise ValueError(
                "the score of a cell is not finite at these coefficients: features or coefficients are too large."
            )
        return cost if self.table.allowed is None else np.where(self.table.allowed, cost, np.inf)

    @cached_property
    def _ground(self) -> Problem:
        cost = self._cost(np.zeros(self.features.count))
        return Problem(cost, self.table.a, self.table.b, epsilon=self.epsilon, rows=self.rows, columns=self.columns)

    @cached_property
    def _attained(self) -> bool:
        """Whether every arc that is allowed carries something in some plan: then no solve has to ask."""
        return attainable(self._ground) is self._ground

    def at(self, theta: np.ndarray, tolerance: float, start: Potentials | None = None) -> Point:
        """Loss and gradient at these coefficients; the forward problem solved to a relative marginal error."""
        solution = solve(self.problem(theta), gradient=Implicit(), tolerance=tolerance, init=start, throw=False)
        plan = np.ascontiguousarray(solution.plan)
        observed = self.features.adjoint(self.table.plan)
        gradient = self.features.adjoint(plan) - observed
        return Point(self, theta, solution, plan, -float(solution.value) - float(theta @ observed), gradient)


@dataclass(frozen=True, eq=False)
class Point:
    """A market at some coefficients."""

    market: Market
    theta: np.ndarray
    solution: Solution
    plan: np.ndarray
    loss: float
    gradient: np.ndarray

    def hessian(self, plan: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The Hessian of the loss, with the effects it took: ``(K, K)``, ``(n, K)``, ``(m, K)``; or those of another plan."""
        plan, features = self.plan if plan is None else plan, self.market.features
        r, c = features.sums(plan)
        over_rows, over_columns = self._solved(plan, r, c)
        found = features.gram(plan) + r.T @ over_rows + c.T @ over_columns
        return (found + found.T) / (2 * self.market.epsilon), over_rows, over_columns

    def felt(self, over_rows: np.ndarray, over_columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a match does to the gradient beside its features: of its row ``(n, K)`` and of its column ``(m, K)``.

        Weights made of the data move with it, between fixed sides by the effects themselves, which are returned as they are.
        Weights that are known do not, but for the total where it is that of the data; nor does a bin that a hard side pins.
        """
        market, plan, table = self.market, self.plan, self.market.table
        r, c = market.features.sums(plan)
        moved = r + plan @ over_columns, c + plan.T @ over_rows  # the gradient in the logarithms of weights
        sides, weights, effects = (market.rows, market.columns), (table.a, table.b), (over_rows, over_columns)
        known, totals = table.known, (table.plan.sum(1), table.plan.sum(0))
        found, whole = list(effects), np.zeros(r.shape[1])
        for k, side in enumerate(sides):
            ends = [number(end) * weights[k] for end in side.bounds if side.is_hard and np.isfinite(number(end))]
            pinned = np.any([abs(totals[k] - end) <= 1e-9 * weights[k] for end in ends] or [weights[k] < 0], axis=0)
            if (side.is_fixed and pinned.all()) or (side.is_free and (known[k] or sides[1 - k].is_fixed)):
                continue
            if side.is_fixed or (side.is_free and not known[k]):  # known shares of the data's total
                found[k] = np.zeros_like(effects[k])
                whole -= moved[k].sum(0) / weights[k].sum()
            elif known[k]:
                found[k] = np.where(pinned[:, None], effects[k], 0.0)
            else:
                found[k] = -moved[k] / np.where(weights[k] > 0, weights[k], np.inf)[:, None]
        if found[0] is over_rows and found[1] is over_columns:
            return over_rows, over_columns
        if market.rows.is_fixed or not known[0]:  # and so is the unit that the problem is posed in
            whole -= (r.sum(0) - moved[0].sum(0) - moved[1].sum(0)) / table.a.sum()
        return found[0] + whole, found[1]

    def _solved(self, plan: np.ndarray, r: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(F, G)`` for right-hand sides ``-(r, c)``; by the Schur complement of the longer side."""
        market = self.market
        sides = (market.rows, market.table.a, plan.sum(1), self.solution.f), (
            market.columns, market.table.b, plan.sum(0), self.solution.g,
        )  # fmt: skip
        (keep_r, big_r), (keep_c, big_c) = (_diagonal(*side, market.epsilon) for side in sides)
        if len(r) < len(c):
            second, first = _eliminated(plan.T, c, r, keep_c, big_c, keep_r, big_r)
            return first, second
        return _eliminated(plan, r, c, keep_r, big_r, keep_c, big_c)

    def moved(self, step: np.ndarray, over_rows: np.ndarray, over_columns: np.ndarray) -> Potentials:
        """Where the potentials would be after a step of the coefficients, to first order."""
        p = self.solution.found
        f, g = (x.detach().double().reshape(-1).numpy() for x in (p.f, p.g))
        f, g = (np.where(np.isfinite(x), x + effect @ step, x) for x, effect in ((f, over_rows), (g, over_columns)))
        return replace(p, f=torch.from_numpy(f), g=torch.from_numpy(g))


def _diagonal(
    side: Marginal, weights: np.ndarray, marginal: np.ndarray, potential: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """The bins whose potential moves, and the diagonal of the system there."""
    a, f = torch.from_numpy(np.ascontiguousarray(weights)), torch.from_numpy(np.ascontiguousarray(potential))
    bend = side.at(a).curvature(torch.where(f.isfinite(), f, 0.0)).numpy()
    keep = (weights > 0) & (marginal > 0) & np.isfinite(bend)
    return keep, np.where(keep, marginal + epsilon * weights * np.where(keep, bend, 0.0), 1.0)


def _eliminated(
    plan: np.ndarray,
    r: np.ndarray,
    c: np.ndarray,
    keep_r: np.ndarray,
    big_r: np.ndarray,
    keep_c: np.ndarray,
    big_c: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The system solved for the columns first; singular directions, that nothing anchors, are filled up."""
    first, second = np.zeros_like(r), np.zeros_like(c)
    whole = bool(keep_r.all() and keep_c.all())
    p = plan if whole else plan[np.ix_(keep_r, keep_c)]
    inverse = 1 / big_r[keep_r]
    if p.shape[1]:
        schur = -(p.T @ (p * inverse[:, None]))
        schur[np.diag_indices_from(schur)] += big_c[keep_c]
        for members in _adrift(p, big_r[keep_r], big_c[keep_c]):
            d = np.where(members, big_c[keep_c], 0.0)
            schur += np.outer(d, d / d.sum())
        right = -(c[keep_c] - p.T @ (r[keep_r] * inverse[:, None]))
        second[keep_c] = _anchored(schur, right, big_c[keep_c])
    first[keep_r] = -(r[keep_r] + p @ second[keep_c]) * inverse[:, None]
    return first, second


def _anchored(schur: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``schur x = right``; where a part of the plan hangs on next to nothing, the solution that is not made of rounding."""
    diagonal = np.diag_indices_from(schur)
    on_diagonal = schur[diagonal].copy()
    schur[diagonal] *= 1 + 1e-15  # rounding
    found = np.linalg.solve(schur, right)  # not SciPy's: NumPy's threads would be in the way of its own
    if (weights @ found**2 <= _LOOSE * ((1 / weights) @ right**2)).all():
        return found
    schur[diagonal] = on_diagonal * (1 + 1e-11)
    inverse = np.linalg.inv(schur)
    schur[diagonal] = on_diagonal
    found = inverse @ right
    return found + inverse @ (right - schur @ found)


_NO_LINK = 1e-15  # of what two bins carry: their rounding
_LOOSE = 1e10  # times the square of what every bin alone would take up: more than effects come to that hold on to something


def _adrift(p: np.ndarray, big_r: np.ndarray, big_c: np.ndarray) -> list[np.ndarray]:
    """The columns of every part of the plan that no curvature and no held bin anchors, so that ``(1, -1)`` moves freely."""
    n, m = p.shape
    linked = p > _NO_LINK * np.minimum(big_r[:, None], big_c)
    if linked.all():
        parts, labels = 1, np.zeros(n + m, np.int64)
    else:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import connected_components

        i, j = np.nonzero(linked)
        graph = csr_array((np.ones(len(i)), (i, n + j)), shape=(n + m, n + m))
        parts, labels = connected_components(graph, directed=False)
    loose_r, loose_c = abs(p.sum(1) - big_r) <= 1e-9 * big_r, abs(p.sum(0) - big_c) <= 1e-9 * big_c
    found = []
    for part in range(parts):
        rows, columns = labels[:n] == part, labels[n:] == part
        if columns.any() and loose_r[rows].all() and loose_c[columns].all():
            found.append(columns)
    return found
