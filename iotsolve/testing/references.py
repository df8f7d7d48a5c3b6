"""What the answer should be, by code that shares nothing with the library.

The formulas of ``docs/definitions.md`` in plain NumPy, and :func:`reference`, which hands the problem as it is stated
to a general convex solver (cvxpy with Clarabel, HiGHS for a linear program). No algorithm of this library is used.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

import cvxpy as cp
import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import kl_div, logsumexp

from iotsolve.marginals import KL, L2, TV, Between, ChiSquared, Marginal
from iotsolve.problem import Problem

__all__ = [
    "Numbers",
    "Reference",
    "best_potentials",
    "dual_objective",
    "envelope",
    "gibbs_plan",
    "numbers",
    "objective",
    "penalty",
    "reference",
    "repaired",
    "rounding",
    "softmax_value",
    "terms",
    "violation",
]

_CLARABEL = {"tol_gap_rel": 1e-12, "tol_gap_abs": 1e-13, "tol_feas": 1e-12, "max_iter": 500, "accept_unknown": True}
_HIGHS = {"method": "highs", "primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
_WORST_GAP = 1e-8
SOFT = (KL, TV, ChiSquared, L2)


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
        f: optimal potentials of the rows, shape ``(n,)``, cost units, in the library's gauge; an empty bin has the limit
            as its weight vanishes, and one that nothing reaches may have ``inf``.
        g: optimal potentials of the columns, shape ``(m,)``.
        lam: multiplier of ``mass``, cost units; 0 without it.
    """

    value: float
    plan: np.ndarray
    scale: float
    f: np.ndarray
    g: np.ndarray
    lam: float


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
    return Numbers(*arrays, float(problem.epsilon), *map(_plain, problem.sides), mass)


def _plain(side: Marginal) -> Marginal:
    return replace(side, **{field.name: float(getattr(side, field.name)) for field in fields(side)})


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
        "rows": penalty(data.rows, plan.sum(1), data.a),
        "columns": penalty(data.columns, plan.sum(0), data.b),
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
    strengths = [float(side.rho) for side in (data.rows, data.columns) if isinstance(side, SOFT)]
    prices = abs(data.cost[data.arcs]).max(initial=0.0) + data.epsilon + sum(strengths)
    return 1e-12 * float(prices * (data.a.sum() + data.b.sum() + (data.mass or 0.0)))


def gibbs_plan(problem: Problem, f: Any, g: Any, lam: Any = 0.0) -> np.ndarray:
    """``a_i b_j exp((f_i + g_j + lam - C_ij) / eps)``, 0 at forbidden arcs and empty bins."""
    data = numbers(problem)
    f, g = np.asarray(f, dtype=np.float64), np.asarray(g, dtype=np.float64)
    plan = np.zeros_like(data.cost)
    i, j = np.nonzero(data.arcs & np.isfinite(f)[:, None] & np.isfinite(g)[None, :])
    with np.errstate(over="ignore"):  # of potentials that are far off
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


def envelope(problem: Problem, answer: Reference) -> dict[str, np.ndarray]:
    """Derivatives of the value in ``cost``, ``a`` and ``b`` at an answer: the definitions' table of gradients.

    A subgradient where there are several; under FIXED/FIXED up to the constants that the tie of the totals leaves open.
    """
    data = numbers(problem)
    found = {"cost": answer.plan}
    for name, side, potential, weights, others, s in _sides(data, answer.f, answer.g, answer.lam):
        varies = isinstance(side, L2)  # with the weight: then phi's own derivative in it counts too
        slope = np.minimum(potential, float(side.rho) * weights) if varies else _phi(side, potential, weights)
        if data.epsilon:
            slope = slope + data.epsilon * (others.sum() - _density(potential, s, data.epsilon))
        found[name] = slope
    return found


def softmax_value(problem: Problem) -> float | None:
    """The value in closed form where there is one: ``epsilon > 0``, a FREE side, the other FREE or tied to its weights."""
    data = numbers(problem)
    (lo_r, hi_r), (lo_c, hi_c) = _bounds(data.rows), _bounds(data.columns)
    if any(isinstance(side, SOFT) for side in problem.sides) or not data.epsilon:
        return None
    product = data.a.sum() * data.b.sum()
    if lo_r == lo_c == 0 and math.isinf(hi_r) and math.isinf(hi_c):
        s = float(_softmin(data.cost.reshape(1, -1), np.zeros(data.cost.size), data.product.ravel(), data.epsilon)[0])
        if data.mass is None:
            return data.epsilon * float(product - np.exp(-s / data.epsilon))
        return data.mass * (s + data.epsilon * math.log(data.mass)) - data.epsilon * (data.mass - product)
    if lo_r == hi_r and lo_c == 0 and math.isinf(hi_c):
        cost, share, weights, others = data.cost, lo_r, data.a, data.b
    elif lo_c == hi_c and lo_r == 0 and math.isinf(hi_r):
        cost, share, weights, others = data.cost.T, lo_c, data.b, data.a
    else:
        return None
    full, target = weights > 0, share * weights[weights > 0]
    f = _softmin(cost[full], np.zeros_like(others), others, data.epsilon) + data.epsilon * math.log(share)
    return float(target @ f) - data.epsilon * float(target.sum() - product)


