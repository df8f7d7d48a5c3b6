"""Hard regimes: small epsilon, weak and strong penalties, curved sides without entropy, uneven batches, overflow.

What a solution claims is judged by formulas written out once more, bin by bin and in plain NumPy. `IOTSOLVE_STRESS=10`
makes the grid ten times as large.
"""

import math
import os
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

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
    Points,
    Problem,
    Sinkhorn,
    Status,
    solve,
)
from iotsolve.solver import spread
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
OUTPUTS = ("value", "plan", "f", "g", "mass_multiplier", "row_marginal", "column_marginal", "mass", "transport_cost")
CERTIFIED = ("primal", "dual", "gap", "scale", "rounding", "mass")
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
        exponents = np.finfo(float).eps * (abs(f).max() + abs(g).max() + abs(lam)) / float(problem.epsilon)
        assert abs(sides[0].w[:, None] * density * sides[1].w[None, :] - plan).sum() <= (TOLERANCE + exponents) * total
    else:
        gap -= (slack[plan > 0] * plan[plan > 0]).sum()
        exponents = 0.0
        assert slack.max() <= 1e-12 * (abs(f).max() + abs(g).max() + abs(lam))
    price = max((x.recession for x in problem.sides if math.isfinite(x.recession)), default=0.0)
    noise = 1e-14 * size

    def relative(error, noise=noise):
        if not math.isfinite(error):  # potentials outside the dual's domain
            return INF
        return max(abs(error) - noise, 0.0) / scale if scale else abs(error)

    # where every entry is below the smallest number the mass is 0
    paid = noise + exponents * price * total  # for the last digits of potentials
    return Errors(violation / total if violation else 0.0, relative(gap, paid), relative(float(solution.value - dual)))


def assert_no_nan(solution):
    for name in OUTPUTS:
        assert not np.isnan(getattr(solution, name)).any(), name
    for name in CERTIFIED:
        assert not np.isnan(getattr(solution.certificate, name)).any(), name


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


def drawn(rng, kinds, *, epsilon, sizes=(5, 20), awkward=None, rhos=RHOS):
    """A problem that has an answer: the arcs of a plan with the marginals asked for are never forbidden.

    Without "room" the totals of both sides are equal, so that bounds of 1 meet at a kink.
    """
    n, m = (int(x) for x in rng.integers(sizes[0], sizes[1] + 1, 2))
    rows, columns = (HARD[k] if k in HARD else SOFT[k](float(rng.choice(rhos))) for k in kinds)
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


def stiff(problem):
    """Whether what rounding does to a marginal, by way of exponents, costs more than the tolerance at the price of a TV side."""
    prices = [side.rho for side in problem.sides if isinstance(side, TV)]
    return problem.epsilon > 0 and max(prices, default=0.0) * np.finfo(float).eps / problem.epsilon > TOLERANCE


# -- the grid ----------------------------------------------------------------------------------------------------------

STRESS = int(os.environ.get("IOTSOLVE_STRESS", "1"))
SMALL, LARGE = 32 * STRESS, 3 * STRESS  # problems per epsilon: up to 20 bins a side, and about 80


@cache
def solved(epsilon):
    """The grid's problems at one epsilon with what `solve` makes of them; the pairs of sides in turn."""
    rng = np.random.default_rng([EPSILONS.index(epsilon), 5])
    order, start = np.random.default_rng(0).permutation(len(PAIRS)), (SMALL + LARGE) * EPSILONS.index(epsilon)
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
        elif not solution.converged:
            beyond = (Status.NOT_FINITE,) if overflows(problem) else (Status.MAX_STEPS, Status.STALLED)
            assert solution.status in beyond, solution


def test_a_stiff_penalty_at_a_tiny_epsilon_is_no_silent_failure():
    problem = Problem([[0.531, 0.071], [0.295, 0.626]], epsilon=1e-5, rows=KL(0.1), columns=TV(1e3))
    assert stiff(problem)
    solution = solve(problem, throw=False)
    assert solution.certificate.holds or not solution.converged


def test_a_potential_at_its_bound_stays_within():
    problem = Problem([[0.89], [0.58], [0.5]], epsilon=1e-4, rows=TV(0.1), columns=TV(10.0))
    solution = solve(problem, throw=False)
    assert solution.converged and solution.f.min() >= -0.1


