"""Hard regimes: small epsilon, weak and strong penalties, curved sides without entropy, uneven batches, overflow.

What a solution claims is judged by formulas written out once more, bin by bin and in plain NumPy. `IOTSOLVE_STRESS=10`
makes the grid ten times as large.
"""

import math
import os
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from scipy.special import kl_div

from iotsolve import (
    AT_MOST,
    FIXED,
    FREE,
    KL,
    L2,
    TV,
    Between,
    ChiSquared,
    Implicit,
    Interior,
    Problem,
    Sinkhorn,
    Solution,
    Status,
    solve,
)
from iotsolve.testing import check_certificate, reference
from iotsolve.testing.references import rounding

INF = math.inf
EPSILONS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # against costs whose range is about 1
RHOS = (1e-3, 0.1, 1.0, 10.0, 1e3)
HARD = {"fixed": FIXED, "free": FREE, "at_most": AT_MOST, "between": Between(0.6, 1.5)}
SOFT = {"kl": KL, "tv": TV, "chi2": ChiSquared, "l2": L2}
KINDS = (*HARD, *SOFT)
PAIRS = [(rows, columns) for rows in KINDS for columns in KINDS]
CURVED = [pair for pair in PAIRS if {"kl", "chi2", "l2"} & set(pair)]
AWKWARD = {"forbidden": 0.3, "empty": 0.3, "negative": 0.25, "mass": 0.3, "room": 0.5}  # how often
OUTPUTS = (
    *("value", "plan", "f", "g", "mass_multiplier", "row_marginal", "column_marginal", "mass", "transport_cost"),
    *(f"certificate.{name}" for name in ("primal", "dual", "gap", "scale", "row_violation", "column_violation")),
)
TOLERANCE = 1e-8

pairs = pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
curved = pytest.mark.parametrize("kinds", CURVED, ids="-".join)


# -- the judge ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """The bins of positive weight ``w`` of one side, and what they pay."""

    kind: object
    w: np.ndarray

    @property
    def bounds(self):
        lo, hi = (self.kind.lo, self.kind.hi) if isinstance(self.kind, Between) else (0.0, INF)
        return lo * self.w, hi * self.w

    @property
    def rho(self):
        return self.kind.rho * (self.w if isinstance(self.kind, L2) else 1.0)  # L2 is chi-squared of strength rho w

    def penalty(self, r):
        """``D(r | w)``; 0 on a hard side, whose violation is counted apart."""
        if isinstance(self.kind, KL):
            return self.rho * kl_div(r, self.w)
        if isinstance(self.kind, TV):
            return self.rho * abs(r - self.w)
        if isinstance(self.kind, ChiSquared | L2):
            return self.rho / 2 * (r - self.w) ** 2 / self.w
        return np.zeros_like(r)

    def conjugate(self, f):
        """``min_r D(r | w) + f r``."""
        if isinstance(self.kind, KL):
            return -self.rho * self.w * np.expm1(-f / self.rho)
        if isinstance(self.kind, TV):
            return np.where(f < -self.rho, -INF, self.w * np.minimum(f, self.rho))
        if isinstance(self.kind, ChiSquared | L2):
            held = np.minimum(f, self.rho)
            return self.w * (held - held**2 / (2 * self.rho))
        lo, hi = self.bounds
        return lo * np.maximum(f, 0.0) + np.where(f < 0, hi, 0.0) * f


@dataclass(frozen=True)
class Errors:
    """Of a solution, all relative: violation to the mass moved, the others to the absolute terms of the dual."""

    violation: float
    gap: float
    value: float  # of the value stated

    @property
    def largest(self):
        return max(self.violation, self.gap, self.value)


