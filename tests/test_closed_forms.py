"""The solver against closed forms and limits: formulas written here by hand, from the definitions of the penalties alone.

What one bin of weight ``a`` pays is told to these tests by its slopes in the marginal (:func:`slopes`), from which
bisection finds every answer. No conjugate, no potential and no sweep of the library is used to say what is right.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import kl_div

from iotsolve import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared, Problem, Sinkhorn, solve

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


HUNDREDTHS = {
    k: st.integers(*k).map(lambda i: i / 100) for k in ((-200, 200), (20, 200), (5, 500), (65, 145), (10, 90))
}


@st.composite
def one_by_one(draw, kinds, exact):
    """Data of a 1 x 1 problem that has an answer other than zero: first the plan, then weights that allow it."""
    moved = draw(HUNDREDTHS[20, 200])
    ratios = {"fixed": st.just(1.0), "at_most": HUNDREDTHS[10, 90], "between": HUNDREDTHS[65, 145]}
    a, b = (moved / draw(ratios.get(kind, HUNDREDTHS[65, 145])) for kind in kinds)
    rows, columns = (side(kind, draw(HUNDREDTHS[5, 500])) for kind in kinds)
    c, mass = draw(HUNDREDTHS[-200, 200]) + 0.001, draw(st.sampled_from([None, moved]))
    if exact and mass is None:
        bounded = max(growth(rows), growth(columns))
        c = max(c, 0.001 - bounded) if bounded < INF else c
        if all(kind in BOUNDS and side(kind).lo == 0 for kind in kinds):
            c, mass = (-abs(c), None) if bounded == INF else (c, moved)
    epsilon = 0.0 if exact else draw(HUNDREDTHS[5, 500])
    return dict(c=c, a=a, b=b, epsilon=epsilon, rows=rows, columns=columns, mass=mass)


def growth(penalty):
    """The slope of the price at infinity."""
    return float(slopes(penalty, 1e300, 1.0)[1]) if isinstance(penalty, TV | Between) else INF


def as_problem(c, a, b, **options):
    return Problem([[c]], [a], [b], **options)


@over_pairs
@pytest.mark.parametrize("exact", [False, True], ids=["entropic", "exact"])
def test_one_bin_against_one_is_a_number_found_by_bisection(kinds, exact):
    @given(data=one_by_one(kinds, exact))
    @settings(max_examples=4)
    def look(data):
        p, value, scale = one_number(**data)
        solution = solve(as_problem(**data), None if exact else TIGHT)
        assert solution.plan[0, 0] == pytest.approx(p, rel=1e-10)
        assert solution.value == pytest.approx(value, abs=1e-10 * scale)
        f, g, lam = float(solution.f[0]), float(solution.g[0]), float(solution.mass_multiplier)
        atol = 1e-8 * (abs(f) + abs(g) + abs(lam) + abs(data["c"]) + data["epsilon"])
        entropy = data["epsilon"] * math.log(p / (data["a"] * data["b"])) if data["epsilon"] else 0.0
        slack = data["c"] + entropy - f - g - lam
        assert slack >= -atol and (slack <= atol or p == 0)
        assert_optimal_side(data["rows"], p, f, data["a"], atol=atol)
        assert_optimal_side(data["columns"], p, g, data["b"], atol=atol)

    look()