def test_nearly_every_problem_is_certified():
    grid = [pair for epsilon in EPSILONS for pair in solved(epsilon) if not overflows(pair[0])]
    left = [
        f"{problem.epsilon:g}, {problem.sides}, mass {problem.mass}, {problem.shape}: {solution.status.name}"
        for problem, solution in grid
        if not (solution.certificate.holds and judged(problem, solution).largest <= TOLERANCE)
    ]
    print(f"{len(grid) - len(left)} of {len(grid)} certified")
    assert len(left) <= 0.01 * len(grid), left


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_a_solution_started_from_is_found_in_no_steps(epsilon):
    for problem, solution in solved(epsilon):
        if solution.converged and stiff(problem):  # rounding may look like an error
            assert solve(problem, init=solution).value == pytest.approx(solution.value, rel=1e-8)
        elif solution.converged:
            again = solve(problem, init=solution)
            assert again.steps == 0 and again.value == pytest.approx(solution.value, rel=1e-12)
            assert solve(problem, Sinkhorn(), init=solution.potentials).steps == 0


@pytest.mark.parametrize("epsilon", [0.01, 0.0])
def test_the_judge_notices_what_is_off(epsilon):
    problem = drawn(np.random.default_rng(0), ("fixed", "kl"), epsilon=epsilon, awkward=())
    solution = solve(problem)
    assert judged(problem, solution).largest <= TOLERANCE

    def altered(**changes):
        names = ("plan", "f", "g", "mass_multiplier", "value")
        return SimpleNamespace(**{name: getattr(solution, name) for name in names} | changes)

    assert judged(problem, altered(value=solution.value * (1 + 1e-6))).value > TOLERANCE
    if epsilon:
        with pytest.raises(AssertionError):  # a plan that is not that of its potentials
            judged(problem, altered(plan=solution.plan * (1 + 1e-6)))
    else:
        assert judged(problem, altered(plan=solution.plan * (1 + 1e-6))).violation > TOLERANCE
        assert judged(problem, altered(f=solution.f - 1e-6)).gap > TOLERANCE


# -- curved sides without entropy --------------------------------------------------------------------------------------


@curved
@pytest.mark.parametrize("awkward", [("forbidden", "empty", "room"), ("negative", "mass")], ids="-".join)
def test_curved_sides_without_entropy_agree_with_cvxpy(kinds, awkward):
    rng = np.random.default_rng([PAIRS.index(kinds), len(awkward)])
    problem = drawn(rng, kinds, epsilon=0.0, sizes=(5, 8), awkward=awkward)
    solution, answer = solve(problem), reference(problem)
    assert_certified(problem, solution)
    check_certificate(problem, solution, answer=answer)
    assert abs(solution.value - answer.value) <= 1e-7 * answer.scale + rounding(problem)


@curved
def test_curved_sides_meet_those_without_entropy_as_epsilon_vanishes(kinds):
    """``V <= V_eps <= V + eps KL(P | a x b)``, with value ``V`` and plan ``P`` at epsilon = 0."""
    rng = np.random.default_rng([PAIRS.index(kinds), 6])
    exact = drawn(rng, kinds, epsilon=0.0, sizes=(5, 8), awkward=("forbidden", "empty"))
    limit, product = solve(exact), np.outer(exact.a, exact.b)
    epsilon = (1e-2, 1e-4, 1e-5)[CURVED.index(kinds) % 3]
    rows, columns = exact.sides
    problem = Problem(exact.cost.dense().numpy(), exact.a, exact.b, epsilon=epsilon, rows=rows, columns=columns)
    solution = solve(problem)
    assert_certified(problem, solution)
    room = TOLERANCE * (limit.certificate.scale + solution.certificate.scale)
    assert limit.value - room <= solution.value
    assert solution.value <= limit.value + epsilon * kl_div(limit.plan, product).sum() + room


# -- the interior point by name ----------------------------------------------------------------------------------------

TIGHT = {"tolerance": 1e-12, "stationary": True}


@pairs
def test_interior_points_and_sweeps_find_the_same(kinds):
    rng, mass = np.random.default_rng([PAIRS.index(kinds), 8]), ("mass",) if kinds < kinds[::-1] else ()
    problem = drawn(rng, kinds, epsilon=0.2, sizes=(5, 8), awkward=("room", "empty", *mass), rhos=(0.1, 1.0))
    interior, sweeps = solve(problem, Interior(**TIGHT)), solve(problem, Sinkhorn(**TIGHT))
    assert_certified(problem, interior)
    assert_certified(problem, sweeps)
    assert abs(interior.value - sweeps.value) <= 1e-11 * sweeps.certificate.scale + rounding(problem)
    np.testing.assert_allclose(interior.plan, sweeps.plan, rtol=0, atol=1e-9 * sweeps.plan.sum())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tolerance": -1e-8}, r"tolerance = -1e-08.*\[0, 1\).*1e-8 is the default"),
        ({"tolerance": 1.0}, r"tolerance = 1\.0.*\[0, 1\)"),
        ({"tolerance": math.nan}, r"tolerance = nan.*\[0, 1\)"),
        ({"max_steps": 0}, r"max_steps = 0.*at least 1.*default is 100"),
        ({"max_steps": -5}, r"max_steps = -5.*at least 1"),
    ],
)
def test_misuse_of_the_interior_point_is_a_value_error(options, words):
    with pytest.raises(ValueError, match=words):
        Interior(**options)


