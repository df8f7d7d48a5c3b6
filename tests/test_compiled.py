"""Compiled passes: each kernel against NumPy, what is built on them against eager code, and a process that is not alone.

Problems here are large enough that `solve` chooses compiled passes by itself. What a solution claims is judged by the formulas
of `test_small_epsilon`, which share nothing with the library.
"""

import copy
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.special import logsumexp
from test_small_epsilon import INF, PAIRS, assert_certified, drawn, judged, overflows
from torch.utils.data import DataLoader, Dataset

from iotsolve import (
    AT_MOST,
    FIXED,
    FREE,
    KL,
    TV,
    Between,
    Dense,
    Exact,
    Interior,
    Newton,
    Points,
    Potentials,
    Problem,
    Sinkhorn,
    SolveError,
    Status,
    certificate,
    certify,
    exact,
    solve,
)
from iotsolve.accelerated import Accelerated
from iotsolve.certificate import _filled
from iotsolve.exact import _network_simplex
from iotsolve.kernels import blocks, dense, passes, small, sparse, threads, workspace
from iotsolve.plans import Plan, StoredPlan, plan_of
from iotsolve.shortlisted import balanced
from iotsolve.support import fits, largest_mass


def random_cost(n, m, seed=0, *, forbidden=0.0):
    rng = np.random.default_rng(seed)
    cost = rng.random((n, m))
    cost[rng.random((n, m)) < forbidden] = INF
    return cost


def plane(n, m, seed=0):
    rng = np.random.default_rng(seed)
    cost = ((rng.random((n, 1, 2)) - rng.random((1, m, 2))) ** 2).sum(-1)
    return cost / cost.max()


