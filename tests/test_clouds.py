"""Points on a CPU: their kernels, stored or made again at every sweep, against NumPy; what is solved by them against matrices.

Problems here are large enough for compiled passes; ``STORED = 0`` takes away the room for a kernel, so that all is streamed.
"""

import math
import sys
import weakref

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import kl_div

from iotsolve import AT_MOST, FREE, KL, TV, Between, Implicit, Newton, Points, Problem, certify, solve
from iotsolve.accelerated import Accelerated
from iotsolve.kernels import gibbs, workspace
from iotsolve.kernels.dense import MATCH, RESPOND, SIDE
from iotsolve.kernels.numeric import LOG2E
from iotsolve.newton import Newton as NewtonSolver
from iotsolve.plans import Plan, plan_of
from iotsolve.problem import Potentials


@pytest.fixture(autouse=True)
def as_of_many(monkeypatch):
    """Points are swept as points here: of few the automatic solver makes a matrix."""
    monkeypatch.setattr(sys.modules["iotsolve.solve"], "_HELD", 0)


over_storage = pytest.mark.parametrize("stored", [True, False], ids=["stored", "streamed"])
SIDES = {
    "balanced": {},
    "kl": {"rows": KL(0.7), "columns": KL(0.3)},
    "semi-relaxed": {"columns": FREE},
    "tv": {"rows": TV(2.0)},
    "between": {"rows": Between(0.6, 1.5)},
    "partial": {"rows": AT_MOST, "columns": AT_MOST, "mass": 0.7},
}
over_sides = pytest.mark.parametrize("name", SIDES)


@pytest.fixture
def storage(stored, monkeypatch):
    if not stored:
        monkeypatch.setattr(workspace, "STORED", 0)


def drawn(n, m, d, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.random((n, d)).astype(dtype), (rng.random((m, d)) ** 1.3).astype(dtype)


def weights(n, seed, empty=()):
    w = np.random.default_rng(seed).uniform(0.5, 1.5, n)
    w[list(empty)] = 0.0
    return w / w.sum()


# -- kernels -------------------------------------------------------------------------------------------------------------


def kernels(x, y, epsilon, barred, dtype):
    """Both kinds, in one precision."""
    points = Points(torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype), "sqeuclidean", barred)
    form = points.bilinear_form(epsilon)
    single = np.float32 if dtype == torch.float32 else np.float64
    return gibbs.OfPoints(np.empty((len(x), len(y)), single), form, barred), gibbs.Streamed(form, barred)