@pytest.mark.parametrize("options", [{"max_steps": "3"}, {"max_steps": 2.5}, {"tolerance": "1e-8"}], ids=str)
@pytest.mark.parametrize("solver", [Interior, Sinkhorn])
def test_an_option_of_the_wrong_type_is_a_value_error(solver, options):
    with pytest.raises(ValueError):
        solver(**options)


STEPPED = [("fixed", "kl"), ("between", "tv"), ("chi2", "l2"), ("at_most", "fixed")]


@pytest.mark.parametrize("kinds", STEPPED, ids="-".join)
@pytest.mark.parametrize("epsilon", [1e-3, 0.0])
def test_an_interior_point_that_may_not_finish_is_honest(kinds, epsilon):
    problem = drawn(np.random.default_rng(9), kinds, epsilon=epsilon, sizes=(5, 9), awkward=("room",))
    answer = reference(problem)
    room = 1e-8 * answer.scale + rounding(problem)
    for count in (1, 2, 4, 7):
        solution = solve(problem, Interior(max_steps=count), throw=False)
        assert_no_nan(solution)
        assert solution.steps <= count if not epsilon else solution.steps > 0  # sweeps that settle it are counted too
        assert solution.certificate.dual <= answer.value + room and answer.value - room <= solution.certificate.primal
        if solution.converged:
            assert_certified(problem, solution)
    # with entropy the sweeps that settle it may end what one step has begun
    assert epsilon or not solve(problem, Interior(max_steps=1), throw=False).converged


@pytest.mark.parametrize("kinds", STEPPED, ids="-".join)
def test_an_interior_point_out_of_steps_says_so_without_entropy(kinds):
    problem = drawn(np.random.default_rng(9), kinds, epsilon=0.0, awkward=("room",))
    assert solve(problem, Interior(max_steps=2), throw=False).status is Status.MAX_STEPS


@pytest.mark.parametrize("kinds", STEPPED, ids="-".join)
@pytest.mark.parametrize("epsilon", [0.1, 1e-3, 0.0])
def test_the_tolerance_of_the_interior_point_is_kept(kinds, epsilon):
    problem = drawn(np.random.default_rng(11), kinds, epsilon=epsilon, awkward=("room", "empty"))
    for tolerance in (1e-3, 1e-8, 1e-12):
        solution = solve(problem, Interior(tolerance=tolerance))
        assert solution.certificate.tolerance == tolerance and solution.certificate.holds
        assert judged(problem, solution).largest <= tolerance
    exactly = solve(problem, Interior(tolerance=0.0), throw=False)
    assert not exactly.converged or judged(problem, exactly).largest == 0.0


@pytest.mark.parametrize("epsilon, solver", [(0.1, Interior()), (0.0, None)], ids=["interior", "exact"])
def test_a_start_is_used_or_refused(epsilon, solver):
    problem = drawn(np.random.default_rng(0), ("fixed", "kl"), epsilon=epsilon, awkward=())
    first = solve(problem, solver)
    try:
        assert solve(problem, solver, init=first).steps < first.steps
    except ValueError as error:
        assert "init" in str(error)


# -- uneven batches ----------------------------------------------------------------------------------------------------


def easy(rng, n, m):
    """Nearly the same for all plans with the same marginals."""
    return rng.random((n, 1)) + rng.random((1, m)) + 0.02 * rng.random((n, m))


def hard(rng, n, m):
    """Points on a line."""
    return abs(np.linspace(0, 1, n)[:, None] - np.linspace(0, 1, m)[None, :] ** 2)


