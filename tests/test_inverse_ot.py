"""Estimates of costs: planted coefficients, Poisson regression with dummies, conditional logit, differences, convex programs."""

import csv
import itertools
import warnings
from pathlib import Path

import cvxpy as cp
import numpy as np
import pytest
from scipy.special import logsumexp

from iotsolve import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared, Implicit, Problem, inverse, solve
from iotsolve.inverse.market import Market


def traits(n, p, seed):
    return np.random.default_rng(seed).standard_normal((n, p))


def weights(n, seed):
    w = np.random.default_rng(seed).random(n) + 0.5
    return w / w.sum()


def planted(features, theta, *, epsilon=1.0, rows=FIXED, columns=FIXED, seed=0):
    n, m = features.shape
    problem = Problem(
        -features.apply(np.asarray(theta, float)), weights(n, seed), weights(m, seed + 1),
        epsilon=epsilon, rows=rows, columns=columns,
    )  # fmt: skip
    return problem, solve(problem, tolerance=1e-13, throw=False).plan


def counted(n=12, m=9, seed=0, total=4000, scale=0.6):
    """A table drawn from a plan of two features of the distance between two sets of points."""
    rng = np.random.default_rng(seed)
    x, y = rng.random((n, 2)), rng.random((m, 2))
    features = inverse.Features({"far": -abs(x[:, None] - y[None]).sum(-1), "same": (rng.random((n, m)) < 0.3) * 1.0})
    _, plan = planted(features, [2.0, scale], seed=seed)
    return features, rng.multinomial(total, plan.ravel() / plan.sum()).reshape(n, m).astype(float)


def dummies(features, shape):
    n, m = shape
    effects = [np.kron(np.eye(n), np.ones((m, 1))), np.kron(np.ones((n, 1)), np.eye(m))[:, 1:]]
    return np.hstack([np.moveaxis(features.values, 0, -1).reshape(n * m, -1), *effects])


def poisson(counts, design):
    """Iteratively reweighted least squares, as textbooks have it."""
    y, mean = counts.ravel(), counts.ravel() + 0.5
    for _ in range(100):
        z = np.log(mean) + (y - mean) / mean
        beta = np.linalg.lstsq(design * np.sqrt(mean)[:, None], z * np.sqrt(mean), rcond=None)[0]
        mean = np.exp(design @ beta)
    bread = np.linalg.inv(design.T @ (mean[:, None] * design))
    return beta, mean, bread


# -- planted coefficients ----------------------------------------------------------------------------------------------

EVERY = {
    "bilinear": lambda: inverse.Bilinear(traits(15, 2, 0), traits(12, 3, 1)),
    "features": lambda: inverse.Features(np.random.default_rng(0).random((3, 15, 12))),
    "mahalanobis": lambda: inverse.Mahalanobis(traits(15, 2, 0), traits(12, 2, 1)),
    "toeplitz": lambda: inverse.Toeplitz(6),
    "one-way": lambda: inverse.Toeplitz(5, 6, symmetric=False),
    "symmetric": lambda: inverse.Symmetric(5),
    "graph": lambda: inverse.GraphPath([(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)], 4, [1.0, 1.1, 1.2, 1.3, 1.5]),
}


@pytest.mark.parametrize("kind", EVERY)
def test_operators_agree_with_the_tensor_of_features(kind):
    features = EVERY[kind]()
    tensor, rng = features.block(slice(None)), np.random.default_rng(0)
    assert tensor.shape == (*features.shape, features.count)
    theta, w = rng.standard_normal(features.count), rng.standard_normal(features.shape)
    np.testing.assert_allclose(features.apply(theta), tensor @ theta, atol=1e-12)
    np.testing.assert_allclose(features.adjoint(w), np.einsum("ij,ijk->k", w, tensor), atol=1e-12)
    np.testing.assert_allclose(features.gram(w), np.einsum("ij,ijk,ijl->kl", w, tensor, tensor), atol=1e-11)
    r, c = features.sums(w)
    np.testing.assert_allclose(r, np.einsum("ij,ijk->ik", w, tensor), atol=1e-12)
    np.testing.assert_allclose(c, np.einsum("ij,ijk->jk", w, tensor), atol=1e-12)
    a, b = rng.random(features.shape[0]), rng.random(features.shape[1])
    moved = features.centred(a, b).apply(theta) - features.apply(theta)
    np.testing.assert_allclose(moved - moved[:1] - moved[:, :1] + moved[0, 0], 0.0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bilinear", "features", "mahalanobis", "symmetric", "toeplitz"])
def test_planted_coefficients_are_found(kind):
    features = EVERY[kind]()
    theta = np.random.default_rng(5).uniform(-1, 1, features.count)
    if kind == "toeplitz":
        theta[-1] = theta[0]  # one cell each way: told by its neighbours
    _, plan = planted(features, theta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inverse.IdentifiabilityWarning)
        fit = inverse.InverseOT(features).fit(inverse.Coupling(plan=plan))
    assert fit.converged and abs(fit.plan - plan / plan.sum()).sum() < 1e-9
    if not fit.unseen.shape[1]:
        np.testing.assert_allclose(fit.coefficients, theta, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0, 100.0])
def test_epsilon_is_a_unit(epsilon):
    features = EVERY["bilinear"]()
    theta = np.random.default_rng(5).uniform(-1, 1, features.count)
    _, plan = planted(features, theta)
    fit = inverse.InverseOT(features, epsilon=epsilon).fit(inverse.Coupling(plan=plan))
    np.testing.assert_allclose(fit.coefficients, epsilon * theta, rtol=1e-7)


def test_twenty_five_coefficients_are_found():
    features = inverse.Bilinear(traits(200, 5, 0), traits(150, 5, 1))
    theta = np.random.default_rng(2).uniform(-0.5, 0.5, 25)
    _, plan = planted(features, theta)
    fit = inverse.InverseOT(features).fit(inverse.Coupling(plan=plan))
    assert abs(fit.coefficients - theta).max() <= 1e-8 * abs(theta).max() and fit.steps <= 12


@pytest.mark.parametrize("kind", ["model", "robust", "clustered"])
def test_errors_have_the_unit_of_epsilon(kind):
    features, counts = counted()
    data = inverse.Coupling(counts, cluster="rows")
    one, other = (inverse.InverseOT(features, epsilon=epsilon).fit(data).errors(kind) for epsilon in (1.0, 0.2))
    np.testing.assert_allclose(other, 0.2 * one, rtol=1e-6)


# -- Poisson regression with effects of rows and columns ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_coefficients_and_errors_are_those_of_poisson_regression_with_dummies(seed):
    features, counts = counted(seed=seed)
    labels = np.random.default_rng(seed).integers(0, 20, counts.shape)
    fit = inverse.InverseOT(features).fit(inverse.Coupling(counts, cluster=labels))
    design = dummies(features, counts.shape)
    beta, mean, bread = poisson(counts, design)
    np.testing.assert_allclose(fit.coefficients, beta[:2], rtol=1e-8)
    np.testing.assert_allclose(counts.sum() * fit.plan.ravel(), mean, rtol=1e-7)
    np.testing.assert_allclose(fit.standard_errors, np.sqrt(np.diag(bread)[:2]), rtol=1e-6)
    scores = design * (counts.ravel() - mean)[:, None]
    robust = bread @ scores.T @ scores @ bread
    np.testing.assert_allclose(fit.errors("robust"), np.sqrt(np.diag(robust)[:2]), rtol=1e-6)
    sums = np.zeros((20, design.shape[1]))
    np.add.at(sums, labels.ravel(), scores)
    groups = len(np.unique(labels))
    clustered = bread @ sums.T @ sums @ bread * groups / (groups - 1)
    np.testing.assert_allclose(fit.errors("clustered"), np.sqrt(np.diag(clustered)[:2]), rtol=1e-6)
    cells, used = counts.size, design.shape[1]
    corrected = fit.errors("robust", small_sample=True) / fit.errors("robust")
    np.testing.assert_allclose(corrected**2, cells / (cells - used), rtol=1e-12)


