"""Costs between points: whatever is true of a matrix must be true of the points behind it, without the matrix."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from scipy.stats import wasserstein_distance
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iotsolve import (
    AT_MOST,
    FREE,
    KL,
    L2,
    TV,
    ChiSquared,
    Dense,
    Envelope,
    Implicit,
    Interior,
    Newton,
    Points,
    Problem,
    Sinkhorn,
    Unroll,
    certify,
    costs,
    solve,
    solver,
)
from iotsolve.kernels import bilinear, threads
from iotsolve.kernels.products import plan_times
from iotsolve.plans import QuickPlan


@pytest.fixture(autouse=True)
def as_of_many(monkeypatch):
    """Points are swept as points here: of few the automatic solver makes a matrix."""
    monkeypatch.setattr(sys.modules["iotsolve.solve"], "_HELD", 0)


METRICS = ("sqeuclidean", "euclidean", "cosine", "sphere", "dot")
TIGHT = Interior(tolerance=1e-13, stationary=True)

REGIMES = {
    "fixed-fixed": {},
    "kl-fixed": {"rows": KL(0.7)},
    "free-tv": {"rows": FREE, "columns": TV(5.0)},
    "at_most-at_most-mass": {"rows": AT_MOST, "columns": AT_MOST, "mass": 0.7},
    "chi2-l2": {"rows": ChiSquared(0.8), "columns": L2(0.9)},
}
over_metrics = pytest.mark.parametrize("metric", METRICS)
over_regimes = pytest.mark.parametrize("regime", REGIMES)


def independent_cost(x, y, metric):
    """The cost by scipy, of one pair of clouds."""
    products = {"dot": 0.0, "sphere": 1.0}
    return products[metric] - np.inner(x, y) if metric in products else cdist(x, y, metric)


def clouds(n=6, m=5, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d))


def weights(n, seed, empty=None):
    """Of total 1, one of them 0."""
    w = np.random.default_rng(seed).uniform(0.5, 1.5, n)
    if empty is not None:
        w[empty] = 0.0
    return w / w.sum()


def both(metric, regime, epsilon, *, seed=0, empty=True):
    """The same problem of points and of the matrix that scipy makes of them."""
    (x, y), sides = clouds(seed=seed), REGIMES[regime]
    a, b = weights(6, seed + 1, 2 if empty else None), weights(5, seed + 2, 4 if empty else None)
    made = (Points(x, y, metric), independent_cost(x, y, metric))
    return [Problem(cost, a, b, epsilon=epsilon, **sides) for cost in made]


def solved(problem):
    return solve(problem) if problem.is_exact else solve(problem, TIGHT)


def assert_same(one, other, *, rtol=1e-9, atol=1e-9):
    """Every output of two solutions."""
    for name in (
        "value",
        "plan",
        "f",
        "g",
        "mass_multiplier",
        "row_marginal",
        "column_marginal",
        "mass",
        "transport_cost",
    ):
        mine, theirs = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol, err_msg=name)


# -- points are their cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@over_metrics
@over_regimes
def test_points_have_the_answer_of_their_cost(regime, metric, epsilon):
    one, other = (solved(problem) for problem in both(metric, regime, epsilon))
    assert_same(one, other)
    assert one.certificate.holds and one.certificate.dual == pytest.approx(other.certificate.dual, abs=1e-8)
    assert one.problem.primal(other.plan) == pytest.approx(other.value, rel=1e-8, abs=1e-9)
    assert one.problem.dual(other.f, other.g, other.mass_multiplier) == pytest.approx(other.value, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@over_metrics
def test_a_batch_of_points_is_each_clouds_own(metric, epsilon):
    """Leading dimensions of x, of the weights and of neither broadcast; bins are empty in one problem and not in the other."""
    (x, y), a, b = clouds(), np.stack([weights(6, 1, 2), weights(6, 2)]), weights(5, 3, 0)
    x = np.stack([x, x[::-1] + 0.3])
    batch = Problem(Points(x, y, metric), a, b, epsilon=epsilon, columns=KL(0.7))
    assert batch.shape == (2, 6, 5)
    singles = [Problem(independent_cost(x[k], y, metric), a[k], b, epsilon=epsilon, columns=KL(0.7)) for k in range(2)]
    found, expected = solved(batch), [solved(problem) for problem in singles]
    for name in ("value", "plan", "f", "g", "row_marginal", "column_marginal", "mass", "transport_cost"):
        stacked = np.stack([getattr(one, name) for one in expected])
        np.testing.assert_allclose(getattr(found, name), stacked, rtol=1e-8, atol=1e-9, err_msg=name)


@over_metrics
@pytest.mark.parametrize("regime", ["fixed-fixed", "chi2-l2"])
def test_single_precision_has_its_own_accuracy(regime, metric):
    problem, other = both(metric, regime, 0.5)
    x, y = (z.float() for z in (problem.cost.x, problem.cost.y))
    low = Problem(Points(x, y, metric), problem.a, problem.b, epsilon=0.5, **REGIMES[regime])
    found = solve(low)
    assert found.plan.dtype == found.value.dtype == torch.float32 and found.certificate.holds
    expected = solve(other, TIGHT)
    assert float(found.value) == pytest.approx(expected.value, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(found.plan, expected.plan, atol=3e-4)


@over_metrics
def test_what_a_solver_asks_of_points_is_what_it_asks_of_their_cost(metric):
    x, y = clouds(7, 4)
    cost = independent_cost(x, y, metric)
    points = Points(torch.tensor(x), torch.tensor(y), metric)
    index = (torch.tensor([0, 6, 3]), torch.tensor([3, 0, 3]))
    np.testing.assert_allclose(points.dense(), cost, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(points.transposed.dense(), cost.T, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(points.entries(index), cost[index], rtol=1e-13, atol=1e-13)
    assert np.ptp(cost) <= float(points.range())
    h, w = np.linspace(-1, 1, 4), np.array([0.2, 0.0, 0.5, 0.3])
    with np.errstate(divide="ignore"):
        soft = -0.5 * np.log((np.exp(np.log(w) - cost / 0.5)).sum(1))
    np.testing.assert_allclose(points.softmin(torch.tensor(w).log(), 0.5, axis=-1), soft, rtol=1e-12)
    hard = (cost - h)[:, w > 0].min(1)
    np.testing.assert_allclose(
        points.reduced_min(torch.tensor(h), torch.tensor(w), axis=-1), hard, rtol=1e-12, atol=1e-12
    )


# -- gradients ---------------------------------------------------------------------------------------------------------


def torch_cost(x, y, metric):
    """The cost by torch's own operations, differentiable; torch.cdist has a gradient of 0 at coincident points."""
    if metric in ("dot", "sphere"):
        return float(metric == "sphere") - torch.einsum("ik,jk->ij", x, y)
    if metric == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1)
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance if metric == "euclidean" else ((x.unsqueeze(-2) - y.unsqueeze(-3)) ** 2).sum(-1)


def leaves(*arrays):
    return [torch.tensor(z, requires_grad=True) for z in arrays]