def uneven(kinds, *, epsilon, mass=None, seed=0, ranges=(1.0, 1.0, 1.0)):
    """An easy, a hard and a random problem of different sizes and given ranges of the cost."""
    rng, singles = np.random.default_rng([PAIRS.index(kinds), seed]), []
    makers = zip((easy, hard, lambda rng, *shape: rng.random(shape)), ((3, 2), (12, 10), (7, 9)), ranges, strict=True)
    rows, columns = (HARD[k] if k in HARD else SOFT[k](0.4) for k in kinds)
    for make, (n, m), size in makers:
        cost, a, b = make(rng, n, m), rng.uniform(0.5, 1.5, n), rng.uniform(0.5, 1.5, m)
        cost, a, b = size * (cost - cost.min()) / np.ptp(cost), a / a.sum(), b / b.sum()
        a, b = (a, 1.3 * b) if columns != FIXED else (1.3 * a, b) if rows != FIXED else (a, b)
        singles.append(Problem(cost, a, b, epsilon=epsilon, rows=rows, columns=columns, mass=mass))
    return singles


def batch(singles, fill=(0.5,)):
    """The problems as one, padded by bins of weight 0 whose costs are drawn from a list."""
    first, n, m = singles[0], max(p.shape[0] for p in singles), max(p.shape[1] for p in singles)
    cost = np.random.default_rng(0).choice(fill, (len(singles), n, m))
    a, b = np.zeros((len(singles), n)), np.zeros((len(singles), m))
    for k, single in enumerate(singles):
        (i, j), (x, u, v) = single.shape, (y.numpy() for y in (single.cost.dense(), single.a, single.b))
        cost[k, :i, :j], a[k, :i], b[k, :j] = x, u, v
    return Problem(cost, a, b, epsilon=first.epsilon, rows=first.sides[0], columns=first.sides[1], mass=first.mass)


def assert_same_numbers(together, k, alone, *, tolerance):
    n, m = alone.problem.shape
    room = tolerance * (1 + alone.plan.sum())
    assert together.value[k] == pytest.approx(alone.value, rel=tolerance, abs=tolerance)
    np.testing.assert_allclose(together.plan[k, :n, :m], alone.plan, rtol=0, atol=room)
    assert not together.plan[k, n:].any() and not together.plan[k, :, m:].any()
    np.testing.assert_allclose(together.f[k, :n], alone.f, rtol=0, atol=room)
    np.testing.assert_allclose(together.g[k, :m], alone.g, rtol=0, atol=room)
    assert together.mass_multiplier[k] == pytest.approx(alone.mass_multiplier, abs=room)


IN_STEP = [("fixed", "fixed"), ("kl", "kl"), ("fixed", "kl"), ("kl", "free"), ("free", "fixed"), ("free", "tv")]
OUT_OF_STEP = [("fixed", "chi2"), ("tv", "kl"), ("between", "l2"), ("at_most", "fixed"), ("tv", "tv")]


@pytest.mark.parametrize("kinds", IN_STEP, ids="-".join)
@pytest.mark.parametrize("epsilon", [0.1, 1e-3, 0.0])
def test_an_uneven_batch_takes_the_steps_and_gives_the_numbers_of_its_problems(kinds, epsilon):
    singles = uneven(kinds, epsilon=epsilon)
    options = {"tolerance": 1e-12} if epsilon == 1e-3 else {}  # many mixed sweeps magnify rounding, as far as they may differ
    together = solve(batch(singles), throw=False, **options)
    for k, single in enumerate(singles):
        alone = solve(single, **options)
        assert together.status[k] is alone.status
        # padding regroups the sums of a pass, and mixing magnifies their rounding where there are many sweeps; how many are tried
        # before a system is factored depends on its columns, and on how many problems share what that costs to begin
        room = alone.steps // (1 if set(kinds) <= {"fixed", "kl"} else 4) if epsilon == 1e-3 and single.cost.is_compiled else 0
        assert abs(int(together.steps[k]) - alone.steps) <= room
        assert_same_numbers(together, k, alone, tolerance=1e-11)
    if epsilon == 0.1 and "free" not in kinds:
        assert together.steps[0] < together.steps[1]  # the easy one does not wait for the hard one


@pytest.mark.parametrize("kinds", IN_STEP + OUT_OF_STEP, ids="-".join)
@pytest.mark.parametrize("epsilon", [0.1, 1e-3, 0.0])
def test_what_stands_in_the_padding_does_not_matter(kinds, epsilon):
    mass = 0.9 if "fixed" not in kinds else None
    singles = uneven(kinds, epsilon=epsilon, mass=mass, ranges=(0.01, 1.0, 0.3))
    gradient = Implicit() if epsilon else None  # asks the sweeps for plans as good as the values
    together = solve(batch(singles, (0.5, -1.0, 1e5, INF)), gradient=gradient, throw=False)
    assert together.converged.all() and together.certificate.holds.all()
    for k, single in enumerate(singles):
        assert_same_numbers(together, k, solve(single, gradient=gradient), tolerance=1e-6)