def test_clusters_of_rows_are_those_of_their_labels():
    features, counts = counted()
    own = np.broadcast_to(np.arange(len(counts))[:, None], counts.shape)
    first, second = (
        inverse.InverseOT(features).fit(inverse.Coupling(counts, cluster=labels)) for labels in ("rows", own)
    )
    np.testing.assert_allclose(first.covariance("clustered"), second.covariance("clustered"))


def test_a_panel_is_the_regression_with_effects_of_its_own_in_each_table():
    """A cluster's label means the same in every table; rows are their table's own."""
    (one, first), (two, second) = counted(seed=1), counted(n=8, m=7, seed=2, total=1000)
    rng = np.random.default_rng(0)
    labels = [
        rng.choice(["ab", "c", "def", "g", "h", "i", "j"], first.shape),
        rng.choice(["c", "g", "new"], second.shape),
    ]
    couplings = [inverse.Coupling(x, cluster=y) for x, y in zip((first, second), labels, strict=True)]
    fit = inverse.InverseOT([one, two]).fit(couplings)
    blocks = dummies(one, first.shape), dummies(two, second.shape)
    design = np.vstack([
        np.hstack([blocks[0], np.zeros((len(blocks[0]), blocks[1].shape[1] - 2))]),
        np.hstack([blocks[1][:, :2], np.zeros((len(blocks[1]), blocks[0].shape[1] - 2)), blocks[1][:, 2:]]),
    ])  # fmt: skip
    counts = np.concatenate([first.ravel(), second.ravel()])
    beta, mean, bread = poisson(counts, design)
    np.testing.assert_allclose(fit.coefficients, beta[:2], rtol=1e-8)
    np.testing.assert_allclose(fit.standard_errors, np.sqrt(np.diag(bread)[:2]), rtol=1e-6)

    def clustered(codes):
        sums = np.zeros((codes.max() + 1, design.shape[1]))
        np.add.at(sums, codes, design * (counts - mean)[:, None])
        groups = len(np.unique(codes))
        return np.sqrt(np.diag(bread @ sums.T @ sums @ bread * groups / (groups - 1))[:2])

    shared = np.unique(np.concatenate([y.ravel() for y in labels]), return_inverse=True)[1]
    np.testing.assert_allclose(fit.errors("clustered"), clustered(shared), rtol=1e-6)
    fit = inverse.InverseOT([one, two]).fit([inverse.Coupling(x, cluster="rows") for x in (first, second)])
    rows = [np.broadcast_to(np.arange(len(x))[:, None], x.shape).ravel() for x in (first, second)]
    np.testing.assert_allclose(
        fit.errors("clustered"), clustered(np.concatenate([rows[0], rows[1] + len(first)])), rtol=1e-6
    )


def test_masked_cells_are_cells_that_are_not_there():
    features, counts = counted(seed=3)
    mask = np.random.default_rng(0).random(counts.shape) < 0.8
    fit = inverse.InverseOT(features).fit(inverse.Coupling(counts * mask, mask=mask))
    kept = mask.ravel()
    beta, _, bread = poisson(counts.ravel()[kept], dummies(features, counts.shape)[kept])
    np.testing.assert_allclose(fit.coefficients, beta[:2], rtol=1e-8)
    np.testing.assert_allclose(fit.standard_errors, np.sqrt(np.diag(bread)[:2]), rtol=1e-6)
    assert (fit.plan[~mask] == 0).all() and np.isinf(fit.cost[~mask]).all()


# -- the other sides ---------------------------------------------------------------------------------------------------


MODES = {
    "fixed": (FIXED, FIXED),
    "free": (FIXED, FREE),
    "free rows": (FREE, FIXED),
    "kl": (KL(0.7), KL(2.0)),
    "semi": (FIXED, KL(0.5)),
    "bounds": (FIXED, Between(0.8, 1.3)),
    "at most": (AT_MOST, AT_MOST),
    "chi": (ChiSquared(0.8), FIXED),
    "l2": (FIXED, L2(3.0)),
    "tv": (FIXED, TV(1.0)),
    "both free": (FREE, FREE),
}


def logit(values, chosen, b):
    """Conditional logit with attractions ``b`` by Newton's method as textbooks have it: coefficients and information of one."""
    n = values.shape[1]
    theta = np.zeros(len(values))
    for _ in range(30):
        scores = np.tensordot(theta, values, 1) + np.log(b)
        chance = np.exp(scores - logsumexp(scores, axis=1, keepdims=True))
        mean = np.einsum("kij,ij->ki", values, chance)
        apart = values - mean[:, :, None]
        information = np.einsum("kij,lij,ij->kl", apart, apart, chance) / n
        theta = theta + np.linalg.solve(information, (values[:, np.arange(n), chosen] - mean).mean(1))
    return theta, information


def chosen_freely(seed, n=40, m=6):
    rng = np.random.default_rng(seed)
    features, chosen, b = inverse.Features(rng.standard_normal((3, n, m))), rng.integers(0, m, n), weights(m, seed + 1)
    return features, chosen, b, inverse.Coupling(pairs=(np.arange(n), chosen), b=b * n)


@pytest.mark.parametrize("seed", range(5))
def test_free_columns_are_conditional_logit(seed):
    features, chosen, b, data = chosen_freely(seed)
    fit = inverse.InverseOT(features, columns=FREE).fit(data)
    theta, information = logit(features.values, chosen, b)
    np.testing.assert_allclose(fit.coefficients, theta, rtol=0, atol=1e-8)
    np.testing.assert_allclose(fit.information, 40 * information, rtol=1e-8)


def test_a_soft_side_tends_to_a_free_one_as_its_price_falls():
    """In proportion to the price, down to conditional logit at 1e-8."""
    features, chosen, b, data = chosen_freely(0)
    theta, _ = logit(features.values, chosen, b)
    apart = [
        abs(inverse.InverseOT(features, columns=KL(rho)).fit(data).coefficients - theta).max()
        for rho in (1e-4, 1e-5, 1e-9)
    ]
    assert apart[0] == pytest.approx(10 * apart[1], rel=1e-3) and apart[2] < 1e-9 < apart[1]


@pytest.mark.parametrize("epsilon", [1.0, 0.1])
def test_a_soft_side_tends_to_a_fixed_one_as_its_price_grows(epsilon):
    features, counts = counted()
    data = inverse.Coupling(counts, b=counts.sum(0))
    fixed = inverse.InverseOT(features, epsilon=epsilon).fit(data).coefficients
    fits = [
        inverse.InverseOT(features, epsilon=epsilon, columns=KL(epsilon * r)).fit(data) for r in (500, 1e5, 1e6, 1e7)
    ]
    assert all(fit.converged for fit in fits)
    apart = [abs(fit.coefficients - fixed).max() / epsilon for fit in fits]
    assert apart[1] < 1e-4 and apart[1] == pytest.approx(10 * apart[2], rel=1e-2) and apart[3] < 1e-6 < apart[2]


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 50.0, 500.0, 1e5])
@pytest.mark.parametrize("epsilon", [1.0, 0.05])
def test_planted_coefficients_are_found_at_every_price_of_a_soft_side(ratio, epsilon):
    features = inverse.Features(np.random.default_rng(0).standard_normal((2, 10, 8)))
    model = inverse.InverseOT(features, epsilon=epsilon, columns=KL(ratio * epsilon))
    theta, a, b = epsilon * np.array([1.0, -0.5]), weights(10, 0), weights(8, 1)
    fit = model.fit(inverse.Coupling(plan=model.plan(theta, a, b), a=a, b=b))
    assert fit.converged
    np.testing.assert_allclose(fit.coefficients, theta, rtol=0, atol=1e-8 * epsilon)


