"""Coefficients without end, beside those that have one; prices, signs and kinks where data say little: linear programs, Poisson
regression, optimality conditions.
"""

import warnings

import numpy as np
import pytest
from scipy.optimize import linprog
from test_inverse_ot import dummies, poisson, traits

from iotsolve import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared, Implicit, Problem, inverse, solve


def fitted(model, data):
    """A fit in silence, but for what NumPy has to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", inverse.IdentifiabilityWarning)
        fit = model.fit(data)
        fit.report()
    return fit


def drawn(features, seed, *, total=30, scale=2.0):
    """Few observations of a plan of these features, so that many cells are empty."""
    rng = np.random.default_rng(seed)
    score = features.apply(scale * rng.standard_normal(features.count))
    share = (rng.random(features.shape) + 0.05) * np.exp(score - score.max())
    return rng.multinomial(total, (share / share.sum()).ravel()).reshape(features.shape).astype(float)


SMALL = {
    "bilinear": lambda k: inverse.Bilinear(traits(6, 2, k), traits(5, 2, k + 1)),
    "features": lambda k: inverse.Features(np.random.default_rng(k).standard_normal((3, 5, 6))),
    "toeplitz": lambda k: inverse.Toeplitz(5, 4, symmetric=bool(k % 2)),
    "symmetric": lambda k: inverse.Symmetric(5),
    "free": lambda k: inverse.FreeCost(4, 4),
}


def ends(features, counts, columns):
    """Which coefficients have an end, by linear programs alone.

    A direction of coefficients and effects whose score is 0 where something was observed and nowhere above leads to infinity if
    it is below somewhere; all such together empty cells. A coefficient is told if it is 0 in every direction that is 0 elsewhere.
    """
    n, m = counts.shape
    filled = np.flatnonzero(np.outer(counts.sum(1), counts.sum(0) if columns is FIXED else np.ones(m)) > 0)
    effects = [np.kron(np.eye(n), np.ones((m, 1)))] + [np.kron(np.ones((n, 1)), np.eye(m))] * (columns is FIXED)
    design = np.hstack([features.block(slice(None)).reshape(n * m, -1), *effects])
    seen = counts.ravel() > 0
    empty = np.setdiff1d(filled, np.flatnonzero(seen))
    cells, count = len(empty), design.shape[1]
    price = np.concatenate([np.zeros(count), -np.ones(cells)])  # as many as possible are below by up to 1
    below = np.hstack([design[empty], np.eye(cells)])
    equal = np.hstack([design[seen], np.zeros((seen.sum(), cells))])
    bounds = [(-1e4, 1e4)] * count + [(0, 1)] * cells
    found = linprog(price, below, np.zeros(cells), equal, np.zeros(seen.sum()), bounds, method="highs")
    assert found.status == 0
    emptied = np.zeros(n * m, bool)
    emptied[empty] = found.x[count:] > 0.5
    left = design[np.setdiff1d(filled, np.flatnonzero(emptied))]
    values = np.linalg.svd(left)
    null = values[2][(np.append(values[1], np.zeros(count))[:count] > 1e-9 * values[1][0]).sum() :]
    return emptied.reshape(n, m), abs(null[:, : features.count]).max(0, initial=0.0) < 1e-7


@pytest.mark.parametrize("columns", [FIXED, FREE], ids=["fixed", "free"])
@pytest.mark.parametrize("kind", SMALL)
def test_what_has_no_end_is_what_linear_programs_say_and_the_rest_is_that_without_emptied_cells(kind, columns):
    separated = 0
    for seed in range(8):
        features = SMALL[kind](seed)
        counts = drawn(features, seed)
        model = inverse.InverseOT(features, columns=columns)
        fit = fitted(model, counts)
        emptied, told = ends(features, counts, columns)
        assert fit.converged and (fit.separated or not emptied.any())
        if fit.separated and not emptied.any():  # a minimum, but where what was never observed is next to never expected
            assert (fit.plan[counts == 0] < 1e-6).any()
            continue
        errors = fit.standard_errors
        np.testing.assert_array_equal(np.isfinite(errors), told)
        assert not (fit.endless & told).any() and (fit.plan[emptied] < 1e-6).all()
        if not emptied.any():
            continue
        separated += 1
        alone = fitted(model, inverse.Coupling(counts, mask=~emptied))
        assert not alone.separated
        np.testing.assert_allclose(fit.coefficients[told], alone.coefficients[told], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(errors[told], alone.standard_errors[told], rtol=1e-5)
    assert separated >= 1


def test_beside_an_endless_coefficient_the_others_are_those_of_poisson_regression():
    rng = np.random.default_rng(0)
    own, far, near = np.eye(8), rng.random((8, 8)), rng.random((8, 8))
    counts = rng.poisson(np.exp(2 - 2 * far + near)) * (1 - own)
    features = inverse.Features({"own": own, "far": far, "near": near})
    fit = fitted(inverse.InverseOT(features), counts)
    assert list(fit.endless) == [True, False, False] and "own" in fit.warnings[0] and fit.coefficients[0] < -10
    kept = (1 - own).ravel() > 0
    design = dummies(inverse.Features({"far": far, "near": near}), (8, 8))
    beta, mean, bread = poisson(counts.ravel()[kept], design[kept])
    np.testing.assert_allclose(fit.coefficients[1:], beta[:2], rtol=1e-8)
    np.testing.assert_allclose(fit.standard_errors[1:], np.sqrt(np.diag(bread)[:2]), rtol=1e-7)
    meat = design[kept].T @ ((counts.ravel()[kept] - mean)[:, None] ** 2 * design[kept])
    robust = np.sqrt(np.diag(bread @ meat @ bread)[:2])
    np.testing.assert_allclose(fit.errors("robust")[1:], robust, rtol=1e-7)
    np.testing.assert_allclose(fit.wald([[0.0, 1.0, -1.0]]).statistic, (beta[0] - beta[1]) ** 2 / (
        bread[0, 0] + bread[1, 1] - 2 * bread[0, 1]), rtol=1e-6)  # fmt: skip


# -- optimality conditions ---------------------------------------------------------------------------------------------


def violation(fit, counts, *, price=0.0, ridge=0.0, nonnegative=False, free=None, mask=None):
    """By how much the conditions of a minimum are missed, relative to the mass that a feature has; endless ones aside."""
    model, features, table = fit.model, fit.features[0], fit.points[0].market.table
    theta = fit.coefficients
    problem = Problem(fit.cost, table.a, table.b, epsilon=model.epsilon, rows=model.rows, columns=model.columns)
    plan = solve(problem, tolerance=1e-11, gradient=Implicit(), throw=False).plan
    size = sum(np.einsum("ij,ijk->k", plan[rows] + table.plan[rows], abs(block)) for rows, block in features.blocks())
    slope = features.adjoint(plan) - features.adjoint(table.plan) + ridge * theta
    if nonnegative:
        off = np.where(theta > 0, abs(slope + price), np.maximum(-(slope + price), 0.0))
    else:
        off = np.where(theta != 0, abs(slope + price * np.sign(theta)), np.maximum(abs(slope) - price, 0.0))
    asked = ~fit.endless if free is None else ~fit.endless & free
    return float((off / np.maximum(size, 1e-3 * size.max()))[asked].max(initial=0.0))


SIDES = {
    "fixed-fixed": (FIXED, FIXED), "fixed-free": (FIXED, FREE), "free-at_most": (FREE, AT_MOST), "kl-kl": (KL(1.0), KL(0.5)),
    "tv-fixed": (TV(3.0), FIXED), "between-between": (Between(0.5, 1.5), Between(0.5, 1.5)),
    "chi2-tv": (ChiSquared(1.0), TV(2.0)), "l2-between": (L2(1.0), Between(0.5, 1.5)),
}  # fmt: skip


@pytest.mark.parametrize("sides", SIDES)
def test_a_fit_that_has_converged_is_a_minimum_whatever_the_sides_and_the_signs(sides):
    (rows, columns), open_ = SIDES[sides], 0
    for seed in range(3):
        for kind in ("bilinear", "free"):
            features = SMALL[kind](seed)
            counts = drawn(features, seed, total=300) + (0.0 if seed % 2 else 1.0)
            for nonnegative in (False, True):
                model = inverse.InverseOT(features, epsilon=0.5, rows=rows, columns=columns, nonnegative=nonnegative)
                fit = fitted(model, counts)
                assert not nonnegative or (fit.coefficients >= 0).all()
                open_ += not fit.converged
                assert not fit.converged or violation(fit, counts, nonnegative=nonnegative) < 1e-6
    assert open_ <= (2 if sides == "tv-fixed" else 0)  # a flat piece may be hard to meet the end of, and that is said


@pytest.mark.parametrize("nonnegative", [False, True], ids=["signed", "nonnegative"])
@pytest.mark.parametrize("columns", [FIXED, FREE], ids=["fixed", "free"])
@pytest.mark.parametrize("kind", SMALL)
def test_a_price_decides_where_the_data_do_not_and_soon(kind, columns, nonnegative):
    """Without a penalty most of these leave coefficients open or send them to infinity."""
    for seed, strength in enumerate([0.3, 0.03, 0.003, 0.0003]):
        features = SMALL[kind](seed)
        counts, known = drawn(features, seed), np.arange(features.count) != 1
        model = inverse.InverseOT(features, columns=columns, penalty=inverse.L1(strength), nonnegative=nonnegative)
        fit = fitted(model, counts)
        assert fit.converged and fit.steps <= 25
        assert violation(fit, counts, price=strength, nonnegative=nonnegative) < 1e-7
        held = fitted(model.set_params(fixed={1: 0.7}), counts)
        assert held.converged and held.coefficients[1] == pytest.approx(0.7, abs=1e-12)
        assert violation(held, counts, price=strength, nonnegative=nonnegative, free=known) < 1e-7

def test_signs_are_kept_in_any_unit_of_the_features():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 7, 6))
    mean = np.exp(np.tensordot(rng.normal(size=4), values, 1))
    counts, units = rng.poisson(30 * mean / mean.sum()).astype(float), 10.0 ** rng.uniform(-3, 3, 4)
    one = fitted(inverse.InverseOT(inverse.Features(values), nonnegative=True, epsilon=0.3), counts)
    other = inverse.Features(values * units[:, None, None])
    other = fitted(inverse.InverseOT(other, nonnegative=True, epsilon=0.3), counts)
    assert one.converged and other.converged and (one.coefficients > 0).any()
    np.testing.assert_allclose(other.coefficients * units, one.coefficients, rtol=0, atol=1e-8)
    assert violation(other, counts, nonnegative=True) < 1e-8


def test_a_known_coefficient_tells_those_that_its_unknown_effect_had_left_open():
    counts = drawn(inverse.FreeCost(3, 4), 0, total=2000) + 1.0
    open_ = fitted(inverse.InverseOT(inverse.FreeCost(3, 4), columns=FREE), counts)
    assert np.isinf(open_.standard_errors).all()  # scores of a row up to a constant
    told = fitted(inverse.InverseOT(inverse.FreeCost(3, 4), columns=FREE, fixed={0: 1.0, 4: 0.0, 8: -1.0}), counts)
    assert told.converged and told.steps <= 10 and not told.unseen.size
    logs = np.log(counts)
    np.testing.assert_allclose(told.matrix, logs - logs[:, :1] + np.array([[1.0], [0.0], [-1.0]]), atol=1e-7)
    errors = np.sqrt(1 / counts + 1 / counts[:, :1])[:, 1:]  # of log odds
    np.testing.assert_allclose(told.standard_errors.reshape(3, 4)[:, 1:], errors, rtol=1e-6)


def test_a_search_comes_back_from_where_a_kink_has_sent_it():
    """At the start no bound is active and little bends the loss: Newton's step is a thousand epsilons long, and a waste."""
    rng = np.random.default_rng(0)
    features = inverse.Symmetric(8)
    counts = drawn(features, 3, total=300)
    a, b = counts.sum(1) * (1 + rng.random(8)) + 0.1, counts.sum(0) * (1 + 0.5 * rng.random(8)) + 0.1
    model = inverse.InverseOT(features, epsilon=0.1, rows=AT_MOST, columns=Between(0.5, 1.5))
    fit = fitted(model, inverse.Coupling(counts, a=a, b=b))
    assert fit.converged and violation(fit, counts) < 1e-6 and abs(fit.coefficients[~fit.endless]).max() < 10.0