def test_large_costs_of_empty_bins_do_not_blunt_exact_transport():
    cost, b = [[0.64, 0.27], [0.04, 0.02]], [0.5, 0.5]
    alone = solve(Problem(cost, [0.25, 0.75], b))
    padded = solve(Problem([*cost, [1e10, 1e10]], [0.25, 0.75, 0.0], b), throw=False)
    assert padded.converged and padded.value == pytest.approx(alone.value, rel=1e-12)


@pytest.mark.parametrize("epsilon, gain", [(0.1, 100.0), (0.0, 1.0)])
def test_gains_at_an_empty_bin_of_a_weak_penalty_change_nothing(epsilon, gain):
    sides = {"epsilon": epsilon, "columns": KL(1e-3)}
    alone = solve(Problem([[0.0]], [1.0], [1.0], **sides))
    solution = solve(Problem([[0.0, -gain]], [1.0], [1.0, 0.0], **sides), throw=False)
    assert solution.value == pytest.approx(alone.value, abs=1e-12)
    assert solution.converged and solution.certificate.holds


def test_steps_do_not_depend_on_when_the_others_finish():
    singles = uneven(("fixed", "chi2"), epsilon=0.1, seed=1)
    together = solve(batch(singles), throw=False)
    assert together.steps.tolist() == [solve(single).steps for single in singles]


def test_steps_do_not_depend_on_the_ranges_of_the_others():
    singles = uneven(("fixed", "fixed"), epsilon=0.02, ranges=(0.01, 1.0, 0.3))
    together = solve(batch(singles), throw=False)
    assert together.steps.tolist() == [solve(single).steps for single in singles]


# -- failures are statuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(FREE, FREE), (FREE, TV(0.1)), (TV(1e-3), FREE), (TV(0.1), TV(0.1))], ids=str)
@pytest.mark.parametrize("epsilon", [1e-4, 1e-5])
def test_a_mass_beyond_the_range_of_floats_is_a_status_and_spoils_no_other_problem(sides, epsilon):
    rng = np.random.default_rng(0)
    cost = np.stack([rng.random((6, 7)), rng.random((6, 7)) - 1.0, rng.random((6, 7))])
    problem = Problem(cost, epsilon=epsilon, rows=sides[0], columns=sides[1])
    assert [overflows(problem.select(k)) for k in range(3)] == [False, True, False]
    solution = solve(problem, throw=False)
    assert_no_nan(solution)
    assert solution.status[1] is Status.NOT_FINITE and not solution.certificate.holds[1]
    for k in (0, 2):
        alone = solve(Problem(cost[k], epsilon=epsilon, rows=sides[0], columns=sides[1]))
        assert solution.status[k] is alone.status is Status.CONVERGED and solution.certificate.holds[k]
        assert_same_numbers(solution, k, alone, tolerance=1e-12)


def test_the_violation_of_a_side_that_forbids_nothing_is_zero():
    certificate = solve(Problem([[-1.0]], epsilon=1e-4, rows=FREE, columns=FREE), throw=False).certificate
    assert certificate.row_violation == certificate.column_violation == 0.0


@pytest.mark.parametrize("cost", [-0.5, -5.0, -50.0, -500.0])
@pytest.mark.parametrize("rho", [1e-3, 0.1])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1e-2, 1.0])
def test_mass_made_at_little_cost_is_as_by_hand_or_a_status(cost, rho, epsilon):
    """One bin of weight 1 a side: the mass is ``exp(-c / (2 rho + eps))``, the value ``(2 rho + eps) (1 - mass)``."""
    solution = solve(Problem([[cost]], [1.0], [1.0], epsilon=epsilon, rows=KL(rho), columns=KL(rho)), throw=False)
    assert_no_nan(solution)
    rate = 2 * rho + epsilon
    if -cost / rate < 700:
        assert solution.converged and solution.certificate.holds
        assert solution.value == pytest.approx(-rate * math.expm1(-cost / rate), rel=1e-8)
        assert math.log(solution.mass) == pytest.approx(-cost / rate, rel=1e-6)
    else:
        assert solution.status in (Status.NOT_FINITE, Status.STALLED) and not solution.certificate.holds