def asymmetric(mode, seed):
    """A market whose data are no plan of its own, away from its optimum."""
    features = inverse.Bilinear(traits(9, 2, seed), traits(7, 2, seed + 10))
    a, b = weights(9, seed), weights(7, seed + 1) * (0.9 if mode == "at most" else 1.0)
    rng = np.random.default_rng(seed)
    observed = rng.random((9, 7)) * np.outer(a, b)
    table = inverse.Coupling(plan=observed, a=a * observed.sum(), b=b * observed.sum()).table((9, 7))
    return Market(features, table, 0.6, *MODES[mode]), rng.uniform(-0.5, 0.5, 4)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_and_information_are_derivatives_of_the_loss(mode):
    """To 1e-7 and 1e-6 of their largest entries, against Richardson's differences in one batch of 24 markets, of which at least
    20 have no kink between the points of their differences."""
    markets, thetas = zip(*(asymmetric(mode, seed) for seed in range(24)), strict=True)
    step = 1e-3
    moves = step * np.array([s * e for s in (1, -1, 2, -2) for e in np.eye(4)])
    costs = np.stack(
        [[-m.features.apply(theta + move) for move in moves] for m, theta in zip(markets, thetas, strict=True)]
    )
    a, b = (
        np.stack([np.tile(w, (16, 1)) for w in ws])
        for ws in zip(*((m.table.a, m.table.b) for m in markets), strict=True)
    )
    rows, columns = MODES[mode]
    found = solve(Problem(costs, a, b, epsilon=0.6, rows=rows, columns=columns), gradient=Implicit(), tolerance=1e-13)
    held = np.concatenate([(found.f == 0) | (abs(found.f) == 1), (found.g == 0) | (abs(found.g) == 1)], -1)
    smooth = (held == held[:, :1]).all((1, 2))
    assert smooth.sum() >= 20
    for k, (market, theta) in enumerate(zip(markets, thetas, strict=True)):
        if not smooth[k]:
            continue
        observed = market.features.adjoint(market.table.plan)
        losses = -found.value[k] - (theta + moves) @ observed
        slopes = np.stack([market.features.adjoint(plan) for plan in found.plan[k]])
        gradient, hessian = (_richardson(x.reshape(4, 4, -1), step) for x in (losses, slopes))
        point = market.at(theta, 1e-13)
        np.testing.assert_allclose(point.gradient, gradient[:, 0], rtol=0, atol=1e-7 * abs(gradient).max())
        np.testing.assert_allclose(point.hessian()[0], hessian, rtol=0, atol=1e-6 * abs(hessian).max())


def _richardson(values, step):
    """The derivative from values at one step ahead and behind, and at two: what is left is of the fourth order."""
    ahead, behind, far, back = values
    return (8 * (ahead - behind) - (far - back)) / (12 * step)


# -- penalties and constraints -----------------------------------------------------------------------------------------


def many_features():
    rng = np.random.default_rng(3)
    features = inverse.Features(rng.standard_normal((8, 15, 12)))
    theta = np.array([1.0, -0.8, 0.6, 0, 0, 0, 0, 0])
    _, plan = planted(features, theta)
    return features, rng.multinomial(20_000, plan.ravel() / plan.sum()).reshape(plan.shape).astype(float)


def by_convex_program(features, counts, price, *constraints):
    n, m = counts.shape
    share = counts / counts.sum()
    theta, u, v = cp.Variable(features.count), cp.Variable(n), cp.Variable(m)
    design = np.moveaxis(features.block(slice(None)), -1, 0)
    phi = sum(theta[k] * design[k] for k in range(features.count))
    exponent = phi + u[:, None] @ np.ones((1, m)) + np.ones((n, 1)) @ v[None, :]
    a, b = share.sum(1), share.sum(0)
    loss = cp.sum(cp.multiply(np.outer(a, b), cp.exp(exponent))) - a @ u - b @ v - cp.sum(cp.multiply(share, phi))
    cp.Problem(cp.Minimize(loss + price(theta)), [c(theta) for c in constraints]).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )
    return theta.value


@pytest.mark.parametrize("strength", [0.003, 0.03])
def test_lasso_equals_a_convex_program(strength):
    features, counts = many_features()
    fit = inverse.InverseOT(features, penalty=inverse.L1(strength)).fit(counts)
    expected = by_convex_program(features, counts, lambda t: strength * cp.norm1(t))
    np.testing.assert_allclose(fit.coefficients, expected, atol=1e-6)
    assert fit.kkt_residual < 1e-8 and (fit.coefficients == 0).any()


def test_group_and_ridge_equal_a_convex_program():
    features, counts = many_features()
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    fit = inverse.InverseOT(features, penalty=(inverse.Ridge(0.1), inverse.Group(0.02, groups))).fit(counts)
    expected = by_convex_program(
        features,
        counts,
        lambda t: 0.05 * cp.sum_squares(t) + 0.02 * sum(2**0.5 * cp.norm(t[k : k + 2]) for k in range(0, 8, 2)),
    )
    np.testing.assert_allclose(fit.coefficients, expected, atol=1e-6)
    assert fit.kkt_residual < 1e-8


def test_constraints_equal_a_convex_program():
    features, counts = many_features()
    fit = inverse.InverseOT(
        features, nonnegative=True, fixed={"feature4": 0.2}, equalities=(np.eye(8)[:1] + np.eye(8)[2:3], [1.4])
    ).fit(counts)
    expected = by_convex_program(
        features, counts, lambda t: 0.0, lambda t: t >= 0, lambda t: t[3] == 0.2, lambda t: t[0] + t[2] == 1.4
    )
    np.testing.assert_allclose(fit.coefficients, expected, atol=1e-6)
    assert fit.coefficients.min() >= 0 and fit.coefficients[3] == pytest.approx(0.2, abs=1e-10)


def test_a_nuclear_norm_finds_a_planted_rank():
    features = inverse.Bilinear(traits(40, 4, 0), traits(40, 4, 1))
    matrix = np.outer([1, -0.5, 0.3, 0.2], [0.8, 0.4, -0.6, 0.1])
    _, plan = planted(features, matrix.ravel())
    counts = np.random.default_rng(0).multinomial(20_000, plan.ravel() / plan.sum()).reshape(plan.shape).astype(float)
    fit = inverse.InverseOT(features, penalty=inverse.Nuclear(0.05)).fit(counts)
    assert np.linalg.matrix_rank(fit.matrix, tol=1e-9) == 1 and fit.kkt_residual < 1e-8
    full = inverse.InverseOT(features).fit(counts)
    assert full.rank_test(1).p_value > 0.01 > full.rank_test(0).p_value
    found = full.saliency()
    assert found.shares[0] > 0.85 and found.intervals[0, 0] < found.shares[0] <= found.intervals[0, 1]


def test_a_path_begins_where_nothing_is_left_and_satisfies_its_conditions_everywhere():
    features, counts = many_features()
    model = inverse.InverseOT(features, penalty=inverse.L1(1.0))
    largest = inverse.largest_strength(model, counts)
    share = counts / counts.sum()
    moments = np.tensordot(features.values, np.outer(share.sum(1), share.sum(0)) - share, 2)
    assert largest == pytest.approx(abs(moments).max(), rel=1e-10)
    found = inverse.path(model, counts, count=12, folds=3)
    assert (found.coefficients[0] == 0).all() and (found.coefficients[1] != 0).sum() >= 1
    assert max(fit.kkt_residual for fit in found.fits) < 1e-8
    assert (np.flatnonzero(abs(found.best.coefficients) > 0.1) == [0, 1, 2]).all()


@pytest.mark.parametrize("kind", ["group", "nuclear"])
def test_below_the_largest_strength_something_is_left_and_above_it_nothing(kind):
    features, counts = inverse.Bilinear(traits(12, 2, 0), traits(9, 3, 1)), counted()[1]
    price = {"group": lambda x: inverse.Group(x, groups=[0, 0, 0, 1, 1, 2]), "nuclear": inverse.Nuclear}[kind]
    largest = inverse.largest_strength(inverse.InverseOT(features, penalty=price(1.0)), counts)
    above, below = (inverse.InverseOT(features, penalty=price(x * largest)).fit(counts) for x in (1.001, 0.98))
    assert not above.coefficients.any() and below.coefficients.any()


