"""The solver against closed forms and limits: formulas written here by hand, from the definitions of the penalties alone.

What one bin of weight ``a`` pays is told to these tests by its slopes in the marginal (:func:`slopes`), from which
bisection finds every answer. No conjugate, no potential and no sweep of the library is used to say what is right.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.special import kl_div, logsumexp

from iotsolve import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared, Points, Problem, Sinkhorn, solve
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