def judged(problem, solution):
    """The errors of a plan and potentials, after what must be so at any rate.

    By the identity behind every certificate the gap is a sum over the bins of ``D(r | w) - phi(f) + f r``; at epsilon = 0
    the slack of the arcs in use is added. What float64 sums of that size can be off by is no error.
    """
    cost, a, b = (x.numpy() for x in (problem.cost.dense(), problem.a, problem.b))
    i, j = np.flatnonzero(a), np.flatnonzero(b)
    assert (solution.plan >= 0).all() and not np.delete(solution.plan, i, 0).any()
    assert not np.delete(solution.plan, j, 1).any() and not solution.plan[np.isinf(cost)].any()
    plan, cost = solution.plan[np.ix_(i, j)], cost[np.ix_(i, j)]
    f, g, lam, mass = solution.f[i], solution.g[j], float(solution.mass_multiplier), problem.mass or 0.0
    sides = [Side(problem.sides[0], a[i]), Side(problem.sides[1], b[j])]
    slack, total, reference_mass = f[:, None] + g[None, :] + lam - cost, plan.sum(), a.sum() * b.sum()

    violation = abs(total - mass) if problem.mass else 0.0
    gap, dual, scale = 0.0, lam * mass, abs(lam * mass)
    size = scale + float(problem.epsilon) * (total + reference_mass)
    for side, r, potential in zip(sides, (plan.sum(1), plan.sum(0)), (f, g), strict=True):
        allowed = np.clip(r, *side.bounds)
        price, conjugate = side.penalty(allowed), side.conjugate(potential)
        violation += abs(r - allowed).sum()
        gap += (price - conjugate + potential * allowed).sum()
        dual, scale = dual + conjugate.sum(), scale + abs(conjugate).sum()
        size += (price + abs(conjugate) + abs(potential * allowed) + side.penalty(0 * r)).sum()
    if problem.epsilon:
        entropy = problem.epsilon * (total - reference_mass)
        dual, scale = dual - entropy, scale + abs(entropy)
        density = np.exp(slack / problem.epsilon)
        assert abs(sides[0].w[:, None] * density * sides[1].w[None, :] - plan).sum() <= TOLERANCE * total
    else:
        gap -= (slack[plan > 0] * plan[plan > 0]).sum()
        assert slack.max() <= 1e-12 * (abs(f).max() + abs(g).max() + abs(lam))
    noise = 1e-14 * size

    def relative(error):
        return max(abs(error) - noise, 0.0) / scale if scale else abs(error)

    # where every entry is below the smallest number the mass is 0
    return Errors(violation / total if violation else 0.0, relative(gap), relative(float(solution.value) - dual))


def assert_no_nan(solution):
    for name in OUTPUTS:
        found = solution.certificate if "." in name else solution
        assert not np.isnan(getattr(found, name.split(".")[-1])).any(), name


def assert_certified(problem, solution):
    assert solution.converged and solution.certificate.holds, solution
    assert judged(problem, solution).largest <= TOLERANCE


# -- problems ----------------------------------------------------------------------------------------------------------


def staircase(rng, a, b):
    """A plan with few arcs and these marginals: bins in random order, filled one after the other."""
    rows, columns = rng.permutation(len(a)), rng.permutation(len(b))
    upto_a, upto_b = np.r_[0.0, a[rows].cumsum()], np.r_[0.0, b[columns].cumsum()]
    lower = np.maximum(upto_a[:-1, None], upto_b[None, :-1])
    upper = np.minimum(upto_a[1:, None], upto_b[None, 1:])
    plan = np.zeros((len(a), len(b)))
    plan[np.ix_(rows, columns)] = np.maximum(upper - lower, 0.0)
    return plan