def assert_slope(of, z, gradient, *, step=1e-5):
    """A gradient along a random direction against the central difference of the function."""
    along = np.random.default_rng(7).normal(size=z.shape)
    expected = (of(z + step * along) - of(z - step * along)) / (2 * step)
    assert float((gradient.numpy() * along).sum()) == pytest.approx(float(expected), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@over_metrics
@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "kl-fixed"])
def test_the_gradient_in_the_points_is_that_of_differences_and_of_autograd(regime, metric, epsilon):
    """Differences of values of scipy's cost; autograd through a matrix that torch makes."""
    (x, y), sides = clouds(4, 3), REGIMES[regime]
    a, b = weights(4, 1, 2), weights(3, 2)

    def value(x, y):
        return solved(Problem(independent_cost(x, y, metric), a, b, epsilon=epsilon, **sides)).value

    live, other = leaves(x, y), leaves(x, y)
    solved(Problem(Points(*live, metric), a, b, epsilon=epsilon, **sides)).value.backward()
    solved(Problem(torch_cost(*other, metric), a, b, epsilon=epsilon, **sides)).value.backward()
    assert_slope(lambda z: value(z, y), x, live[0].grad)
    assert_slope(lambda z: value(x, z), y, live[1].grad)
    for mine, matrix in zip(live, other, strict=True):
        np.testing.assert_allclose(mine.grad, matrix.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gradient", [Implicit(), Unroll(30)], ids=["implicit", "unroll"])
@pytest.mark.parametrize("of", ["plan", "f", "transport_cost"])
@over_metrics
def test_the_gradient_of_every_output_flows_to_the_points(metric, of, gradient):
    (x, y), a, b = clouds(4, 3), weights(4, 1, 2), weights(3, 2)
    live, other = leaves(x, y), leaves(x, y)
    for cost in (Points(*live, metric), torch_cost(*other, metric)):
        output = getattr(solve(Problem(cost, a, b, epsilon=1.0, rows=KL(0.7)), TIGHT, gradient=gradient), of)
        (output * torch.linspace(1, 2, output.numel()).to(output).reshape(output.shape)).sum().backward()
    for mine, matrix in zip(live, other, strict=True):
        assert mine.grad.abs().max() > 1e-3
        np.testing.assert_allclose(mine.grad, matrix.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("of", ["f", "g", "row_marginal", "column_marginal", "mass", "mass_multiplier", "transport_cost"])
@over_regimes
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "dot"])
def test_derivatives_that_stream_are_those_of_the_matrix(metric, regime, of, empty):
    """In every datum, at empty bins too."""
    found = []
    for make in (Points, torch_cost):
        x, y = leaves(*clouds())
        a, b = leaves(weights(6, 1, 2 if empty else None), weights(5, 2))
        epsilon = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        problem = Problem(make(x, y, metric), a, b, epsilon=epsilon, **REGIMES[regime])
        output = getattr(solve(problem, TIGHT, gradient=Implicit()), of)
        output = torch.where(output.isfinite(), output, 0.0)
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        slopes = torch.autograd.grad((drawn * output).sum(), (x, y, a, b, epsilon), materialize_grads=True)
        if regime == "fixed-fixed":  # only changes that keep the totals equal have a derivative
            level = slopes[2].mean()
            slopes = (*slopes[:2], slopes[2] - level, slopes[3] + level, slopes[4])
        found.append([output.detach(), *slopes])
    for mine, matrix in zip(*found, strict=True):
        torch.testing.assert_close(mine, matrix, rtol=1e-7, atol=1e-8)


# -- products with the plan --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("gradient", [Envelope(), Implicit()], ids=["envelope", "implicit"])
@over_regimes
@over_metrics
def test_a_product_with_the_plan_is_one_with_the_matrix(metric, regime, gradient, axis):
    """Vectors and matrices, and their derivatives: in the values by every choice, in the problem's data where it has them."""
    (x, y), a, b = clouds(), weights(6, 1, 2), weights(5, 2)
    drawn, follows = np.random.default_rng(3).normal(size=(5 if axis == -1 else 6, 3)), isinstance(gradient, Implicit)
    found = []
    for make, product in ((Points, True), (torch_cost, False)):
        inputs = [z.requires_grad_(follows) for z in leaves(x, y, a, b)]
        values = leaves(drawn)[0]
        problem = Problem(make(*inputs[:2], metric), *inputs[2:], epsilon=0.5, **REGIMES[regime])
        solution = solve(problem, TIGHT, gradient=gradient)
        plan = solution.plan if axis == -1 else solution.plan.mT
        carried = solution.apply(values, axis=axis) if product else plan @ values
        alone = solution.apply(values[:, 0], axis=axis) if product else plan @ values[:, 0]
        assert carried.shape == (6 if axis == -1 else 5, 3) and alone.shape == carried.shape[:1]
        loss = (carried**2).sum() + alone[0]
        found.append([carried.detach(), *torch.autograd.grad(loss, [values, *(inputs if follows else [])])])
    if follows and regime == "fixed-fixed":  # only changes that keep the totals equal have a derivative
        for slopes in found:
            level = slopes[4].mean()
            slopes[4:] = [slopes[4] - level, slopes[5] + level]
    for mine, matrix in zip(*found, strict=True):
        torch.testing.assert_close(mine, matrix, rtol=1e-7, atol=1e-8)


def test_a_product_with_an_exact_plan_reads_its_arcs():
    (x, y), values = clouds(300, 300), np.random.default_rng(3).normal(size=(300, 2))
    solution = solve(Problem(Points(x, y)))
    with Largest() as largest:
        found, back = solution.apply(values), solution.apply(values[:, 1], axis=-2)
    assert largest.size < 300 * 10
    np.testing.assert_allclose(found, solution.plan @ values, atol=1e-14)
    np.testing.assert_allclose(back, solution.plan.T @ values[:, 1], atol=1e-14)
    np.testing.assert_allclose(solve(Problem(independent_cost(x, y, "euclidean"))).apply(np.ones(300)), 1 / 300)


def test_products_of_a_batch_are_each_problems_own():
    x, y = (np.stack(z) for z in zip(clouds(seed=0), clouds(seed=1), strict=True))
    values = np.random.default_rng(3).normal(size=(2, 5, 4))
    for cost in (Points(x, y), np.stack([cdist(*z) for z in zip(x, y, strict=True)])):
        solution = solve(Problem(cost, epsilon=0.5))
        np.testing.assert_allclose(solution.apply(values), solution.plan @ values, rtol=1e-9)
        np.testing.assert_allclose(solution.apply(values[..., 0]), (solution.plan @ values)[..., 0], rtol=1e-9)


def test_the_envelope_does_not_follow_a_product_to_the_problem():
    x, y = leaves(*clouds())
    for cost in (Points(x, y), torch_cost(x, y, "sqeuclidean")):
        found = solve(Problem(cost, epsilon=0.5)).apply(torch.ones(5, dtype=torch.float64))
        with pytest.raises(RuntimeError, match=r"differentiates solution\.value only"):
            found.sum().backward()


