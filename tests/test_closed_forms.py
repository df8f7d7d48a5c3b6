"""The solver against closed forms and limits: formulas written here by hand, from the definitions of the penalties alone.

What one bin of weight ``a`` pays is told to these tests by its slopes in the marginal (:func:`slopes`), from which
bisection finds every answer. No conjugate, no potential and no sweep of the library is used to say what is right.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.optimize import linprog
from scipy.special import kl_div, logsumexp

from iotsolve import (
    AT_MOST,
    FIXED,
    FREE,
    KL,
    L2,
    TV,
    Between,
    ChiSquared,
    Interior,
    Points,
    Problem,
    Sinkhorn,
    Status,
    sinkhorn_divergence,
    solve,
)
from iotsolve.marginals import kl_divergence
from iotsolve.testing import problems
from iotsolve.testing.references import numbers

INF = math.inf
BOUNDS = {"fixed": FIXED, "free": FREE, "at_most": AT_MOST, "between": Between(0.6, 1.5)}
PENALTIES = {"kl": KL, "tv": TV, "chi2": ChiSquared, "l2": L2}
KINDS = [*BOUNDS, *PENALTIES]
PAIRS = [(r, c) for r in KINDS for c in KINDS]
TIGHT = Sinkhorn(tolerance=1e-13, max_steps=20_000, stationary=True)
over_pairs = pytest.mark.parametrize("kinds", PAIRS, ids="-".join)


def side(kind, rho=1.0):
    return BOUNDS[kind] if kind in BOUNDS else PENALTIES[kind](rho)


# -- what a bin pays ---------------------------------------------------------------------------------------------------


def price(penalty, r, a):
    """What a bin of weight ``a`` pays for the marginal ``r``; bounds pay nothing."""
    r, a = np.asarray(r, dtype=float), np.asarray(a, dtype=float)
    if isinstance(penalty, KL):
        return penalty.rho * kl_div(r, a)
    if isinstance(penalty, TV):
        return penalty.rho * np.abs(r - a)
    if isinstance(penalty, ChiSquared):
        return penalty.rho / 2 * (r - a) ** 2 / a
    if isinstance(penalty, L2):
        return penalty.rho / 2 * (r - a) ** 2
    return 0 * r


def slopes(penalty, r, a):
    """Left and right derivative of that price in ``r > 0``: ``-inf`` below what a bound allows, ``inf`` above."""
    if isinstance(penalty, KL):
        smooth = penalty.rho * np.log(r / a)
    elif isinstance(penalty, ChiSquared):
        smooth = penalty.rho * (r - a) / a
    elif isinstance(penalty, L2):
        smooth = penalty.rho * (r - a)
    elif isinstance(penalty, TV):
        return np.where(r <= a, -penalty.rho, penalty.rho), np.where(r < a, -penalty.rho, penalty.rho)
    else:
        lo, hi = penalty.lo * a, penalty.hi * a
        left = np.where(r <= lo, -INF, np.where(r <= hi, 0.0, INF))
        return left, np.where(r >= hi, INF, np.where(r >= lo, 0.0, -INF))
    return smooth, smooth


def crossing(rising, low, high, *, steps=80):
    """Where a rising function turns from negative to positive, by bisection."""
    low, high = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    for _ in range(steps):
        middle = (low + high) / 2
        below = rising(middle) < 0
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high


# -- one bin against one -----------------------------------------------------------------------------------------------


def one_number(c, a, b, *, epsilon, rows, columns, mass=None):
    """Plan, value and the size of the value's terms of a 1 x 1 problem: where the slope of its objective changes sign."""
    reference = a * b

    def slope(log_p):
        p = np.exp(log_p)
        entropy = epsilon * (log_p - math.log(reference)) if epsilon else 0.0
        return c + entropy + slopes(rows, p, a)[1] + slopes(columns, p, b)[1]

    p = mass if mass is not None else float(np.exp(crossing(slope, -700.0, 700.0)))
    p = 0.0 if p < 1e-300 else p
    parts = [c * p, epsilon * float(kl_div(p, reference)), float(price(rows, p, a)), float(price(columns, p, b))]
    return p, sum(parts), sum(map(abs, parts)) + epsilon * (p + reference)


def assert_optimal_side(penalty, r, f, a, *, atol):
    """``-f`` is a slope of the price at ``r``, where ``r`` is known to nine digits."""
    left, right = slopes(penalty, r * (1 - 1e-9), a)[0], slopes(penalty, r * (1 + 1e-9), a)[1]
    assert np.all((left - atol <= -f) | (r == 0)) and np.all(-f <= right + atol)


def one_by_one(hundredths, kinds, exact):
    """Data of a 1 x 1 problem that has an answer other than zero: first the plan, then weights that allow it.

    ``hundredths(low, high)`` draws a number between ``low`` and ``high`` hundredths.
    """
    moved = hundredths(20, 200)
    ratios = {"fixed": (100, 100), "at_most": (10, 90), "between": (65, 145)}
    a, b = (moved / hundredths(*ratios.get(kind, (20, 300))) for kind in kinds)
    rows, columns = (side(kind, hundredths(5, 500)) for kind in kinds)
    c, mass = hundredths(-200, 200) + 0.001, moved if hundredths(0, 100) > 0.5 else None
    if exact and mass is None:
        bounded = max(growth(rows), growth(columns))
        c = max(c, 0.001 - bounded) if bounded < INF else c
        if all(kind in BOUNDS and side(kind).lo == 0 for kind in kinds):
            c, mass = (-abs(c), None) if bounded == INF else (c, moved)
    epsilon = 0.0 if exact else hundredths(5, 500)
    return dict(c=c, a=a, b=b, epsilon=epsilon, rows=rows, columns=columns, mass=mass)


def of_seed(seed):
    """Numbers for :func:`one_by_one` out of a seed."""
    rng = np.random.default_rng(seed)
    return lambda low, high: int(rng.integers(low, high + 1)) / 100


def growth(penalty):
    """The slope of the price at infinity."""
    return float(slopes(penalty, 1e300, 1.0)[1]) if isinstance(penalty, TV | Between) else INF


def check_one_by_one(c, a, b, **options):
    p, value, scale = one_number(c, a, b, **options)
    epsilon = options["epsilon"]
    solution = solve(Problem([[c]], [a], [b], **options), TIGHT if epsilon else None)
    assert solution.plan[0, 0] == pytest.approx(p, rel=1e-10)
    assert solution.value == pytest.approx(value, abs=1e-10 * scale)
    f, g, lam = float(solution.f[0]), float(solution.g[0]), float(solution.mass_multiplier)
    atol = 1e-8 * (abs(f) + abs(g) + abs(lam) + abs(c) + epsilon)
    slack = c + (epsilon * math.log(p / (a * b)) if epsilon else 0.0) - f - g - lam
    assert slack >= -atol and (slack <= atol or p == 0)
    assert_optimal_side(options["rows"], p, f, a, atol=atol)
    assert_optimal_side(options["columns"], p, g, b, atol=atol)


@over_pairs
@pytest.mark.parametrize("exact", [False, True], ids=["entropic", "exact"])
def test_one_bin_against_one_is_a_number_found_by_bisection(kinds, exact):
    for seed in range(3):
        check_one_by_one(**one_by_one(of_seed(seed), kinds, exact))


@given(data=st.data(), kinds=st.sampled_from(PAIRS), exact=st.booleans())
def test_one_bin_against_one_whatever_the_numbers(data, kinds, exact):
    check_one_by_one(**one_by_one(lambda low, high: data.draw(st.integers(low, high)) / 100, kinds, exact))