@pytest.mark.parametrize("kinds", [pair for pair in PAIRS if "free" not in pair][::5], ids="-".join)
def test_too_few_sweeps_at_a_small_epsilon_are_a_status_with_true_bounds(kinds):
    problem = drawn(np.random.default_rng(12), kinds, epsilon=1e-4, awkward=("room", "mass"))
    solution, answer = solve(problem, Sinkhorn(max_steps=20), throw=False), solve(problem)
    assert solution.status is Status.MAX_STEPS and solution.steps == 20 and not solution.certificate.holds
    assert_no_nan(solution)
    certificate, room = solution.certificate, 1e-7 * answer.certificate.scale
    assert certificate.dual <= answer.value + room and answer.value - room <= certificate.primal


def test_an_arc_that_may_but_need_not_carry_mass_is_no_dust():
    """Two rows fill the first column exactly: for the third the arc to it has neither mass nor a reduced cost."""
    cost = [[-2.0, INF], [-2.0, -2.0], [-2.0, INF]]
    solution = solve(Problem(cost, [0.05, 0.6, 0.49], [1.35, 1.5], columns=KL(4.75)))
    assert solution.certificate.relative_violation <= 1e-9
    np.testing.assert_allclose(solution.plan, [[0.05, 0.0], [0.0, 0.6], [0.49, 0.0]], atol=1e-6)


def test_heavy_weights_do_not_overflow_what_autograd_follows_at_an_empty_bin():
    b = torch.tensor([1.19, 0.0], dtype=torch.float64, requires_grad=True)
    cost = torch.full((1, 2), -0.02, dtype=torch.float64)
    solution = solve(Problem(cost, [1.25], b, epsilon=3e-4, rows=L2(6.65), columns=L2(7.6)))
    assert solution.plan.isfinite().all() and solution.plan[0, 1] == 0
    (slope,) = torch.autograd.grad(solution.value, b)
    assert slope.isfinite().all()


STRANDABLE = (AT_MOST, FREE, KL(1.0), TV(0.5), ChiSquared(1.0), L2(1.85))


@pytest.mark.parametrize("columns", STRANDABLE, ids=str)
@pytest.mark.parametrize("rows", [FIXED, *STRANDABLE], ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.04])
def test_a_bin_with_weight_whose_arcs_are_all_forbidden_troubles_nobody(rows, columns, epsilon):
    """It pays for being empty, and the others have the plan they have without it."""
    cost, a, b = np.array([[-1.0, 0.5], [0.0, -2.0]]), np.array([0.7, 0.3]), np.array([0.9, 0.6])
    stranded = np.column_stack([cost, [INF, INF]])
    sides = dict(epsilon=epsilon, rows=rows, columns=columns, mass=1.0)
    # with the same product of the totals, so that the entropy of what cannot be is the same
    without = solve(Problem(cost, a, b, **sides), Interior(tolerance=1e-12) if epsilon else None)
    for solver in (None, Interior()):
        solution = solve(Problem(stranded, a, [*b, 0.5], **sides), solver)
        assert solution.certificate.holds and not np.isnan(solution.g).any()
        assert not solution.plan[:, 2].any()
        penalty = float(
            Problem(np.zeros((1, 1)), [0.5], [0.5], epsilon=1.0, columns=columns).columns.divergence(
                torch.zeros(1).double(), torch.tensor([0.5]).double()
            )
        )
        assert solution.value == pytest.approx(without.value + penalty + epsilon * 0.5, abs=1e-7)


STRANDED = torch.tensor([[0.0, INF], [0.0, INF]], dtype=torch.float64)


@pytest.mark.parametrize("epsilon, status", [(0.0, Status.INFEASIBLE), (0.1, Status.NOT_FINITE)])
def test_a_batch_changed_into_one_with_an_infeasible_problem_keeps_the_others(epsilon, status):
    cost = np.random.default_rng(0).random((3, 2, 2))
    sound = Problem(cost, epsilon=epsilon)
    changed = sound.with_tensors({"cost": torch.stack([sound.cost.dense()[0], STRANDED, sound.cost.dense()[2]])})
    before, after = solve(sound), solve(changed, throw=False)
    assert after.status.tolist() == [Status.CONVERGED, status, Status.CONVERGED]
    assert after.certificate.holds.tolist() == [True, False, True]
    np.testing.assert_allclose(after.value[[0, 2]], before.value[[0, 2]], rtol=1e-12)
    np.testing.assert_allclose(after.plan[[0, 2]], before.plan[[0, 2]], atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1e-3])