def best_potentials(problem: Problem, f: Any, g: Any, lam: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """For every bin the potential that maximises the dual while the other side's stay: found by bisection.

    For an empty bin, which the dual does not see, the limit as its weight vanishes.
    """
    data = numbers(problem)
    rows, columns = (_best(side, s, weights, data.epsilon) for _, side, _, weights, _, s in _sides(data, f, g, lam))
    return rows, columns


def repaired(problem: Problem, f: Any, g: Any, lam: Any = 0.0) -> tuple[np.ndarray, np.ndarray, float]:
    """Potentials lowered into the dual's domain, and at ``epsilon = 0`` to ``f + g + lam <= C``; empty bins say nothing."""
    data = numbers(problem)
    known = data.a > 0, data.b > 0
    f = np.where(known[0], np.asarray(f, dtype=np.float64), -math.inf)
    g = np.where(known[1], np.asarray(g, dtype=np.float64), -math.inf)
    return _lowered(data, f, g, float(lam), known)


def _sides(data: Numbers, f: Any, g: Any, lam: Any) -> list[tuple[Any, ...]]:
    """Of both sides: the name of the weights, marginal object, potentials, weights, the others' weights, soft-minima."""
    f, g, lam = np.asarray(f, dtype=np.float64), np.asarray(g, dtype=np.float64), float(lam)
    rows = _softmin(data.cost, g + lam, data.b, data.epsilon)
    columns = _softmin(data.cost.T, f + lam, data.a, data.epsilon)
    return [("a", data.rows, f, data.a, data.b, rows), ("b", data.columns, g, data.b, data.a, columns)]


def _softmin(cost: np.ndarray, potential: np.ndarray, weights: np.ndarray, epsilon: float) -> np.ndarray:
    """``-eps log sum_j b_j exp((g_j - C_ij) / eps)``, the minimum at ``eps = 0``; ``inf`` where nothing is reached."""
    there = (weights > 0) & np.isfinite(potential)
    if not there.any():
        return np.full(len(cost), math.inf)
    slack = potential[there] - cost[:, there]
    if not epsilon:
        return -slack.max(1)
    with np.errstate(divide="ignore"):
        return -epsilon * logsumexp(slack / epsilon, axis=1, b=weights[there])


def _density(potential: np.ndarray, s: np.ndarray, epsilon: float) -> np.ndarray:
    """``exp((f - s) / eps)``, the marginal per unit of weight; 0 where nothing arrives."""
    reached = np.isfinite(s) & np.isfinite(potential)
    with np.errstate(over="ignore"):
        return np.where(reached, np.exp(np.where(reached, potential - np.where(reached, s, 0.0), 0.0) / epsilon), 0.0)


def _best(side: Marginal, s: np.ndarray, weights: np.ndarray, epsilon: float) -> np.ndarray:
    """The maximiser of ``phi(f) - eps exp((f - s) / eps)``: where the marginal asked for crosses the one that arrives."""
    floor, cap = _floor(side), _cap(side, weights)
    reached = np.isfinite(s)
    if not epsilon:
        return np.maximum(np.minimum(s, cap), floor)
    near = np.where(reached, s, 0.0)
    spread = epsilon * sum(abs(math.log(x)) for x in _bounds(side) if 0 < x < math.inf)
    low, high = np.minimum(near, 0.0) - spread, np.maximum(near, 0.0) + spread
    for _ in range(100):
        middle = (low + high) / 2
        wanted = _demand(side, middle, weights) > _density(middle, near, epsilon)
        low, high = np.where(wanted, middle, low), np.where(wanted, high, middle)
    return np.where(reached, high, cap)


def penalty(side: Marginal, r: np.ndarray, weights: np.ndarray) -> float:
    """``D(r | a)`` of soft sides, 0 of hard ones."""
    if isinstance(side, KL):
        return float(side.rho) * float(kl_div(r, weights).sum())
    if isinstance(side, TV):
        return float(side.rho) * float(np.abs(r - weights).sum())
    if isinstance(side, ChiSquared):
        full = weights > 0
        squares = (r - weights)[full] ** 2 / weights[full]
        return float(side.rho) / 2 * float(squares.sum()) if not r[~full].any() else math.inf
    if isinstance(side, L2):
        return float(side.rho) / 2 * float(((r - weights) ** 2).sum())
    return 0.0


def _conjugate(side: Marginal, f: np.ndarray, weights: np.ndarray) -> float:
    full = weights > 0
    phi = _phi(side, f[full], weights[full])
    return float(weights[full] @ phi) if np.all(phi > -math.inf) else -math.inf


def _phi(side: Marginal, f: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``min_t psi(t) + f t``, per unit of weight."""
    f = np.where(f < _floor(side), -math.inf, f)
    with np.errstate(invalid="ignore", over="ignore"):
        if isinstance(side, KL):
            return -float(side.rho) * np.expm1(-f / float(side.rho))
        if isinstance(side, TV):
            return np.minimum(f, float(side.rho))
        if isinstance(side, ChiSquared | L2):
            strength = _strength(side, weights)
            held = np.minimum(f, strength)
            return held - np.divide(held**2, 2 * strength, out=np.zeros_like(held), where=strength > 0)
    lo, hi = _bounds(side)
    upper = np.minimum(f, 0.0) if math.isinf(hi) else hi * np.minimum(f, 0.0)
    return upper + (lo * np.maximum(f, 0.0) if lo else 0.0)


def _demand(side: Marginal, f: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The marginal, per unit of weight, that the potential asks for: ``phi'``."""
    with np.errstate(over="ignore"):
        if isinstance(side, KL):
            return np.exp(-f / float(side.rho))
        if isinstance(side, TV):
            return np.where(f < -float(side.rho), math.inf, np.where(f < float(side.rho), 1.0, 0.0))
        if isinstance(side, ChiSquared | L2):
            strength = _strength(side, weights)
            share = np.divide(f, strength, out=np.where(f < 0, -math.inf, math.inf), where=strength > 0)
            return np.maximum(1.0 - share, 0.0)
    lo, hi = _bounds(side)
    return np.where(f < 0, hi, lo)


def _bounds(side: Marginal) -> tuple[float, float]:
    return (float(side.lo), float(side.hi)) if isinstance(side, Between) else (0.0, math.inf)


def _strength(side: Marginal, weights: np.ndarray) -> np.ndarray:
    """``rho`` of the chi-squared penalty that each bin pays."""
    return float(side.rho) * (weights if isinstance(side, L2) else np.ones_like(weights))


def _floor(side: Marginal) -> float:
    """Smallest potential of finite conjugate."""
    if isinstance(side, TV):
        return -float(side.rho)
    return 0.0 if isinstance(side, Between) and math.isinf(_bounds(side)[1]) else -math.inf


def _cap(side: Marginal, weights: np.ndarray) -> np.ndarray:
    """Smallest potential from which on the conjugate is constant: that of a bin that nothing reaches."""
    if isinstance(side, TV):
        return np.full_like(weights, float(side.rho))
    if isinstance(side, ChiSquared | L2):
        return _strength(side, weights)
    return np.full_like(weights, 0.0 if isinstance(side, Between) and not _bounds(side)[0] else math.inf)


# -- the general solver ------------------------------------------------------------------------------------------------


def reference(problem: Problem) -> Reference:
    """Optimal value, plan and potentials of a problem without a batch, by cvxpy: slow, general, written without us.

    The marginals are variables of their own, tied to the plan's by equations whose multipliers are the potentials, with
    the signs of the definitions' Lagrangian. At ``epsilon = 0`` they are lowered by rounding until they are feasible.

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
    goal, constraints, ties = cost @ p, [], []
    if data.epsilon:
        goal = goal + data.epsilon / unit * cp.sum(cp.kl_div(p, data.product[i, j]))
    for side, weights, bins in ((data.rows, data.a, i), (data.columns, data.b, j)):
        sums = csr_matrix((np.ones(len(k)), (bins, k)), shape=(len(weights), len(k))) @ p
        full = np.flatnonzero(np.bincount(bins, minlength=len(weights)))
        marginal, rules, price = _side(side, weights[full], unit)
        constraints, goal = constraints + rules, goal + price
        ties.append((full, marginal == sums[full]))
    total = None if data.mass is None else cp.Constant(data.mass) == cp.sum(p)
    constraints += [tie for _, tie in ties] + ([] if total is None else [total])
    _run(cp.Problem(cp.Minimize(goal), constraints))
    plan = np.zeros_like(data.cost)
    plan[i, j] = np.maximum(p.value, 0.0)
    parts = terms(problem, plan)
    scale = abs(data.cost[i, j]) @ plan[i, j] + parts["rows"] + parts["columns"] + parts["entropy"]
    scale += data.epsilon * (plan.sum() + data.a.sum() * data.b.sum())
    lam = 0.0 if total is None else unit * float(total.dual_value)
    f, g, lam = _potentials(problem, [(full, unit * tie.dual_value) for full, tie in ties], lam)
    return Reference(float(goal.value) * unit + _constant(data), plan, float(scale), f, g, lam)


def _potentials(problem: Problem, found: list[tuple[np.ndarray, np.ndarray]], lam: float) -> tuple[Any, Any, float]:
    """Multipliers as potentials: in the domain, in the gauge, and with those of the bins that are no variables."""
    data = numbers(problem)
    f, g = np.full_like(data.a, -math.inf), np.full_like(data.b, -math.inf)  # -inf: not known yet
    for potential, (full, values) in zip((f, g), found, strict=True):
        potential[full] = values
    known = np.isfinite(f), np.isfinite(g)
    f, g, lam = _gauge(data, *_lowered(data, f, g, lam, known), known)
    best_f, best_g = best_potentials(problem, f, g, lam)
    return np.where(known[0], f, best_f), np.where(known[1], g, best_g), lam


def _lowered(data: Numbers, f: np.ndarray, g: np.ndarray, lam: float, known: Any) -> tuple[Any, Any, float]:
    """Potentials in the domains of both sides; at ``epsilon = 0`` lowered to ``f + g + lam <= C``, which costs rounding."""
    f = np.where(known[0], np.maximum(f, _floor(data.rows)), f)
    g = np.where(known[1], np.maximum(g, _floor(data.columns)), g)
    if data.epsilon:
        return f, g, lam
    if data.mass is not None:
        i, j = np.nonzero(data.arcs)  # elsewhere a potential may be infinite, like the cost
        return f, g, lam - max(0.0, float((f[i] + g[j] + lam - data.cost[i, j]).max()))
    f = np.where(known[0], np.maximum(np.minimum(f, _softmin(data.cost, g, data.b, 0.0)), _floor(data.rows)), f)
    lowered, floor = np.minimum(g, _softmin(data.cost.T, f, data.a, 0.0)), _floor(data.columns)
    rounded = (lowered < floor) & (lowered >= floor - 1e-14 * np.maximum(abs(floor), abs(g)))  # not out of the domain
    return f, np.where(known[1], np.where(rounded, floor, lowered), g), lam


def _gauge(data: Numbers, f: np.ndarray, g: np.ndarray, lam: float, known: Any) -> tuple[Any, Any, float]:
    fixed = [isinstance(side, Between) and float(side.lo) == float(side.hi) for side in (data.rows, data.columns)]
    means = [float(w[k] @ x[k]) for x, w, k in zip((f, g), (data.a, data.b), known, strict=True)]
    if data.mass is None:
        shift = (means[0] - means[1]) / (data.a.sum() + data.b.sum()) if all(fixed) else 0.0
        return f - shift, g + shift, lam
    shifts = [
        mean / weights.sum() if tied else 0.0
        for mean, weights, tied in zip(means, (data.a, data.b), fixed, strict=True)
    ]
    return f - shifts[0], g - shifts[1], lam + sum(shifts)


def _unit(data: Numbers) -> float:
    """What to divide cost, epsilon and rho by, so that the general solver meets numbers near 1."""
    cost = data.cost[data.arcs]
    strengths = [float(side.rho) for side in (data.rows, data.columns) if isinstance(side, SOFT)]
    return float(np.ptp(cost)) or float(abs(cost).max()) or data.epsilon or max(strengths, default=1.0)


def _side(side: Marginal, weights: np.ndarray, unit: float) -> tuple[Any, list[cp.Constraint], Any]:
    """The marginal of the bins that arcs reach, as a variable or a constant, what it must satisfy and what it pays."""
    lo, hi = _bounds(side)
    if lo == hi:
        return cp.Constant(lo * weights), [], 0.0
    r = cp.Variable(len(weights))
    if isinstance(side, Between):
        lower = [r >= lo * weights] if lo > 0 else []
        return r, lower + ([] if math.isinf(hi) else [r <= hi * weights]), 0.0
    if isinstance(side, KL):
        price = cp.sum(cp.kl_div(r, weights))
    elif isinstance(side, TV):
        price = cp.sum(cp.abs(r - weights))
    elif isinstance(side, ChiSquared):
        price = cp.sum_squares(cp.multiply(1 / np.sqrt(weights), r - weights)) / 2
    else:
        price = cp.sum_squares(r - weights) / 2
    return r, [], float(side.rho) / unit * price


def _constant(data: Numbers) -> float:
    """What the arcs and bins left out add to the objective: they are empty in every plan."""
    total = data.epsilon * float(data.product[~data.arcs].sum()) if data.epsilon else 0.0
    for side, weights, axis in ((data.rows, data.a, 1), (data.columns, data.b, 0)):
        left_out = ~data.arcs.any(axis)
        total += penalty(side, np.zeros(int(left_out.sum())), weights[left_out])
    return total


def _run(program: cp.Problem) -> None:
    if program.is_lp():
        program.solve(cp.SCIPY, scipy_options=dict(_HIGHS))  # scipy's HiGHS says nothing on stdout
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