# -- problems that are one bin against one -----------------------------------------------------------------------------


def shared(penalty, n):
    """The penalty with which ``n`` equal bins together pay what one pays."""
    return L2(n * penalty.rho) if isinstance(penalty, L2) else penalty


def split(total, n, penalty, rng):
    """Uneven weights of this total; even ones under L2, which is no divergence and does not scale."""
    return np.full(n, total / n) if isinstance(penalty, L2) else total * rng.dirichlet(np.full(n, 2.0))


@over_pairs
def test_equal_costs_give_the_product_plan_of_one_bin_against_one(kinds):
    for seed in range(2):
        data = one_by_one(of_seed(seed), kinds, exact=False)
        rng, (n, m) = np.random.default_rng(seed), (3, 4)
        p, value, scale = one_number(**data)
        rows, columns = shared(data["rows"], n), shared(data["columns"], m)
        a, b = split(data["a"], n, rows, rng), split(data["b"], m, columns, rng)
        options = data | {"rows": rows, "columns": columns}
        cost = np.full((n, m), options.pop("c"))
        solution = solve(Problem(cost, **(options | {"a": a, "b": b})), TIGHT)
        np.testing.assert_allclose(solution.plan, p * np.outer(a / a.sum(), b / b.sum()), rtol=1e-10)
        assert solution.value == pytest.approx(value, abs=1e-10 * scale)


@over_pairs
def test_equal_costs_without_entropy_move_what_one_bin_against_one_moves(kinds):
    for seed in range(2):
        data = one_by_one(of_seed(seed), kinds, exact=True)
        rng, (n, m) = np.random.default_rng(seed), (3, 4)
        p, value, scale = one_number(**data)
        rows, columns = shared(data["rows"], n), shared(data["columns"], m)
        a, b = split(data["a"], n, rows, rng), split(data["b"], m, columns, rng)
        options = data | {"rows": rows, "columns": columns}
        cost = np.full((n, m), options.pop("c"))
        solution = solve(Problem(cost, **(options | {"a": a, "b": b})))
        assert solution.plan.sum() == pytest.approx(p, rel=1e-9)
        assert solution.value == pytest.approx(value, abs=1e-10 * scale)


@over_pairs
def test_a_circulant_cost_is_its_soft_min_against_one_bin(kinds):
    """Every row and column of such a cost holds the same numbers, so with even weights all potentials of a side are equal."""
    for seed in range(2):
        data = one_by_one(of_seed(seed), kinds, exact=False)
        n, epsilon = 4, data["epsilon"]
        k = np.random.default_rng(seed).uniform(-1, 1, n)[np.add.outer(np.arange(n), np.arange(n)) % n]
        c = -epsilon * float(logsumexp(-k[0] / epsilon) - math.log(n))
        p, value, scale = one_number(**(data | {"c": c}))
        a, b, mass = np.full(n, data["a"] / n), np.full(n, data["b"] / n), data["mass"]
        rows, columns = shared(data["rows"], n), shared(data["columns"], n)
        solution = solve(Problem(k, a, b, epsilon=epsilon, rows=rows, columns=columns, mass=mass), TIGHT)
        np.testing.assert_allclose(solution.plan, p / n**2 * np.exp((c - k) / epsilon), rtol=1e-10)
        assert solution.value == pytest.approx(value, abs=1e-10 * (scale + p * np.abs(k).max()))


@given(order=st.integers(1, 8).flatmap(lambda n: st.permutations(range(n))))
def test_a_permutation_cost_gives_the_permutation(order):
    n = len(order)
    matching = np.eye(n)[list(order)]
    solution = solve(Problem(1.0 - matching))
    np.testing.assert_array_equal(solution.plan, matching / n)
    assert solution.value == 0.0


