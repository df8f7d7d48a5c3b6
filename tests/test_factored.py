"""Newton's steps whose systems are factored, by way of larger epsilons: small epsilons of few bins, and what others leave."""

import math
import sys

import numpy as np
import pytest
import torch

from iotsolve import AT_MOST, FIXED, KL, TV, Interior, Points, Problem, Status, certify, solve
from iotsolve.accelerated import Accelerated
from iotsolve.direct import Direct
from iotsolve.testing.references import numbers

SIDES = {
    "fixed": (FIXED, FIXED),
    "kl": (KL(0.5), KL(2.0)),
    "kl-fixed": (KL(0.3), FIXED),
    "fixed-kl": (FIXED, KL(0.05)),
}
COSTS = ("plane", "random", "cosine", "line")
over_sides = pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
over_costs = pytest.mark.parametrize("kind", COSTS)


def cost(kind, n, m, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 16)), rng.normal(size=(m, 16))
    if kind == "random":
        return rng.random((n, m))
    if kind == "cosine":
        found = 1 - (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T
    else:
        d = 2 if kind == "plane" else 1
        found = np.square(x[:, None, :d] - y[None, :, :d]).sum(-1)
    return found / found.max()


def weights(n, m, *, uneven, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(w / w.sum() for w in (rng.random(k) ** 2 + 0.01 if uneven else np.ones(k) for k in (n, m)))


def flat(problem):
    return problem.working().flat()


def run(problem, tolerance=1e-10):
    with torch.no_grad():
        return Direct(tolerance).run(flat(problem))


def asked_and_given(problem, f, g):
    """By logarithms of sums in NumPy: the plan's marginals, and what KL and fixed sides ask for at these potentials."""
    given, eps = numbers(problem), float(problem.epsilon)
    with np.errstate(divide="ignore"):
        plan = np.exp((f[:, None] + g - given.cost) / eps + np.log(given.a)[:, None] + np.log(given.b))
    sides = (problem.rows, given.a, f), (problem.columns, given.b, g)
    return [w * np.exp(-x / side.rho) if isinstance(side, KL) else w for side, w, x in sides], plan


@over_sides
@over_costs
@pytest.mark.parametrize(("n", "m"), [(7, 7), (40, 25), (25, 40), (150, 130)])
def test_any_cost_at_a_small_epsilon_is_solved_in_some_dozen_steps(sides, kind, n, m):
    """Where sweeps take thousands; the optimality conditions are looked at by other means."""
    a, b = weights(n, m, uneven=n != m)
    for epsilon in (0.1, 1e-3, 1e-4):
        problem = Problem(cost(kind, n, m), a, b, epsilon=epsilon, rows=sides[0], columns=sides[1])
        found = run(problem)
        assert found.status == [Status.CONVERGED] and found.steps[0] <= (200 if epsilon == 1e-4 else 60)
        f, g = (x[0].numpy() for x in (found.potentials.f, found.potentials.g))
        (rows, columns), plan = asked_and_given(problem, f, g)
        off = np.abs(plan.sum(1) - rows).sum() + np.abs(plan.sum(0) - columns).sum()
        assert off <= 1e-9 * plan.sum()


@over_sides
@pytest.mark.parametrize(("n", "m"), [(9, 6), (6, 9)])
def test_values_are_those_of_an_interior_point(sides, n, m):
    a, b = weights(n, m, uneven=True, seed=3)
    problem = Problem(cost("random", n, m, 3), a, b, epsilon=2e-3, rows=sides[0], columns=sides[1])
    p = run(problem).potentials
    value = solve(problem, Interior(tolerance=1e-12)).value
    assert certify(problem, p.f[0].numpy(), p.g[0].numpy()).dual == pytest.approx(value, rel=1e-9)


@over_sides
@pytest.mark.parametrize("large", [False, True])
def test_a_step_is_newtons_on_the_dual(sides, large):
    """Gradient and Hessian of the dual in the columns' potentials, the rows answering, by torch's automatic differentiation."""
    from iotsolve.kernels import ascent, gibbs

    n, m, eps = 8, 6, 0.05
    a, b = weights(n, m, uneven=True, seed=1)
    given = cost("plane", n, m, 1)
    rates = [eps / side.rho if isinstance(side, KL) else 0.0 for side in sides]  # potentials are in units of epsilon
    log_a, log_b, scaled = (torch.from_numpy(x) for x in (np.log(a), np.log(b), given / eps))

    def dual(g):
        s = -torch.logsumexp(log_b + g - scaled, 1)
        f = s / (1 + rates[0])
        terms = [
            (w.exp() * (x if not r else (1 - torch.exp(-r * x)) / r)).sum()
            for w, x, r in ((log_a, f, rates[0]), (log_b, g, rates[1]))
        ]
        return sum(terms) - torch.exp(log_a[:, None] + log_b + f[:, None] + g - scaled).sum()

    g = 0.3 * torch.from_numpy(np.random.default_rng(2).normal(size=m))
    slope = torch.func.jacrev(dual)(g)
    bend = torch.func.hessian(dual)(g)
    expected = -torch.linalg.lstsq(bend, slope[:, None], driver="gelsd", rcond=1e-12).solution[:, 0]

    kernel = np.exp(log_a.numpy()[:, None] + log_b.numpy() - scaled.numpy())  # around potentials of 0
    v = np.exp(g.numpy())
    y = kernel @ v
    slopes = [1 / (1 + rate) for rate in rates]
    f = slopes[0] * (np.log(a) - np.log(y))
    u = np.exp(f)
    sums = u @ kernel
    change = slopes[1] * (log_b.numpy() - np.log(sums)) - g.numpy()
    pulls, step, along = np.empty(m), np.empty(m), np.random.default_rng(3).normal(size=m)
    rise = ascent.pull(sums, g.numpy(), slopes[1], change, along, pulls)
    np.testing.assert_allclose(pulls, slope, rtol=1e-9, atol=1e-12)
    assert rise == pytest.approx(float(slope @ torch.from_numpy(along)), rel=1e-9)
    ascend = ascent.ascend_on_kernel if large else ascent.ascend
    stored = gibbs.Stored(kernel, given, 1.0) if large else kernel
    promised = ascend(stored, v, u, y, *slopes, sums, pulls, 0.0, step)
    if sides == (FIXED, FIXED):  # which a constant does not change
        step, expected = step - step.mean(), expected - expected.mean()
    np.testing.assert_allclose(step, expected, rtol=1e-6, atol=1e-9)
    assert promised == pytest.approx(float(slope @ expected), rel=1e-6)


@over_sides
def test_compiled_and_by_blas_are_one(sides, monkeypatch):
    a, b = weights(30, 21, uneven=True)
    problem = Problem(cost("plane", 30, 21), a, b, epsilon=3e-3, rows=sides[0], columns=sides[1])
    compiled = run(problem)
    monkeypatch.setattr("iotsolve.direct.TINY", 0)
    by_blas = run(problem)
    assert by_blas.status == compiled.status == [Status.CONVERGED] and by_blas.steps == compiled.steps
    for x, y in zip(problem.gauge(compiled.potentials).arrays(), problem.gauge(by_blas.potentials).arrays(), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-9)


@over_sides
@pytest.mark.parametrize("tiny", [2**14, 0])
def test_a_problem_of_a_batch_is_what_it_is_alone(sides, tiny, monkeypatch):
    """To the bit, beside others of a hundred times its range."""
    monkeypatch.setattr("iotsolve.direct.TINY", tiny)
    scaled = zip(COSTS, (1, 0.1, 10, 0.01), strict=True)
    costs = np.stack([cost(kind, 12, 9, k) * scale for k, (kind, scale) in enumerate(scaled)])
    a, b = weights(12, 9, uneven=True)
    together = run(Problem(costs, a, b, epsilon=3e-3, rows=sides[0], columns=sides[1]))
    for k in range(len(costs)):
        alone = run(Problem(costs[k], a, b, epsilon=3e-3, rows=sides[0], columns=sides[1]))
        assert together.steps[k] == alone.steps[0] and together.status[k] is alone.status[0] is Status.CONVERGED
        assert torch.equal(together.potentials.f[k], alone.potentials.f[0])
        assert torch.equal(together.potentials.g[k], alone.potentials.g[0])


@over_sides
def test_forbidden_arcs_and_empty_bins(sides):
    """Two blocks that nothing joins, where a system is singular twice, and bins without weight."""
    given = cost("random", 12, 12)
    given[:6, 6:] = given[6:, :6] = math.inf
    a, b = (np.concatenate([half / half.sum(), half / half.sum()]) / 2 for half in weights(6, 6, uneven=True))
    a[[1, 2]], b[[7, 9]] = (0.0, a[1] + a[2]), (b[7] + b[9], 0.0)
    problem = Problem(given, a, b, epsilon=2e-3, rows=sides[0], columns=sides[1])
    found = run(problem)
    assert found.status == [Status.CONVERGED]
    assert certify(problem, found.potentials.f[0].numpy(), found.potentials.g[0].numpy(), tolerance=1e-8).holds


def test_who_it_is_for():
    def fits(shape, **options):
        return Direct.fits(flat(Problem(np.zeros(shape), epsilon=0.1, **options)))

    assert fits((3, 4)) and fits((3, 4), rows=KL(1.0)) and fits((2000, 2000)) and fits((10, 5000))
    assert not fits((3, 4), rows=TV(1.0)) and not fits((3, 4), columns=AT_MOST) and not fits((2100, 2100))
    assert not fits((3, 4), rows=KL(1.0), columns=KL(1.0), mass=0.5)
    points = Points(np.zeros((3, 1)), np.ones((3, 1)))
    assert not Direct.fits(flat(Problem(points, epsilon=0.1)))
    with pytest.raises(ValueError, match="tolerance = 2"):
        Direct(2)


@over_costs
@pytest.mark.parametrize("n", [10, 100, 170, 450])
def test_the_automatic_solver_needs_no_thousand_sweeps(kind, n, monkeypatch):
    """At a thousandth of the range, where one alone takes thousands: what it cannot do soon is factored. Certified."""
    with monkeypatch.context() as here:
        here.setattr(sys.modules["iotsolve.solve"].Interior, "run", lambda *_: pytest.fail("an interior point"))
        solution = solve(Problem(cost(kind, n, n, 5), epsilon=1e-3), tolerance=1e-6)
    assert solution.certificate.holds and solution.steps <= 300 + 3 * n


def test_what_it_cannot_do_leaves_others_what_they_had(monkeypatch):
    """Potentials that have not converged here are no better than those of the sweeps that it began after."""
    problem = Problem(cost("random", 10, 10), epsilon=1e-3)
    monkeypatch.setattr("iotsolve.direct._STEPS", 1)
    automatic = sys.modules["iotsolve.solve"]._Automatic(1e-8)
    with torch.no_grad():
        swept = Accelerated(1e-8).patient(flat(problem), 40).run(flat(problem))
        left = automatic._factored(flat(problem), swept)
    assert swept.status != [Status.CONVERGED] and left.status != [Status.CONVERGED]
    assert torch.equal(swept.potentials.f, left.potentials.f) and left.steps[0] > swept.steps[0]


def test_mass_beyond_the_range_of_floats_is_certified_by_nobody():
    """Compiled exponentials end where floats do, and a plan that has reached that end says nothing."""
    problem = Problem([[-500.0]], [1.0], [1.0], epsilon=1e-5, rows=KL(1e-3), columns=KL(1e-3))
    assert not certify(problem, [-0.7091], [-0.7091]).holds
    assert run(problem).status != [Status.CONVERGED]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("given", ["sqeuclidean", "euclidean", "cosine", "matrix"])
@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
def test_few_arcs_are_solved_in_float64_whatever_they_came_as(given, dtype, epsilon, monkeypatch):
    """In single precision potentials have digits for what sweeps and steps in single precision never reach."""
    rng = np.random.default_rng(0)
    x, y = rng.random((40, 3)).astype(dtype), rng.random((30, 3)).astype(dtype)
    points = Points(x, y, "sqeuclidean" if given == "matrix" else given)
    exact = Points(x.astype(float), y.astype(float), points.metric)
    scale = epsilon * float(Problem(exact).cost.dense().max())
    cost = Problem(points).cost.dense().numpy() if given == "matrix" else points
    tolerance = 1e-9 if dtype is np.float64 else 1e-5 if epsilon == 0.1 else 1e-4  # what potentials of that dtype can say
    solution = solve(Problem(cost, epsilon=scale), tolerance=tolerance)
    assert solution.certificate.holds and solution.f.dtype == solution.plan.dtype == dtype
    sharp = solve(Problem(exact, epsilon=scale), Interior(tolerance=1e-12))
    np.testing.assert_allclose(solution.value, sharp.value, rtol=tolerance)
    if epsilon == 0.1 or dtype is np.float64:
        monkeypatch.setattr(sys.modules["iotsolve.solve"], "_HELD", 0)
        swept = solve(Problem(cost, epsilon=scale), tolerance=tolerance)
        np.testing.assert_allclose(solution.value, swept.value, rtol=2 * tolerance)
        np.testing.assert_allclose(solution.plan, swept.plan, rtol=0, atol=2 * tolerance)