@pytest.mark.parametrize("shape", [(60, 50), (7, 3), (700, 600), (1200, 5), (3, 9000)])
@pytest.mark.parametrize("bars", ["none", "mask", "columns"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sweep_is_that_of_numpy(shape, bars, dtype):
    (n, m), epsilon, close = shape, 0.4, 1e-12 if dtype == torch.float64 else 2e-6
    (x, y), rng = drawn(n, m, 3), np.random.default_rng(1)
    cost, barred = cdist(x, y, "sqeuclidean"), None
    if bars == "mask":
        barred = torch.from_numpy(rng.random(shape) < 0.2)
        cost[barred.numpy()] = math.inf
    elif bars == "columns":
        barred = torch.from_numpy(rng.integers(0, m, (n, 1)))
        cost[np.arange(n), barred[:, 0]] = math.inf
    alpha, beta = rng.normal(size=n), rng.normal(size=m)
    alpha[1], beta[2] = -math.inf, -math.inf
    expected = np.exp2(alpha[:, None] + beta - LOG2E * cost / epsilon)
    v, w = rng.random(m), rng.random(n)
    v = v.astype(np.float32).astype(float)
    for kernel in kernels(x, y, epsilon, barred, dtype):
        assert kernel.shape == shape
        kernel.absorb(alpha, beta)
        found, columns = kernel.product(w, v, as_given=True)
        np.testing.assert_allclose(found, expected @ v, rtol=close)
        np.testing.assert_allclose(columns, w @ expected, rtol=close)
        found, columns = kernel.product(w, v, as_given=False)
        np.testing.assert_allclose(columns, (w * (expected @ v)) @ expected, rtol=2 * close)
        sums, u, columns, none = np.empty(n), np.empty(n), np.empty(m), np.empty(0)
        kernel.sweep(v.astype(kernel.dtype), MATCH, w, none, none, SIDE, 0.0, sums, u, columns)
        live = sums > 0
        with np.errstate(divide="ignore"):
            scaled = np.where(live, w / (expected @ v), 0.0)
        np.testing.assert_allclose(u[live], scaled[live], rtol=close)
        np.testing.assert_allclose(columns, scaled @ expected, rtol=2 * close) if live.all() else None


@over_storage
def test_rows_that_answer_for_themselves_do_so_in_every_block(stored, storage):
    """A side with a slope and bounds, its numbers different in every row."""
    n, m, rng = 900, 400, np.random.default_rng(0)
    x, y = drawn(n, m, 2)
    kernel = kernels(x, y, 0.5, None, torch.float64)[0 if stored else 1]
    kernel.absorb(np.zeros(n), np.zeros(m))
    base, known, v, side, lam = rng.normal(size=n), rng.normal(size=n), rng.random(m), (0.6, -0.5, 0.0, 0.0, 0.4), 0.1
    sums, u, columns = np.empty(n), np.empty(n), np.empty(m)
    kernel.sweep(v, RESPOND, np.empty(n), base, known, side, lam, sums, u, columns)
    matrix = np.exp(-cdist(x, y, "sqeuclidean") / 0.5)
    answer = np.clip(0.6 * (base - np.log(matrix @ v) - lam), -0.5, 0.4)
    expected = np.exp(answer - known + lam)
    np.testing.assert_allclose(u, expected, rtol=1e-11)
    np.testing.assert_allclose(columns, expected @ matrix, rtol=1e-11)


def test_long_rows_keep_their_digits_in_single_precision():
    """A row of very many columns: its sum in float32 alone would lose a digit or two."""
    x, y = drawn(8, 200_000, 2)
    kernel = kernels(x, y, 0.5, None, torch.float32)[1]
    kernel.absorb(np.zeros(8), np.zeros(len(y)))
    found, _ = kernel.product(np.ones(8), np.ones(len(y)), as_given=True)
    exact = np.exp(-cdist(x.astype(np.float32), y.astype(np.float32), "sqeuclidean") / 0.5).sum(1)
    np.testing.assert_allclose(found, exact, rtol=3e-7)


def test_exponents_of_stored_kernels_are_as_good_as_the_points(monkeypatch):
    """At exponents of thousands float32 has no digits of their differences: the kernel's are made in float64."""
    x, y = drawn(70, 60, 3, dtype=np.float32)
    asked = []
    made = gibbs.OfPoints.__init__
    monkeypatch.setattr(gibbs.OfPoints, "__init__", lambda self, *given: asked.append(given[1][0].dtype) or made(self, *given))
    for epsilon, dtype in ((1.0, torch.float32), (2e-3, torch.float64)):
        Accelerated(1e-4, max_steps=3).run(Problem(Points(x, y), epsilon=epsilon).working().flat())
        assert set(asked) == {dtype}
        asked.clear()


def test_a_kernel_in_float32_does_not_claim_what_it_cannot_reach():
    problem = Problem(Points(*drawn(800, 700, 3)), epsilon=0.1).working().flat()
    for tolerance, reached in ((1e-5, True), (1e-6, True), (1e-9, False)):
        for stored in (workspace.STORED, 0):
            with pytest.MonkeyPatch.context() as here:
                here.setattr(workspace, "STORED", stored)
                done = Accelerated(tolerance).run(problem)
            assert (done.status[0].name == "CONVERGED") is reached


@pytest.mark.parametrize("most", [1, 6])
def test_two_precisions_share_the_steps(most, monkeypatch):
    """Where float32 begins and float64 ends, which looks once at least."""
    monkeypatch.setattr(workspace, "STORED", 0)
    swept, sweep = [], gibbs.Streamed.sweep
    monkeypatch.setattr(gibbs.Streamed, "sweep", lambda self, *given: swept.append(self.dtype) or sweep(self, *given))
    problem = Problem(Points(*drawn(300, 280, 3, dtype=np.float32)), epsilon=2e-3).working().flat()
    done = Accelerated(1e-5, max_steps=most).run(problem)
    assert done.status[0].name != "CONVERGED" and done.steps == [most + 1] == [len(swept)]
    assert swept == [np.float32] * most + [np.float64]


# -- solutions -----------------------------------------------------------------------------------------------------------


@over_storage
@over_sides
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "dot", "sphere"])
@pytest.mark.parametrize("epsilon", [0.3, 0.02])
def test_points_have_the_answer_of_a_matrix(name, metric, epsilon, stored, storage):
    x, y = drawn(70, 60, 3)
    a, b = weights(70, 1, [4]), weights(60, 2, [0, 7])
    cost = -x @ y.T if metric in ("dot", "sphere") else cdist(x, y, metric)
    matrix = Problem(cost + (metric == "sphere"), a, b, epsilon=epsilon, **SIDES[name])
    points = Problem(Points(x, y, metric), a, b, epsilon=epsilon, **SIDES[name])
    assert Accelerated.fits(points.flat())
    expected, found = solve(matrix, tolerance=1e-11), solve(points, tolerance=1e-11)
    assert found.certificate.holds and found.certificate.tolerance == 1e-11
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.plan, expected.plan, atol=1e-9)
    np.testing.assert_allclose(found.row_marginal, expected.row_marginal, atol=1e-9)
    # and it is judged by its matrix as by itself
    assert certify(matrix, found.f, found.g, found.mass_multiplier, tolerance=1e-10).holds