@given(problem=problems(largest_scale=1, smallest_epsilon=0.1), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_permuting_a_problem_permutes_its_potentials_and_gradients(problem, seed):
    rng, data = np.random.default_rng(seed), numbers(problem)
    i, j = rng.permutation(len(data.a)), rng.permutation(len(data.b))
    options = dict(epsilon=data.epsilon, rows=data.rows, columns=data.columns, mass=data.mass)
    moved = Problem(data.cost[np.ix_(i, j)], data.a[i], data.b[j], **options)
    one, other = (solve(p, None if problem.is_exact else TIGHT, throw=False) for p in (problem, moved))
    assert one.status == other.status
    if not one.converged:
        return
    size = 1 + np.abs(data.cost[np.isfinite(data.cost)]).max()
    assert one.value == pytest.approx(other.value, rel=1e-9, abs=1e-9 * size)
    if problem.is_exact:  # other potentials and another plan may be optimal too
        return
    np.testing.assert_allclose(one.f[i], other.f, rtol=0, atol=1e-7 * size)
    np.testing.assert_allclose(one.g[j], other.g, rtol=0, atol=1e-7 * size)
    here, there = one.gradient(), other.gradient()
    np.testing.assert_allclose(here.cost[np.ix_(i, j)], there.cost, atol=1e-7 * (1 + one.plan.sum()))
    np.testing.assert_allclose(here.a[i], there.a, rtol=1e-6, atol=1e-6 * size)
    np.testing.assert_allclose(here.b[j], there.b, rtol=1e-6, atol=1e-6 * size)


# -- Gaussians ---------------------------------------------------------------------------------------------------------


def gaussian(count, mean, covariance):
    """Gauss-Hermite nodes and weights of a normal distribution: exact for polynomials of degree ``2 count - 1``."""
    mean, root = np.atleast_1d(mean), np.linalg.cholesky(np.atleast_2d(covariance))
    z, w = np.polynomial.hermite_e.hermegauss(count)
    grid = np.stack(np.meshgrid(*[z] * len(mean), indexing="ij"), -1).reshape(-1, len(mean))
    mass = np.prod(np.stack(np.meshgrid(*[w] * len(mean), indexing="ij"), -1).reshape(-1, len(mean)), -1)
    return mean + grid @ root.T, mass / mass.sum()


def balanced_gaussians(mean, other, covariance, other_covariance, epsilon):
    """Janati, Muzellec, Peyre and Cuturi (2020), theorem 1, with ``epsilon = 2 sigma^2``: the value for ``|x - y|^2``.

    Among couplings of covariance ``K`` the objective is ``|m - m'|^2 + tr A + tr B - 2 tr K - eps/2 log det(1 - ..)``: in one
    dimension stationary where ``K^2 + eps/2 K = A B``.
    """
    d, variance = len(mean), epsilon / 2
    root = sqrtm(covariance)
    inner = sqrtm(4 * root @ other_covariance @ root + variance**2 * np.eye(d))
    bures = np.trace(covariance) + np.trace(other_covariance) - np.trace(inner) + d * variance * (1 - math.log(epsilon))
    bures += variance * np.linalg.slogdet(inner + variance * np.eye(d))[1]
    return float(np.sum((mean - other) ** 2) + np.real(bures))


def test_the_formula_for_gaussians_is_that_of_one_dimension_by_hand():
    for epsilon in (0.1, 1.0, 7.0):
        a, b = 0.5, 0.8
        k = -epsilon / 4 + math.sqrt(epsilon**2 / 16 + a * b)
        by_hand = 0.3**2 + a + b - 2 * k - epsilon / 2 * math.log(1 - k * k / (a * b))
        formula = balanced_gaussians(np.array([0.3]), np.zeros(1), np.array([[a]]), np.array([[b]]), epsilon)
        assert formula == pytest.approx(by_hand, rel=1e-12)


PLANE = (np.array([0.2, -0.1]), np.zeros(2), np.array([[0.5, 0.2], [0.2, 0.3]]), np.array([[0.4, -0.1], [-0.1, 0.6]]))
LINE = (np.array([0.4]), np.zeros(1), np.array([[0.5]]), np.array([[0.8]]))


@pytest.mark.parametrize(
    "gaussians, epsilon, counts", [(LINE, 2.0, (4, 8, 16, 32)), (LINE, 0.8, (8, 16, 32, 64)), (PLANE, 2.0, (4, 8, 16))]
)
def test_entropic_transport_between_gaussians_has_its_closed_form(gaussians, epsilon, counts):
    """The entropy is relative to the product of the two; the error falls as the nodes grow, down to ten digits."""
    mean, other, covariance, other_covariance = gaussians
    expected, errors = balanced_gaussians(*gaussians, epsilon), []
    for count in counts:
        (x, a), (y, b) = gaussian(count, mean, covariance), gaussian(count, other, other_covariance)
        errors.append(abs(solve(Problem(Points(x, y), a, b, epsilon=epsilon), TIGHT).value - expected))
    assert all(fine < coarse / 5 for coarse, fine in pairwise(errors) if coarse > 1e-9 * expected)
    assert errors[-1] <= 1e-10 * expected


def unbalanced_gaussians(mean, other, a, b, epsilon, rho, totals):
    """Value, mass and covariance of the plan, one dimension, both sides ``KL(rho)``.

    With a plan ``m N(mu, H)`` the objective is ``m T + (entropies of the masses)`` where, with ``k = (eps + rho) / 2``,

        T = |mu1 - mu2|^2 + k (mu1 - mean)^2 / a + k (mu2 - other)^2 / b
            + (1 + k/a) H11 + (1 + k/b) H22 - 2 H12 - eps/2 log det H - rho/2 log(H11 H22) + constants.

    Stationary in H: ``det H = eps/2 H12``, ``(1 + k/a) H11 = (1 + k/b) H22 = H12 + k``: a quadratic equation for H12.
    (Janati et al., theorem 3, in one dimension.)
    """
    k = (epsilon + rho) / 2
    p, q = 1 + k / a, 1 + k / b
    half = (2 * k - p * q * epsilon / 2) / 2
    h12 = (half + math.sqrt(half**2 + (p * q - 1) * k**2)) / (p * q - 1)
    h11, h22 = (h12 + k) / p, (h12 + k) / q
    apart = (mean - other) ** 2 / (1 + a / k + b / k)
    logs = -epsilon / 2 * math.log((h11 * h22 - h12**2) / (a * b)) - rho / 2 * math.log(h11 * h22 / (a * b))
    price_of_shape = apart + p * h11 + q * h22 - 2 * h12 + logs - 2 * k
    product = totals[0] * totals[1]
    mass = math.exp(((epsilon + rho) * math.log(product) - price_of_shape) / (epsilon + 2 * rho))
    value = epsilon * product + rho * sum(totals) - (epsilon + 2 * rho) * mass
    return value, mass, np.array([[h11, h12], [h12, h22]])


@pytest.mark.parametrize("epsilon, rho", [(2.0, 1.0), (1.0, 5.0), (3.0, 0.3)])
@pytest.mark.parametrize("totals", [(1.0, 1.0), (0.6, 1.7)], ids=str)
def test_unbalanced_transport_between_gaussians_has_its_closed_form(epsilon, rho, totals):
    value, mass, covariance = unbalanced_gaussians(0.5, -0.2, 0.5, 0.8, epsilon, rho, totals)
    errors = []
    for count in (6, 12, 24, 48):
        (x, a), (y, b) = gaussian(count, 0.5, 0.5), gaussian(count, -0.2, 0.8)
        sides = dict(rows=KL(rho), columns=KL(rho))
        solution = solve(Problem(Points(x, y), totals[0] * a, totals[1] * b, epsilon=epsilon, **sides), TIGHT)
        errors.append(abs(solution.value - value))
    assert all(fine < coarse / 5 for coarse, fine in pairwise(errors) if coarse > 1e-9 * value)
    assert errors[-1] <= 1e-10 * value and solution.mass == pytest.approx(mass, rel=1e-10)
    plan, z = solution.plan / solution.mass, np.stack(np.broadcast_arrays(x, y.T))
    centred = z - (z * plan).sum((1, 2), keepdims=True)
    np.testing.assert_allclose((centred[:, None] * centred[None] * plan).sum((2, 3)), covariance, rtol=1e-8)
    balanced = balanced_gaussians(np.array([0.5]), np.array([-0.2]), np.array([[0.5]]), np.array([[0.8]]), epsilon)
    assert unbalanced_gaussians(0.5, -0.2, 0.5, 0.8, epsilon, 1e7, (1.0, 1.0))[0] == pytest.approx(balanced, rel=1e-6)


# -- the line ----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), n=st.integers(1, 7), m=st.integers(1, 7), power=st.sampled_from([1, 2, 3]))
@settings(max_examples=50)
def test_on_the_line_the_matrix_has_the_value_of_the_quantiles(seed, n, m, power):
    """Integral of ``|F^-1 - G^-1|^p`` over the levels, and of ``|F - G|`` over the line for p = 1."""
    rng = np.random.default_rng(seed)
    x, y, a, b = rng.normal(size=n), rng.normal(size=m), rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    i, j = x.argsort(), y.argsort()
    up, down = a[i].cumsum(), b[j].cumsum()
    up[-1] = down[-1] = 1.0
    levels = np.union1d(up, down)
    middle = levels - np.diff(levels, prepend=0.0) / 2
    apart = np.abs(x[i][np.searchsorted(up, middle)] - y[j][np.searchsorted(down, middle)])
    expected = float(np.diff(levels, prepend=0.0) @ apart**power)
    value = solve(Problem(np.abs(x[:, None] - y) ** power, a, b)).value
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if power == 1:
        z = np.union1d(x, y)
        below = [(w * (p <= t)).sum() for t in z[:-1] for p, w in ((x, a), (y, b))]
        distance = np.abs(np.subtract(below[::2], below[1::2])) @ np.diff(z) if len(z) > 1 else 0.0
        assert value == pytest.approx(float(distance), rel=1e-9, abs=1e-12)


# -- limits ------------------------------------------------------------------------------------------------------------


def balanced_data(seed, n=5, m=6):
    rng = np.random.default_rng(seed)
    return rng.random((n, m)), rng.dirichlet(np.full(n, 2.0)), rng.dirichlet(np.full(m, 2.0))


def linear_program(cost, a, b, *, rows=FIXED, columns=FIXED, mass=None):
    """Value and plan at epsilon = 0 by HiGHS: bounds as inequalities, TV by what is made and what is left out."""
    n, m = cost.shape
    of_rows, of_columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    prices, equal, at_most = cost.ravel(), [], []
    slacks = sum(2 * len(w) for penalty, w in ((rows, a), (columns, b)) if isinstance(penalty, TV))
    place = 0
    for penalty, sums, w in ((rows, of_rows, a), (columns, of_columns, b)):
        own = np.zeros((len(w), slacks))
        if isinstance(penalty, TV):
            own[:, place : place + 2 * len(w)] = np.hstack([-np.eye(len(w)), np.eye(len(w))])
            place, prices = place + 2 * len(w), np.r_[prices, np.full(2 * len(w), penalty.rho)]
            equal.append((np.hstack([sums, own]), w))
            continue
        at_most.append((np.hstack([-sums, own]), -penalty.lo * w))
        if penalty.hi < INF:
            at_most.append((np.hstack([sums, own]), penalty.hi * w))
    if mass is not None:
        equal.append((np.r_[np.ones(n * m), np.zeros(slacks)][None], np.array([mass])))
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    matrices = {}
    for name, blocks in (("eq", equal), ("ub", at_most)):
        if blocks:
            matrices |= {f"A_{name}": np.vstack([x for x, _ in blocks]), f"b_{name}": np.hstack([y for _, y in blocks])}
    found = linprog(prices, **matrices, method="highs", options=options)
    assert found.status == 0
    return found.fun, found.x[: n * m].reshape(n, m)


def half_squares(kind, f, g, a, b):
    """``sum a f^2 / 2 + sum b g^2 / 2`` at the best of the potentials ``(f + t, g - t)``; L2 knows no weights."""
    w, x = np.r_[f, -g], np.ones(len(f) + len(g)) if kind == "l2" else np.r_[a, b]
    return float(x @ (w - x @ w / x.sum()) ** 2) / 2


@pytest.mark.parametrize("kind", ["kl", "chi2", "l2"])
@pytest.mark.parametrize("seed", range(2))
def test_strong_penalties_fall_short_of_the_balanced_value_like_the_inverse_of_rho(kind, seed):
    """``phi(f) = f - f^2 / (2 rho) + ...``, so ``rho (V - V(rho))`` tends to half the square of the balanced potentials."""
    cost, a, b = balanced_data(seed)
    hard = solve(Problem(cost, a, b, epsilon=0.1), TIGHT)
    limit, off = half_squares(kind, hard.f, hard.g, a, b), []
    for rho in (1e2, 1e3, 1e4):
        soft = solve(Problem(cost, a, b, epsilon=0.1, rows=side(kind, rho), columns=side(kind, rho)), TIGHT)
        off.append(abs(rho * (hard.value - soft.value) / limit - 1))
        assert soft.value < hard.value
    assert off[1] < off[0] / 8 and off[1] <= 1e-2 and off[2] <= 2e-3


@pytest.mark.parametrize("kind", ["kl", "chi2", "l2"])
def test_strong_penalties_without_entropy_meet_the_linear_program(kind):
    cost, a, b = balanced_data(3)
    value, plan = linear_program(cost, a, b)
    short = []
    for rho in (1e2, 1e3, 1e4):
        soft = solve(Problem(cost, a, b, rows=side(kind, rho), columns=side(kind, rho)))
        short.append(value - soft.value)
        np.testing.assert_allclose(soft.plan, plan, atol=30 / rho)
    assert short[0] > 0 and short[0] / short[1] == pytest.approx(10, rel=0.02)
    assert short[1] / short[2] == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("rows", ["fixed", "soft"])
def test_weak_penalties_exceed_the_free_value_by_what_they_charge_its_plan(kind, rows):
    """``V(rho) = V + rho D(r | a) + O(rho^2)`` at the marginals of the free plan, which is a soft-max."""
    cost, a, b = balanced_data(1)
    kernel = np.outer(a, b) * np.exp(-cost / 0.1)
    if rows == "fixed":
        plan = a[:, None] * kernel / kernel.sum(1, keepdims=True)
        value = float(-0.1 * a @ np.log(kernel.sum(1) / a))
        slope = float(price(side(kind), plan.sum(0), b).sum())
    else:
        plan, value = kernel, 0.1 * (1 - kernel.sum())
        slope = float(price(side(kind), plan.sum(0), b).sum() + price(side(kind), plan.sum(1), a).sum())
    off = []
    for rho in (1e-2, 1e-3, 1e-4):
        rows_then = FIXED if rows == "fixed" else side(kind, rho)
        found = solve(Problem(cost, a, b, epsilon=0.1, rows=rows_then, columns=side(kind, rho)), TIGHT)
        off.append(abs((found.value - value) / rho - slope))
    assert off[1] < off[0] / 8 and off[2] < off[1] / 8 and off[2] < 5e-3 * slope
    np.testing.assert_allclose(found.plan, plan, rtol=0.01)


def clamp(f, g):
    """Least ``rho`` for which some ``(f + t, g - t)`` lies within ``[-rho, rho]``."""
    w = np.r_[f, -g]
    return float(w.max() - w.min()) / 2


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_total_variation_equals_the_balanced_problem_from_a_finite_rho_on(epsilon, seed):
    cost, a, b = balanced_data(seed)
    hard = solve(Problem(cost, a, b, epsilon=epsilon), TIGHT if epsilon else None)
    value = linear_program(cost, a, b)[0] if not epsilon else hard.value
    enough = clamp(hard.f, hard.g)
    assert hard.value == pytest.approx(value, rel=1e-9)

    def soft(rho):
        problem = Problem(cost, a, b, epsilon=epsilon, rows=TV(rho), columns=TV(rho))
        return solve(problem, TIGHT if epsilon else None)

    same, less = soft(1.001 * enough), soft(0.5 * enough)
    assert same.value == pytest.approx(value, rel=1e-10)
    np.testing.assert_allclose(same.plan, hard.plan, atol=1e-10)
    assert less.value < value * (1 - 1e-3) and less.mass < 1 - 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_total_variation_without_entropy_is_the_linear_program_with_slacks(seed):
    cost, a, b = balanced_data(seed)
    for rho, other in ((0.1, TV(0.2)), (0.3, FIXED), (0.2, AT_MOST), (0.25, FREE)):
        value, plan = linear_program(cost, a, 1.2 * b, rows=TV(rho), columns=other)
        solution = solve(Problem(cost, a, 1.2 * b, rows=TV(rho), columns=other))
        assert solution.value == pytest.approx(value, rel=1e-9)
        np.testing.assert_allclose(solution.plan, plan, atol=1e-9)


LINEAR = {
    "fixed-fixed": dict(),
    "at_most-at_most-mass": dict(rows=AT_MOST, columns=AT_MOST, mass=0.7),
    "between-fixed": dict(rows=Between(0.6, 1.5)),
    "tv-fixed": dict(rows=TV(0.3)),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("seed", range(2))
def test_a_small_epsilon_exceeds_the_linear_program_by_the_entropy_of_its_plan(name, seed):
    """Where the optimal plan is one, ``V(eps) = V(0) + eps KL(P | a x b) + o(eps)``, and the plan meets it too."""
    cost, a, b = balanced_data(seed)
    options = LINEAR[name]
    value, plan = linear_program(cost, a, b, **options)
    entropy, off = float(kl_div(plan, np.outer(a, b)).sum()), []
    for epsilon in (1e-2, 1e-3, 1e-4):
        solution = solve(Problem(cost, a, b, epsilon=epsilon, **options))
        off.append((solution.value - value) / epsilon - entropy)
    assert max(off) <= 1e-9 and abs(off[1]) <= abs(off[0]) / 5 and abs(off[2]) <= 1e-9
    np.testing.assert_allclose(solution.plan, plan, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_epsilon_meets_the_product_at_the_rate_of_the_costs_variance(seed):
    """``V = <C, a x b> - Var / (2 eps) + O(1 / eps^2)``, the variance that of the cost less its row and column means."""
    cost, a, b = balanced_data(seed)
    centred = cost - (cost @ b)[:, None] - (a @ cost)[None, :] + a @ cost @ b
    variance, off = float(a @ centred**2 @ b), []
    for epsilon in (10.0, 100.0, 1000.0):
        solution = solve(Problem(cost, a, b, epsilon=epsilon), TIGHT)
        off.append(abs(2 * epsilon * (a @ cost @ b - solution.value) / variance - 1))
        np.testing.assert_allclose(solution.plan, np.outer(a, b) * (1 - centred / epsilon), rtol=3 / epsilon**2)
    assert off[0] <= 0.1 and off[1] < off[0] / 5 and off[2] <= 1e-3


# -- stiff semi-relaxed problems ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "chi2", "l2"])
@pytest.mark.parametrize("k", [6, 12, 25, 50])
@pytest.mark.parametrize("ratio", [0.5, 5.0, 50.0, 500.0])
def test_stiff_semi_relaxed_problems_satisfy_their_optimality_conditions(kind, k, ratio):
    """Rows FIXED, columns soft: every bin of either side to 1e-9, all to half the tolerance, recomputed from the potentials."""
    rng, epsilon = np.random.default_rng(k), 0.02
    cost, a, b = rng.random((40, k)), rng.dirichlet(np.full(40, 5.0)), rng.dirichlet(np.full(k, 5.0))
    penalty = side(kind, ratio * epsilon * (k if kind == "l2" else 1))
    for tolerance in (1e-8, 1e-9):  # the first is the default
        solution = solve(Problem(cost, a, b, epsilon=epsilon, columns=penalty), tolerance=tolerance)
        plan = np.outer(a, b) * np.exp((solution.f[:, None] + solution.g[None, :] - cost) / epsilon)
        np.testing.assert_allclose(solution.plan, plan, rtol=1e-12)
        r, c = plan.sum(1), plan.sum(0)
        asked = {
            "kl": lambda t: b * np.exp(-t),
            "chi2": lambda t: b * np.maximum(1 - t, 0.0),
            "l2": lambda t: np.maximum(b - t, 0.0),
        }[kind](solution.g / penalty.rho)
        for off in (np.abs(r - a), np.abs(c - asked)):
            assert off.max() <= 1e-9 and off.sum() <= tolerance / 2


# -- conjugates --------------------------------------------------------------------------------------------------------


def per_weight(penalty, a):
    """The price of a bin of weight ``a`` as a function of ``t = r / a``, per unit of weight; and its slopes."""
    return (lambda t: price(penalty, a * t, a) / a), (lambda t: slopes(penalty, a * t, a)[1])


@st.composite
def sides(draw):
    kind, rho = draw(st.sampled_from(KINDS)), draw(st.integers(5, 500)) / 100
    return side(kind, rho)


NUMBERS = st.integers(-200, 200).map(lambda k: k / 100 + 0.0013)


@given(penalty=sides(), f=NUMBERS, a=st.integers(20, 200).map(lambda k: k / 100), r=st.integers(0, 300))
def test_conjugates_are_minima_found_by_bisection(penalty, f, a, r):
    """``phi(f) = min psi(t) + f t``, its slope the minimiser; and the Fenchel-Young term by its definition."""
    psi, slope = per_weight(penalty, a)
    at, x = penalty.at(torch.tensor([a], dtype=torch.float64)), torch.tensor([f], dtype=torch.float64)
    found = float(at.conjugate(x))
    if f < {TV: -penalty.rho}.get(type(penalty), -INF) if isinstance(penalty, TV) else penalty == FREE and f < 0:
        assert found == -INF
        return
    t = float(np.exp(crossing(lambda log_t: slope(np.exp(log_t)) + f, -700.0, 60.0)))
    t = 0.0 if t < 1e-300 else t
    expected = float(psi(t)) + f * t
    assert found == pytest.approx(expected, abs=1e-12 * (1 + float(psi(t)) + abs(f * t)))
    assert float(at.response(x)) == pytest.approx(t, rel=1e-9)
    lo, hi = (float(bound) for bound in penalty.bounds) if isinstance(penalty, Between) else (0.0, INF)
    marginal = min(max(r / 100, lo * a), hi * a)
    term = at.fenchel_young(*(torch.tensor([z], dtype=torch.float64) for z in (marginal, f, a)))
    by_definition = a * (float(psi(marginal / a)) - expected) + f * marginal
    assert float(term) == pytest.approx(by_definition, abs=1e-9 * (1 + abs(by_definition) + abs(f * marginal)))


@given(
    penalty=sides(), s=NUMBERS, a=st.integers(20, 200).map(lambda k: k / 100), epsilon=st.sampled_from([0.01, 0.1, 3.0])
)
def test_proximal_steps_are_found_by_bisection_on_the_marginal(penalty, s, a, epsilon):
    """At ``f = s + eps log t`` the marginal ``t`` that arrives is one that ``f`` asks for: ``-f`` is a slope of psi there."""
    _, slope = per_weight(penalty, a)
    log_t = float(crossing(lambda x: slope(np.exp(x)) + s + epsilon * x, -500.0, 500.0))
    at, soft_min = penalty.at(torch.tensor([a], dtype=torch.float64)), torch.tensor([s], dtype=torch.float64)
    assert float(at.aprox(soft_min, epsilon)) == pytest.approx(s + epsilon * log_t, abs=1e-11 * (1 + abs(s)))
    exact = at.aprox(soft_min, 0.0)
    if float(exact) <= s:  # else the floor of the dual's domain holds it
        best = float(at.conjugate(torch.minimum(soft_min, torch.tensor(1e3))))
        assert float(at.conjugate(exact)) == pytest.approx(best, abs=1e-12)
    else:
        assert exact == at.floor


@given(penalty=sides(), f=NUMBERS, a=st.integers(20, 200).map(lambda k: k / 100))
def test_curvatures_are_differences_of_the_conjugates_slope(penalty, f, a):
    at, step = penalty.at(torch.tensor([a], dtype=torch.float64)), 1e-5
    x, low, high = (torch.tensor([z], dtype=torch.float64) for z in (f, f - step, f + step))
    if not np.isfinite(float(at.conjugate(low))):
        return
    difference = float((at.response(low) - at.response(high)) / (2 * step))
    curvature = float(at.curvature(x))
    if np.isfinite(curvature):
        assert difference == pytest.approx(curvature, rel=1e-6, abs=1e-9)
    else:  # held by a kink: where nothing more is asked for, whichever way it moves
        assert difference == 0.0


# -- known ways to be wrong --------------------------------------------------------------------------------------------


def two_diracs(c, a, b, rho, epsilon):
    """Mass and value of one arc between bins of ``a`` and ``b``, both sides KL: ``c + eps log(p/ab) + rho log(p^2/ab) = 0``."""
    p = math.exp(((rho + epsilon) * math.log(a * b) - c) / (2 * rho + epsilon))
    return p, epsilon * a * b + rho * (a + b) - (epsilon + 2 * rho) * p


@pytest.mark.parametrize("epsilon", [0.0, 0.7])
def test_the_value_keeps_the_mass_terms_of_the_divergence(epsilon):
    """Without ``- x + y`` the value would be ``c p + (eps + ..) p log p``-like: off by ``eps (ab - p) + rho (a + b - 2 p)``."""
    c, a, b, rho = 0.4, 2.0, 0.5, 0.9
    p, value = two_diracs(c, a, b, rho, epsilon)
    without = c * p + epsilon * p * math.log(p / (a * b)) + rho * p * (math.log(p / a) + math.log(p / b))
    solution = solve(Problem([[c]], [a], [b], epsilon=epsilon, rows=KL(rho), columns=KL(rho)))
    assert solution.value == pytest.approx(value, rel=1e-8)
    assert (
        value - without == pytest.approx(epsilon * (a * b - p) + rho * (a + b - 2 * p)) and abs(value - without) > 0.5
    )


def test_gradients_in_the_weights_keep_the_term_of_the_reference():
    """One arc, KL: ``dV/da = eps b + rho - (eps + rho) p / a``; rows FIXED, columns FREE: by the soft-min."""
    c, a, b, rho, epsilon = 0.4, 2.0, 0.5, 0.9, 0.7
    p, _ = two_diracs(c, a, b, rho, epsilon)
    found = solve(Problem([[c]], [a], [b], epsilon=epsilon, rows=KL(rho), columns=KL(rho)), TIGHT).gradient()
    assert found.a[0] == pytest.approx(epsilon * b + rho - (epsilon + rho) * p / a, rel=1e-8)
    assert found.b[0] == pytest.approx(epsilon * a + rho - (epsilon + rho) * p / b, rel=1e-8)

    cost, a, b = balanced_data(0)
    a, b = 1.7 * a, 0.6 * b
    kernel = np.exp(-cost / epsilon)
    s = -epsilon * np.log(kernel @ b)
    found = solve(Problem(cost, a, b, epsilon=epsilon, columns=FREE)).gradient()
    np.testing.assert_allclose(found.a, s - epsilon + epsilon * b.sum(), rtol=1e-9)
    np.testing.assert_allclose(found.b, -epsilon * kernel.T @ (a * np.exp(s / epsilon)) + epsilon * a.sum(), rtol=1e-9)


def held(penalty, s):
    """The potential of a bin of weight 0 at ``epsilon = 0``: as high as ``s`` and the penalty's slopes let it be."""
    if isinstance(penalty, TV):
        return np.clip(s, -penalty.rho, penalty.rho)
    if isinstance(penalty, ChiSquared):
        return np.minimum(s, penalty.rho)
    if isinstance(penalty, L2) or penalty == FREE:  # what L2 pays vanishes with the weight
        return 0 * s
    return np.minimum(s, 0.0) if penalty == AT_MOST else s


@over_pairs
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_potentials_at_empty_bins_are_feasible_and_tight(kinds, epsilon):
    cost, a, b = balanced_data(4)
    a[1] = b[2] = b[5] = 0.0
    a, b = a / a.sum(), b / b.sum()
    rows, columns = (side(kind, 0.4) for kind in kinds)
    idle = all(kind in BOUNDS and side(kind).lo == 0 for kind in kinds)
    mass = 0.9 if idle else 1.0 if "fixed" in kinds else None
    problem = Problem(cost, a, b, epsilon=epsilon, rows=rows, columns=columns, mass=mass)
    solution = solve(problem, TIGHT if epsilon else None)
    f, g, lam = solution.f, solution.g, float(solution.mass_multiplier)
    for penalty, potential, other, w, v, c in ((rows, f, g, a, b, cost), (columns, g, f, b, a, cost.T)):
        empty, full = w == 0, v > 0
        slack = (c - other - lam)[empty][:, full]
        if epsilon:
            s = -epsilon * logsumexp(-slack / epsilon, b=v[full], axis=1)
            unit = FREE if isinstance(penalty, L2) else penalty
            t = np.exp((potential[empty] - s) / epsilon)
            assert_optimal_side(unit, t, potential[empty], np.ones_like(t), atol=1e-7)
        else:
            np.testing.assert_allclose(potential[empty], held(penalty, slack.min(1)), atol=1e-9)


@pytest.mark.parametrize("epsilon, mass", [(0.0, None), (0.0, 0.8), (0.1, None), (0.1, 0.8)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_free_side_gives_finite_everything(kind, epsilon, mass):
    """No side is emulated by an infinite strength, whose products with 0 are NaN."""
    if kind == "fixed" and mass:
        mass = 1.0
    if not epsilon and mass is None and kind in ("free", "at_most"):
        mass = 0.5
    cost, a, b = balanced_data(2)
    a[3] = 0.0
    a /= a.sum()
    solution = solve(Problem(cost, a, b, epsilon=epsilon, rows=side(kind, 0.5), columns=FREE, mass=mass))
    found, certificate = solution.gradient(), solution.certificate
    assert not np.any(solution.g) and certificate.holds
    numbers_of = [solution.value, solution.f, solution.plan, solution.mass_multiplier, found.cost, found.a, found.b]
    numbers_of += [*found.rows.values(), certificate.primal, certificate.dual, certificate.row_violation]
    assert all(np.isfinite(x).all() for x in numbers_of) and found.columns == {}
    assert certificate.column_violation == 0.0


@pytest.mark.parametrize("name", ["fixed-fixed", "at_most-at_most-mass", "tv-fixed", "tv-tv"])
def test_mass_does_not_vanish_at_a_hundred_thousandth_of_the_cost_range(name):
    """Plan and value stay at the linear program's, though every ``exp(-C / eps)`` is 0 in floats."""
    cost, a, b = balanced_data(5)
    cost, epsilon = 0.1 + cost, 1e-5
    options = dict(rows=TV(0.3), columns=TV(0.25)) if name == "tv-tv" else LINEAR[name]
    assert not np.exp(-cost / epsilon).any()
    value, plan = linear_program(cost, a, b, **options)
    solution = solve(Problem(cost, a, b, epsilon=epsilon, **options))
    assert solution.plan.sum() == pytest.approx(plan.sum(), rel=1e-8)
    assert solution.value == pytest.approx(value + epsilon * kl_div(plan, np.outer(a, b)).sum(), rel=1e-7)
    np.testing.assert_allclose(solution.plan, plan, atol=1e-7)


@pytest.mark.parametrize("kind", ["kl", "chi2"])
def test_mass_does_not_vanish_at_a_tiny_epsilon_under_curved_penalties(kind):
    n, epsilon = 4, 1e-5
    k = np.random.default_rng(0).uniform(0.2, 1.2, n)[np.add.outer(np.arange(n), np.arange(n)) % n]
    c = -epsilon * float(logsumexp(-k[0] / epsilon) - math.log(n))
    sides_ = dict(epsilon=epsilon, rows=side(kind, 0.7), columns=side(kind, 1.1))
    p, value, _ = one_number(c, 1.0, 1.0, **sides_)
    solution = solve(Problem(k, **sides_), Interior(tolerance=1e-9, stationary=True))
    assert p > 0.3 and solution.plan.sum() == pytest.approx(p, rel=1e-8)
    assert solution.value == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
@pytest.mark.parametrize("mass", [0.1, 0.6, 0.999])
def test_partial_transport_that_gains_moves_exactly_its_mass(epsilon, mass):
    """All costs negative: moving everything would gain more, and is not asked for."""
    cost, a, b = balanced_data(6)
    cost = cost - 3.0
    problem = Problem(cost, a, 1.3 * b, epsilon=epsilon, rows=AT_MOST, columns=AT_MOST, mass=mass)
    solution = solve(problem, TIGHT if epsilon else None)
    assert solution.mass == pytest.approx(mass, rel=1e-12) and solution.plan.sum() == pytest.approx(mass, rel=1e-12)
    assert (solution.plan.sum(1) <= a * (1 + 1e-9)).all() and (solution.plan.sum(0) <= 1.3 * b * (1 + 1e-9)).all()
    assert solution.mass_multiplier < 0
    if not epsilon:
        value, _ = linear_program(cost, a, 1.3 * b, rows=AT_MOST, columns=AT_MOST, mass=mass)
        assert solution.value == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kinds", [("fixed", "fixed"), ("kl", "tv"), ("chi2", "l2"), ("between", "kl")], ids="-".join)
def test_single_precision_has_its_own_tolerance_and_a_certificate_in_double(kinds):
    cost, a, b = balanced_data(7)
    rows, columns = (side(kind, 0.4) for kind in kinds)
    arrays = [np.float32(x) for x in (cost, a, b)]
    solution = solve(Problem(*arrays, epsilon=0.05, rows=rows, columns=columns))
    certificate = solution.certificate
    assert solution.plan.dtype == np.float32 and certificate.tolerance == 1e-5 and certificate.holds
    cost, a, b, f, g = (np.float64(x) for x in (*arrays, solution.f, solution.g))
    plan = np.outer(a, b) * np.exp((f[:, None] + g[None, :] - cost) / 0.05)
    dual = -0.05 * (plan.sum() - a.sum() * b.sum())
    for penalty, marginal, potential, w, said in (
        (rows, plan.sum(1), f, a, certificate.row_violation),
        (columns, plan.sum(0), g, b, certificate.column_violation),
    ):
        lo, hi = (penalty.lo, penalty.hi) if isinstance(penalty, Between) else (0.0, INF)
        off = np.maximum(lo * w - marginal, 0).sum() + (np.maximum(marginal - hi * w, 0).sum() if hi < INF else 0.0)
        assert said == pytest.approx(off, abs=1e-13) and off <= 1e-5
        for x, weight in zip(potential, w, strict=True):
            psi, slope = per_weight(penalty, weight)
            t = float(np.exp(crossing(lambda log_t, slope=slope, x=x: slope(np.exp(log_t)) + x, -700.0, 60.0)))
            dual += weight * (float(psi(t)) + x * t)
    assert certificate.dual == pytest.approx(dual, abs=1e-12) and certificate.mass == pytest.approx(
        plan.sum(), rel=1e-13
    )


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_a_dual_that_is_not_attained_is_a_status_within_bounded_steps(epsilon):
    """Equal totals leave FIXED/AT_MOST no freedom; the arc (0, 1) then carries nothing, at no finite potentials."""
    problem = Problem([[0.0, 0.0], [INF, 0.0]], epsilon=epsilon, columns=AT_MOST)
    solution = solve(problem, throw=False)
    assert solution.steps <= 25_000
    if solution.converged:
        np.testing.assert_allclose(solution.plan, np.eye(2) / 2, atol=1e-8)
    else:
        assert solution.status in (Status.MAX_STEPS, Status.STALLED) and not np.isnan(solution.plan).any()


OVERFLOWS = {
    "product of the weights": ([[0.5, 1.0]], [1e200], [5e199, 5e199]),
    "total of the weights": ([[0.5, 1.0]], [1e308], [1e308, 1e308]),
    "range of the costs": ([[1e308, -1e308]], [1.0], [0.5, 0.5]),
    "product of cost and weight": ([[1e200, 1e200]], [1e200], [5e199, 5e199]),
}


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("name", OVERFLOWS)
@pytest.mark.parametrize("rows", [FIXED, KL(1.0), FREE], ids=str)
def test_what_overflows_is_an_error_or_a_status(name, rows, epsilon):
    cost, a, b = OVERFLOWS[name]
    try:
        problem = Problem(cost, a, b, epsilon=epsilon, rows=rows)
    except ValueError:
        return
    solution = solve(problem, throw=False)
    assert solution.steps <= 25_000
    if solution.converged:
        assert np.isfinite(solution.value) and np.isfinite(solution.plan).all() and solution.certificate.holds


# -- the debiased divergence -------------------------------------------------------------------------------------------

PRECISE = Interior(tolerance=1e-12, stationary=True)  # a cloud against itself is where sweeps crawl
DIVERGENCES = {"fixed": FIXED, "kl": KL(0.8), "tv": TV(0.6), "chi2": ChiSquared(0.9)}
METRICS = {
    "sqeuclidean": lambda x, y: ((x[:, None] - y[None]) ** 2).sum(-1),
    "euclidean": lambda x, y: np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1)),
    "cosine": lambda x, y: 1 - (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T,
}
over_divergences = pytest.mark.parametrize("kind", DIVERGENCES)


def two_clouds(seed, n=5, m=4, *, balanced):
    rng = np.random.default_rng(seed)
    a, b = rng.dirichlet(np.full(n, 2.0)), rng.dirichlet(np.full(m, 2.0))
    totals = (1.0, 1.0) if balanced else (0.7, 1.4)
    return rng.normal(size=(n, 2)), 0.4 + rng.normal(size=(m, 2)), totals[0] * a, totals[1] * b


@over_divergences
@given(seed=st.integers(0, 9999), epsilon=st.sampled_from([0.1, 0.5, 3.0]), metric=st.sampled_from([*METRICS]))
@settings(max_examples=10)
def test_the_divergence_is_symmetric_and_not_negative(kind, seed, epsilon, metric):
    x, y, a, b = two_clouds(seed, balanced=kind == "fixed")
    options = dict(epsilon=epsilon, side=DIVERGENCES[kind], metric=metric, solver=PRECISE)
    one, other = sinkhorn_divergence(x, y, a, b, **options), sinkhorn_divergence(y, x, b, a, **options)
    assert one > 0 and one == pytest.approx(other, rel=1e-9)


@over_divergences
@pytest.mark.parametrize("metric", METRICS)
def test_the_divergence_of_equal_clouds_is_zero_and_rests(kind, metric):
    """In another order and with a bin split in two it is the same cloud: 0 to twelve digits, and stationary in the points."""
    x, _, a, _ = two_clouds(3, balanced=False)
    i = np.random.default_rng(0).permutation(5)
    y, b = np.vstack([x[i], x[2:3]]), np.r_[np.where(i == 2, 0.75, 1.0) * a[i], 0.25 * a[2]]
    options = dict(epsilon=0.2, side=DIVERGENCES[kind], metric=metric, solver=PRECISE)
    assert abs(sinkhorn_divergence(x, y, a, b, **options)) <= 1e-12
    live, weights = (torch.tensor(z, requires_grad=True) for z in (x, a))
    value = sinkhorn_divergence(live, torch.tensor(x), weights, torch.tensor(a), **options)
    in_points, in_weights = torch.autograd.grad(value, (live, weights))
    assert abs(float(value.detach())) <= 1e-12 and in_points.abs().max() <= 1e-9
    # FIXED: the totals move together; TV: that one total exceeds the other is a kink, whose slopes are all the same
    spread = in_weights - in_weights.mean() if kind in ("fixed", "tv") else in_weights
    assert spread.abs().max() <= 1e-9


@pytest.mark.parametrize("metric", METRICS)
def test_at_a_large_epsilon_the_divergence_is_half_the_energy_distance(metric):
    """Product plans: ``<C, a x b> - <C, a x a> / 2 - <C, b x b> / 2``, met like ``1 / eps``."""
    x, y, a, b = two_clouds(1, balanced=True)
    of = METRICS[metric]
    energy, off = a @ of(x, y) @ b - a @ of(x, x) @ a / 2 - b @ of(y, y) @ b / 2, []
    for epsilon in (1e2, 1e3, 1e4):
        off.append(abs(sinkhorn_divergence(x, y, a, b, epsilon=epsilon, metric=metric, solver=PRECISE) / energy - 1))
    assert off[1] < off[0] / 8 and off[1] < 0.02 and off[2] < 2e-3
    if metric == "sqeuclidean":
        assert energy == pytest.approx(float(((a @ x - b @ y) ** 2).sum()))


@pytest.mark.parametrize("metric", METRICS)
def test_at_a_small_epsilon_the_divergence_is_the_transport_cost(metric):
    """``W + eps (KL(P | a x b) - H(a) / 2 - H(b) / 2) + o(eps)``, H Shannon's entropy: the plan of a self-term is diagonal."""
    x, y, a, b = two_clouds(2, balanced=True)
    value, plan = linear_program(METRICS[metric](x, y), a, b)
    bias = float(kl_div(plan, np.outer(a, b)).sum() + (a @ np.log(a) + b @ np.log(b)) / 2)
    for epsilon in (1e-3, 1e-4):
        found = sinkhorn_divergence(x, y, a, b, epsilon=epsilon, metric=metric)
        assert found == pytest.approx(value + epsilon * bias, abs=1e-7) and abs(found - value) <= 3 * epsilon


@over_divergences
@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_the_divergence_of_two_points_has_a_closed_form(kind, epsilon):
    """Three problems of one arc each, by bisection, and the excess for unequal totals."""
    x, y, c, (a, b) = (
        np.array([[0.3, 0.1]]),
        np.array([[-0.2, 0.6]]),
        0.5,
        (1.2, 1.2) if kind == "fixed" else (0.7, 1.6),
    )
    sides_ = dict(epsilon=epsilon, rows=DIVERGENCES[kind], columns=DIVERGENCES[kind])
    value, own_a, own_b = (one_number(z, *w, **sides_)[1] for z, w in ((c, (a, b)), (0.0, (a, a)), (0.0, (b, b))))
    expected = value - own_a / 2 - own_b / 2 + epsilon / 2 * (a - b) ** 2
    found = sinkhorn_divergence(x, y, [a], [b], epsilon=epsilon, side=DIVERGENCES[kind], solver=PRECISE)
    assert found == pytest.approx(expected, rel=1e-9)
    if kind == "fixed":
        assert found == pytest.approx(a * c, rel=1e-9)


@pytest.mark.parametrize("totals", [None, (1.0, 1.0), (0.6, 1.7)], ids=str)
def test_the_divergence_of_gaussians_has_a_closed_form(totals):
    epsilon, rho = 2.0, 1.5
    (x, a), (y, b) = gaussian(32, 0.5, 0.5), gaussian(32, -0.2, 0.8)

    def value(mean, other, v, w, masses):
        if totals is not None:
            return unbalanced_gaussians(mean, other, v, w, epsilon, rho, masses)[0]
        return balanced_gaussians(np.array([mean]), np.array([other]), np.array([[v]]), np.array([[w]]), epsilon)

    s, t = totals or (1.0, 1.0)
    expected = value(0.5, -0.2, 0.5, 0.8, (s, t)) - value(0.5, 0.5, 0.5, 0.5, (s, s)) / 2
    expected += epsilon / 2 * (s - t) ** 2 - value(-0.2, -0.2, 0.8, 0.8, (t, t)) / 2
    penalty = FIXED if totals is None else KL(rho)
    found = sinkhorn_divergence(x, y, s * a, t * b, epsilon=epsilon, side=penalty, solver=TIGHT)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(epsilon=0.0), "epsilon = 0.*no bias"),
        (dict(epsilon=0.1, side=FREE), "debiased divergence.*value of solve"),
        (dict(epsilon=0.1, side=Between(1.0, 2.0)), "debiased divergence"),
        (dict(epsilon=0.1, metric="dot"), "metric = 'dot'"),
        (dict(epsilon=0.1, metric=torch.abs), "metric = .*abs"),
        (dict(epsilon=-1.0), "epsilon = -1"),
    ],
    ids=["no entropy", "free", "bounds", "scalar product", "function", "negative epsilon"],
)
def test_what_is_no_divergence_is_refused(options, words):
    x = np.array([[0.0], [1.0]])
    with pytest.raises(ValueError, match=f"(?s){words}"):
        sinkhorn_divergence(x, x + 1.0, **options)


@over_divergences
def test_the_divergences_gradient_is_that_of_differences(kind):
    x, y, a, b = two_clouds(5, balanced=kind == "fixed")
    options = dict(epsilon=0.4, side=DIVERGENCES[kind], solver=PRECISE)
    live = torch.tensor(x, requires_grad=True)
    sinkhorn_divergence(live, torch.tensor(y), torch.tensor(a), torch.tensor(b), **options).backward()
    direction = np.random.default_rng(0).normal(size=x.shape)
    high, low = (sinkhorn_divergence(x + step * direction, y, a, b, **options) for step in (1e-5, -1e-5))
    assert float((live.grad * torch.tensor(direction)).sum()) == pytest.approx((high - low) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("apart", [1e-8, 1e-3, 0.3, 3.0])
def test_the_divergence_of_close_numbers_keeps_its_digits_with_and_without_autograd(apart):
    """Against its series where they are close, SciPy where they are not; nothing, and nothing beside something, included."""
    rng = np.random.default_rng(0)
    y = rng.random(50) + 0.1
    x = y * (1 + apart * rng.random(50))
    t = (x - y) / y
    expected = y * (t**2 / 2 - t**3 / 6 + t**4 / 12 - t**5 / 20) if apart < 0.1 else kl_div(x, y)
    given = torch.from_numpy(x), torch.from_numpy(y)
    with torch.no_grad():
        found = kl_divergence(*given)
        assert kl_divergence(*(z[:0] for z in given)).shape == (0,)
        odd = kl_divergence(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([2.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(odd, torch.tensor([2.0, math.inf, 0.0, 0.0]))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-7 * apart**2)  # a first-order term cancels
    torch.testing.assert_close(kl_divergence(*given), found, rtol=1e-12, atol=1e-30)


@pytest.mark.parametrize("size", [(3, 4), (60, 50)], ids=str)
@pytest.mark.parametrize("soft", [KL(1.0), TV(1.0), ChiSquared(1.0)], ids=str)
@pytest.mark.parametrize("other", [FREE, AT_MOST, KL(0.5)], ids=str)
@pytest.mark.parametrize("empty", [False, True])
def test_a_bin_that_reaches_no_weight_pays_for_all_of_it(size, soft, other, empty):
    """All its arcs are forbidden, or lead to a bin of weight 0; the value is that without it and its price, either way round."""
    rng, (n, m) = np.random.default_rng(3), size
    cost, a, b = rng.random((n, m)), rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    b[0] = 0.0
    cost[0, 1 if empty else 0 :] = np.inf
    problem = Problem(cost, a, b, epsilon=0.05, rows=soft, columns=other)
    turned = Problem(np.ascontiguousarray(cost.T), b, a, epsilon=0.05, rows=other, columns=soft)
    without = solve(Problem(cost[1:], a[1:], b, epsilon=0.05, rows=soft, columns=other))
    expected = without.value + price(soft, np.zeros(1), a[:1]).sum() + 0.05 * a[0] * b.sum()  # its share of the reference's mass
    for solution in (solve(problem), solve(turned)):
        assert solution.certificate.holds
        assert solution.value == pytest.approx(expected, rel=1e-7)