def test_totals_changed_apart_are_never_certified(epsilon):
    problem = Problem(np.random.default_rng(0).random((5, 6)), epsilon=epsilon)
    solution = solve(problem.with_tensors({"b": 2 * problem.b}), throw=False)
    assert not solution.converged and not solution.certificate.holds


@pytest.mark.parametrize(
    "sides", [(FIXED, FIXED), (AT_MOST, FIXED), (FIXED, AT_MOST), (Between(0.5, 1.0), FIXED)], ids=str
)
@pytest.mark.parametrize("size", [(9, 14), (17, 33), (40, 44)], ids=str)
def test_totals_that_differ_by_the_rounding_of_float32(size, sides):
    """Weights normalised in float32 have sums 1e-8 apart, along which a dual in float64 would rise forever."""
    draw = torch.Generator().manual_seed(0)
    for epsilon in (0.1, 0.02, 0.01):
        cost, a, b = (torch.rand(shape, generator=draw) + 0.1 for shape in (size, *size))
        a, b = a / a.sum(), b / b.sum()
        found = solve(Problem(cost, a, b, epsilon=epsilon, rows=sides[0], columns=sides[1]))
        assert found.certificate.holds
        wide = [x.double().numpy() for x in (cost, a, b)]
        wide[1:] = (x / x.sum() for x in wide[1:])
        exact = reference(Problem(*wide, epsilon=epsilon))  # capacities that sum to the demand are no choice
        assert float(found.value) == pytest.approx(exact.value, rel=1e-5)
        if sides[0] is not FIXED:
            assert (found.f <= 0).all()
        if sides[1] is not FIXED:
            assert (found.g <= 0).all()


@pytest.mark.parametrize("other", [FIXED, KL(0.3), AT_MOST], ids=str)
@pytest.mark.parametrize("epsilon", [0.01, 0.003, 0.001])
def test_a_closed_form_in_float32_has_converged_only_where_it_is_certified(epsilon, other):
    """It is exact but for rounding, which at a small epsilon is more than the tolerance."""
    rng = np.random.default_rng(0)
    said = []
    for size in ((9, 14), (60, 70)):
        for _ in range(10):
            cost = rng.random(size).astype(np.float32) * rng.choice([1.0, 30.0])
            a, b = (np.float32(x / x.sum()) for x in (rng.random(n) + 0.01 for n in size))
            solution = solve(Problem(cost, a, b, epsilon=epsilon, rows=other, columns=FREE), throw=False)
            assert bool(solution.certificate.holds) == solution.converged
            said.append(solution.converged)
    assert any(said)


@pytest.mark.parametrize("columns", [FIXED, Between(0.7, 1.4)], ids=str)
@pytest.mark.parametrize("shape", [(7, 1), (30, 8), (8, 30), (200, 160)])
@pytest.mark.parametrize("forbidden", [False, True])
def test_a_soft_side_whose_mass_vanishes_has_its_price(shape, columns, forbidden):
    """A row whose cheapest arc costs a thousand times rho keeps e^-1000 of its weight, and its potential tells what it pays."""
    rng = np.random.default_rng(0)
    cost = rng.integers(0, 4, shape).astype(float)
    if forbidden:
        cost[rng.random(shape) < 0.2] = INF
        cost[np.isinf(cost).all(1), 0] = 3.0
        cost[0, np.isinf(cost).all(0)] = 3.0
    a, b = (w / w.sum() for w in (rng.random(k) + 0.1 for k in shape))
    for rho in (3e-3, 3e-2):
        for epsilon in (3e-4, 4e-3):
            problem = Problem(cost, a, b, epsilon=epsilon, rows=KL(rho), columns=columns)
            solution = solve(problem, tolerance=1e-7)
            assert solution.certificate.holds and solution.converged


def test_the_spread_of_costs_does_not_end_at_a_forbidden_arc():
    cost = np.array([[0.0, 3.0], [INF, 1.0]])
    assert spread(Problem(cost, epsilon=0.5).flat()) == 6.0
    assert list(spread(Problem(np.stack([cost, -cost.clip(max=2.0)]), epsilon=0.5))) == [6.0, 4.0]