def test_the_likelihood_of_shares_is_the_mean_over_tables():
    features = EVERY["bilinear"]()
    tables = [planted(features, np.full(features.count, x), seed=k)[1] for k, x in enumerate((0.3, 0.5))]
    tables = [table / table.sum() for table in tables]
    fit = inverse.InverseOT([features, features]).fit([inverse.Coupling(plan=table) for table in tables])
    mean = np.mean([(table * np.log(plan / plan.sum())).sum() for table, plan in zip(tables, fit.plan, strict=True)])
    assert fit.log_likelihood == pytest.approx(mean, rel=1e-9)


# -- inference ---------------------------------------------------------------------------------------------------------


def test_intervals_cover():
    """A small version of the benchmark: 120 tables, two coefficients."""
    features, _ = counted()
    _, plan = planted(features, [2.0, 0.6])
    rng, hits = np.random.default_rng(1), []
    for _ in range(120):
        counts = rng.multinomial(3000, plan.ravel() / plan.sum()).reshape(plan.shape)
        low, high = inverse.InverseOT(features).fit(counts).confidence_intervals().T
        hits.append((low <= [2.0, 0.6]) & (high >= [2.0, 0.6]))
    assert 0.9 <= np.mean(hits) <= 0.99


def sorted_by_traits():
    """Counts of couples with correlated traits of different units, and the fit."""
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(n, 3)) @ rng.uniform(-1, 1, (3, 3)) * [1.0, 5.0, 0.2] for n in (20, 25))
    features = inverse.Bilinear(x, y)
    a, b = weights(20, 4), weights(25, 5)
    affinity = np.diag([0.8, 0.4, 0.1]) / np.outer(x.std(0), y.std(0))
    plan = solve(Problem(-features.apply(affinity.ravel()), a, b, epsilon=1.0)).plan
    counts = rng.multinomial(30_000, plan.ravel() / plan.sum()).reshape(plan.shape).astype(float)
    return x, y, inverse.InverseOT(features).fit(counts)


def dimensions(matrix, x, y, a, b):
    """Singular values of the affinity of whitened traits, by another root of the covariance than the symmetric one."""
    roots = (np.linalg.cholesky(np.cov(z.T, aweights=w, ddof=0)) for z, w in ((x, a), (y, b)))
    first, second = roots
    return np.linalg.svd(first.T @ matrix @ second, compute_uv=False)


def test_saliency_is_of_uncorrelated_indices_that_matter_one_by_one():
    x, y, fit = sorted_by_traits()
    found, (a, b) = fit.saliency(), (fit.plan.sum(1), fit.plan.sum(0))
    np.testing.assert_allclose(found.values, dimensions(fit.matrix, x, y, a, b), rtol=1e-8)
    np.testing.assert_allclose(found.shares, found.values / found.values.sum())
    np.testing.assert_allclose(found.rows @ np.diag(found.values) @ found.columns.T, fit.matrix, rtol=1e-7, atol=1e-9)
    for z, weight, index in ((x, a, found.rows), (y, b, found.columns)):
        np.testing.assert_allclose(np.cov((z @ index).T, aweights=weight, ddof=0), np.eye(3), atol=1e-8)


def test_intervals_of_shares_are_by_the_delta_method():
    """Its slopes by differences of the singular values."""
    x, y, fit = sorted_by_traits()
    a, b = fit.plan.sum(1), fit.plan.sum(0)

    def shares(theta):
        values = dimensions(theta.reshape(3, 3), x, y, a, b)
        return values / values.sum()

    steps = 1e-6 * abs(fit.coefficients).max() * np.eye(9)
    slopes = np.stack([(shares(fit.coefficients + h) - shares(fit.coefficients - h)) / (2 * h.sum()) for h in steps], 1)
    half = 1.959963985 * np.sqrt(np.diag(slopes @ fit.covariance() @ slopes.T))
    lower, upper = fit.saliency().intervals.T
    np.testing.assert_allclose(lower, np.maximum(fit.saliency().shares - half, 0.0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(upper, np.minimum(fit.saliency().shares + half, 1.0), rtol=1e-5)


def test_a_rank_that_lacks_one_is_tested_by_the_smallest_singular_value():
    """Its square over its variance by the delta method, with one degree of freedom; and rank 0 is Wald's of all coefficients."""
    x, y, fit = sorted_by_traits()
    a, b = fit.plan.sum(1), fit.plan.sum(0)
    smallest = lambda theta: dimensions(theta.reshape(3, 3), x, y, a, b)[-1]  # noqa: E731
    steps = 1e-6 * abs(fit.coefficients).max() * np.eye(9)
    slope = np.array([(smallest(fit.coefficients + h) - smallest(fit.coefficients - h)) / (2 * h.sum()) for h in steps])
    test, none = fit.rank_test(2), fit.rank_test(0)
    assert test.degrees == 1 and none.degrees == 9 and fit.rank_test(1).degrees == 4
    assert test.statistic == pytest.approx(smallest(fit.coefficients) ** 2 / (slope @ fit.covariance() @ slope), rel=1e-5)
    assert none.statistic == pytest.approx(fit.wald(np.eye(9)).statistic, rel=1e-6)


def test_potentials_are_in_the_gauge_of_problems():
    _, _, fit = sorted_by_traits()
    f, g = fit.potentials
    assert fit.plan.sum(1) @ f == pytest.approx(fit.plan.sum(0) @ g, abs=1e-10 * abs(f).max())


def test_wald_is_the_square_of_a_ratio():
    features, counts = counted()
    fit = inverse.InverseOT(features).fit(counts)
    test = fit.wald([[0.0, 1.0]])
    assert test.statistic == pytest.approx((fit.coefficients[1] / fit.standard_errors[1]) ** 2) and test.degrees == 1
    assert fit.wald([[0.0, 1.0]], fit.coefficients[1]).p_value == pytest.approx(1.0)


def test_hypotheses_of_which_the_data_say_nothing_are_refused():
    features, counts = counted()
    values = np.concatenate([features.values, np.arange(12.0)[:, None] * np.ones((1, 12, 9))])
    with pytest.warns(inverse.IdentifiabilityWarning):
        fit = inverse.InverseOT(inverse.Features(values, ["far", "same", "row"])).fit(counts)
    alone = inverse.InverseOT(features).fit(counts)
    assert fit.wald([[1.0, -2.0, 0.0]]).statistic == pytest.approx(alone.wald([[1.0, -2.0]]).statistic, rel=1e-6)
    with pytest.raises(ValueError, match=r"equation 1 of R is about far \+ row"):
        fit.wald([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])


def test_what_is_said_of_an_affinity_that_is_not_told_whole_is_no_more_than_is_known():
    x = traits(30, 2, 0)
    with pytest.warns(inverse.IdentifiabilityWarning):
        fit = inverse.affinity(np.hstack([x, x[:, :1]]), x + traits(30, 2, 1))
    assert fit.saliency().intervals is None and inverse.affinity(x, x + traits(30, 2, 1)).saliency().intervals is not None
    with pytest.raises(ValueError, match="do not tell all entries"):
        fit.rank_test(1)
    with pytest.raises(ValueError, match="level = 95"):
        fit.confidence_intervals(95)


def test_nested_lists_are_a_table():
    features, counts = counted()
    model = inverse.InverseOT(features)
    np.testing.assert_array_equal(model.fit(counts.tolist()).coefficients, model.fit(counts).coefficients)
    both = model.fit([counts, inverse.Coupling(counts)]), model.fit([counts, counts])
    np.testing.assert_allclose(both[0].coefficients, both[1].coefficients)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tolerance": -1.0}, "tolerance = -1"), ({"max_steps": 0}, "max_steps = 0"), ({"rows": "fixed"}, "rows = 'fixed'"),
        ({"fixed": {0: np.nan}}, "fixed coefficient 0 = nan"),
    ],
)  # fmt: skip
def test_settings_that_are_none_are_refused(options, message):
    features, counts = counted()
    with pytest.raises(ValueError, match=message):
        inverse.InverseOT(features, **options).fit(counts)


