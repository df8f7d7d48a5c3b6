"""What the answer should be, by code that shares nothing with the library.

The formulas of ``docs/definitions.md`` in plain NumPy, and :func:`reference`, which hands the problem as it is stated
to a general convex solver (cvxpy with Clarabel, HiGHS for a linear program). No algorithm of this library is used.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import kl_div

from iotsolve.marginals import KL, TV, Between, Marginal
from iotsolve.problem import Problem

__all__ = [
    "Numbers",
    "Reference",
    "dual_objective",
    "gibbs_plan",
    "numbers",
    "objective",
    "reference",
    "rounding",
    "terms",
    "violation",
]

_CLARABEL = {"tol_gap_rel": 1e-12, "tol_gap_abs": 1e-13, "tol_feas": 1e-12, "max_iter": 500, "accept_unknown": True}
_HIGHS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
_WORST_GAP = 1e-8


@dataclass(frozen=True)
class Numbers:
    """A problem without a batch as float64 NumPy arrays and floats."""

    cost: np.ndarray
    a: np.ndarray
    b: np.ndarray
    epsilon: float
    rows: Marginal
    columns: Marginal
    mass: float | None

    @property
    def product(self) -> np.ndarray:
        """``a x b``."""
        return np.outer(self.a, self.b)

    @property
    def arcs(self) -> np.ndarray:
        """Where a plan may be positive: finite cost and weight on both ends."""
        return np.isfinite(self.cost) & (self.product > 0)


@dataclass(frozen=True)
class Reference:
    """The answer of a general convex solver.

    Attributes:
        value: optimal objective.
        plan: an optimal plan, shape ``(n, m)``; the only one if ``epsilon > 0``.
        scale: sum of the absolute terms of the objective: what an error of the value is large or small against.
    """

    value: float
    plan: np.ndarray
    scale: float


def numbers(problem: Problem) -> Numbers:
    """The data of a problem without a batch, out of torch and in float64.

    Raises:
        ValueError: if the problem has a batch.
    """
    if problem.batch_shape:
        raise ValueError(f"the problem has batch shape {problem.batch_shape}: take one with problem.select(i) first.")

    def leave(x: Any) -> np.ndarray:
        return x.detach().cpu().double().numpy()

    mass = None if problem.mass is None else float(problem.mass)
    arrays = (leave(x) for x in (problem.cost.dense(), problem.a, problem.b))
    return Numbers(*arrays, float(problem.epsilon), problem.rows, problem.columns, mass)


# -- the formulas ------------------------------------------------------------------------------------------------------


def terms(problem: Problem, plan: Any) -> dict[str, float]:
    """The objective's terms at a plan, by name; constraints are not looked at (see :func:`violation`)."""
    data, plan = numbers(problem), np.asarray(plan, dtype=np.float64)
    used = plan > 0
    with np.errstate(invalid="ignore"):
        transport = float((data.cost[used] * plan[used]).sum())
    return {
        "transport": transport,
        "entropy": data.epsilon * float(kl_div(plan, data.product).sum()) if data.epsilon else 0.0,
        "rows": _penalty(data.rows, plan.sum(1), data.a),
        "columns": _penalty(data.columns, plan.sum(0), data.b),
    }


def objective(problem: Problem, plan: Any) -> float:
    """``<C, P> + eps KL(P | a x b) + D_rows(P 1 | a) + D_cols(P' 1 | b)``."""
    return sum(terms(problem, plan).values())


def violation(problem: Problem, plan: Any) -> float:
    """L1 distance of a plan's marginals from what hard sides allow, plus that of its total from ``mass``."""
    data, plan = numbers(problem), np.asarray(plan, dtype=np.float64)
    total = 0.0 if data.mass is None else abs(plan.sum() - data.mass)
    for side, r, weights in ((data.rows, plan.sum(1), data.a), (data.columns, plan.sum(0), data.b)):
        if isinstance(side, Between):
            total += np.maximum(float(side.lo) * weights - r, 0).sum()
            total += 0.0 if math.isinf(float(side.hi)) else np.maximum(r - float(side.hi) * weights, 0).sum()
    return float(total)


def rounding(problem: Problem) -> float:
    """Error of an objective whose terms cancel or vanish: all prices times all masses, at twelve digits."""
    data = numbers(problem)
    strengths = [float(side.rho) for side in (data.rows, data.columns) if isinstance(side, KL | TV)]
    prices = abs(data.cost[data.arcs]).max(initial=0.0) + data.epsilon + sum(strengths)
    return 1e-12 * float(prices * (data.a.sum() + data.b.sum() + (data.mass or 0.0)))


def gibbs_plan(problem: Problem, f: Any, g: Any, lam: Any = 0.0) -> np.ndarray:
    """``a_i b_j exp((f_i + g_j + lam - C_ij) / eps)``, 0 at forbidden arcs and empty bins."""
    data = numbers(problem)
    f, g = np.asarray(f, dtype=np.float64), np.asarray(g, dtype=np.float64)
    plan = np.zeros_like(data.cost)
    i, j = np.nonzero(data.arcs & np.isfinite(f)[:, None] & np.isfinite(g)[None, :])
    plan[i, j] = data.a[i] * data.b[j] * np.exp((f[i] + g[j] + float(lam) - data.cost[i, j]) / data.epsilon)
    return plan