@pytest.mark.parametrize("n", [60, 600])  # below and above the arcs that are solved in float64 altogether
@pytest.mark.parametrize("kind", ["matrix", "points", "distances"])
@pytest.mark.parametrize("sides", [(FIXED, FIXED), (KL(0.4), KL(0.4)), (KL(0.3), FIXED)], ids=str)
def test_float32_is_solved_at_an_epsilon_for_which_its_potentials_have_no_digits(n, kind, sides):
    """They are kept in float64 there; what is given out is float32, and the plan that of the same numbers in float64."""
    rng = np.random.default_rng(11)
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (rng.normal(size=(n, 6)), rng.normal(size=(n, 6))))
    x, y = x.astype(np.float32), y.astype(np.float32)
    metric = "euclidean" if kind == "distances" else "cosine"
    cost = Points(torch.tensor(x), torch.tensor(y), metric)
    cost = cost.dense() if kind == "matrix" else cost
    assert cost.dtype == torch.float32
    solution = solve(Problem(cost, epsilon=3e-3, rows=sides[0], columns=sides[1]))
    assert solution.certificate.holds and solution.potentials.f.dtype == torch.float64
    outputs = solution.f, solution.value, solution.plan, solution.row_marginal, solution.transport_cost
    assert all(z.dtype == torch.float32 for z in outputs)
    double = cost.double() if kind == "matrix" else Points(torch.tensor(x).double(), torch.tensor(y).double(), metric)
    exact = solve(Problem(double, epsilon=3e-3, rows=sides[0], columns=sides[1]))
    assert float((solution.plan - exact.plan).abs().sum()) <= 2e-5 * float(exact.plan.sum())
    again = solve(Problem(cost, epsilon=3e-3, rows=sides[0], columns=sides[1]), init=solution)
    assert again.steps <= 3 and again.certificate.holds


@pytest.mark.parametrize("kind", ["matrix", "points", "distances"])
@pytest.mark.parametrize("sides", [(FIXED, FIXED), (KL(0.4), FIXED)], ids=str)
def test_derivatives_in_float32_at_such_an_epsilon_are_those_in_float64(kind, sides):
    generator = torch.Generator().manual_seed(4)
    x, y, weights = (torch.rand(size, generator=generator) for size in ((50, 3), (40, 3), (50,)))
    metric, found = "euclidean" if kind == "distances" else "sqeuclidean", {}
    for dtype in (torch.float32, torch.float64):
        a = weights.to(dtype) / weights.to(dtype).sum()
        live = [z.to(dtype).clone().requires_grad_() for z in (x, y, a)]
        points = Points(live[0], live[1], metric)
        problem = Problem(points.dense() if kind == "matrix" else points, live[2], epsilon=4e-3, rows=sides[0], columns=sides[1])
        solution = solve(problem, tolerance=1e-7, gradient=Implicit())
        assert solution.potentials.f.dtype == torch.float64
        outputs = (solution.value, solution.transport_cost, solution.f.square().sum(), solution.plan.square().sum())
        found[dtype] = [z for output in outputs for z in torch.autograd.grad(output, live, retain_graph=True)]
    for rough, exact in zip(found[torch.float32], found[torch.float64], strict=True):
        assert rough.dtype == torch.float32
        rough = rough.double()
        if exact.dim() == 1:  # weights may only move together
            rough, exact = rough - rough.mean(), exact - exact.mean()
        assert float((rough - exact).norm()) <= 1e-3 * float(exact.norm()) + 1e-6


def test_float32_where_its_potentials_have_digits_keeps_them_in_it():
    cost = torch.rand(30, 20, generator=torch.Generator().manual_seed(0))
    assert solve(Problem(cost, epsilon=0.2)).potentials.f.dtype == torch.float32


def test_what_float32_cannot_hold_has_not_converged_in_it():
    cost = torch.tensor([[-2.0, -2.0]], dtype=torch.float64)
    given = (cost, cost.float())
    double, single = (solve(Problem(x, epsilon=0.01, rows=TV(1.0), columns=FREE), throw=False) for x in given)
    assert double.status is Status.CONVERGED and float(double.mass) > 1e39
    assert single.status is Status.NOT_FINITE


@pytest.mark.parametrize(("seed", "n", "epsilon"), [(4, 200, 0.0076), (20, 284, 0.0076), (34, 200, 0.004)])
def test_clouds_against_themselves_are_certified_in_float32_where_what_is_lacking_is_dear(seed, n, epsilon):
    """Their potentials are next to nothing, beside costs of thousands of epsilons."""
    generator = torch.Generator().manual_seed(seed)
    x, a = torch.randn(n, 5, generator=generator), torch.rand(n, generator=generator) + 0.1
    solution = solve(Problem(Points(x, x), a / a.sum(), a / a.sum(), epsilon=epsilon))
    assert solution.certificate.holds and float(solution.f.abs().max()) < 0.1