def test_errors_that_nothing_tells_are_refused():
    fit = inverse.InverseOT(inverse.Features({"one": [[0.0, 1.0], [0.0, 0.0]]})).fit(
        inverse.Coupling([[3, 4], [5, 6]], cluster=np.zeros((2, 2)))
    )
    with pytest.raises(ValueError, match="4 cells and 4 coefficients"):
        fit.errors(small_sample=True)
    with pytest.raises(ValueError, match="one cluster"):
        fit.errors("clustered")
    with pytest.raises(ValueError, match="matrix of numbers"):
        inverse.Coupling([["a", "b"], ["c", "d"]]).table((2, 2))


@pytest.mark.parametrize(
    "options, data, message",
    [
        ({}, inverse.Coupling(plan=[[2, 1], [1, 2.0]]), "number of observations"),
        ({"penalty": inverse.L1(0.01)}, [[2, 1], [1, 2]], "penalised"),
        ({}, [[2, 1], [1, 2]], "no cluster"),
    ],
)
def test_errors_that_would_be_wrong_are_refused(options, data, message):
    fit = inverse.InverseOT(inverse.Toeplitz(2), **options).fit(
        data if isinstance(data, inverse.Coupling) else inverse.Coupling(data)
    )
    with pytest.raises(ValueError, match=message):
        fit.covariance("clustered" if "cluster" in message else "model")


# -- invariances -------------------------------------------------------------------------------------------------------


def test_nothing_depends_on_the_unit_of_flows():
    features, counts = counted()
    fit = inverse.InverseOT(features).fit(inverse.Coupling(plan=counts))
    scaled = inverse.InverseOT(features).fit(inverse.Coupling(plan=1e6 * counts))
    np.testing.assert_allclose(scaled.coefficients, fit.coefficients, rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_depends_on_the_order_of_rows_and_columns(mode):
    rows, columns = MODES[mode]
    model = inverse.InverseOT(counted()[0], rows=rows, columns=columns)
    for seed in range(3):
        features, counts = counted(seed=seed)
        (n, m), rng = counts.shape, np.random.default_rng(seed)
        a = counts.sum(1) if rows.is_fixed else counts.sum(1) * (1 + rng.random(n))
        b = counts.sum(0) if columns.is_fixed else counts.sum(0) * (1 + rng.random(m)) / 1.4
        b = counts.sum(0) * (1 + rng.random(m)) if columns is AT_MOST else b
        fit = model.set_params(features=features).fit(inverse.Coupling(plan=counts, a=a, b=b))
        i, j = rng.permutation(n), rng.permutation(m)
        turned = inverse.Coupling(plan=counts[np.ix_(i, j)], a=a[i], b=b[j])
        again = model.set_params(features=inverse.Features(features.values[:, i][:, :, j])).fit(turned)
        assert fit.converged and abs(again.coefficients - fit.coefficients).max() <= 1e-12 * abs(fit.coefficients).max()


def test_effects_of_rows_and_columns_change_nothing_between_fixed_sides():
    features, counts = counted()
    n, m = counts.shape
    moved = features.values + 30 * traits(n, 1, 0)[None] + 50 * traits(m, 1, 1).T[None]
    fit, other = (inverse.InverseOT(x).fit(counts) for x in (features, inverse.Features(moved)))
    np.testing.assert_allclose(other.coefficients, fit.coefficients, rtol=1e-9)
    f, g = other.potentials
    share = counts / counts.sum()
    plan = np.outer(share.sum(1), share.sum(0)) * np.exp(f[:, None] + g - other.cost)
    np.testing.assert_allclose(plan, fit.plan, rtol=1e-8)


# -- what cannot be known ----------------------------------------------------------------------------------------------


def test_what_is_not_identified_is_named():
    features, counts = counted()
    n, m = counts.shape
    more = {
        "far": features.values[0],
        "row": np.repeat(np.arange(n)[:, None] * 1.0, m, 1),
        "twice": 2 * features.values[0],
    }
    with pytest.warns(inverse.IdentifiabilityWarning, match="2 of 3 directions") as caught:
        fit = inverse.InverseOT(inverse.Features(more)).fit(counts)
    assert "row" in str(caught[0].message) and "far" in str(caught[0].message)
    named = sorted(tuple(sorted(v)) for v in fit.null_vectors)
    assert named == [("far", "twice"), ("row",)]
    assert np.isinf(fit.standard_errors).all() and "rank 1 of 3" in fit.report()
    alone = inverse.InverseOT(inverse.Features({"far": features.values[0]})).fit(counts)
    assert fit.coefficients[0] + 2 * fit.coefficients[2] == pytest.approx(alone.coefficients[0], rel=1e-8)


def test_separated_data_are_noticed_and_a_ridge_keeps_them_finite():
    features = inverse.Features({"apart": 1.0 - np.eye(3)})
    data = np.diag([5.0, 4.0, 3.0])
    with pytest.warns(inverse.IdentifiabilityWarning, match="separated"):
        fit = inverse.InverseOT(features).fit(data)
    assert np.isfinite(fit.coefficients).all() and fit.coefficients[0] < -10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = inverse.InverseOT(features, penalty=inverse.Ridge(0.01)).fit(data)
    assert kept.converged and -10 < kept.coefficients[0] < -1


# -- closed forms and front doors --------------------------------------------------------------------------------------


def test_free_costs_and_cross_ratios_in_closed_form():
    rng = np.random.default_rng(0)
    cost = rng.random((6, 6))
    cost = cost + cost.T
    np.fill_diagonal(cost, 0.0)
    plan = solve(Problem(cost, weights(6, 0), weights(6, 1), epsilon=0.3), tolerance=1e-13).plan
    np.testing.assert_allclose(inverse.free_cost(plan, epsilon=0.3, symmetric=True), cost, atol=1e-9)
    centred = inverse.free_cost(plan, epsilon=0.3)
    np.testing.assert_allclose(plan.sum(1) @ centred, 0.0, atol=1e-12)
    again = solve(Problem(centred, plan.sum(1), plan.sum(0), epsilon=0.3), tolerance=1e-12).plan
    np.testing.assert_allclose(again, plan, atol=1e-11)
    np.testing.assert_allclose(inverse.cross_ratios(plan), inverse.cross_ratios(np.exp(-cost / 0.3)), atol=1e-9)
    with pytest.raises(ValueError, match="positive"):
        inverse.free_cost([[1.0, 0.0], [1.0, 1.0]])


def test_gravity_reads_a_table():
    features, counts = counted()
    i, j = np.indices(counts.shape)
    lines = {
        "from": np.char.add("o", i.ravel().astype(str)),
        "to": j.ravel(),
        "flow": counts.ravel(),
        "pair": i.ravel(),
    }
    lines |= {"far": features.values[0].ravel(), "same": features.values[1].ravel()}
    options = dict(flow="flow", origin="from", destination="to", features=["far", "same"], cluster="pair")
    fit = inverse.gravity(lines, **options)
    other = inverse.InverseOT(features).fit(inverse.Coupling(counts, cluster="rows"))
    np.testing.assert_allclose(fit.coefficients, other.coefficients, rtol=1e-9)
    np.testing.assert_allclose(fit.errors("clustered"), other.errors("clustered"), rtol=1e-8)
    with pytest.raises(ValueError, match="no column 'distance'"):
        inverse.gravity(lines, **(options | {"features": ["distance"]}))
    with pytest.raises(ValueError, match="listed 2 times"):
        inverse.gravity({k: np.concatenate([v, v[:1]]) for k, v in lines.items()}, **options)


def lines():
    """A table of two places each, one line per pair."""
    return {
        "from": ["a", "a", "b", "b"],
        "to": [0, 1, 0, 1],
        "flow": [8.0, 2, 4, 4],
        "far": [0.0, 1, 1, 0],
        "group": list("uvuv"),
    }


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("flow", [8, 2, np.nan, 4], "column 'flow', line 2: nan"),
        ("flow", [8, 2, None, 4], "column 'flow', line 2: nan"),
        ("far", ["1 km", "2 km", "0", "3"], "column 'far': must be numbers"),
        ("from", ["a", "a", None, "b"], "column 'from', line 2: the label is missing"),
        ("to", [0.0, 1.0, np.nan, 1.0], "column 'to', line 2: the label is missing"),
        ("group", ["u", np.nan, "u", "v"], "column 'group', line 1: the label is missing"),
    ],
)
def test_what_is_missing_in_a_table_is_named(column, values, message):
    with pytest.raises(ValueError, match=message):
        inverse.gravity(
            lines() | {column: values}, flow="flow", origin="from", destination="to", features=["far"], cluster="group"
        )