def dual_objective(problem: Problem, f: Any, g: Any, lam: Any = 0.0) -> float:
    """The dual objective, ``-inf`` outside its domain."""
    data, lam = numbers(problem), float(lam)
    f, g = np.asarray(f, dtype=np.float64), np.asarray(g, dtype=np.float64)
    value = _conjugate(data.rows, f, data.a) + _conjugate(data.columns, g, data.b)
    value += 0.0 if data.mass is None else lam * data.mass
    if data.epsilon:
        return value - data.epsilon * float(gibbs_plan(problem, f, g, lam).sum() - data.a.sum() * data.b.sum())
    i, j = np.nonzero(data.arcs)
    size = np.abs(f[i]) + np.abs(g[j]) + abs(lam) + np.abs(data.cost[i, j])
    return value if np.all(f[i] + g[j] + lam - data.cost[i, j] <= 1e-13 * size) else -math.inf


def _penalty(side: Marginal, r: np.ndarray, weights: np.ndarray) -> float:
    if isinstance(side, KL):
        return float(side.rho) * float(kl_div(r, weights).sum())
    if isinstance(side, TV):
        return float(side.rho) * float(np.abs(r - weights).sum())
    return 0.0


def _conjugate(side: Marginal, f: np.ndarray, weights: np.ndarray) -> float:
    f, weights = f[weights > 0], weights[weights > 0]
    if isinstance(side, KL):
        return float(side.rho) * float(weights @ (1 - np.exp(-f / float(side.rho))))
    if isinstance(side, TV):
        return float(weights @ np.minimum(f, float(side.rho))) if np.all(f >= -float(side.rho)) else -math.inf
    lo, hi = float(side.lo), float(side.hi)
    lower = lo * float(weights @ np.maximum(f, 0)) if lo else 0.0
    if math.isinf(hi):
        return lower if np.all(f >= 0) else -math.inf
    return lower + hi * float(weights @ np.minimum(f, 0))


# -- the general solver ------------------------------------------------------------------------------------------------


def reference(problem: Problem) -> Reference:
    """Optimal value and plan of a problem without a batch, by cvxpy: slow, general, and written without us.

    Args:
        problem: any regime, up to some thousand arcs. Forbidden arcs and arcs of empty bins are no variables.

    Raises:
        RuntimeError: if the general solver is not sure of its answer.

    Example:
        >>> round(reference(Problem([[0.0, 1.0], [1.0, 0.0]])).value, 9)
        0.0
    """
    data = numbers(problem)
    i, j = np.nonzero(data.arcs)
    unit, k = _unit(data), np.arange(len(i))
    p = cp.Variable(len(i), nonneg=True)
    cost = data.cost[i, j] / unit
    goal, constraints = cost @ p, []
    if data.epsilon:
        goal = goal + data.epsilon / unit * cp.sum(cp.kl_div(p, data.product[i, j]))
    for side, weights, bins in ((data.rows, data.a, i), (data.columns, data.b, j)):
        sums = csr_matrix((np.ones(len(k)), (bins, k)), shape=(len(weights), len(k))) @ p
        full = np.flatnonzero(np.bincount(bins, minlength=len(weights)))
        rules, price = _side(side, sums[full], weights[full], unit)
        constraints, goal = constraints + rules, goal + price
    if data.mass is not None:
        constraints.append(cp.sum(p) == data.mass)
    _run(cp.Problem(cp.Minimize(goal), constraints))
    plan = np.zeros_like(data.cost)
    plan[i, j] = np.maximum(p.value, 0.0)
    parts = terms(problem, plan)
    scale = abs(data.cost[i, j]) @ plan[i, j] + parts["rows"] + parts["columns"] + parts["entropy"]
    scale += data.epsilon * (plan.sum() + data.a.sum() * data.b.sum())
    return Reference(float(goal.value) * unit + _constant(data), plan, float(scale))


def _unit(data: Numbers) -> float:
    """What to divide cost, epsilon and rho by, so that the general solver meets numbers near 1."""
    cost = data.cost[data.arcs]
    return float(np.ptp(cost)) or float(abs(cost).max()) or data.epsilon or 1.0


def _side(side: Marginal, sums: cp.Expression, weights: np.ndarray, unit: float) -> tuple[list[cp.Constraint], Any]:
    if isinstance(side, KL):
        return [], float(side.rho) / unit * cp.sum(cp.kl_div(sums, weights))
    if isinstance(side, TV):
        return [], float(side.rho) / unit * cp.sum(cp.abs(sums - weights))
    lo, hi = float(side.lo), float(side.hi)
    if lo == hi:
        return [sums == lo * weights], 0.0
    lower = [sums >= lo * weights] if lo > 0 else []
    return lower + ([] if math.isinf(hi) else [sums <= hi * weights]), 0.0


def _constant(data: Numbers) -> float:
    """What the arcs and bins left out add to the objective: they are empty in every plan."""
    total = data.epsilon * float(data.product[~data.arcs].sum()) if data.epsilon else 0.0
    for side, weights, axis in ((data.rows, data.a, 1), (data.columns, data.b, 0)):
        left_out = ~data.arcs.any(axis)
        total += _penalty(side, np.zeros(int(left_out.sum())), weights[left_out])
    return total


def _run(program: cp.Problem) -> None:
    if program.is_lp():
        program.solve(cp.HIGHS, **_HIGHS)
    else:
        data, chain, inverse = program.get_problem_data(cp.CLARABEL, solver_opts=_CLARABEL)
        answer = chain.solve_via_data(program, data, solver_opts=_CLARABEL)
        # Asked for more than rounding allows, Clarabel reports little progress at answers that are good to ten digits.
        if not abs(answer.obj_val - answer.obj_val_dual) <= _WORST_GAP * (1 + abs(answer.obj_val)):
            raise RuntimeError(f"Clarabel stopped at {answer.status}: {answer.obj_val} against {answer.obj_val_dual}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            program.unpack_results(answer, chain, inverse)
    if program.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise RuntimeError(f"the general solver says: {program.status}")