def test_a_product_has_the_accuracy_of_the_points():
    x, y = (torch.tensor(z).float() for z in clouds())
    solution = solve(Problem(Points(x, y), epsilon=0.5))
    found = solution.apply(y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, solution.plan @ y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "axis", "says"),
    [
        (np.ones(4), -1, r"values has shape \(4,\): must be \(5,\).*other axis"),
        (np.ones((5, 2)), -2, r"values has shape \(5, 2\)"),
        (np.ones(5), 0, "axis = 0: must be -1"),
        ("all", -1, "must be an array of real numbers"),
        (np.ones(5) * 1j, -1, r"values are complex \(torch\.complex128\): must be real"),
    ],
)
def test_products_that_do_not_fit_are_told(values, axis, says):
    with pytest.raises(ValueError, match=says):
        solve(Problem(Points(*clouds()), epsilon=0.5)).apply(values, axis=axis)


@pytest.mark.parametrize("barred", [None, "mask", "lists"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pairs", [0, 1])
def test_products_have_derivatives_of_second_order(pairs, turned, barred, monkeypatch):
    """In points, exponents, values and factors, by differences; where blocks and slabs end does not matter."""
    monkeypatch.setattr(bilinear, "_BLOCK", 6)
    monkeypatch.setattr(bilinear, "_WIDTH", 3)
    draw = torch.Generator().manual_seed(0)
    x, y, u, v, left, right, values = (
        torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 2), (4, 2), (5,), (4,), (5, 2), (4, 2), (5 if turned else 4, 2))
    )
    lists = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(5)])
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask = mask.scatter_(1, lists, True) if barred else mask
    given = {None: None, "mask": mask, "lists": lists}[barred]

    def product(x, y, u, v, values, *pair):
        return plan_times(x, y, u, v, values, given, turned=turned, factors=(pair,) if pair else ())

    inputs = (x, y, u, v, values, *((left, right) if pairs else ()))
    plan = (u[:, None] + v + x @ y.mT).exp().masked_fill(mask, 0.0) * (left @ right.mT if pairs else 1.0)
    torch.testing.assert_close(product(*inputs), (plan.mT if turned else plan) @ values)
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("d", [1, 3])
def test_at_coincident_points_the_distance_has_gradient_zero(epsilon, d):
    """The sum of unit vectors weighted by the plan, in which a vector of length 0 is 0."""
    x, _ = clouds(5, 5, d)
    live = leaves(x, x[[0, 1, 3]])
    b = [0.3, 0.1, 0.6]
    solution = solve(Problem(Points(*live, "euclidean"), b=b, epsilon=epsilon))
    solution.value.backward()
    assert solution.plan[0, 0] > 0
    apart = x[:, None] - x[None, [0, 1, 3]]
    length = np.linalg.norm(apart, axis=-1, keepdims=True)
    unit = np.divide(apart, length, out=np.zeros_like(apart), where=length > 0)
    pull = solution.plan.detach().numpy()[..., None] * unit
    np.testing.assert_allclose(live[0].grad, pull.sum(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(live[1].grad, -pull.sum(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_a_cloud_upon_itself_rests(metric):
    x = clouds()[0]
    live = leaves(x, x)
    value = solve(Problem(Points(*live, metric))).value
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-15)
    assert all((z.grad.abs() <= 1e-15).all() for z in live)


@pytest.mark.parametrize("solver", [TIGHT, Sinkhorn(tolerance=1e-13, stationary=True)], ids=["interior", "sinkhorn"])
@pytest.mark.parametrize("rho, epsilon", [(1.0, 0.5), (0.3, 2.0), (10.0, 0.01)])
def test_two_diracs_under_kl_have_a_closed_form(rho, epsilon, solver):
    r"""Stationary in the one entry p: c + eps log(p/ab) + rho log(p/a) + rho log(p/b) = 0, and dV/dc = p.

    So log p = ((rho + eps) log(ab) - c) / (2 rho + eps), the gradient in x is 2 p (x - y), and the Hessian follows.
    """
    x, y, a, b = np.array([[0.3, -0.2]]), np.array([[-0.4, 0.5]]), 0.7, 1.6
    apart = (x - y)[0]
    cost = apart @ apart
    p = math.exp(((rho + epsilon) * math.log(a * b) - cost) / (2 * rho + epsilon))
    kl = [rho * (p * math.log(p / w) - p + w) for w in (a, b)]
    value = cost * p + epsilon * (p * math.log(p / (a * b)) - p + a * b) + sum(kl)
    live = leaves(x, y)
    found = solve(Problem(Points(*live), [a], [b], epsilon=epsilon, rows=KL(rho), columns=KL(rho)), solver).value
    slope_x, slope_y = torch.autograd.grad(found, live, create_graph=True)
    assert float(found.detach()) == pytest.approx(value, rel=1e-10)
    np.testing.assert_allclose(slope_x.detach(), 2 * p * (x - y), rtol=1e-9)
    np.testing.assert_allclose(slope_y.detach(), 2 * p * (y - x), rtol=1e-9)
    hessian = np.stack([torch.autograd.grad(s, live[0], retain_graph=True)[0][0] for s in slope_x[0]])
    expected = 2 * p * np.eye(2) - 4 * p / (2 * rho + epsilon) * np.outer(apart, apart)
    np.testing.assert_allclose(hessian, expected, rtol=1e-8)


@over_metrics
@over_regimes
def test_second_derivatives_are_differences_of_first_ones(regime, metric):
    """Some points coincide, where rounding may push a squared distance below 0; a distance is left alone there."""
    (x, y), sides = clouds(4, 3), REGIMES[regime]
    a, b = weights(4, 1), weights(3, 2)
    if metric == "sqeuclidean":
        y[:] = x[:3]
    v, w = np.random.default_rng(5).normal(size=(2, *x.shape))

    def slopes(z, create_graph=False):
        live = leaves(z, y)
        value = solve(Problem(Points(*live, metric), a, b, epsilon=0.5, **sides), TIGHT).value
        return live, torch.autograd.grad(value, live, create_graph=create_graph)

    live, (slope, other) = slopes(x, create_graph=True)
    products = torch.autograd.grad((slope * torch.tensor(v)).sum() + other.sum(), live)
    step = 1e-5
    (_, (high_x, high_y)), (_, (low_x, low_y)) = slopes(x + step * w), slopes(x - step * w)
    expected = (((high_x - low_x) * torch.tensor(v)).sum() + (high_y - low_y).sum()) / (2 * step)
    assert float((products[0] * torch.tensor(w)).sum()) == pytest.approx(float(expected), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    "metric, factor", [("sqeuclidean", math.sqrt(0.5)), ("euclidean", 0.5), ("dot", math.sqrt(0.5))]
)
@over_regimes
def test_half_the_cost_epsilon_and_rho_give_half_the_value(regime, metric, factor):
    """And the same plan; the gradient in points shrunk by a factor is half the old one over that factor."""
    (x, y), sides = clouds(), REGIMES[regime]
    small = {k: type(s)(s.rho / 2) if hasattr(s, "rho") else s for k, s in sides.items()}
    live, shrunk = leaves(x, y), leaves(factor * x, factor * y)
    whole = solve(Problem(Points(*live, metric), epsilon=0.4, **sides), TIGHT)
    half = solve(Problem(Points(*shrunk, metric), epsilon=0.2, **small), TIGHT)
    assert float(half.value.detach()) == pytest.approx(float(whole.value.detach()) / 2, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(half.plan.detach(), whole.plan.detach(), rtol=1e-8, atol=1e-11)
    (whole.value + half.value).backward()
    for one, other in zip(live, shrunk, strict=True):
        torch.testing.assert_close(factor * other.grad, one.grad / 2, rtol=1e-7, atol=1e-9)


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 40], ids=lambda size: f"block-{size}")
def tiny_blocks(request, monkeypatch):
    """Blocks of one row, and of a few that do not divide their number."""
    for passes in (costs, bilinear):
        monkeypatch.setattr(passes, "_BLOCK", request.param)
    return request.param


def everything(metric, regime, epsilon):
    """What is read in blocks: value, marginals, transport cost, certificate, gradients in every datum."""
    x, y = leaves(*clouds(11, 7))
    a, b = leaves(weights(11, 1, 3), weights(7, 2, 6))
    eps = torch.tensor(epsilon, dtype=torch.float64, requires_grad=True) if epsilon else 0.0
    sides = REGIMES[regime]
    solution = solved(Problem(Points(x, y, metric), a, b, epsilon=eps, **sides))
    inputs = [t for t in (x, y, a, b, eps) if isinstance(t, torch.Tensor)]
    slopes = torch.autograd.grad(solution.value, inputs)
    yield from (solution.value, solution.f, solution.g, solution.row_marginal, solution.transport_cost, *slopes)
    certificate = solution.certificate
    yield from (torch.as_tensor(x) for x in (certificate.dual, certificate.primal, certificate.row_violation))


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("regime", ["fixed-fixed", "chi2-l2"])
@over_metrics
def test_where_blocks_end_does_not_matter(metric, regime, epsilon, tiny_blocks):
    points = Points(*(torch.tensor(z) for z in clouds(11, 7)), metric)
    parts = [part for part, _ in points.blocks()]
    assert len(parts) >= 3 and [i for part in parts for i in range(part.start, part.stop)] == list(range(11))
    found = list(everything(metric, regime, epsilon))
    with pytest.MonkeyPatch.context() as whole:
        for passes in (costs, bilinear):
            whole.setattr(passes, "_BLOCK", 10**6)
        expected = list(everything(metric, regime, epsilon))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tame", [True, False])
def test_sums_over_very_many_rows_keep_their_digits(tame, monkeypatch):
    """In single precision an error that grows with the rows, always the same way, would end above every tolerance."""
    monkeypatch.setattr(bilinear, "_BLOCK", 8)  # two rows
    rng = np.random.default_rng(0)
    n, y = 60_000, rng.random((4, 3)) * (1 if tame else 60)
    x, u = rng.random((n, 3)), rng.random(n)
    u = (
        u - logsumexp(u[:, None] + x @ y.T, axis=0).mean()
    )  # the sums are near 1, where a logarithm has no digits to hide behind
    given = [torch.from_numpy(z).float() for z in (x, y, u)]
    assert bilinear._is_tame(*given, None) == tame
    _, found = bilinear.log_sums(*given, None)
    exact = [z.double().numpy() for z in given]
    expected = logsumexp(exact[2][:, None] + exact[0] @ exact[1].T, axis=0)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-7, atol=5e-8)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("regime", ["fixed-fixed", "kl-fixed", "chi2-l2"])
def test_the_certificate_of_points_that_were_stopped_early_is_that_of_their_matrix(regime, steps):
    x, y = np.random.default_rng(0).random((60, 3)), np.random.default_rng(1).random((50, 3)) ** 2
    problem = Problem(Points(x, y), epsilon=0.05, **REGIMES[regime])
    found = solve(problem, Sinkhorn(max_steps=steps, annealing=None), throw=False)
    assert not found.converged
    dense = Problem(independent_cost(x, y, "sqeuclidean"), epsilon=0.05, **REGIMES[regime])
    expected = certify(dense, found.f, found.g, found.mass_multiplier)
    for name in ("dual", "row_violation", "column_violation", "mass_violation"):
        assert getattr(found.certificate, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-12), name
    assert found.certificate.primal == pytest.approx(expected.primal, rel=1e-6)
    optimum = solve(dense).value
    assert found.certificate.dual <= optimum + 1e-9 and optimum - 1e-9 <= found.certificate.primal


def test_a_large_problem_stops_at_the_first_step_that_is_good_enough(monkeypatch):
    problem = Problem(Points(*clouds(40, 30)), epsilon=0.05)
    method = Sinkhorn(tolerance=1e-8)
    usual = solve(problem, method)
    monkeypatch.setattr(solver, "_DEAR", 0)
    sooner = solve(problem, method)
    assert usual.steps - 8 < sooner.steps < usual.steps and sooner.certificate.holds
    before = solve(problem, Sinkhorn(tolerance=1e-8, max_steps=int(sooner.steps) - 1), throw=False)
    assert max(before.certificate.row_violation, before.certificate.column_violation) > 0.4e-8
    assert sooner.value == pytest.approx(usual.value, rel=1e-7)


# -- what has gone wrong elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("regime", ["fixed-fixed", "kl-fixed"])
def test_where_the_origin_is_does_not_matter(regime, dtype):
    """Both clouds moved by 100 times their size: no digit of the squares is lost."""
    x, y = (torch.tensor(z, dtype=dtype) for z in clouds(60, 70))
    moved = [(z.double() + 100.0).to(dtype) for z in (x, y)]
    rounded = [(z.double() - 100.0).to(dtype) for z in moved]  # what is left of the points in this precision
    first = solve(Problem(Points(*rounded), epsilon=0.3, **REGIMES[regime]))
    second = solve(Problem(Points(*moved), epsilon=0.3, **REGIMES[regime]))
    close = 1e-9 if dtype == torch.float64 else 3e-5
    assert float(second.value) == pytest.approx(float(first.value), rel=close)
    torch.testing.assert_close(second.plan, first.plan, rtol=10 * close, atol=close / 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_of_no_weight_far_away_do_not_matter(dtype):
    x, y = (torch.tensor(z, dtype=dtype) for z in clouds(60, 70))
    far = torch.full((3, x.shape[1]), 3e4, dtype=dtype)
    a, more = torch.full((60,), 1 / 60, dtype=dtype), torch.zeros(3, dtype=dtype)
    live = [z.clone().requires_grad_() for z in (x, torch.cat([x, far]))]
    first = solve(Problem(Points(live[0], y), a, epsilon=0.3))
    second = solve(Problem(Points(live[1], y), torch.cat([a, more]), epsilon=0.3))
    close = 1e-9 if dtype == torch.float64 else 3e-5
    matrix = torch.cat([(x[:, None] - y).square().sum(-1), torch.full((3, 70), 1e9, dtype=dtype)])
    third = solve(Problem(matrix, torch.cat([a, more]), epsilon=0.3))
    for other in (second, third):
        assert float(other.value.detach()) == pytest.approx(float(first.value.detach()), rel=close)
        assert other.certificate.holds and other.certificate.gap <= 2 * first.certificate.gap
    (first.value + second.value).backward()
    torch.testing.assert_close(live[1].grad[:60], live[0].grad, rtol=100 * close, atol=close / 6)
    assert (live[1].grad[60:] == 0).all()


@pytest.mark.parametrize("sides", [{}, {"rows": KL(1.0)}, {"columns": KL(1.0)}], ids=str)
def test_second_derivatives_in_weights_are_those_of_differences_at_empty_bins_too(sides):
    """Of one more-sided difference there: a weight cannot be taken from a bin that has none."""
    x, y = (torch.tensor(z) for z in clouds(7, 6))
    a, b, along = weights(7, 1, 3), weights(6, 2), np.r_[0.2, -0.1, 0.1, 0.3, -0.2, -0.1, -0.2]

    def slopes(step, *, graph=False):
        given = torch.tensor(a + step * along, requires_grad=True), torch.tensor(b, requires_grad=True)
        value = solve(Problem(Points(x, y), *given, epsilon=0.4, **sides), TIGHT).value
        return given, torch.autograd.grad(value, given, create_graph=graph)

    given, first = slopes(0.0, graph=True)
    found = torch.autograd.grad((first[0] * torch.tensor(along)).sum(), given)
    steps = [slopes(k * 1e-4)[1] for k in range(3)]
    for k in range(2):
        expected = (-1.5 * steps[0][k] + 2 * steps[1][k] - 0.5 * steps[2][k]) / 1e-4
        off = found[k] - expected  # between fixed sides a gradient in weights is one up to a number
        torch.testing.assert_close(off - off.mean(), torch.zeros_like(off), rtol=0, atol=2e-5)
        if sides:
            torch.testing.assert_close(off, torch.zeros_like(off), rtol=0, atol=2e-5)


# -- memory ------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        held = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor) and not x.is_sparse]
        self.size = max([self.size, *(x.numel() for x in held)])
        return made


def most_held(action):
    """The largest number of float64 elements that torch held at a time during an action, beyond those held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max() / 8


def assert_held(action, blocks):
    """No tensor above one block, and no more than so many of them at a time."""
    with Largest() as largest, pytest.MonkeyPatch.context() as here:
        here.setattr(threads, "allowed", lambda: 1)  # other threads' blocks would not be seen
        held = most_held(action)
    assert costs._BLOCK / 8 < largest.size <= costs._BLOCK
    assert largest.size <= held <= blocks * costs._BLOCK


def test_distances_too_many_for_an_interior_point_are_solved_by_second_order(monkeypatch):
    """As on a device: after the sweeps it has patience for, a solve goes on in blocks of the plan, and is certified."""
    front = sys.modules["iotsolve.solve"]
    for name, value in (("_FITS", 1), ("_PATIENT", 20), ("_LAST", 1)):
        monkeypatch.setattr(front, name, value)
    monkeypatch.setattr(sys.modules["iotsolve.problem"], "_MANY", 0)
    problem = Problem(Points(*clouds(60, 50), "euclidean"), epsilon=0.02)
    solution = solve(problem)
    assert solution.certificate.holds and 20 < solution.steps < 60
    monkeypatch.setattr(front.Newton, "run", lambda self, problem, start: solver.iterate(problem, Sinkhorn(max_steps=1), start))
    assert not solve(problem, throw=False).converged


@pytest.mark.parametrize("sides", [{}, {"rows": KL(1.0)}, {"rows": AT_MOST, "columns": AT_MOST, "mass": 0.7}], ids=str)
def test_second_order_in_tensors_is_that_in_numpy(sides, monkeypatch):
    """As on a device, where nothing is NumPy's: steps, and derivatives by their linear system."""
    found, drawn = [], np.random.default_rng(1).normal(size=60)
    for in_numpy in (True, False):
        asked = []
        monkeypatch.setattr(QuickPlan, "in_numpy", property(lambda plan, is_so=in_numpy, asked=asked: asked.append(1) or is_so))
        x, y = leaves(*clouds(60, 50))
        solution = solve(Problem(Points(x, y), epsilon=0.2, **sides), Newton(tolerance=1e-12), gradient=Implicit())
        (solution.f * torch.tensor(drawn)).sum().backward()
        assert asked and solution.converged
        found.append([solution.f.detach(), solution.g.detach(), x.grad, y.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@over_regimes
@over_metrics
def test_points_too_many_for_a_matrix_have_its_answer(metric, regime, monkeypatch):
    """What the automatic solver does with them, as if these were."""
    points, matrix = both(metric, regime, 0.5)
    expected = solve(matrix, tolerance=1e-10)
    for name in ("_FEW", "_MANY"):
        monkeypatch.setattr(sys.modules["iotsolve.problem"], name, 0)
    assert_same(solve(points, tolerance=1e-10), expected, rtol=1e-5, atol=1e-5)
    assert solve(points).certificate.holds


@pytest.mark.parametrize("sides", [{}, {"rows": KL(1.0)}], ids=str)
@pytest.mark.parametrize("tolerance, digits", [(1e-3, 1e-6), (1e-6, 0.05)])  # a gap of 1e-10 has few
def test_the_certificate_of_distances_is_that_of_their_matrix(tolerance, digits, sides, monkeypatch):
    """Which is made once, and not at every product that corrects the plan."""
    x, y = clouds(70, 60)
    points, matrix = (
        Problem(z, epsilon=0.02, **sides)
        for z in (Points(x, y, "euclidean"), np.linalg.norm(x[:, None] - y[None], axis=-1))
    )
    solution, made = solve(points, tolerance=tolerance), []
    blocks = Points.blocks
    monkeypatch.setattr(Points, "blocks", lambda self: made.append(1) or blocks(self))
    found, expected = (certify(problem, solution.f, solution.g) for problem in (points, matrix))
    assert len(made) == 1 and found.holds == expected.holds
    for name, rtol in (("primal", 1e-6), ("dual", 1e-6), ("mass", 1e-6), ("gap", digits)):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("solver", [Sinkhorn(tolerance=1e-10), Newton(tolerance=1e-10)], ids=["sweeps", "newton"])
def test_an_explicit_solver_reads_a_matrix_of_distances_that_is_made_once(solver, monkeypatch):
    x, y = clouds(70, 60)
    expected, made = solve(Problem(np.linalg.norm(x[:, None] - y[None], axis=-1), epsilon=0.2), solver), []
    problem, blocks = Problem(Points(x, y, "euclidean"), epsilon=0.2), Points.blocks
    monkeypatch.setattr(Points, "blocks", lambda self: made.append(1) or blocks(self))
    found = solve(problem, solver)
    assert len(made) == 1 and found.steps == expected.steps > 1
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-12)


def test_few_points_are_a_matrix_and_never_its_differences():
    """Of distances, whose differences are as many matrices as there are dimensions."""
    problem = Problem(Points(*clouds(700, 700, 40), "euclidean"), epsilon=3.0)
    with pytest.MonkeyPatch.context() as here:
        here.setattr(threads, "allowed", lambda: 1)
        held = most_held(lambda: solve(problem))
    assert held < 4 * 700 * 700


def test_double_points_begin_in_single_precision(monkeypatch):
    """And end where they would have, as on a device: the first sweeps are half the work."""
    front, seen = sys.modules["iotsolve.solve"], []
    step = front.iterate

    def counted(problem, solver, start):
        done = step(problem, solver, start)
        seen.append((problem.dtype, max(done.steps)))
        return done

    monkeypatch.setattr(front, "iterate", counted)
    monkeypatch.setattr(sys.modules["iotsolve.problem"], "_FEW", 0)
    monkeypatch.setattr(front.Accelerated, "fits", lambda problem: False)
    cost = Points(*clouds(600, 600))
    climbed = solve(Problem(cost, epsilon=1.0), tolerance=1e-10)
    assert [dtype for dtype, _ in seen] == [torch.float32, torch.float64] and seen[1][1] < seen[0][1] + 20
    assert climbed.steps == sum(steps for _, steps in seen) and climbed.certificate.holds
    direct = solve(Problem(cost, epsilon=1.0), Sinkhorn(tolerance=1e-10))
    np.testing.assert_allclose(climbed.value, direct.value, rtol=1e-9)
    seen.clear()
    front._climbed(Problem(cost, epsilon=1e-7).flat(), Sinkhorn(max_steps=1), None)
    assert [dtype for dtype, _ in seen] == [torch.float64]  # single precision has no digit of such exponents


@over_metrics
def test_points_never_make_a_matrix(metric, monkeypatch):
    """n = m = 3000: ten blocks at a time where the matrix is 34 of them, back, and twenty there, where a certificate is asked for
    because one step is too few."""
    monkeypatch.setattr(bilinear, "_BLOCK", costs._BLOCK)
    monkeypatch.setattr(sys.modules["iotsolve.problem"], "_MANY", 0)  # as of more
    x, made = leaves(*clouds(3000, 3000, 2)), []

    def solving():
        problem = Problem(Points(*x, metric), epsilon=3.0, rows=KL(1.0), columns=TV(1.0))
        made.append(solve(problem, Sinkhorn(max_steps=1, annealing=None), throw=False).value)

    assert_held(solving, 20)
    assert_held(lambda: made[0].backward(), 10)
    assert all(z.grad.abs().max() > 0 for z in x)


def small_blocks(monkeypatch):
    for passes, name in ((costs, "_BLOCK"), (bilinear, "_BLOCK"), (bilinear, "_SHARED")):
        monkeypatch.setattr(passes, name, 2**15)


def test_what_is_read_of_a_plan_never_makes_a_matrix(monkeypatch):
    """Twenty blocks at a time where the matrix is 30 of them: the divergences of the certificate have many terms."""
    small_blocks(monkeypatch)
    solution = solve(
        Problem(Points(*clouds(1000, 1000)), epsilon=3.0, rows=KL(1.0)), Sinkhorn(max_steps=3), throw=False
    )
    assert_held(lambda: solution.row_marginal + solution.column_marginal + solution.transport_cost, 10)
    assert_held(lambda: certify(solution.problem, solution.f, solution.g), 20)
    assert solution.certificate.gap < math.inf


@pytest.mark.parametrize("gradient", [Implicit(), Unroll(3)], ids=["implicit", "unroll"])
@pytest.mark.parametrize("empty", [None, 3])
@pytest.mark.parametrize("of", ["f", "row_marginal", "transport_cost", "apply"])
def test_a_derivative_of_what_the_potentials_determine_never_makes_a_matrix(of, empty, gradient, monkeypatch):
    small_blocks(monkeypatch)
    x = leaves(*clouds(700, 700))
    problem = Problem(Points(*x), weights(700, 1, empty), weights(700, 2, empty), epsilon=3.0, rows=KL(1.0))
    output = getattr(solve(problem, gradient=gradient), of)
    output = output(x[1]) if of == "apply" else output
    assert_held(lambda: (output**2).sum().backward(), 8)
    assert all(z.grad.abs().max() > 0 for z in x)


@pytest.mark.parametrize("empty", [None, 3])
def test_a_second_derivative_of_the_value_never_makes_a_matrix(empty, monkeypatch):
    small_blocks(monkeypatch)
    x = leaves(*clouds(700, 700))
    value = solve(Problem(Points(*x), weights(700, 1, empty), epsilon=3.0, rows=KL(1.0))).value
    slopes = []
    assert_held(lambda: slopes.append(torch.autograd.grad(value, x, create_graph=True)), 8)
    assert_held(lambda: (slopes[0][0] ** 2).sum().backward(), 8)
    assert all(z.grad.abs().max() > 0 for z in x)


def test_the_count_of_memory_sees_a_matrix():
    with Largest() as largest:
        held = most_held(lambda: Points(*(torch.tensor(z) for z in clouds(500, 500))).dense())
    assert largest.size == 500 * 500 and held >= 500 * 500


# -- points on a line --------------------------------------------------------------------------------------------------


def on_line(*arrays):
    return [np.asarray(z, dtype=float)[:, None] for z in arrays]


def transport(cost, a, b):
    """The value of the linear program, by HiGHS."""
    n, m = cost.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    return linprog(cost.ravel(), A_eq=np.r_[rows, columns], b_eq=np.r_[a, b], method="highs").fun


def assert_optimal(solution, cost, a, b, *, atol=1e-12):
    """Plan and potentials prove each other, by arithmetic of NumPy alone."""
    plan, f, g = solution.sparse_plan, solution.f, solution.g
    size = np.abs(cost).max() + np.abs(f).max() + np.abs(g).max()
    assert plan.nnz <= len(a) + len(b) - 1 and (plan.data > 0).all()
    np.testing.assert_allclose(plan.sum(1), a, rtol=0, atol=atol * a.sum())
    np.testing.assert_allclose(plan.sum(0), b, rtol=0, atol=atol * a.sum())
    assert (a[plan.row] > 0).all() and (b[plan.col] > 0).all()
    slack = cost - f[:, None] - g[None, :]
    assert slack.min() >= -atol * size
    assert np.abs(slack[plan.row, plan.col]).max() <= atol * size
    assert solution.value == pytest.approx((plan.data * cost[plan.row, plan.col]).sum(), rel=1e-12, abs=atol * size)


FUNCTIONS = {
    "power": (lambda z: z.abs() ** 1.5, lambda z: np.abs(z) ** 1.5),
    "late": (lambda z: 3 * z.clamp(min=0.0) - z.clamp(max=0.0), lambda z: np.where(z > 0, 3 * z, -z)),
    "exponential": (torch.exp, np.exp),
    "constant": (lambda z: 0 * z + 2.0, lambda z: 0 * z + 2.0),
}
CONCAVE = {
    "root": (lambda z: z.abs().sqrt(), lambda z: np.sqrt(np.abs(z))),
    "wave": (lambda z: torch.cos(3 * z), lambda z: np.cos(3 * z)),
    "gain": (lambda z: -z.square(), lambda z: -(z**2)),
}
ON_A_LINE = FUNCTIONS | {
    "sqeuclidean": ("sqeuclidean", np.square),
    "euclidean": ("euclidean", np.abs),
}
SMALL = st.integers(-4, 4).map(lambda k: k / 2)
MASSES = st.integers(0, 5).map(lambda k: k / 4)


@st.composite
def lines(draw):
    """Points with ties and weights with zeros at either end, of equal totals up to rounding."""
    x, y = (draw(st.lists(SMALL, min_size=1, max_size=6)) for _ in range(2))
    a, b = (np.array(draw(st.lists(MASSES, min_size=len(z), max_size=len(z)))) for z in (x, y))
    a[draw(st.integers(0, len(a) - 1))] += 0.3
    b[draw(st.integers(0, len(b) - 1))] += 0.1
    return np.array(x), np.array(y), a, b * (a.sum() / b.sum())


@given(metric=st.sampled_from([*ON_A_LINE]), line=lines())
def test_points_on_a_line_have_the_value_of_the_linear_program(metric, line):
    x, y, a, b = line
    h, of_numpy = ON_A_LINE[metric]
    cost = of_numpy(x[:, None] - y[None, :])
    solution = solve(Problem(Points(*on_line(x, y), h), a, b))
    assert solution.exact_plan.is_sparse
    assert_optimal(solution, cost, a, b)
    assert solution.value == pytest.approx(transport(cost, a, b), rel=1e-9, abs=1e-9)
    certificate = solution.certificate
    assert certificate.holds and certificate.gap <= 1e-12 * a.sum() * (1 + np.abs(cost).max())


@given(metric=st.sampled_from(["dot", *CONCAVE]), line=lines())
def test_what_is_not_convex_on_a_line_is_solved_all_the_same(metric, line):
    """A scalar product is convex in effect; a claim of convexity is not taken from anybody."""
    x, y, a, b = line
    h, of_numpy = CONCAVE.get(metric, ("dot", None))
    cost = -np.outer(x, y) if of_numpy is None else of_numpy(x[:, None] - y[None, :])
    solution = solve(Problem(Points(*on_line(x, y), h), a, b))
    assert solution.value == pytest.approx(transport(cost, a, b), rel=1e-9, abs=1e-9)
    assert solution.certificate.holds


@pytest.mark.parametrize("metric", CONCAVE)
def test_matching_in_order_is_not_what_a_concave_cost_wants(metric):
    h, of_numpy = CONCAVE[metric]
    x, y = np.arange(4.0), np.arange(4.0) + (0.0 if metric == "wave" else 1.0)
    solution = solve(Problem(Points(*on_line(x, y), h)))
    in_order = of_numpy(x - y).mean()
    assert solution.value < in_order - 0.1 and solution.converged and not solution.exact_plan.is_sparse


def in_order(h, x, y, a, b):
    """Integral over [0, total] of h between the two quantile functions, in extended precision."""
    i, j = x.argsort(), y.argsort()
    up, down = (w.astype(np.longdouble).cumsum() for w in (a[i], b[j]))
    down *= up[-1] / down[-1]
    levels = np.union1d(up, down)
    widths = np.diff(levels, prepend=0)
    middle = (levels - widths / 2)[levels <= min(up[-1], down[-1])]
    apart = x[i[np.searchsorted(up, middle)]] - y[j[np.searchsorted(down, middle)]]
    return (widths[: len(middle)] * h(apart)).sum()


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_a_hundred_thousand_points_on_a_line(metric):
    rng, n, m = np.random.default_rng(0), 100_000, 99_000
    x, y = rng.normal(size=n), rng.normal(size=m) ** 3
    a, b = rng.random(n), rng.random(m)
    a[::10] = b[::3] = a[x > 3] = b[y > 2] = b[y < -2] = 0.0  # at either end too, where rounding collects
    b *= a.sum() / b.sum()
    solution = solve(Problem(Points(*on_line(x, y), metric), a, b))
    plan, f, g = solution.sparse_plan, solution.f, solution.g
    assert plan.nnz <= n + m - 1 and (a[plan.row] > 0).all() and (b[plan.col] > 0).all()
    if metric == "euclidean":
        assert solution.value == pytest.approx(a.sum() * wasserstein_distance(x, y, a, b), rel=1e-12)
    h = {"euclidean": np.abs, "sqeuclidean": np.square}[metric]
    assert solution.value == pytest.approx(float(in_order(h, x, y, a, b)), rel=1e-13)
    # Plan and potentials are cumulative sums: off by the rounding of n + m terms, of the size of the largest.
    rounding, size = (n + m) * np.finfo(float).eps, np.abs(f).max() + np.abs(g).max()
    assert solution.value == pytest.approx(a @ f + b @ g, abs=rounding * a.sum() * size)
    assert solution.value == pytest.approx((plan.data * h(x[plan.row] - y[plan.col])).sum(), rel=1e-12)
    np.testing.assert_allclose(plan.sum(1), a, rtol=0, atol=rounding * a.sum())
    np.testing.assert_allclose(plan.sum(0), b, rtol=0, atol=rounding * a.sum())
    i, j = rng.integers(n, size=10**6), rng.integers(m, size=10**6)
    i, j = np.r_[i, plan.row], np.r_[j, np.roll(plan.col, 1)]
    assert (h(x[i] - y[j]) - f[i] - g[j]).min() >= -rounding * size


def test_the_certificate_of_a_line_in_single_precision_is_in_double():
    rng = np.random.default_rng(0)
    x, y = (torch.tensor(rng.normal(size=(n, 1)), dtype=torch.float32) for n in (40, 30))
    solution = solve(Problem(Points(x, y, "euclidean")))
    exact = wasserstein_distance(x[:, 0].double(), y[:, 0].double())
    certificate = solution.certificate
    assert solution.value.dtype == torch.float32 and certificate.dual.dtype == np.float64
    assert certificate.holds and certificate.dual <= exact * (1 + 1e-6) and exact <= certificate.primal * (1 + 1e-6)
    assert certificate.gap <= 1e-6 * exact


def test_the_gradient_on_a_line_is_that_of_differences():
    (x, y), a, b = on_line(*(np.random.default_rng(k).normal(size=4) for k in (0, 1))), weights(4, 2), weights(4, 3)
    for h, of_numpy in ON_A_LINE.values():
        live = leaves(x, y)
        solve(Problem(Points(*live, h), a, b)).value.sum().backward()
        assert_slope(lambda z, h=of_numpy: transport(h(z - y.T), a, b), x, live[0].grad)
        assert_slope(lambda z, h=of_numpy: transport(h(x - z.T), a, b), y, live[1].grad)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("metric", ["exponential", "wave"])
def test_a_function_of_the_difference_is_a_cost_like_any_other(metric, regime, monkeypatch):
    """With entropy, in small blocks, its sides not alike: the second side must not take h(x - y) for h(y - x)."""
    monkeypatch.setattr(costs, "_BLOCK", 13)
    h, of_numpy = (FUNCTIONS | CONCAVE)[metric]
    rng, sides = np.random.default_rng(3), REGIMES[regime]
    (x, y), a, b = on_line(rng.normal(size=7), rng.normal(size=5)), weights(7, 1, 3), weights(5, 2)
    one = solve(Problem(Points(x, y, h), a, b, epsilon=0.5, **sides), TIGHT)
    other = solve(Problem(of_numpy(x - y.T), a, b, epsilon=0.5, **sides), TIGHT)
    assert_same(one, other)
    live = leaves(x, y)
    solve(Problem(Points(*live, h), a, b, epsilon=0.5, **sides), TIGHT).value.backward()

    def value(apart):
        return solve(Problem(of_numpy(apart), a, b, epsilon=0.5, **sides), TIGHT).value

    assert_slope(lambda z: value(z - y.T), x, live[0].grad)
    assert_slope(lambda z: value(x - z.T), y, live[1].grad)


# -- where the points are does not matter ------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_a_large_common_offset_costs_no_digits(metric, epsilon):
    """Coordinates that are multiples of 2^-10 stay exact a million away, where the square has no room for them."""
    x, y = (np.round(z * 1024) / 1024 for z in clouds())
    near, far = (solve(Problem(Points(x + c, y + c, metric), epsilon=epsilon)) for c in (0.0, 1e6))
    assert_same(far, near, rtol=1e-10, atol=1e-10)
    expected = solve(Problem(cdist(x, y, metric), epsilon=epsilon)).value
    assert far.value == pytest.approx(expected, rel=1e-12)


@st.composite
def motions(draw):
    """A seed of clouds, and a shift and a rotation or reflection of the plane."""
    angle, mirror = draw(st.floats(0, 2 * math.pi)), draw(st.sampled_from([1.0, -1.0]))
    turn = np.array([[math.cos(angle), -mirror * math.sin(angle)], [math.sin(angle), mirror * math.cos(angle)]])
    shift = np.array([draw(st.floats(-1000, 1000)), draw(st.floats(-1000, 1000))])
    return draw(st.integers(0, 1000)), turn, shift


@given(motion=motions(), metric=st.sampled_from(METRICS), epsilon=st.sampled_from([0.0, 2.0]))
def test_a_motion_of_the_plane_changes_nothing(motion, metric, epsilon):
    """Angles and scalar products do not survive a shift, so they are only turned; gradients turn along."""
    seed, turn, shift = motion
    shift = shift if metric in ("sqeuclidean", "euclidean") else 0.0
    x, y = clouds(5, 4, 2, seed)
    live, moved = leaves(x, y), leaves(x @ turn.T + shift, y @ turn.T + shift)
    one, other = (solved(Problem(Points(*z, metric), epsilon=epsilon)) for z in (live, moved))
    assert float(other.value.detach()) == pytest.approx(float(one.value.detach()), rel=1e-9, abs=1e-9)
    (one.value + other.value).backward()
    for before, after in zip(live, moved, strict=True):
        np.testing.assert_allclose(after.grad, before.grad.numpy() @ turn.T, rtol=1e-6, atol=1e-7)


@given(factors=st.lists(st.floats(1e-3, 1e3), min_size=9, max_size=9), seed=st.integers(0, 1000))
def test_an_angle_does_not_know_lengths(factors, seed):
    x, y = clouds(5, 4, 2, seed)
    long_x, long_y = x * np.array(factors[:5])[:, None], y * np.array(factors[5:])[:, None]
    one, other = (solve(Problem(Points(*z, "cosine"))) for z in ((x, y), (long_x, long_y)))
    assert other.value == pytest.approx(one.value, rel=1e-12, abs=1e-14)
    np.testing.assert_allclose(other.plan, one.plan, rtol=0, atol=1e-14)


# -- misuse ------------------------------------------------------------------------------------------------------------

X, Y = clouds()
LINE = on_line([0.0, 1.0], [2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    "points, message",
    [
        ((X, Y[:, :2]), r"x \(6, 3\) and y \(5, 2\): must be \(\.\.\., n, d\).*same d"),
        ((X[:, 0], Y), r"x \(6,\).*Points on a line are columns: x\[:, None\]"),
        ((X, Y[0]), r"y \(3,\): must be"),
        ((X[:0], Y), r"x \(0, 3\).*must be"),
        ((X[:, :0], Y[:, :0]), r"same d >= 1"),
        (
            (np.stack([X, X]), np.stack([Y, Y, Y])),
            r"\(2, 6, 3\) and y \(3, 5, 3\).*do not broadcast.*batch's, or absent",
        ),
        ((np.where(X[1, 2] == X, np.nan, X), Y), r"x\[1, 2\] = nan: points must be finite.*Drop"),
        ((X, np.where(Y[0, 1] == Y, -np.inf, Y)), r"y\[0, 1\] = -inf: points must be finite"),
        (
            (X, Y, "manhattan"),
            r"metric = 'manhattan': must be one of sqeuclidean, euclidean, cosine, sphere, dot.*as a matrix",
        ),
        ((X, Y, None), r"metric = None: must be one of"),
        ((X, Y, ["dot"]), r"metric = \['dot'\]: must be one of"),
        ((X * np.array([1, 0, 1, 1, 1, 1])[:, None], Y, "cosine"), r"x\[1\] is the zero vector.*no direction.*Drop it"),
        ((X, 0 * Y, "cosine"), r"y\[0\] is the zero vector"),
        ((X, Y, "sphere", None, "auto", True, True), r"unit = True and a point of length .* Normalise the points"),
        ((1e200 * X, Y), r"so far apart that their sqeuclidean cost overflows torch.float64: rescale"),
        ((X.astype(str), Y), r"x has dtype <U\d+: it must hold real numbers"),
        ((X, Y + 0j), r"y has dtype complex128: it must hold real numbers"),
        (([[0.0], [0.0, 1.0]], Y), r"x is no array.*equal lengths"),
        ((X, Y, torch.abs), r"a function of the difference x - y, and points with d = 3: .* d = 1.*as a matrix"),
        ((*LINE, np.abs), r"fails on a tensor of shape \(1, 3\) \(RuntimeError: .*\)\. It must be written for torch"),
        ((*LINE, lambda z: z.largest), r"fails on a tensor.*AttributeError.*must be written for torch"),
        (
            (*LINE, lambda z: z.sum()),
            r"of shape \(1, 3\), torch.float64: shape \(\), torch.float64.*one cost for each.*sum",
        ),
        ((*LINE, lambda z: z.float()), r"shape \(1, 3\), torch.float32\. It must give.*same dtype"),
        ((*LINE, lambda z: 1.0), r"torch.float64: 1\.0\. It must give one cost for each"),
        ((*LINE, lambda z: z.sqrt()), r"infinite or NaN at some difference: it must be finite.*root.*barred="),
        ((*LINE, lambda z: 1 / (z + 2)), r"infinite or NaN at some difference"),
    ],
)
def test_misuse_is_told(points, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Problem(Points(*points), epsilon=0.5)


def test_whole_numbers_are_points():
    """As NumPy they are float64; as torch tensors of integers, torch's default."""
    x, y = np.array([[0, 1], [2, 3]]), np.array([[1, 1], [5, 3], [0, 0]])
    found = solve(Problem(Points(x, y), epsilon=1.0))
    assert found.value.dtype == np.float64
    assert found.value == pytest.approx(solve(Problem(cdist(x, y, "sqeuclidean"), epsilon=1.0)).value, rel=1e-12)
    assert Problem(Points(torch.tensor(x), torch.tensor(y)), epsilon=1.0).dtype == torch.get_default_dtype()


def test_points_of_numpy_and_torch_may_meet():
    x, y = clouds()
    solution = solve(Problem(Points(torch.tensor(x), y), epsilon=0.5))
    assert isinstance(solution.value, torch.Tensor)
    assert float(solution.value) == pytest.approx(solve(Problem(cdist(x, y, "sqeuclidean"), epsilon=0.5)).value)


def test_the_points_given_are_not_changed():
    x, y = clouds()
    kept = x.copy(), y.copy()
    solve(Problem(Points(x, y), epsilon=0.5)).certificate  # noqa: B018
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(y, kept[1])


def test_a_dense_cost_is_its_matrix():
    cost = independent_cost(X, Y, "euclidean")
    one, other = solve(Problem(Dense(cost), epsilon=0.5)), solve(Problem(cost, epsilon=0.5))
    assert_same(one, other, rtol=0, atol=0)