def test_data_frames_are_tables_traits_weights_and_pairs():
    pd = pytest.importorskip("pandas")
    features, counts = counted()
    (n, m), rng = counts.shape, np.random.default_rng(0)
    i, j = np.indices((n, m)).reshape(2, -1)
    frame = pd.DataFrame({
        "from": pd.Categorical.from_codes(i, [f"o{k:02}" for k in range(n)]), "to": j, "flow": counts.astype(int).ravel(),
        "far": features.values[0].ravel(), "same": features.values[1].ravel() > 0.5,
    }).astype({"flow": "Int64"})  # fmt: skip
    options = dict(flow="flow", origin="from", destination="to", features=["far", "same"])
    expected = inverse.InverseOT(features).fit(counts)
    fit = inverse.gravity(frame.sample(frac=1.0, random_state=0), **options)
    np.testing.assert_allclose(fit.coefficients, expected.coefficients, rtol=1e-9)
    np.testing.assert_allclose(fit.standard_errors, expected.standard_errors, rtol=1e-9)
    with pytest.raises(ValueError, match="line 3: the label is missing"):
        inverse.gravity(frame.assign(to=frame["to"].astype("Int64").where(j != 3)), **options)

    x = pd.DataFrame(traits(n, 2, 0), columns=["age", "income"], index=rng.permutation(n))
    y = pd.DataFrame(traits(m, 2, 1), columns=["age", "schooling"])
    flows = pd.DataFrame(counts, index=x.index)
    fit = inverse.affinity(x, y, flows)
    plain = inverse.affinity(x.to_numpy(), y.to_numpy(), counts)
    assert fit.names == ("age*age", "age*schooling", "income*age", "income*schooling") and "income*age" in fit.report()
    assert (fit.coefficients == plain.coefficients).all() and fit.score(flows) == plain.score(counts)
    a, b = (pd.Series(w, index=rng.permutation(len(w))) for w in (weights(n, 0), weights(m, 1)))
    assert (fit.predict(a, b) == plain.predict(a.to_numpy(), b.to_numpy())).all()

    met = pd.DataFrame({"i": i, "j": j, "times": counts.ravel()}, index=rng.permutation(n * m))
    given = inverse.Coupling(pairs=(met["i"], met["j"], met["times"]), mask=flows >= 0, a=flows.sum(axis=1))
    table, other = given.table((n, m)), inverse.Coupling(counts).table((n, m))
    assert (table.plan == other.plan).all() and (table.a == other.a).all() and table.allowed is None