def weights(n, seed):
    w = np.random.default_rng(seed).random(n)
    return w / w.sum()


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32,) * 2, (torch.float32, torch.float64)])
def test_plans_are_written_as_torch_would_write_them(batch, dtypes):
    """Forbidden arcs and bins, broadcast scalings; what overflows and what is no number go where torch's go."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(*batch, 60, 70, generator=generator, dtype=dtypes[0])
    cost[..., 3, 4] = INF
    rows, columns = (torch.randn(n, generator=generator, dtype=dtypes[1]) for n in (60, 70))
    rows[2] = -INF
    exponent = rows.double()[:, None] + columns.double() - cost.double() / 0.02
    found = Dense(cost).gibbs(rows, columns, 0.02)
    assert found.dtype == torch.promote_types(*dtypes)
    rounding = 1e-12 if found.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), exponent.exp(), rtol=rounding, atol=1e-40)
    for odd in (1e3, math.nan):
        rows[5] = odd
        found, expected = Dense(cost).gibbs(rows, columns, 0.02), (exponent[..., 5, :] * 0 + odd).exp()
        assert torch.equal(found[..., 5, :].isnan(), expected.isnan())
        assert torch.equal(found[..., 5, :].isinf(), expected.isinf())


# -- the kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(70, 65), (64, 130), (3, 1500), (1500, 3)])
def test_soft_minima_and_c_transforms_are_those_of_numpy(shape, dtype):
    """Spread over thousands of epsilons, with forbidden arcs, and bins that nothing reaches."""
    cost = random_cost(*shape, forbidden=0.2).astype(dtype)
    cost[0] = INF
    rng, eps = np.random.default_rng(1), 1e-4
    for axis, size in ((-1, shape[1]), (-2, shape[0])):
        log_weights = 30 * rng.standard_normal(size)
        log_weights[1] = -INF
        found = Dense(torch.from_numpy(cost)).softmin(torch.from_numpy(log_weights), eps, axis=axis).numpy()
        exponent = (log_weights[None, :] if axis == -1 else log_weights[:, None]) - cost.astype(float) / eps
        with np.errstate(divide="ignore"):
            expected = -eps * logsumexp(exponent, axis=axis)
        np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15 * eps)
        potential = torch.from_numpy(rng.standard_normal(size))
        lowest = Dense(torch.from_numpy(cost)).reduced_min(potential, torch.ones(size), axis=axis).numpy()
        shift = potential.numpy()[None, :] if axis == -1 else potential.numpy()[:, None]
        np.testing.assert_array_equal(lowest, (cost.astype(float) - shift).min(axis))


@pytest.mark.parametrize("count", [1, 3])
def test_marginals_and_products_of_a_stored_plan_are_those_of_the_plan(count):
    rng = np.random.default_rng(0)
    cost = torch.from_numpy(rng.random((count, 70, 90)))
    a, b = torch.from_numpy(rng.random((count, 70))), torch.from_numpy(rng.random((count, 90)))
    a[:, 3] = 0.0
    problem = Problem.unchecked(cost, a, b, epsilon=0.05)
    p = Potentials(
        torch.from_numpy(rng.random((count, 70))), torch.from_numpy(rng.random((count, 90))), torch.zeros(count)
    )
    plan, dense = plan_of(problem, p), problem.plan(p)
    assert isinstance(plan, StoredPlan)
    for found, expected in zip(plan.marginals(), (dense.sum(-1), dense.sum(-2)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0.0)
    u, v = torch.from_numpy(rng.standard_normal((count, 70))), torch.from_numpy(rng.standard_normal((count, 90)))
    w = u.square()
    image = (dense @ v.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(plan.times(v), image)
    torch.testing.assert_close(plan.times_back(u), (dense.mT @ u.unsqueeze(-1)).squeeze(-1))
    y, back = plan.product(w.numpy(), v.numpy(), as_given=False)
    np.testing.assert_allclose(y, image.numpy())
    np.testing.assert_allclose(back, (dense.mT @ (w * image).unsqueeze(-1)).squeeze(-1).numpy())
    rows = dense.sum(-1) + 0.1
    spread = (dense * w.unsqueeze(-1) * (rows.unsqueeze(-1) - dense)).sum(-2)
    torch.testing.assert_close(plan.spread(w, rows), spread)


def test_a_product_in_single_precision_errs_by_single_precision():
    rng = np.random.default_rng(0)
    kernel = rng.random((1, 900, 700))
    v, w = rng.random((1, 700)), rng.random((1, 900))
    y, back = passes.product(kernel.astype(np.float32), v, w, as_given=True)
    np.testing.assert_allclose(y[0], kernel[0] @ v[0], rtol=2e-6)
    np.testing.assert_allclose(back[0], w[0] @ kernel[0], rtol=2e-6)


def test_rows_are_cut_by_their_number_and_every_one_is_in_a_piece():
    for rows, entries in ((5, 10), (9, 2**21), (1000, 2**24), (4003, 2**25), (3, 2**22)):
        parts = threads.pieces(rows, entries)
        assert [first for first, _ in parts[1:]] == [last for _, last in parts[:-1]]
        assert parts[0][0] == 0 and parts[-1][1] == rows and len(parts) <= 8
        assert all(first % 4 == 0 for first, _ in parts)


def test_buffers_are_lent_to_one_borrower_and_used_again():
    with workspace.borrow((100, 100), np.float32) as one, workspace.borrow((100, 100), np.float32) as two:
        one[:], two[:] = 1.0, 2.0
        assert (one == 1.0).all()
        address = two.ctypes.data
    with workspace.borrow((99, 100), np.float32) as again:
        assert again.ctypes.data in (address, one.ctypes.data)
    assert sum(x.nbytes for x in workspace._free) <= workspace.KEPT


# -- every pair of sides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.parametrize("epsilon", [0.1, 0.005])
def test_every_pair_is_certified_and_judged_right(kinds, epsilon):
    rng = np.random.default_rng([len(kinds[0]), len(kinds[1]), int(1000 * epsilon)])
    problem = drawn(rng, kinds, epsilon=epsilon, sizes=(64, 90), rhos=(0.1, 1.0, 10.0))
    if not overflows(problem):
        assert_certified(problem, solve(problem))


@pytest.mark.parametrize("kinds", PAIRS[::3], ids="-".join)
@pytest.mark.parametrize("epsilon", [1e-3, 1e-4, 1e-5])
def test_a_small_epsilon_ends_in_a_certificate_or_a_status(kinds, epsilon):
    problem = drawn(np.random.default_rng(7), kinds, epsilon=epsilon, sizes=(64, 80))
    solution = solve(problem, throw=False)
    if solution.converged:
        assert_certified(problem, solution)
    else:
        beyond = (Status.NOT_FINITE,) if overflows(problem) else (Status.MAX_STEPS, Status.STALLED)
        assert solution.status in beyond


SMOOTH = [
    (FIXED, FIXED),
    (KL(0.5), KL(2.0)),
    (FIXED, KL(0.3)),
    (FIXED, FREE),
    (AT_MOST, Between(0.5, 1.5)),
    (TV(0.2), KL(1.0)),
]


@pytest.mark.parametrize("sides", SMOOTH, ids=str)
@pytest.mark.parametrize("mass", [None, 0.7])
def test_accelerated_sweeps_newton_and_plain_sweeps_find_the_same_plan(sides, mass):
    if mass is not None and FIXED in sides:
        mass = 1.0
    a, b = weights(70, 1), weights(80, 2) * (1.0 if FIXED in sides[1:] else 1.2)
    problem = Problem(plane(70, 80), a, b, epsilon=0.05, rows=sides[0], columns=sides[1], mass=mass)
    slow = solve(problem, Sinkhorn(tolerance=1e-12, max_steps=50_000, stationary=True))
    for found in (solve(problem, tolerance=1e-12), solve(problem, Newton(tolerance=1e-12))):
        assert abs(found.plan - slow.plan).sum() <= 1e-9
        assert found.value == pytest.approx(slow.value, rel=1e-10)
    alone = Accelerated(tolerance=1e-9).run(problem.working().flat())
    if mass == 0.7 and sides in SMOOTH[-2:]:  # kinks and a mass: as a rule left to Newton
        return
    assert alone.status == [Status.CONVERGED]
    assert abs(problem.flat().plan(alone.potentials)[0].numpy() - slow.plan).sum() <= 1e-7


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("size", [100, 800])
def test_the_tolerance_asked_for_is_kept(tolerance, size):
    """On either side of the size from which on kernels are kept in single precision."""
    a, b = weights(size, 1), weights(size, 2)
    solution = solve(Problem(plane(size, size), a, b, epsilon=0.01), tolerance=tolerance)
    off = abs(solution.plan.sum(1) - a).sum() + abs(solution.plan.sum(0) - b).sum()
    assert off <= tolerance and solution.certificate.holds and solution.certificate.tolerance == tolerance


def test_the_tolerance_belongs_to_the_solver_if_there_is_one():
    problem = Problem(plane(70, 70), epsilon=0.1)
    with pytest.raises(ValueError, match=r"tolerance = 1e-06 beside solver.*has its own"):
        solve(problem, Sinkhorn(), tolerance=1e-6)
    with pytest.raises(ValueError, match="tolerance = 2"):
        solve(problem, tolerance=2)
    with pytest.raises(ValueError, match=r"Newton.*epsilon = 0"):
        solve(Problem(plane(5, 5)), Newton())


def test_single_precision_is_solved_to_its_tolerance():
    cost = torch.from_numpy(plane(300, 200)).float()
    solution = solve(Problem(cost, epsilon=0.02))
    assert solution.plan.dtype == torch.float32 and solution.certificate.holds
    rows = solution.plan.double().sum(1)
    assert float((rows - 1 / 300).abs().sum()) <= 2e-5


def test_potentials_of_empty_bins_are_those_of_the_definition():
    a, b, cost = weights(70, 1), weights(80, 2), random_cost(70, 80)
    a[4] = b[7] = 0.0
    a, b = a / a.sum(), b / b.sum()
    solution = solve(Problem(cost, a, b, epsilon=0.05), tolerance=1e-11)
    with np.errstate(divide="ignore"):
        s = -0.05 * logsumexp(np.log(b) + (solution.g - cost) / 0.05, axis=1)
        t = -0.05 * logsumexp(np.log(a)[:, None] + (solution.f[:, None] - cost) / 0.05, axis=0)
    np.testing.assert_allclose(solution.f, s, atol=1e-9)
    np.testing.assert_allclose(solution.g, t, atol=1e-9)


def test_a_start_shortens_the_way():
    cost, a, b = plane(200, 200), weights(200, 1), weights(200, 2)
    cold = solve(Problem(cost, a, b, epsilon=0.01))
    warm = solve(Problem(cost * 1.001, a, b, epsilon=0.01), init=cold)
    assert warm.steps < cold.steps and warm.certificate.holds


def test_views_and_transposes_are_solved_like_their_copies():
    cost = plane(150, 100)
    copied = solve(Problem(np.ascontiguousarray(cost.T), epsilon=0.05))
    for view in (cost.T, np.asfortranarray(cost.T), np.repeat(cost.T, 2, 1)[:, ::2]):
        assert solve(Problem(view, epsilon=0.05)).value == pytest.approx(copied.value, rel=1e-9)


def test_gradients_flow_where_passes_are_compiled():
    cost = torch.from_numpy(plane(80, 70)).requires_grad_()
    solution = solve(Problem(cost, epsilon=0.05), tolerance=1e-10)
    solution.value.backward()
    torch.testing.assert_close(cost.grad, solution.plan.detach(), rtol=0.0, atol=1e-9)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(FIXED, FIXED), (KL(1.0), FIXED), (AT_MOST, AT_MOST)], ids=str)
def test_a_batch_is_its_problems(sides):
    mass = 0.6 if sides[0] == AT_MOST else None
    cost = np.stack([plane(70, 64, seed) * (1 + seed) for seed in range(4)])
    options = dict(epsilon=0.05, rows=sides[0], columns=sides[1], mass=mass)
    together = solve(Problem(cost, **options))
    for k in range(4):
        alone = solve(Problem(cost[k], **options))
        assert abs(together.steps[k] - alone.steps) <= 2  # sums are added up in another order
        np.testing.assert_allclose(together.plan[k], alone.plan, atol=1e-10)
        np.testing.assert_allclose(together.f[k], alone.f, atol=1e-9)


def test_many_small_problems_are_certified_one_by_one():
    cost = np.random.default_rng(0).random((300, 16, 20))
    solution = solve(Problem(cost, epsilon=0.02))
    assert solution.certificate.holds.all() and solution.steps.min() < solution.steps.max()
    alone = solve(Problem(cost[11], epsilon=0.02))
    np.testing.assert_allclose(solution.plan[11], alone.plan, atol=1e-8)


def test_one_cost_and_many_weights_share_the_cost():
    cost, a = plane(64, 64), np.random.default_rng(0).dirichlet(np.ones(64), size=6)
    solution = solve(Problem(cost, a, epsilon=0.05))
    assert solution.certificate.holds.all()
    np.testing.assert_allclose(solution.plan[2], solve(Problem(cost, a[2], epsilon=0.05)).plan, atol=1e-9)


def test_a_problem_without_an_answer_spoils_no_other():
    cost = np.random.default_rng(0).random((3, 64, 64))
    problem = Problem(cost, epsilon=0.05)
    b = problem.b.clone()
    b[1, 0] += 0.5
    solution = solve(problem.with_tensors({"b": b}), throw=False)
    assert solution.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.CONVERGED]


# -- the certificate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sides", [(FIXED, FIXED), (FIXED, KL(0.5)), (KL(0.5), KL(0.5)), (FREE, FIXED), (TV(0.3), FIXED)], ids=str
)
@pytest.mark.parametrize("rough", [1e-2, 1e-5, 1e-8])
def test_the_bounds_from_a_stored_plan_enclose_the_optimal_value(sides, rough):
    a, b = weights(100, 1), weights(90, 2)
    problem = Problem(plane(100, 90), a, b, epsilon=0.02, rows=sides[0], columns=sides[1])
    best = solve(problem, Interior(tolerance=1e-12))
    rng = np.random.default_rng(0)
    f, g = (x + rough * 0.02 * rng.standard_normal(len(x)) for x in (best.f, best.g))
    found = certify(problem, f, g, tolerance=1e-3)
    room = 1e-11 * found.scale
    assert found.dual <= best.value + room and best.value <= found.primal + room
    assert found.primal - found.dual == pytest.approx(found.gap, abs=room)
    off = abs(problem.plan(found_potentials(f, g)).numpy().sum(1) - a).sum() if sides[0] == FIXED else 0.0
    assert found.row_violation == pytest.approx(off, rel=1e-9, abs=1e-15)


def found_potentials(f, g):
    return Potentials(torch.from_numpy(f), torch.from_numpy(g), torch.zeros((), dtype=torch.float64))


def test_a_stored_plan_certifies_what_needs_a_linear_correction():
    """A gap asked for that a rank-one filling is far too dear for, at an epsilon where sweeps crawl."""
    problem = Problem(plane(150, 150), epsilon=5e-4)
    rough = solve(problem, tolerance=1e-6)
    found = certify(problem, rough.f, rough.g, tolerance=1e-6)
    assert found.holds and found.gap <= 1e-6 * found.scale
    best = solve(problem, tolerance=1e-11).value
    assert found.dual - 1e-12 <= best <= found.primal + 1e-12


def test_a_certificate_may_be_asked_for_no_error_at_all():
    problem = Problem(plane(100, 100), epsilon=0.02)
    solution = solve(problem)
    strict, usual = (certify(problem, solution.f, solution.g, tolerance=x) for x in (0.0, 1e-8))
    assert usual.holds and not strict.holds
    assert 0 <= strict.gap < 1e-6 and strict.dual == usual.dual


def relative_entropy(change):
    """``(1 + x) log(1 + x) - x``."""
    near = np.where(abs(change) < 1e-3, change, 0.0)
    return np.where(abs(change) < 1e-3, near**2 / 2 - near**3 / 6 + near**4 / 12, (1 + change) * np.log1p(change) - change)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.01])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_repair_costs_is_within_the_bound_from_marginals_alone(corrected, size, epsilon, seed):
    """The repaired plan is written out: it has the marginals asked for, and its divergence is counted entry by entry."""
    rng = np.random.default_rng(seed)
    cost, a, b = plane(40, 50, seed), weights(40, seed + 5), weights(50, seed + 9)
    solution = solve(Problem(cost, a, b, epsilon=epsilon), tolerance=1e-12)
    f, g = solution.f + epsilon * size * rng.standard_normal(40), solution.g + epsilon * size * rng.standard_normal(50)
    plan = a[:, None] * b * np.exp((f[:, None] + g - cost) / epsilon)
    u, v = (0.1 * size * rng.standard_normal(n) if corrected else np.zeros(n) for n in (40, 50))
    moved = plan * (1 + u[:, None] + v)
    r, c = moved.sum(1), moved.sum(0)
    scaled = moved * np.minimum(a / r, 1)[:, None] * np.minimum(b / c, 1)
    lack_r, lack_c = a - scaled.sum(1), b - scaled.sum(0)
    assert min(lack_r.min(), lack_c.min()) >= -1e-15
    repaired = scaled + np.outer(lack_r, lack_c) / lack_r.sum()
    assert abs(repaired.sum(1) - a).sum() + abs(repaired.sum(0) - b).sum() <= 1e-14
    spent = (plan * relative_entropy(repaired / plan - 1)).sum()
    dearest = ((cost - f[:, None] - g) / epsilon).max()
    corrections = (np.array((plan * (u[:, None] + v) ** 2).sum()), abs(u).max() + abs(v).max()) if corrected else ()
    bound = _filled(a, b, r, c, dearest, *corrections)
    assert 0 < spent <= bound < math.inf
    assert bound <= 4 * size * max(dearest, 1.0)


@pytest.mark.parametrize("side", [(1.0, -INF, 0.0, 0.0, INF), (0.5, -INF, 0.0, -INF, INF), (1.0, -2.0, 0.0, 0.0, 2.0)])
def test_four_rows_at_once_answer_as_one_by_one(side):
    """Empty bins, sums that are 0, denormal, infinite or no number, and answers beyond the largest number."""
    rng = np.random.default_rng(0)
    kernel, known, base = rng.random((24, 9)), rng.standard_normal(24), rng.standard_normal(24)
    for row, scale in ((1, 0.0), (6, 1e-320), (9, INF), (14, math.nan), (17, 1e-300)):
        kernel[row] *= scale
    base[3], base[20] = -INF, 2000.0
    shared = (np.ones(9), dense.RESPOND, np.ones(24), base, known, side, 0.3)
    (y, u, columns), (each_y, each_u, each_columns) = ((np.zeros(24), np.zeros(24), np.zeros(9)) for _ in range(2))
    dense.stored_pass(kernel, *shared, y, u, columns, 0, 24)
    for row in range(24):
        dense.stored_pass(kernel, *shared, each_y, each_u, each_columns, row, row + 1)
    np.testing.assert_allclose(u, each_u, rtol=1e-12)  # the rounding of exponents up to 1000
    assert np.isfinite(u).sum() >= 20


@pytest.mark.parametrize("side", [FIXED, KL(0.3)])
def test_a_small_plan_is_computed_once_and_belongs_to_who_asked(side):
    problem = Problem(plane(60, 70), epsilon=0.05, rows=side, columns=side)
    first, second = solve(problem), solve(problem)
    for solution in (first, second):
        assert solution.certificate.holds
        expected = np.exp((solution.f[:, None] + solution.g - plane(60, 70)) / 0.05) / (60 * 70)
        np.testing.assert_allclose(solution.plan, expected, rtol=1e-12)
        with pytest.raises(ValueError, match="read-only"):  # of which marginals are made
            solution.plan[:] = 7.0
    once_more = solve(first.problem)
    assert once_more.problem.memory is once_more.problem.flat().memory is not first.problem.memory
    again, other = copy.deepcopy(second), solve(problem)
    del again.__dict__["certificate"]
    assert again.certificate.holds and certify(second.problem, second.f, second.g).holds
    assert not certify(other.problem, other.f + 0.1, other.g).holds
    assert abs(other.plan.sum() - other.certificate.mass) < 1e-12
    collected = [solve(problem) for _ in range(3)]
    assert all(each.certificate.holds for each in collected)
    assert [each.problem.memory.of(each.potentials) is not None for each in collected] == [False, False, True]


def test_rubbish_is_not_certified():
    problem = Problem(plane(100, 100), epsilon=0.02)
    for f in (np.zeros(100), np.full(100, np.nan), np.full(100, 1e5), np.full(100, INF)):
        assert not certify(problem, f, np.zeros(100)).holds


# -- exact -------------------------------------------------------------------------------------------------------------

N = 150


def exact_costs():
    rng = np.random.default_rng(0)
    x, y = rng.random((N, 2)), rng.random((N, 2))
    centres = np.repeat(rng.random((10, 2)), N // 10, 0)
    near = centres + 0.01 * rng.standard_normal((N, 2)), centres + 0.01 * rng.standard_normal((N, 2))
    return {
        "plane": plane(N, N),
        "random": rng.random((N, N)),
        "integers": rng.integers(0, 100, (N, N)).astype(float),
        "few integers": rng.integers(0, 4, (N, N)).astype(float),
        "binary": (rng.random((N, N)) < 0.5).astype(float),
        "nearly all equal": (rng.random((N, N)) < 0.98).astype(float),
        "constant": np.full((N, N), 3.0),
        "zero": np.zeros((N, N)),
        "sums": x[:, :1] + y[:, 0],
        "products": x[:, :1] * y[:, 0],
        "line": abs(x[:, :1] - y[:, 0]),
        "clusters": ((near[0][:, None] - near[1][None]) ** 2).sum(-1),
        "duplicates": ((x[rng.integers(0, 9, N)][:, None] - y[rng.integers(0, 9, N)][None]) ** 2).sum(-1),
        "heavy tails": abs(rng.standard_cauchy((N, N))),
        "log-normal": np.exp(3 * rng.standard_normal((N, N))),
        "negative": -rng.random((N, N)),
        "huge": 1e12 * rng.random((N, N)),
        "tiny": 1e-9 * rng.random((N, N)),
        "far from zero": 1e6 + rng.random((N, N)),
        "mostly forbidden": np.where(rng.random((N, N)) < 0.8, INF, rng.random((N, N))),
    }


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "random"])
@pytest.mark.parametrize("name", exact_costs())
def test_exact_transport_is_certified_whatever_the_costs(name, equal):
    cost = exact_costs()[name]
    a, b = (np.full(N, 1 / N), np.full(N, 1 / N)) if equal else (weights(N, 1), weights(N, 2))
    if name == "mostly forbidden":
        np.fill_diagonal(cost, 1.0)
        b = a
    problem = Problem(cost, a, b)
    solution = solve(problem)
    assert solution.certificate.holds and judged(problem, solution).largest <= 1e-8
    if equal:
        i, j = linear_sum_assignment(cost)
        assert solution.transport_cost == pytest.approx(cost[i, j].mean(), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("shape", [(130, 140), (128, 300), (300, 60)])
@pytest.mark.parametrize("empty", [False, True])
def test_exact_transport_of_any_shape_is_that_of_the_network_simplex(shape, empty):
    cost, a, b = plane(*shape), weights(shape[0], 1), weights(shape[1], 2)
    if empty:
        a[3:9] = b[5] = 0.0
        a, b = a / a.sum(), b / b.sum()
    solution = solve(Problem(cost, a, b))
    plan, *_ = _network_simplex(cost, a, b, 10**7)
    assert solution.certificate.holds
    assert solution.value == pytest.approx((cost * plan).sum(), rel=1e-9)
    assert (solution.f[:, None] + solution.g[None, :] - cost).max() <= 1e-12


def test_the_shortlist_is_what_solves_it_and_is_no_matter_of_faith(monkeypatch):
    """A list that lacks what the optimum needs is found out by pricing."""
    cost = plane(N, N)
    found = balanced(cost, np.full(N, 1 / N), np.full(N, 1 / N), 0.0, 1.0, 10**7)
    assert found is not None and found.steps >= N
    i, j = linear_sum_assignment(cost)
    assert cost[found.rows, found.columns].sum() == pytest.approx(cost[i, j].sum(), rel=1e-12)
    monkeypatch.setattr("iotsolve.shortlisted._MOST", 2)
    monkeypatch.setattr("iotsolve.shortlisted._MORE", 2)
    for a in (np.full(N, 1 / N), weights(N, 1)):
        short = balanced(cost, a, a[::-1].copy(), 0.0, 1.0, 10**7)
        assert short is None or (cost - short.f[:, None] - short.g[None, :]).min() >= -1e-12


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "random"])
@pytest.mark.parametrize("name", ["far above zero", "far below zero", "concentrated"])
def test_costs_far_from_zero_or_from_their_spread_have_a_shortlist_too(name, equal):
    """Exponentials of such costs underflow at any useful epsilon unless potentials are taken off them first."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((N, 2000)), rng.standard_normal((N, 2000))
    apart = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    cost = {"far above zero": plane(N, N) + 1e4, "far below zero": plane(N, N) - 1e4, "concentrated": apart}[name]
    a, b = (np.full(N, 1 / N), np.full(N, 1 / N)) if equal else (weights(N, 1), weights(N, 2))
    found = balanced(cost, a, b, cost.min(), cost.max(), 10**7)
    assert found is not None
    value = (cost * _network_simplex(cost, a, b, 10**7)[0]).sum()
    assert (cost[found.rows, found.columns] * found.flow).sum() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("pivots", [0, 1, 2, 7, 40, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_the_tree_of_the_network_simplex_is_one_after_every_pivot(pivots, seed):
    """Spanning, each node followed by its subtree, of the size noted, its arcs neither cheap nor dear, its flows the weights."""
    rng, n, m = np.random.default_rng(seed), 30, 40
    nodes, arcs = n + m, np.argwhere(rng.random((n, m)) < 0.3)
    a, b = weights(n, seed), weights(m, seed + 1)
    zeros = np.zeros(nodes, np.int64)
    tail, head = np.r_[zeros, arcs[:, 0]], np.r_[zeros, n + arcs[:, 1]]
    price, flow = np.r_[np.zeros(nodes), rng.random(len(arcs))], np.zeros(nodes + len(arcs))
    parent, arc, size, after, before = tree = [np.empty(nodes + 1, np.int32) for _ in range(5)]
    pi, order = np.empty(nodes + 1), nodes + rng.permutation(len(arcs))
    sparse.plant(a, b, tail, head, price, order, 16.0, flow, *tree, pi)
    taken = sparse.simplex(tail, head, price, flow, *tree, pi, 1e-12, pivots)
    assert taken <= pivots and (taken == pivots or pivots == 10_000)
    chain = [nodes]
    while (u := after[chain[-1]]) != nodes:
        assert before[u] == chain[-1]
        chain.append(u)
    assert sorted(chain) == list(range(nodes + 1)) and before[nodes] == chain[-1]
    below = {u: {u} for u in chain}
    for u in chain[:0:-1]:
        assert {tail[arc[u]], head[arc[u]]} == {u, parent[u]}
        assert abs(price[arc[u]] + pi[tail[arc[u]]] - pi[head[arc[u]]]) <= 1e-12
        below[parent[u]] |= below[u]
    for k, u in enumerate(chain):
        assert size[u] == len(below[u]) and set(chain[k : k + size[u]]) == below[u]
    balance = np.bincount(tail, flow, nodes + 1) - np.bincount(head, flow, nodes + 1)
    assert flow.min() >= -1e-15 and abs(balance[:n] - a).max() <= 1e-14 and abs(balance[n:nodes] + b).max() <= 1e-14
    if pivots == 10_000:
        left = price + pi[tail] - pi[head]
        assert left[nodes:].min() >= -1e-12


def test_given_up_shortlists_end_in_the_dense_simplex(monkeypatch):
    monkeypatch.setattr("iotsolve.exact.balanced", lambda *_: None)
    solution = solve(Problem(plane(N, N)))
    assert solution.certificate.holds


OUTSIDES = {
    "partial": dict(rows=AT_MOST, columns=AT_MOST, mass=0.6),
    "all that fits": dict(rows=AT_MOST, columns=AT_MOST, mass=1.0),
    "tv": dict(rows=TV(0.03), columns=TV(0.05)),
    "fixed and tv": dict(columns=TV(0.02)),
    "between": dict(columns=Between(0.5, 1.5)),
    "both between": dict(rows=Between(0.8, 1.1), columns=Between(0.5, 1.5), mass=0.9),
    "at most and tv": dict(rows=AT_MOST, columns=TV(0.1)),
    "room and fixed": dict(rows=Between(0.0, 1.5)),
    "free and tv": dict(rows=FREE, columns=TV(0.03)),
    "from a half": dict(rows=Between(0.5, INF), columns=Between(0.7, 1.0)),
}


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", OUTSIDES)
@pytest.mark.parametrize("shape", [(150, 120), (3, 40), (12, 9)])
def test_bounds_variation_and_mass_by_outsides_are_the_linear_program(shape, name, empty, monkeypatch):
    """Value, certificate and, where it is unique, the plan; with and without a shortlist."""
    cost, a, b = plane(*shape), weights(shape[0], 1), weights(shape[1], 2)
    if empty:
        a[1] = b[5] = 0.0
        a, b = a / a.sum(), b / b.sum()
    problem = Problem(cost, a, b, **OUTSIDES[name])
    tried = []
    way = exact.with_outsides
    monkeypatch.setattr(exact, "with_outsides", lambda *given: tried.append(way(*given)) or tried[-1])
    solution = solve(problem)
    assert tried[0].known.all() and solution.certificate.holds and solution.certificate.gap <= 1e-12
    monkeypatch.setattr(exact, "with_outsides", lambda *_: None)
    program = solve(problem)
    assert solution.value == pytest.approx(program.value, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(solution.plan, program.plan, atol=1e-9)


@pytest.mark.parametrize("big", [1e8, 1e14, 1e20])
def test_one_cost_that_is_huge_takes_no_digits_of_the_others(big):
    cost, a = plane(5, 5), np.array([0.0, 0.25, 0.25, 0.25, 0.25])
    dear = cost.copy()
    dear[0, 3] = big
    assert solve(Problem(dear, a)).value == pytest.approx(solve(Problem(cost, a)).value, rel=1e-12)
    dear, barred = cost.copy(), cost.copy()
    dear[2, 3], barred[2, 3] = big, INF
    assert solve(Problem(dear)).value == pytest.approx(solve(Problem(barred)).value, rel=1e-12)
    if big < 1e9:
        for name in ("partial", "tv", "fixed and tv"):
            found, expected = (solve(Problem(c, **OUTSIDES[name])).value for c in (dear, barred))
            assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("amount", [1e-9, 1e7, 1e9])
def test_linear_programs_do_not_mind_the_unit_of_the_weights(amount):
    """HiGHS's tolerances are absolute: at 1e7 two thirds of such problems were called infeasible."""
    for seed in range(5):
        cost, a, b = random_cost(4, 5, seed), weights(4, seed), weights(5, seed + 1)
        barred = cost.copy()
        barred[0, 1] = INF
        for given, sides in ((barred, {}), (cost, dict(rows=TV(0.3), columns=TV(0.2), mass=0.5))):
            whole = {**sides, **({"mass": 0.5 * amount} if "mass" in sides else {})}
            value = solve(Problem(given, amount * a, amount * b, **whole)).value
            assert value == pytest.approx(amount * solve(Problem(given, a, b, **sides)).value, rel=1e-9)


def test_forbidden_arcs_beside_bounds_are_a_linear_programs(monkeypatch):
    cost = random_cost(20, 15, forbidden=0.3)
    monkeypatch.setattr(exact, "_balanced", lambda *_: pytest.fail("it takes costs that are finite"))
    assert solve(Problem(cost, rows=AT_MOST, columns=AT_MOST, mass=0.5)).certificate.holds


@pytest.mark.parametrize("shape", [(1, 30, 20), (5, 30, 20), (3, 800, 700)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("axis", [-1, -2])
def test_passes_over_a_batch_are_those_of_torch(shape, shared, axis):
    """Small problems at once, large ones by their rows; each with a cost of its own, or one for all."""
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(rng.random(shape))
    matrix[0, 1, 2:5] = INF
    matrix = matrix[:1].expand(shape) if shared else matrix
    vector = torch.from_numpy(rng.standard_normal((shape[0], shape[2] if axis == -1 else shape[1])))
    along = vector.unsqueeze(-2 if axis == -1 else -1)
    found = Dense(matrix).softmin(vector, 0.1, axis=axis)
    torch.testing.assert_close(found, -0.1 * torch.logsumexp(along - matrix / 0.1, axis), rtol=1e-12, atol=1e-13)
    found = Dense(matrix).reduced_min(vector, torch.ones_like(vector), axis=axis)
    torch.testing.assert_close(found, (matrix - along).amin(axis), rtol=1e-14, atol=0.0)


TOGETHER = {"fixed": {}, **OUTSIDES}


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", TOGETHER)
def test_many_small_exact_problems_are_solved_as_one_by_one(name, empty, monkeypatch):
    """In compiled code, of which nothing is left over; costs of their own, or one for all."""
    a, b = (np.stack([weights(size, first + k) for k in range(20)]) for size, first in ((12, 0), (9, 30)))
    if empty:
        a[:, 1] = b[::2, 5] = 0.0
        a, b = a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True)
    own = np.stack([(1 + 0.3 * k) * random_cost(12, 9, k) for k in range(20)])
    for costs in (own, np.broadcast_to(random_cost(12, 9), own.shape)):
        alone = [solve(Problem(c, *w, **TOGETHER[name])) for c, *w in zip(costs, a, b, strict=True)]
        with monkeypatch.context() as patched:
            patched.setattr(exact.Exact, "_one", lambda *_: pytest.fail("a problem was left over"))
            together = solve(Problem(costs, a, b, **TOGETHER[name]))
        assert together.certificate.holds.all() and (together.certificate.gap <= 1e-12).all()
        np.testing.assert_allclose(together.value, [x.value for x in alone], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(together.plan, np.stack([x.plan for x in alone]), atol=1e-9)


@pytest.mark.parametrize("size", [(8, 9), (200, 210)], ids=["many small", "one large"])
def test_exact_potentials_in_single_precision_are_off_by_their_own_rounding(size):
    """Not by that of a shift between rows and columns, which a simplex takes as large as it likes."""
    count, unit = 400 if size[0] < 10 else 1, np.finfo(np.float32).eps
    rng = np.random.default_rng(0)
    costs, a, b = (rng.random((count, *s), np.float32) for s in (size, size[:1], size[1:]))
    a, b = (x / x.sum(-1, keepdims=True) for x in (a + 0.1, b + 0.1))
    found = solve(Problem(costs, a, b))
    excess = found.f.astype(float)[:, :, None] + found.g.astype(float)[:, None] - costs.astype(float)
    assert excess.max() <= 0.75 * unit
    alike = solve(Problem(np.full((20, 7, 1), 1e-9, np.float32), a[:1, :7] / a[:1, :7].sum(), np.ones(1, np.float32)))
    np.testing.assert_allclose(alike.f + alike.g, 1e-9, rtol=2 * unit)
    assert alike.certificate.holds.all()


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("side", [AT_MOST, Between(0.5, 1.5)], ids=["at most", "between"])
def test_a_mass_in_single_precision_is_certified_of_the_plan_before_it_is_rounded(side, count):
    """No plan in float32 need have that mass and keep to its bounds: a fourth of these had stalled."""
    rng = np.random.default_rng(0)
    for _ in range(80 // count):
        costs, a, b = (rng.random((count, *size), np.float32) for size in ((8, 9), (8,), (9,)))
        a, b = (x / x.sum(-1, keepdims=True) for x in (a + 0.1, b + 0.1))
        found = solve(Problem(costs, a, b, rows=side, columns=side, mass=0.6))
        assert found.certificate.holds.all() and found.plan.dtype == found.value.dtype == np.float32
        alone = _linear_program_value(costs[0].astype(float), a[0].astype(float), b[0].astype(float), side, 0.6)
        assert found.value[0] == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("count", [1, 40])
def test_exact_plans_of_weights_in_single_precision_are_not_corrected(count, monkeypatch):
    """Their totals differ by rounding, which no plan can mend: trying took ten times as long as solving."""
    rng = np.random.default_rng(0)
    costs, a, b = (rng.random((count, *size), np.float32) for size in ((30, 31), (30,), (31,)))
    a, b = (x / x.sum(-1, keepdims=True) for x in (a + 0.1, b + 0.1))
    monkeypatch.setattr(certificate, "_linear_correction", lambda *_: pytest.fail("there is nothing to correct"))
    found = solve(Problem(costs, a, b))
    wide = [x.astype(float) for x in (costs, a, b)]
    same = solve(Problem(wide[0], *(x / x.sum(-1, keepdims=True) for x in wide[1:])))
    assert found.certificate.holds.all()
    np.testing.assert_allclose(found.certificate.primal, same.value, rtol=1e-6)
    np.testing.assert_allclose(found.certificate.dual, same.value, rtol=1e-6)


def _linear_program_value(cost, a, b, side, mass):
    """Plans between bounds with a mass, by HiGHS and inequalities."""
    n, m = cost.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    low, high = ((bound * np.r_[a, b]) for bound in side.bounds)
    found = linprog(
        cost.ravel(), A_ub=np.vstack([sums, -sums]), b_ub=np.r_[high, -low], A_eq=np.ones((1, n * m)), b_eq=[mass]
    )
    return found.fun


def test_many_small_assignments_are_scipys():
    costs = np.stack([plane(n=17, m=17, seed=k) for k in range(20)])
    found = solve(Problem(costs))
    best = [cost[linear_sum_assignment(cost)].mean() for cost in costs]
    np.testing.assert_allclose(found.value, best, rtol=1e-12)
    assert found.certificate.holds.all() and ((found.plan > 0).sum((1, 2)) == 17).all()


@pytest.mark.parametrize("name", ["fixed", "partial", "tv", "both between"])
def test_forbidden_arcs_of_many_small_problems_are_the_linear_programs(name):
    costs = np.stack([random_cost(8, 7, k, forbidden=0.25) for k in range(40)])
    a, b = np.stack([weights(8, k) for k in range(40)]), np.stack([weights(7, 60 + k) for k in range(40)])
    feasible = []
    for k in range(40):
        try:
            feasible.append((k, solve(Problem(costs[k], a[k], b[k], **TOGETHER[name])).value))
        except ValueError:  # no plan exists
            continue
    kept = [k for k, _ in feasible]
    assert len(kept) >= 16
    found = solve(Problem(costs[kept], a[kept], b[kept], **TOGETHER[name]))
    np.testing.assert_allclose(found.value, [value for _, value in feasible], rtol=1e-9, atol=1e-12)
    assert found.certificate.holds.all() and (found.plan[np.isinf(costs[kept])] == 0).all()


@pytest.mark.parametrize("equal", [True, False], ids=["same totals", "room"])
def test_what_scalings_say_of_forbidden_arcs_a_maximum_flow_says_too(equal, monkeypatch):
    """A plan that scalings find is a proof; that they find none is not, and is rare."""
    rng, told, feasible = np.random.default_rng(0), 0, 0
    for turn in range(60):
        n, m = rng.integers(1, 9, 2)
        allowed = rng.random((5, n, m)) > (0.1, 0.3, 0.6)[turn % 3]
        a, b = rng.random((5, n)) * (rng.random((5, n)) > 0.1), rng.random((5, m))
        if equal:
            a, b = a / a.sum(1, keepdims=True).clip(1e-9), b / b.sum(1, keepdims=True)
        need = 0.99 * a.sum(1)
        found = fits(allowed, a, b, need)
        monkeypatch.setattr("iotsolve.support._AT_ONCE", 2 * n * m)
        assert (fits(allowed, a, b, need) == found).all()  # in pieces
        monkeypatch.undo()
        most = np.array([largest_mass(*each)[0] for each in zip(allowed, a, b, strict=True)])
        assert (most[found] >= need[found] - 1e-7).all()
        told, feasible = told + found.sum(), feasible + (most >= need).sum()
    assert feasible >= 50 and told >= 0.95 * feasible


def test_small_problems_that_compiled_code_cannot_solve_are_left_alone():
    cost = np.array([[[1.0, INF], [2.0, INF]], [[1.0, 2.0], [2.0, 1.0]], [[0.0, INF], [0.0, 0.0]]])
    a, b = np.array([[0.5, 0.5], [0.3, 0.7], [0.8, 0.2]]), np.array([[0.5, 0.5], [0.6, 0.4], [0.5, 0.5]])
    plan, f, g = np.zeros((3, 2, 2)), np.zeros((3, 2)), np.zeros((3, 2))
    steps, solved = np.zeros(3, np.int64), np.ones(3, bool)
    small.transport(cost, a, b, plan, f, g, steps, solved, 10**7, 0, 3)
    assert solved.tolist() == [False, True, False]  # a column without arcs; one that lacks mass
    assert (plan[[0, 2]] == 0).all() and plan[1].sum() == pytest.approx(1.0)
    with pytest.raises(SolveError, match="max_steps"):
        solve(Problem(np.stack([plane(60, 60, k) for k in range(16)]), weights(60, 1), weights(60, 2)), Exact(max_steps=3))


def test_steps_of_exact_transport_are_limited():
    with pytest.raises(SolveError, match="max_steps"):
        solve(Problem(plane(300, 300), weights(300, 1), weights(300, 2)), Exact(max_steps=3))


def test_the_assignment_kernel_reports_rows_that_have_no_way():
    start, column, price = np.array([0, 1, 2]), np.array([0, 0]), np.array([1.0, 2.0])
    v, row_of, column_of = np.zeros(2), np.full(2, -1), np.full(2, -1)
    assert sparse.assign(start, column, price, v, row_of, column_of, np.arange(2), 1.0, 100) == 1
    assert sorted(column_of.tolist()) == [-1, 0]


# -- not alone ---------------------------------------------------------------------------------------------------------


def found(seed):
    """Every bit of the potentials; values are sums of torch's, which rounds as its threads have it."""
    return solve(Problem(plane(1100, 1000, seed), epsilon=0.05), tolerance=1e-6).f.tobytes()


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = found(0)
        torch.set_num_threads(2)
        assert found(0) == one
    finally:
        torch.set_num_threads(before)


def test_solves_at_the_same_time_do_not_disturb_each_other():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = [found(seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(found, range(4))) == expected
    finally:
        torch.set_num_threads(before)


class Found(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, seed):
        return found(seed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_data_loaders_worker_solves_too():
    """Forked from a parent that has used its threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = [found(seed) for seed in range(3)]
        loader = DataLoader(Found(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        assert list(loader) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path):
    """numba refuses to compile with a cache it cannot write."""
    program = (
        "import numpy as np; from iotsolve import Problem, solve;"
        "print(solve(Problem(np.random.default_rng(0).random((70, 70)), epsilon=0.1)).certificate.holds)"
    )
    blocked = tmp_path / "file"
    blocked.write_text("")
    env = os.environ | {"NUMBA_CACHE_DIR": str(blocked / "under"), "HOME": str(blocked)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "True", done.stderr


def test_importing_does_not_wait_for_numba():
    program = "import sys, iotsolve, contrastive; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_a_certified_solve_holds_little_more_than_one_copy_of_the_cost():
    n = 3000
    program = f"""
import resource
import numpy as np
from iotsolve import Problem, solve
solve(Problem(np.random.default_rng(0).random((100, 100), dtype=np.float32), epsilon=0.1)).certificate
cost = np.random.default_rng(0).random(({n}, {n}), dtype=np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert solve(Problem(cost, epsilon=0.05)).certificate.holds
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / cost.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.5  # beside the cost itself


def test_math_is_finite_where_a_mass_underflows():
    """A total beyond the range of floats is a status."""
    problem = Problem(plane(70, 70) - 2.0, epsilon=1e-3, rows=KL(1e-3), columns=KL(1e-3))
    solution = solve(problem, throw=False)
    assert solution.status is not Status.CONVERGED or math.isfinite(solution.value)


def test_torch_has_its_threads_back_whatever_happens(monkeypatch):
    """A large problem keeps torch on one thread beside compiled passes, and says in chunks only when to use all."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        problem = Problem(plane(1100, 1000), epsilon=0.05, rows=Between(0.5, 1.0), columns=AT_MOST)

        def fails(*given):
            seen.append((torch.get_num_threads(), threads.allowed()))
            raise KeyboardInterrupt

        monkeypatch.setattr("iotsolve.plans.Chunk.add_rows", fails)
        with pytest.raises(KeyboardInterrupt):
            certify(problem, np.zeros(1100), np.zeros(1000))
        monkeypatch.setattr("iotsolve.certificate._certify", fails)
        with pytest.raises(KeyboardInterrupt):
            certify(problem, np.zeros(1100), np.zeros(1000))
        assert seen == [(2, 2), (1, 2)] and torch.get_num_threads() == threads.allowed() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not let one choose")
def test_helpers_stay_off_the_processor_of_who_called_them():
    """Whatever processors this process may use; it goes back to all of them itself."""
    before, pinned = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(2)
    try:
        for _ in range(3):  # the first call starts the helper, the next one finds it
            threads.each_piece(100, 2**22, lambda k, first, last: None)
        assert os.sched_getaffinity(0) == pinned
        for helper in threads._helpers if len(pinned) > 1 else ():
            assert os.sched_getaffinity(helper) < pinned
        os.sched_setaffinity(0, {min(pinned)})  # nowhere else to go
        threads.each_piece(100, 2**22, lambda k, first, last: None)
    finally:
        os.sched_setaffinity(0, pinned)
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "error"), [(np.float32, -87.3, 88.2, 1e-7), (np.float64, -708.0, 709.0, 2e-16)], ids=str
)
def test_exponentials_of_blocks(dtype, low, high, error):
    """In place and summed; 0 where a number would be denormal or nothing is allowed, infinite beyond, and NaN for NaN."""
    x = np.linspace(low, high, 100_000).astype(dtype).reshape(200, 500)
    found = x.copy()
    blocks.exponentiate(found)
    exact = np.exp(x.astype(np.longdouble))
    assert float(np.max(np.abs(found / exact - 1))) < error
    ends = np.array([[-np.inf, low - 1, 0.0, high + 1, np.inf, np.nan]], dtype)
    blocks.exponentiate(ends)
    np.testing.assert_array_equal(ends, [[0.0, 0.0, 1.0, np.inf, np.inf, np.nan]])
    rng = np.random.default_rng(0)
    block = rng.uniform(-3, 3, (300, 70)).astype(dtype)
    rows, columns, sums, totals = rng.random(300).astype(dtype), rng.random(70).astype(dtype), np.empty(300, dtype), np.ones(70)
    expected = np.exp(block.astype(np.float64))
    blocks.weigh(block, rows, columns, sums, totals)
    np.testing.assert_allclose(sums, expected @ columns, rtol=20 * error)
    np.testing.assert_allclose(totals, 1 + expected.T @ rows, rtol=20 * error)


@pytest.mark.parametrize("sides", [{}, {"columns": FREE}], ids=str)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-4])
def test_a_loose_certificate_reads_no_plan_and_holds_the_value(tolerance, sides, monkeypatch):
    """Of violations that a tolerance allows: products with vectors say enough, in single precision, and what they say is true."""
    rng = np.random.default_rng(0)
    x, y = rng.random((300, 3)).astype(np.float32), rng.random((300, 3)).astype(np.float32)
    value = float(solve(Problem(Points(x.astype(float), y.astype(float)), epsilon=0.3, **sides)).value)
    rough = solve(Problem(Points(x, y), epsilon=0.3, **sides), Sinkhorn(tolerance=tolerance))
    monkeypatch.setattr(Plan, "sum", lambda *given: pytest.fail("the plan was read"))
    for cost in (rough.problem.cost, rough.problem.cost.dense()):
        found = certify(Problem(cost, epsilon=0.3, **sides), rough.f, rough.g, tolerance=tolerance)
        assert found.holds and found.dual <= value + 1e-6 and value - 1e-6 <= found.primal


@pytest.mark.parametrize("sides", [(FIXED, FIXED), (KL(1.0), KL(1.0)), (TV(0.3), TV(0.3))], ids=str)
def test_sweeps_alone_end_most_small_problems_at_a_small_epsilon(sides):
    """Of kernels in the nearest cache, which are made anew as often as it takes, by mixing that does not jump."""
    rng, found = np.random.default_rng(0), []
    for n in (5, 10, 20, 45):
        x, line = rng.random((2, n, 2)), np.linspace(0, 1, n)
        for cost in (
            np.square(x[0][:, None] - x[1]).sum(-1),
            np.abs(x[0][:, None, 0] - x[1][:, 0]),
            np.square(line[:, None] - line),
            rng.random((n, n)),
        ):
            problem = Problem(cost, epsilon=0.003, rows=sides[0], columns=sides[1]).working().flat()
            found += Accelerated().patient(problem, 1000).run(problem).status
    assert np.mean([word is Status.CONVERGED for word in found]) >= 0.7


def test_a_person_who_waits_for_a_compiler_is_told_once(capsys, monkeypatch):
    from iotsolve.kernels.numeric import _Notice

    def begun(module):
        compiled = SimpleNamespace(py_func=SimpleNamespace(__module__=module))
        return SimpleNamespace(data={"dispatcher": compiled})

    notice = _Notice()
    notice.on_start(begun("iotsolve.kernels.dense"))
    assert capsys.readouterr().err == ""  # nobody looks
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for module in ("of.somebody.else", "iotsolve.kernels.dense", "iotsolve.kernels.scaling"):
        notice.on_start(begun(module))
    assert capsys.readouterr().err.count("compiles") == 1
