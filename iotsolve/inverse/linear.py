"""Without entropy: costs for which an observed plan is optimal, by linear programs (Ahuja and Orlin, Oper. Res. 2001).

``C = -Phi`` has ``Phat`` as an optimal plan exactly if there are ``u, v`` with ``C - u - v >= 0`` everywhere and ``= 0`` where
``Phat > 0``. These coefficients are a polyhedron, so that there is an interval for each, and a choice of which point to return.
Rows of the program that matter are found by pricing the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iotsolve.inverse.data import Coupling, Table
from iotsolve.inverse.features import FeatureMap
from iotsolve.inverse.steps import Constraints
from iotsolve.problem import Problem
from iotsolve.solution import Solution
from iotsolve.solve import solve

__all__ = ["ExactFit", "ExactInverse", "MaxMargin", "Nearest", "SmallestGap"]


@dataclass(frozen=True)
class MaxMargin:
    """The point furthest inside: no cell without mass gets nearer to being used than necessary.

    Coefficients are in ``[-1, 1]`` where nothing fixes their scale. Where something does and the margin still grows without end,
    they are no larger than those that explain the plan and are smallest.
    """


@dataclass(frozen=True)
class Nearest:
    """The point nearest to a prior in L1.

    Args:
        prior: coefficients, shape ``(K,)``.
    """

    prior: Any


@dataclass(frozen=True)
class SmallestGap:
    """The coefficients under which the observed plan loses least, for plans that no coefficients explain exactly.

    Needs ``fixed`` or ``equalities``, since without a scale the coefficients 0 lose nothing.
    """


@dataclass(frozen=True, eq=False)
class ExactFit:
    """What an inverse linear program found.

    Args:
        names: of the coefficients.
        coefficients: shape ``(K,)``.
        bounds: lower and upper ends of the identified set per coefficient, shape ``(K, 2)``; None where no coefficients explain
            the plan exactly.
        cost: ``-Phi``, shape ``(n, m)``.
        potentials: ``(u, v)`` that certify the plan.
        margin: least reduced cost of a cell without mass.
        gap: by how much the observed plan costs more than the optimal one, relative to the sum of its terms' sizes.
        solution: the forward problem solved again, with its certificate.
    """

    names: tuple[str, ...]
    coefficients: np.ndarray
    bounds: np.ndarray | None
    cost: np.ndarray
    potentials: tuple[np.ndarray, np.ndarray]
    margin: float
    gap: float
    solution: Solution

    @property
    def plan(self) -> np.ndarray:
        """An optimal plan at these coefficients."""
        return self.solution.plan


@dataclass(frozen=True, eq=False)
class ExactInverse:
    """Coefficients under which an observed plan is optimal at ``epsilon = 0``.

    Args:
        features: what the score ``Phi = -C`` is made of.
        objective: which of the coefficients to return: :class:`MaxMargin`, :class:`Nearest` or :class:`SmallestGap`.
        nonnegative: whether coefficients must not be negative.
        fixed: coefficients that are known, by name or number: the scale, which the plan does not tell.
        equalities: ``(A, r)``: linear equations ``A theta = r``.

    Raises:
        ValueError: when fitted, if no coefficients explain the plan.

    Example:
        >>> from iotsolve import inverse
        >>> near = inverse.Features({"distance": -np.abs(np.subtract.outer(np.arange(3.0), np.arange(3.0)))})
        >>> fit = ExactInverse(near).fit(Coupling(plan=np.eye(3)))
        >>> float(fit.coefficients[0]), float(fit.margin)
        (1.0, 1.0)
    """

    features: FeatureMap
    objective: MaxMargin | Nearest | SmallestGap = MaxMargin()
    nonnegative: bool = False
    fixed: Mapping[Any, float] | None = None
    equalities: tuple[Any, Any] | None = None

    def fit(self, data: Coupling | Any, *, bounds: bool = True) -> ExactFit:
        """One linear program for the coefficients and, with ``bounds``, two for each interval."""
        coupling = data if isinstance(data, Coupling) else Coupling(data)
        table = coupling.table(self.features.shape)
        constraints = Constraints.of(self.features, self.nonnegative, self.fixed, self.equalities)
        if isinstance(self.objective, SmallestGap) and not len(constraints.right):
            raise ValueError("SmallestGap without a scale returns 0: fix a coefficient (fixed=), or give equalities.")
        program = _Program(self.features, table, constraints, tight=not isinstance(self.objective, SmallestGap))
        theta, u, v = program.best(self.objective)
        cost = -self.features.apply(theta)
        reduced = np.where(program.allowed, cost - u[:, None] - v, np.inf)
        empty = program.allowed & (table.plan == 0)
        solution = solve(Problem(np.where(program.allowed, cost, np.inf), table.a, table.b))
        spent = float((cost * table.plan).sum())
        size = abs(cost[table.plan > 0]) @ table.plan[table.plan > 0] + abs(float(solution.value))
        gap = (spent - float(solution.value)) / size if size > 0 else 0.0
        intervals = None
        if bounds and program.tight:
            box = None if len(constraints.right) else 1.0
            intervals = np.array([program.interval(k, box) for k in range(self.features.count)])
        margin = float(reduced[empty].min()) if empty.any() else np.inf
        return ExactFit(self.features.names, theta, intervals, cost, (u, v), margin, gap, solution)


class _Program:
    """``-phi theta - u - v >= 0``, with equality where there is mass if ``tight``; cells enter when they are violated."""

    def __init__(self, features: FeatureMap, table: Table, constraints: Constraints, *, tight: bool) -> None:
        self.features, self.table, self.constraints, self.tight = features, table, constraints, tight
        n, m = features.shape
        self.allowed = np.ones((n, m), bool) if table.allowed is None else table.allowed
        self.support = table.plan > 0
        self.known = self.support.copy()
        order = np.random.default_rng(0).permuted(np.tile(np.arange(m), (n, 1)), axis=1)[:, : min(m, _FIRST)]
        self.known[np.arange(n)[:, None], order] = True
        self.known &= self.allowed

    def best(self, objective: MaxMargin | Nearest | SmallestGap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The coefficients and potentials of an objective."""
        count, (n, m) = self.features.count, self.features.shape
        price = np.zeros(count + n + m)
        if isinstance(objective, Nearest):
            prior = np.asarray(objective.prior, dtype=np.float64)
            if prior.shape != (count,):
                raise ValueError(f"prior of shape {prior.shape}: must be one number for each of {count} coefficients.")
            return self._solved(price, prior=prior)
        if isinstance(objective, MaxMargin):
            box = None if len(self.constraints.right) else 1.0
            if (found := self._solved(price, margin=True, box=box, endless=True)) is None:
                least = self._solved(price, prior=np.zeros(count))
                box = max(1.0, (1 + 1e-9) * float(abs(least[0]).max()))
                # None again where no cell is without mass, or potentials alone keep them as far away as one likes
                found = self._solved(price, margin=True, box=box, endless=True) or least
            return found
        price[:count] = -self.features.adjoint(self.table.plan)
        price[count : count + n], price[count + n :] = -self.table.plan.sum(1), -self.table.plan.sum(0)
        return self._solved(price)

    def interval(self, k: int, box: float | None) -> tuple[float, float]:
        """Least and largest value of a coefficient in the identified set; infinite where it has no end."""
        price = np.zeros(self.features.count + sum(self.features.shape))
        ends = []
        for sign in (1.0, -1.0):
            price[k] = sign
            found = self._solved(price, box=box, endless=True)
            ends.append(-sign * np.inf if found is None else float(found[0][k]))
        return ends[0], ends[1]

    def _rows(self, cells: np.ndarray) -> Any:
        """``-phi - e_i - e_j`` of some cells, sparse."""
        from scipy.sparse import csr_array, hstack

        (i, j), (n, m) = np.nonzero(cells), self.features.shape
        values = np.concatenate([-block[cells[rows]] for rows, block in self.features.blocks()])
        both = (np.tile(np.arange(len(i)), 2), np.concatenate([i, n + j]))
        return hstack([csr_array(values), csr_array((-np.ones(2 * len(i)), both), shape=(len(i), n + m))], format="csr")

    def _solved(
        self,
        price: np.ndarray,
        *,
        margin: bool = False,
        prior: np.ndarray | None = None,
        box: float | None = None,
        endless: bool = False,
    ) -> Any:
        from scipy.optimize import linprog  # scipy is imported where it is needed
        from scipy.sparse import csr_array, hstack, vstack

        count, (n, m) = self.features.count, self.features.shape
        extra = int(margin) + (count if prior is not None else 0)
        price = np.concatenate([price, [-1.0] if margin else [], np.ones(count) if prior is not None else []])
        low = 0.0 if self.constraints.nonnegative else -np.inf
        coefficient = (max(low, -np.inf if box is None else -box), np.inf if box is None else box)
        limits = [coefficient] * count + [(None, None)] * (n + m) + [(0.0, None)] * extra
        limits[count] = (0.0, 0.0)  # the gauge
        for _ in range(_ROUNDS):
            free = self.known & ~self.support if self.tight else self.known
            above, fixed = self._rows(free), self._rows(self.support if self.tight else np.zeros_like(self.support))
            if margin:
                above = hstack([above, csr_array(-np.ones((above.shape[0], 1)))], format="csr")
                fixed = hstack([fixed, csr_array((fixed.shape[0], 1))], format="csr")
            equal = csr_array(self.constraints.matrix) if len(self.constraints.right) else csr_array((0, count))
            equal = hstack([equal, csr_array((equal.shape[0], n + m + int(margin)))], format="csr")
            left, top = [-above], [np.zeros(above.shape[0])]
            equalities, right = [fixed, equal], np.concatenate([np.zeros(fixed.shape[0]), self.constraints.right])
            if prior is not None:
                identity, nothing = csr_array(np.eye(count)), csr_array((count, n + m))
                left = [hstack([-above, csr_array((above.shape[0], count))])]
                left += [hstack([identity, nothing, -identity]), hstack([-identity, nothing, -identity])]
                top += [prior, -prior]
                equalities = [hstack([x, csr_array((x.shape[0], count))]) for x in equalities]
            found = linprog(
                price, A_ub=vstack(left, format="csr"), b_ub=np.concatenate(top), A_eq=vstack(equalities, format="csr"),
                b_eq=right, bounds=limits, method="highs", options={"primal_feasibility_tolerance": 1e-10,
                "dual_feasibility_tolerance": 1e-10},
            )  # fmt: skip
            if found.status == 3 and endless:
                if self.known[self.allowed].all():
                    return None
                self.known = self.allowed.copy()
                continue
            if found.status != 0:
                raise ValueError(
                    "no coefficients explain the observed plan as an optimal one: its support needs more than these features and "
                    f"constraints allow ({found.message}). Use SmallestGap(), more features, or epsilon > 0 for data with noise."
                )
            theta, u, v = found.x[:count], found.x[count : count + n], found.x[count + n : count + n + m]
            reduced = np.where(self.allowed, -self.features.apply(theta) - u[:, None] - v, np.inf)
            floor = float(found.x[count + n + m]) if margin else 0.0
            short = np.where(self.support & self.tight, 0.0, reduced - floor)
            if not self._enter(short, float(abs(reduced[self.allowed]).max(initial=1.0))):
                return theta, u, v
        raise RuntimeError("pricing did not end")  # every round adds cells, and there are finitely many

    def _enter(self, short: np.ndarray, size: float) -> bool:
        """Take in the most violated cells of every row and column."""
        bad = short < -1e-9 * size
        fresh = np.zeros_like(bad)
        for axis in (0, 1):
            worst = np.argsort(short, axis)[:_MORE] if axis == 0 else np.argsort(short, axis)[:, :_MORE]
            np.put_along_axis(fresh, worst, True, axis)
        fresh &= bad & ~self.known
        self.known |= fresh
        return bool(fresh.any())


_FIRST, _MORE, _ROUNDS = 8, 3, 500