@pytest.mark.parametrize("as_given", [np.asarray, torch.from_numpy])
def test_a_mask_of_whole_numbers_is_no_list_of_columns(as_given):
    x, y = drawn(6, 5, 2)
    mask = np.random.default_rng(0).random((6, 5)) < 0.3
    with pytest.raises(ValueError, match=r"a mask must be boolean.*barred.astype\(bool\)"):
        Problem(Points(x, y, barred=as_given(mask.astype(int))), epsilon=0.1)
    with pytest.raises(ValueError, match="a mask must be boolean"):
        Problem(Points(x, y[:2], barred=as_given(np.zeros((6, 2), int))), epsilon=0.1)
    with pytest.raises(ValueError, match="names column 5, but there are 5, from 0"):
        Problem(Points(x, y, barred=as_given(np.array([[1], [2], [3], [4], [5], [1]]))), epsilon=0.1)


@over_storage
def test_barred_arcs_carry_nothing(stored, storage):
    x, y = drawn(64, 64, 3)
    cost = cdist(x, y, "sqeuclidean")
    np.fill_diagonal(cost, math.inf)
    for barred in (np.eye(64, dtype=bool), np.arange(64)[:, None]):
        found = solve(Problem(Points(x, y, "sqeuclidean", barred), epsilon=0.05))
        assert found.certificate.holds and not found.plan.diagonal().any()
        np.testing.assert_allclose(found.value, solve(Problem(cost, epsilon=0.05)).value, rtol=1e-7)