@pytest.mark.parametrize("far", [1e2, 1e5, 1e200])
def test_no_start_makes_an_estimate_fail(far):
    features = SMALL["features"](0)
    counts = np.random.default_rng(1).poisson(3.0, features.shape)
    cold, warm = (inverse.InverseOT(features).fit(counts, start=start) for start in (None, [far, -far, far]))
    assert warm.converged
    np.testing.assert_allclose(warm.coefficients, cold.coefficients, rtol=1e-8)


def test_what_cannot_be_is_said():
    features = inverse.FreeCost(3, 3)
    with pytest.raises(ValueError, match="negative one"):
        inverse.InverseOT(features, nonnegative=True, fixed={2: -1.0}).fit(np.ones((3, 3)))
    with pytest.raises(ValueError, match="negative one"):
        equal = np.ones((1, 9)), [-1.0]
        inverse.InverseOT(features, nonnegative=True, equalities=equal).fit(np.ones((3, 3)))
    short = inverse.Coupling(np.ones((3, 3)), b=[10.0, 3.0, 3.0])
    fit = fitted(inverse.InverseOT(features, columns=Between(0.5, 1.5), max_steps=5), short)
    assert not fit.converged and any("column 0 has 3, and its side asks for 5 to 15" in said for said in fit.warnings)