def drawn(rng, kinds, *, epsilon, sizes=(5, 20), awkward=None):
    """A problem that has an answer: the arcs of a plan with the marginals asked for are never forbidden.

    Without "room" the totals of both sides are equal, so that bounds of 1 meet at a kink.
    """
    n, m = (int(x) for x in rng.integers(sizes[0], sizes[1] + 1, 2))
    rows, columns = (HARD[k] if k in HARD else SOFT[k](float(rng.choice(RHOS))) for k in kinds)
    chosen = {name for name, share in AWKWARD.items() if rng.random() < share} if awkward is None else awkward
    x, y = rng.random((n, 1, 2)), rng.random((1, m, 2))
    cost = rng.random((n, m)) if rng.random() < 0.5 else ((x - y) ** 2).sum(-1) / 2
    a, b = rng.uniform(0.1, 1.5, n), rng.uniform(0.1, 1.5, m)
    if "empty" in chosen:
        a[rng.permutation(n)[: n // 4]] = b[rng.permutation(m)[: m // 4]] = 0.0
    a, b = a / a.sum(), b / b.sum()
    if "negative" in chosen:
        cost = cost - 0.5
    if "forbidden" in chosen:
        cost[(rng.random((n, m)) < 0.3) & (staircase(rng, a, b) == 0)] = INF
    if "room" in chosen and columns != FIXED:
        b = 1.3 * b
    elif "room" in chosen and rows != FIXED:
        a = 1.3 * a
    mass = (1.0 if FIXED in (rows, columns) else 0.8) if "mass" in chosen else None
    return Problem(cost, a, b, epsilon=epsilon, rows=rows, columns=columns, mass=mass)


def overflows(problem):
    """Whether even the lowest potentials that the sides allow make an entry of the plan too large for float64."""
    floors = [0.0 if side == FREE else -side.rho if isinstance(side, TV) else -INF for side in problem.sides]
    if problem.mass is not None or min(floors) == -INF:
        return False
    logs = [np.log(w.numpy(), out=np.full(len(w), -INF), where=w.numpy() > 0) for w in (problem.a, problem.b)]
    exponent = (sum(floors) - problem.cost.dense().numpy()) / problem.epsilon + logs[0][:, None] + logs[1][None, :]
    return exponent.max() > 709.0


# -- the grid ----------------------------------------------------------------------------------------------------------

STRESS = int(os.environ.get("IOTSOLVE_STRESS", "1"))
SMALL, LARGE = 36 * STRESS, 4 * STRESS  # problems per epsilon: up to 20 bins a side, and about 80


@cache
def solved(epsilon):
    """The grid's problems at one epsilon with what `solve` makes of them; the pairs of sides in turn."""
    rng, start = np.random.default_rng([EPSILONS.index(epsilon), 5]), 40 * EPSILONS.index(epsilon)
    order = np.random.default_rng(0).permutation(len(PAIRS))
    found = []
    for k in range(SMALL + LARGE):
        sizes = (5, 20) if k < SMALL else (70, 80)
        problem = drawn(rng, PAIRS[order[(start + k) % len(PAIRS)]], epsilon=epsilon, sizes=sizes)
        found.append((problem, solve(problem, throw=False)))
    return found


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_no_output_is_nan_and_no_failure_is_silent(epsilon):
    for problem, solution in solved(epsilon):
        assert_no_nan(solution)
        if solution.converged:
            assert_certified(problem, solution)
        else:
            assert solution.status in (Status.MAX_STEPS, Status.STALLED, Status.NOT_FINITE)


def test_nearly_every_problem_is_certified():
    grid = [pair for epsilon in EPSILONS for pair in solved(epsilon) if not overflows(pair[0])]
    left = [
        f"{problem.epsilon:g}, {problem.sides}, mass {problem.mass}, {problem.shape}: {solution.status.name}"
        for problem, solution in grid
        if not (solution.certificate.holds and judged(problem, solution).largest <= TOLERANCE)
    ]
    assert len(left) <= 0.01 * len(grid), left


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_a_solution_started_from_is_found_in_no_steps(epsilon):
    for problem, solution in solved(epsilon):
        if solution.converged:
            again = solve(problem, init=solution)
            assert again.steps == 0 and again.value == pytest.approx(solution.value, rel=1e-12)
            assert solve(problem, Sinkhorn(), init=solution.potentials).steps == 0