@over_storage
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [2, 40])
@pytest.mark.parametrize("epsilon", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("tolerance", [1e-3, None])
def test_converged_means_certified(epsilon, d, dtype, tolerance, stored, storage):
    """At a small epsilon too, where what a certificate fills in is priced by the largest cost."""
    for seed in range(3):
        problem = Problem(Points(*drawn(300, 280, d, seed, dtype)), epsilon=epsilon * d)
        solution = solve(problem, tolerance=tolerance, throw=False)
        assert solution.certificate.holds or not solution.converged
        if dtype == np.float64:
            assert solution.converged


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("epsilon", [0.02, 0.01])
def test_corrections_by_products_in_single_precision_do_not_drift(epsilon, seed, monkeypatch):
    """Along the constants, that a system between fixed sides does not see but for the rounding of exponents."""
    monkeypatch.setattr(workspace, "STORED", 2**10)
    monkeypatch.setattr(sys.modules["iotsolve.problem"], "_FEW", 0)
    solution = solve(Problem(Points(*drawn(540, 500, 3, seed, np.float32)), epsilon=epsilon))
    assert solution.certificate.holds


@pytest.mark.parametrize("points", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_newtons_method_goes_for_what_its_certificate_asks(points, seed):
    x, y = drawn(200, 180, 30, seed)
    cost = Points(x, y) if points else cdist(x, y, "sqeuclidean")
    solution = solve(Problem(cost, epsilon=0.05), tolerance=1e-8)
    again = solve(solution.problem, Newton(tolerance=1e-6), init=solution)
    assert solution.certificate.holds and again.certificate.holds


def test_what_newton_reaches_counts_where_its_aim_is_out_of_reach(monkeypatch):
    x, y = drawn(80, 70, 3)
    problem = Problem(Points(x, y), epsilon=0.003).working().flat()
    done = NewtonSolver(tolerance=1e-7).run(problem, Accelerated(1e-3).run(problem).potentials)
    assert [word.name for word in done.status] == ["CONVERGED"]
    halted = NewtonSolver.run.__globals__
    monkeypatch.setitem(halted, "dearness", lambda problem: 1e30)  # no aim will do
    done = NewtonSolver(tolerance=1e-7).run(problem, Accelerated(1e-3).run(problem).potentials)
    assert [word.name for word in done.status] == ["CONVERGED"]


@over_storage
@over_sides
def test_derivatives_are_those_of_a_matrix(name, stored, storage):
    """Of potentials, by a linear system whose products are the kernel's."""
    x, y, along = *drawn(60, 50, 3), torch.linspace(-1, 1, 60, dtype=torch.float64)
    found = []
    for of_points in (True, False):
        live = torch.tensor(x, requires_grad=True)
        cost = Points(live, torch.tensor(y)) if of_points else torch.cdist(live, torch.tensor(y)).square()
        solution = solve(Problem(cost, epsilon=0.2, **SIDES[name]), Newton(tolerance=1e-12), gradient=Implicit())
        ((solution.row_marginal * along).sum() + (solution.f * along).sum()).backward()
        found.append(live.grad)
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8)


@over_storage
@pytest.mark.parametrize("precise", [True, False])
def test_products_of_a_streamed_plan_are_those_of_the_plan(precise, stored, storage):
    (x, y), rng = drawn(90, 80, 3), np.random.default_rng(0)
    problem = Problem(Points(x, y), weights(90, 1), weights(80, 2), epsilon=0.1).flat()
    f, g = torch.from_numpy(0.1 * rng.normal(size=(1, 90))), torch.from_numpy(0.1 * rng.normal(size=(1, 80)))
    p = Potentials(f, g, torch.zeros(1, dtype=torch.float64))
    plan, matrix = plan_of(problem, p), problem.plan(p)
    plan, close = (plan.precise, 1e-12) if precise else (plan, 3e-6)
    u, v = torch.from_numpy(rng.random((1, 90))), torch.from_numpy(rng.random((1, 80)))
    torch.testing.assert_close(plan.times(v), (matrix @ v[..., None])[..., 0], rtol=close, atol=0)
    torch.testing.assert_close(plan.times_back(u), (matrix.mT @ u[..., None])[..., 0], rtol=close, atol=0)
    twice = (matrix.mT @ (u * (matrix @ v[..., None])[..., 0])[..., None])[..., 0]
    torch.testing.assert_close(plan.normal(u, v), twice, rtol=close, atol=0)
    rows = matrix.sum(-1)
    spread = (matrix * u[..., None] * (rows[..., None] - matrix)).sum(-2)
    torch.testing.assert_close(plan.spread(u, rows), spread, rtol=10 * close, atol=0)


# -- memory and work -----------------------------------------------------------------------------------------------------


def test_what_is_stored_of_points_has_a_bound(monkeypatch):
    """Kernels and copies of plans: of what is larger nothing is."""
    asked, take = [], workspace._take
    monkeypatch.setattr(workspace, "_take", lambda size: asked.append(size) or take(size))

    def work():
        asked.clear()
        solution = solve(Problem(Points(*drawn(300, 300, 3)), epsilon=0.004), tolerance=1e-9)
        assert solution.certificate.holds
        return max(asked, default=0)

    assert 300 * 300 * 4 <= work() <= 300 * 300 * 8
    for limit in (300 * 300 * 4, 300 * 300 * 4 - 1, 0):
        monkeypatch.setattr(workspace, "STORED", limit)
        assert work() <= limit
    assert workspace.STORED == 0


def test_newtons_method_holds_one_copy_of_a_plan(monkeypatch):
    """That of the point it stands at; the best of those it has left is potentials alone."""
    lent, most, lend = [], [], workspace.lend_to

    def counted(borrower, *given):
        lent.append(weakref.ref(borrower))
        most.append(sum(x() is not None for x in lent))
        return lend(borrower, *given)

    monkeypatch.setattr(workspace, "lend_to", counted)
    problem = Problem(Points(*drawn(300, 280, 3)), epsilon=0.02).working().flat()
    assert NewtonSolver(tolerance=1e-12).run(problem).status[0].name == "CONVERGED"
    assert len(most) > 3 and max(most) == 1


def test_blocks_of_very_many_columns_have_few_rows(monkeypatch):
    """A block is a few rows at least, and no more than its bound where rows are long."""
    sizes, made = [], gibbs.bilinear.exponential
    monkeypatch.setattr(gibbs.bilinear, "exponential", lambda worth, block: sizes.append(block.shape) or made(worth, block))
    monkeypatch.setattr(gibbs, "_ENTRIES", 2**16)
    monkeypatch.setattr(gibbs.bilinear, "_BLOCK", 2**16)
    for m, rows in ((100, 655), (3000, 21), (30_000, 4)):
        sizes.clear()
        x, y = drawn(900, m, 100)
        kernel = kernels(x, y, 50.0, None, torch.float64)[1]
        kernel.absorb(np.zeros(900), np.zeros(m))
        found, _ = kernel.product(np.ones(900), np.ones(m), as_given=True)
        np.testing.assert_allclose(found[:5], np.exp(-cdist(x[:5], y, "sqeuclidean") / 50.0).sum(1), rtol=1e-10)
        assert max(n for n, _ in sizes) <= rows


def test_points_are_centred_once(monkeypatch):
    """And far from the origin no digit is lost, block by block."""
    x, y = drawn(3000, 700, 2)
    far = Points(torch.tensor(x + 1e5), torch.tensor(y + 1e5))
    medians, median = [], torch.Tensor.median
    monkeypatch.setattr(torch.Tensor, "median", lambda *given, **how: medians.append(1) or median(*given, **how))
    whole = torch.cat([block.matrix for _, block in far.blocks()])
    assert len(medians) == 1 and len(list(far.blocks())) > 3
    np.testing.assert_allclose(whole, cdist(x + 1e5, y + 1e5, "sqeuclidean"), atol=1e-9)


@pytest.mark.parametrize("d", [1, 2, 60])
@pytest.mark.parametrize("seed", range(4))
def test_the_range_of_squared_distances_is_a_bound_and_remembered(d, seed):
    """By the diagonal of the box or by the distances from the centre, whichever is less; after a change in place anew."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(300, d)) + 10.0 * seed, rng.normal(size=(5, d)) ** 3
    points, cost = Points(torch.tensor(x), torch.tensor(y)), cdist(x, y, "sqeuclidean")
    both = np.concatenate([x, y])
    box = (np.ptp(both, axis=0) ** 2).sum()
    for _ in range(2):
        assert cost.max() <= float(points.range()) * (1 + 1e-12) and float(points.range()) <= box * (1 + 1e-12)
    if d == 60 and seed == 0:
        assert float(points.range()) < 0.8 * box
    points.x.mul_(3.0)
    assert cdist(3.0 * x, y, "sqeuclidean").max() <= float(points.range()) * (1 + 1e-12)


def test_a_part_of_points_is_not_taken_for_the_whole():
    """Its first rows begin where the whole begins."""
    x, y = (torch.tensor(z) for z in drawn(50, 40, 3))
    points = Points(x, y)
    points.bilinear_form(0.1)
    part = points.viewed(Points(x[:20], y))
    assert len(part.bilinear_form(0.1)[0]) == 20


def test_a_certificate_of_many_points_does_not_look_at_their_plan_for_ever(monkeypatch):
    """Potentials that are far from good: what is lacking is filled in after a few projections."""
    x, y = drawn(1100, 1000, 20)
    looks, sums = [], Plan._sums
    monkeypatch.setattr(Plan, "_sums", lambda self, of: looks.append(1) or sums(self, of))
    problem = Problem(Points(x, y), epsilon=0.05)
    rough = Accelerated(1e-2, max_steps=12).run(problem.working().flat()).potentials
    certificate = certify(problem, rough.f[0], rough.g[0])
    assert not certificate.holds and math.isfinite(certificate.gap)
    assert 0 < len(looks) < 40


def test_the_derivative_of_points_in_epsilon_is_the_divergence_of_their_plan():
    rng = np.random.default_rng(0)
    drawn = rng.random((7, 2)), rng.random((5, 2)), rng.uniform(0.5, 1.5, 7), np.full(5, 0.4)
    x, y, a, b = (torch.from_numpy(z) for z in drawn)
    epsilon = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    solution = solve(Problem(Points(x, y), a, b, epsilon=epsilon, rows=KL(1.0), columns=KL(2.0)), tolerance=1e-12)
    solution.value.backward()
    due = kl_div(solution.plan.detach().numpy(), np.outer(a, b)).sum()
    assert float(epsilon.grad) == pytest.approx(due, rel=1e-6)


METRICS_OF_A_LINE = {"squared": "sqeuclidean", "distance": "euclidean", "function": lambda apart: apart.abs() ** 1.5}


@pytest.mark.parametrize("metric", METRICS_OF_A_LINE.values(), ids=METRICS_OF_A_LINE)
@pytest.mark.parametrize("listed", [False, True])
def test_barred_pairs_of_the_line_are_those_of_the_matrix(metric, listed):
    """Sorted points would be matched in order, barred or not."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x, y, a = torch.from_numpy(rng.random((6, 1))).requires_grad_(), torch.from_numpy(rng.random((7, 1))), rng.random(6)
        barred = rng.integers(0, 7, (6, 1)) if listed else rng.random((6, 7)) < 0.15
        mask = np.zeros((6, 7), bool)
        np.put_along_axis(mask, barred, True, 1) if listed else np.copyto(mask, barred)
        apart = x - y.mT
        cost = {"sqeuclidean": apart.square, "euclidean": apart.abs}.get(metric, lambda apart=apart: metric(apart))()
        cost = torch.where(torch.from_numpy(mask), math.inf, cost)
        for options in ({}, {"epsilon": 0.05}, {"columns": AT_MOST, "rows": AT_MOST, "mass": 0.5}):
            known = {"a": a / a.sum(), **options}
            found, expected = solve(Problem(Points(x, y, metric, barred), **known)), solve(Problem(cost, **known))
            assert found.certificate.holds and float(found.plan.detach()[mask].sum()) == 0
            assert float(found.value.detach()) == pytest.approx(float(expected.value.detach()), rel=1e-7, abs=1e-10)
            (of_points,), (of_matrix,) = (torch.autograd.grad(s.value, x, retain_graph=True) for s in (found, expected))
            torch.testing.assert_close(of_points, of_matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", [(1,), (1, 1)], ids=str)
@pytest.mark.parametrize("size, features", [(4, 1), (150, 1), (150, 2), (300, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"rows": AT_MOST, "columns": AT_MOST, "mass": 0.5}], ids=["fixed", "mass"])
def test_a_batch_of_one_exact_problem_is_that_problem(batch, size, features, options):
    """Whose plan may be a list of arcs, which has no batch."""
    rng = np.random.default_rng(0)
    x, y, a, z = rng.random((size, features)), rng.random((size, features)), rng.random(size), rng.random((size, 3))
    options = {"a": a / a.sum(), **options}
    for lone in (Points(x, y), ((x[:, None] - y[None]) ** 2).sum(-1)):
        lifted = lone.reshape(*batch, size, size) if isinstance(lone, np.ndarray) else Points(x.reshape(*batch, *x.shape), y)
        one, many = solve(Problem(lone, **options)), solve(Problem(lifted, **options))
        for name in ("value", "plan", "f", "g", "row_marginal", "column_marginal", "mass", "transport_cost"):
            given, found = np.asarray(getattr(one, name)), np.asarray(getattr(many, name))
            assert found.shape == (*batch, *given.shape)
            np.testing.assert_allclose(found.reshape(given.shape), given, atol=1e-12)
        np.testing.assert_allclose(many.apply(np.broadcast_to(z, (*batch, *z.shape))).reshape(z.shape), one.apply(z), atol=1e-12)
        np.testing.assert_allclose(many.gradient().cost, many.plan, atol=1e-12)
        assert many.certificate.holds.all() and many.certificate.holds.shape == batch


@pytest.mark.parametrize("features", [1, 2])
def test_the_value_of_a_batch_of_one_leads_back_to_its_points(features):
    rng = np.random.default_rng(1)
    x, y = torch.from_numpy(rng.random((150, features))), torch.from_numpy(rng.random((150, features)))
    x.requires_grad_()
    (lone,) = torch.autograd.grad(solve(Problem(Points(x, y))).value, x)
    (found,) = torch.autograd.grad(solve(Problem(Points(x[None], y[None]))).value.sum(), x)
    torch.testing.assert_close(found, lone)