def test_clusters_of_cells_that_were_not_possible_do_not_count():
    """Their number enters a factor: pairs that are not listed are in no cluster, whatever label they bear."""
    features, counts = counted()
    allowed = ~np.eye(*counts.shape, dtype=bool)
    labels = np.add.outer(np.arange(counts.shape[0]) // 3, 0 * np.arange(counts.shape[1]))
    other = np.where(allowed, labels, 1000 + np.arange(counts.size).reshape(counts.shape))
    flows = np.where(allowed, counts, 0)
    fits = [inverse.InverseOT(features).fit(inverse.Coupling(flows, mask=allowed, cluster=x)) for x in (labels, other)]
    np.testing.assert_allclose(*(fit.errors("clustered") for fit in fits), rtol=1e-12)


def test_migration_between_states_has_the_coefficients_known_from_poisson_regression():
    """Reference values from an independent estimate of the same gravity equation."""
    with open(Path(__file__).parent / "data" / "us_state_migration_2012.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    table = {name: np.array([line[name] for line in lines]) for name in ("origin", "dest")}
    km = np.array([float(line["km"]) for line in lines])
    table |= {"movers": np.array([float(line["movers"]) for line in lines]), "log km": np.log(km), "km": km}
    fit = inverse.gravity(table, flow="movers", origin="origin", destination="dest", features=["log km", "km"])
    np.testing.assert_allclose(fit.coefficients, [-1.4929633099, 3.402997240e-4], rtol=1e-8)
    assert "cells without observations 155 of 2550" in fit.report("robust")


@pytest.mark.parametrize("sides", [(KL(0.7), KL(2.0)), (FIXED, KL(0.5)), (AT_MOST, Between(0.5, 2.0))], ids=str)
@pytest.mark.parametrize("unit", [1.0, 250.0])
def test_soft_sides_are_recovered_and_predicted_in_any_unit(sides, unit):
    features = inverse.Bilinear(traits(12, 2, 0), traits(10, 2, 1))
    theta = np.array([0.8, -0.3, 0.2, 0.5])
    model = inverse.InverseOT(features, rows=sides[0], columns=sides[1])
    a, b = unit * weights(12, 3), unit * weights(10, 4)
    plan = model.plan(theta, a, b)
    problem = Problem(-features.apply(theta), a / unit, b / unit, epsilon=1.0, rows=sides[0], columns=sides[1])
    np.testing.assert_allclose(plan, unit * solve(problem, tolerance=1e-12).plan, rtol=1e-7, atol=1e-12 * unit)
    fit = model.fit(inverse.Coupling(plan=plan, a=a, b=b, observations=5000))
    np.testing.assert_allclose(fit.coefficients, theta, atol=1e-7)
    np.testing.assert_allclose(fit.predict(a, b), plan, rtol=1e-6)
    assert fit.score(inverse.Coupling(plan=plan, a=a, b=b)) == pytest.approx(fit.log_likelihood / 5000)


def test_weights_of_fixed_sides_in_another_unit_are_refused():
    with pytest.raises(ValueError, match="a has total 1 but 8 was observed"):
        inverse.InverseOT(inverse.Toeplitz(2)).fit(inverse.Coupling([[3, 1], [1, 3]], a=[0.5, 0.5]))


def test_features_of_which_nothing_can_be_told_are_no_accident():
    rows = inverse.Features({"row": np.arange(3.0)[:, None] * np.ones((3, 3))})
    with pytest.warns(inverse.IdentifiabilityWarning, match="1 of 1 directions"):
        fit = inverse.InverseOT(rows).fit(np.diag([2.0, 1.0, 1.0]) + np.eye(3)[::-1])
    assert fit.coefficients[0] == 0 and np.isinf(fit.standard_errors).all() and "rank 0 of 1" in fit.report()


def test_predictions_and_scores_of_other_data():
    features = inverse.Bilinear(traits(10, 2, 0), traits(9, 2, 1))
    model = inverse.InverseOT(features)
    _, plan = planted(features, [1.0, 0.2, -0.4, 0.5])
    fit = model.fit(inverse.Coupling(plan=plan))
    a, b = 7 * weights(4, 5), 7 * weights(5, 6)
    others = inverse.Bilinear(traits(4, 2, 7), traits(5, 2, 8))
    expected = solve(Problem(-others.apply(fit.coefficients), a / 7, b / 7, epsilon=1.0), tolerance=1e-12).plan
    np.testing.assert_allclose(fit.predict(a, b, others), 7 * expected, atol=1e-9)
    assert fit.score(inverse.Coupling(plan=plan)) == pytest.approx(fit.log_likelihood)

# -- sides whose totals are not those of the data ------------------------------------------------------------------------


def alternatives(seed, n=200, m=5):
    """Choices among alternatives that differ in their mean price."""
    rng = np.random.default_rng(seed)
    price = np.linspace(1, 4, m) + 0.3 * rng.standard_normal((n, m))
    chance = np.exp(-0.8 * price)
    chosen = (rng.random((n, 1)) > (chance / chance.sum(1, keepdims=True)).cumsum(1)[:, :-1]).sum(1)
    return inverse.Features({"price": price}), chosen, inverse.Coupling(pairs=(np.arange(n), chosen))


def test_choices_are_conditional_logit_without_weights_of_the_alternatives():
    features, chosen, data = alternatives(0)
    theta, information = logit(features.values, chosen, np.ones(5))
    fit = inverse.InverseOT(features, columns=FREE).fit(data)
    np.testing.assert_allclose(fit.coefficients, theta, rtol=0, atol=1e-8)
    np.testing.assert_allclose(fit.standard_errors, 1 / np.sqrt(200 * information[0]), rtol=1e-8)
    chance = np.exp(theta * features.values[0])
    expected = np.log(chance / chance.sum(1, keepdims=True))[np.arange(200), chosen].mean() - np.log(200)
    assert fit.score(data) == pytest.approx(expected, abs=1e-8)
    turned = inverse.InverseOT(inverse.Features({"price": features.values[0].T}), rows=FREE)
    np.testing.assert_allclose(turned.fit(inverse.Coupling(pairs=(chosen, np.arange(200)))).coefficients, theta, atol=1e-8)


def test_an_alternative_that_nobody_chose_is_one_all_the_same():
    price = np.arange(12.0).reshape(4, 3) % 5
    chosen = np.array([0, 1, 0, 1])
    fit = inverse.InverseOT(inverse.Features({"price": price}), columns=FREE).fit(
        inverse.Coupling(pairs=(np.arange(4), chosen))
    )
    theta, _ = logit(price[None], chosen, np.ones(3))
    np.testing.assert_allclose(fit.coefficients, theta, atol=1e-8)
    assert (fit.plan > 0.01).all()


UNCERTAIN = {
    "fixed": (FIXED, FIXED, {}), "fixed, known": (FIXED, FIXED, {"a": 1.0, "b": 1.0}), "fixed and free": (FIXED, FREE, {}),
    "free": (FREE, FREE, {}), "soft": (KL(1.0), KL(10.0), {}), "soft, known": (KL(1.0), KL(10.0), {"a": 1.0, "b": 1.1}),
    "one soft": (FIXED, KL(1.0), {}), "one soft, known": (FIXED, KL(1.0), {"b": 0.9}),
    "one known": (KL(2.0), FIXED, {"b": 1.0}), "others": (ChiSquared(1.0), L2(0.5), {"a": 1.0, "b": 1.0}),
    "a price with a kink": (TV(0.2), FIXED, {"a": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("mode", UNCERTAIN)
def test_errors_are_what_the_estimate_does_when_a_cell_changes(mode):
    """The delta method by differences: one more match in every cell in turn, with its share of the weights that are known."""
    rows, columns, known = UNCERTAIN[mode]
    rng = np.random.default_rng(3)
    n, m = 4, 5
    values = rng.standard_normal((2, n, m)) + rng.standard_normal((n, 1)) + 0.3
    counts = rng.poisson(40.0, (n, m)).astype(float)
    size = {"a": n, "b": m}
    shares = {name: scale * weights(size[name], 5) for name, scale in known.items()}
    total = counts.sum()
    model = inverse.InverseOT(inverse.Features(values), rows=rows, columns=columns)

    def estimate(counts):
        pinned = (rows.is_fixed and "a" in known) or (columns.is_fixed and "b" in known)
        own = {name: (counts.sum() if pinned else total) * share for name, share in shares.items()}
        return model.fit(inverse.Coupling(counts, **own))

    fit, moves = estimate(counts), np.zeros((n, m, 2))
    for i, j in np.ndindex(n, m):
        step = np.zeros((n, m))
        step[i, j] = 0.02
        moves[i, j] = (estimate(counts + step).coefficients - estimate(counts - step).coefficients) / 0.04
    expected = counts.sum() / fit.points[0].market.table.plan.sum() * fit.plan
    for kind, variance in (("model", expected), ("robust", (counts - expected) ** 2)):
        covariance = np.einsum("ij,ijk,ijl->kl", variance, moves, moves)
        np.testing.assert_allclose(fit.covariance(kind), covariance, rtol=2e-4, atol=1e-7)


def with_singles(score, n, m):
    """The market of Choo and Siow by its own equations: who is with whom, and who alone."""
    gain, first, second = np.exp(score / 2), np.sqrt(n), np.sqrt(m)
    for _ in range(5000):
        half = gain @ second / 2
        first = np.sqrt(n + half**2) - half
        half = gain.T @ first / 2
        second = np.sqrt(m + half**2) - half
    return first[:, None] * second * gain, first**2, second**2


def test_couples_and_singles_are_a_table_in_which_everybody_is_a_row_and_a_column():
    theta, values = np.array([-1.0, 0.8]), np.stack([np.ones((5, 4)), traits(5, 4, 0)])
    n, m = weights(5, 1), 1.2 * weights(4, 2)

    def everybody(couples, first, second):
        return np.block([[np.diag(first), couples], [couples.T, np.diag(second)]])

    halves = inverse.Features([everybody(x / 2, np.zeros(5), np.zeros(4)) for x in values])
    table = everybody(*with_singles(np.tensordot(theta, values, 1), n, m))
    fit = inverse.InverseOT(halves).fit(inverse.Coupling(plan=table, mask=table > 0))
    np.testing.assert_allclose(fit.coefficients, theta, atol=1e-8)
    n, m = n * np.linspace(0.8, 1.3, 5), m * np.linspace(1.4, 0.7, 4)
    expected = everybody(*with_singles(np.tensordot(theta, values, 1), n, m))
    np.testing.assert_allclose(fit.predict(*2 * [np.concatenate([n, m])]), expected, atol=1e-8)


def test_errors_of_rows_that_are_full_are_those_of_choices_and_of_others_those_of_counts():
    rng = np.random.default_rng(0)
    values, a, b = rng.standard_normal((2, 4, 5)), np.array([300.0, 260.0, 200.0, 240.0]), 160 * np.ones(5)
    model = inverse.InverseOT(inverse.Features(values), rows=AT_MOST, columns=FREE)
    plan = model.plan([0.7, -0.5], a, b)
    full = plan.sum(1) > a * (1 - 1e-9)
    assert full.any() and not full.all()
    fit = model.fit(inverse.Coupling(counts=plan, a=a, b=b))
    np.testing.assert_allclose(fit.coefficients, [0.7, -0.5], atol=1e-6)
    apart = values - np.where(full, np.einsum("kij,ij->ki", values, plan) / plan.sum(1), 0.0)[:, :, None]
    information = np.einsum("ij,kij,lij->kl", plan, apart, apart)
    np.testing.assert_allclose(fit.covariance(), np.linalg.inv(information), rtol=1e-5)


def test_intervals_cover_where_totals_are_known_and_soft():
    rng = np.random.default_rng(1)
    features = inverse.Features(rng.standard_normal((1, 6, 7)) + rng.standard_normal((6, 1)))
    model, a, b = inverse.InverseOT(features, rows=KL(10.0), columns=KL(10.0)), weights(6, 0), weights(7, 1)
    plan = model.plan([0.5], a, b)
    fits = [model.fit(inverse.Coupling(rng.poisson(4000 * plan), a=4000 * a, b=4000 * b)) for _ in range(200)]
    inside = [low <= 0.5 <= high for low, high in (fit.confidence_intervals()[0] for fit in fits)]
    assert 0.90 <= np.mean(inside) <= 0.99


def test_a_plan_is_solved_for_where_a_search_has_nothing_to_do():
    rng = np.random.default_rng(0)
    mask = rng.random((7, 5)) < 0.7
    counts = rng.poisson(3.0, (7, 5)) * mask + np.eye(7, 5)
    data, features = inverse.Coupling(counts, mask=counts + mask > 0), inverse.Features(rng.standard_normal((2, 7, 5)))
    largest = inverse.largest_strength(inverse.InverseOT(features, penalty=inverse.L1(1.0)), data)
    for options in ({"penalty": inverse.L1(2 * largest)}, {"fixed": {0: 0.5, 1: -0.5}}):
        plan = inverse.InverseOT(features, **options).fit(data).plan
        np.testing.assert_allclose(plan.sum(1), counts.sum(1) / counts.sum(), rtol=1e-9)
    assert (inverse.InverseOT(features, penalty=inverse.L1((1 - 1e-6) * largest)).fit(data).coefficients != 0).any()


def alternated(cost, a, b):
    """Iterative proportional fitting."""
    plan = np.exp(-cost)
    for _ in range(5000):
        plan *= (a / plan.sum(1))[:, None]
        plan *= b / plan.sum(0)
    return plan


def test_what_was_not_possible_is_not_predicted_unless_it_is_said_to_be():
    features, counts = counted()
    n, m = features.shape
    mask = np.ones((n, m), bool)
    mask[0, 0] = mask[1, 2] = False
    fit = inverse.InverseOT(features).fit(inverse.Coupling(counts * mask, mask=mask))
    np.testing.assert_allclose(
        fit.predict(*((counts * mask).sum(k) for k in (1, 0))), fit.plan * (counts * mask).sum(), rtol=1e-7
    )
    score = features.apply(fit.coefficients)
    closed = mask.copy()
    closed[2, 0] = False
    a, b = counts.sum(1) + 1.0, counts.sum(0) + n / m
    for given, possible, others in ((None, mask, None), (closed, closed, None), (None, mask | True, features)):
        expected = alternated(np.where(possible, -score, np.inf), a, b)
        np.testing.assert_allclose(fit.predict(a, b, others, mask=given), expected, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="mask of shape"):
        fit.predict(a, b, mask=mask[1:])


def test_folds_keep_known_weights():
    features, _, data = alternatives(1)
    b = np.array([5.0, 1.0, 1.0, 1.0, 1.0])
    model = inverse.InverseOT(features, columns=FREE, penalty=inverse.L1(1.0))
    path = inverse.path(model, inverse.Coupling(pairs=data.pairs, b=b), strengths=[1e-9], folds=2)
    of_none = inverse.path(model, data, strengths=[1e-9], folds=2)
    chosen, price = data.pairs[1], features.values[0]
    theta, _ = logit(price[None], chosen, b)
    chance = b * np.exp(theta * price)
    mean = np.log(chance / chance.sum(1, keepdims=True))[np.arange(200), chosen].mean() - np.log(100)
    assert path.scores.mean() == pytest.approx(mean, abs=0.05) and of_none.scores.mean() > path.scores.mean() + 0.1


# -- without entropy ---------------------------------------------------------------------------------------------------


def exact_data(n, seed=0):
    rng = np.random.default_rng(seed)
    features = inverse.Features(rng.standard_normal((3, n, n)))
    theta = np.array([1.0, 0.6, -0.4])
    solution = solve(Problem(-features.apply(theta), weights(n, seed), weights(n, seed + 1)))
    return features, theta, solution.plan


def by_linear_program(features, plan, k, sign):
    n, m = plan.shape
    theta, u, v = cp.Variable(3), cp.Variable(n), cp.Variable(m)
    cost = -sum(theta[l] * features.values[l] for l in range(3))
    reduced = cost - u[:, None] @ np.ones((1, m)) - np.ones((n, 1)) @ v[None, :]
    program = cp.Problem(cp.Minimize(sign * theta[k]), [reduced >= 0, reduced[plan > 0] == 0, theta[0] == 1])
    return sign * program.solve(solver=cp.HIGHS)


def test_exact_inverse_finds_the_identified_set():
    features, theta, plan = exact_data(12)
    fit = inverse.ExactInverse(features, fixed={0: 1.0}).fit(inverse.Coupling(plan=plan))
    assert (fit.bounds[:, 0] <= theta + 1e-7).all() and (theta <= fit.bounds[:, 1] + 1e-7).all()
    for k, (end, sign) in itertools.product((1, 2), enumerate((1, -1))):
        assert fit.bounds[k, end] == pytest.approx(by_linear_program(features, plan, k, sign), abs=1e-7)
    assert fit.margin > 0 and abs(fit.gap) < 1e-9 and abs(fit.plan - plan).sum() < 1e-9


@pytest.mark.parametrize("objective", [inverse.Nearest([1.0, 0.5, 0.0]), inverse.SmallestGap()])
def test_other_objectives_explain_the_plan_too(objective):
    features, _, plan = exact_data(10)
    fit = inverse.ExactInverse(features, objective, fixed={0: 1.0}).fit(inverse.Coupling(plan=plan))
    assert abs(fit.gap) < 1e-8 and fit.coefficients[0] == pytest.approx(1.0)


def test_a_known_coefficient_may_be_larger_than_one():
    features = inverse.Features(np.random.default_rng(0).standard_normal((2, 5, 5)))
    plan = solve(Problem(-features.apply(np.array([2.0, 3.0])), weights(5, 0), weights(5, 1))).plan
    for scale in (1.0, 0.01, 100.0):  # the largest margin is a scale's
        fit = inverse.ExactInverse(features, fixed={0: 2.0 * scale}).fit(inverse.Coupling(plan=plan))
        assert fit.coefficients[0] == pytest.approx(2 * scale) and fit.gap < 1e-9
        low, high = fit.bounds[1]
        assert low - 1e-9 <= 3 * scale <= high + 1e-9 and low - 1e-9 <= fit.coefficients[1] <= high + 1e-9
        assert fit.margin / scale == pytest.approx(inverse.ExactInverse(features, fixed={0: 2.0}).fit(
            inverse.Coupling(plan=plan), bounds=False).margin)  # fmt: skip
    whole = inverse.ExactInverse(inverse.Features({"one": np.ones((2, 3))}), fixed={0: 1.0}).fit(np.ones((2, 3)))
    assert whole.margin == np.inf and whole.gap < 1e-12  # no cell is without mass


def test_a_plan_that_no_coefficients_explain_is_said_so():
    features = inverse.Features(np.random.default_rng(0).standard_normal((2, 5, 5)))
    with pytest.raises(ValueError, match="no coefficients explain"):
        inverse.ExactInverse(features, fixed={0: 1.0}).fit(inverse.Coupling(plan=np.ones((5, 5))))
    fit = inverse.ExactInverse(features, inverse.SmallestGap(), fixed={0: 1.0}).fit(np.ones((5, 5)))
    assert fit.gap > 0.01 and fit.bounds is None


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "coupling, message",
    [
        (dict(counts=[[1, -1], [1, 1]]), r"coupling\[0, 1\] = -1"),
        (dict(counts=[[1, np.nan], [1, 1]]), "finite"),
        (dict(counts=np.zeros((2, 2))), "total 0"),
        (dict(counts=np.ones((3, 2))), "transposed"),
        (dict(counts=np.ones((2, 2)), mask=np.eye(2)), "mask forbids"),
        (dict(pairs=([0, 5], [0, 1])), "rows must be from 0 to 1"),
        (dict(counts=np.ones((2, 2)), a=[1.0]), "a of shape"),
        (dict(counts=np.ones((2, 2)), cluster="people"), "cluster = 'people'"),
        (dict(counts=np.ones((2, 2)), plan=np.ones((2, 2))), "exactly one"),
    ],
)
def test_data_that_are_none_are_refused(coupling, message):
    with pytest.raises(ValueError, match=message):
        inverse.InverseOT(inverse.Toeplitz(2)).fit(inverse.Coupling(**coupling))


def test_parameters_can_be_read_and_set():
    model = inverse.InverseOT(inverse.Toeplitz(3), epsilon=2.0)
    again = type(model)(**model.get_params())
    assert again.get_params() == model.get_params() and model.set_params(epsilon=3.0).epsilon == 3.0
