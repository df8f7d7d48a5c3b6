"""Anderson's mixing: against GMRES, which it is on linear maps, and in sweeps of every pair of sides."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import gmres

from iotsolve import AT_MOST, FREE, KL, L2, TV, Newton, Points, Problem, Sinkhorn, solve
from iotsolve.mixing import Mixing, eliminated
from iotsolve.testing import check_certificate, problems

MIXED = Sinkhorn(stationary=True, max_steps=3000)
REGIMES = {
    "balanced": {},
    "kl": dict(rows=KL(1.0), columns=KL(0.5)),
    "semi-unbalanced": dict(columns=KL(1.0)),
    "tv": dict(rows=TV(0.3)),
    "l2": dict(rows=L2(1.0)),
    "partial": dict(rows=AT_MOST, columns=AT_MOST, mass=0.7),
    "mass and kl": dict(rows=KL(1.0), columns=KL(1.0), mass=0.5),
    "semi-relaxed": dict(columns=FREE),
}


def clouds(n=120, m=100, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(k, d, generator=generator, dtype=torch.float64) for k in (n, m))


def test_on_a_linear_map_every_iterate_is_the_image_of_that_of_gmres():
    """Walker and Ni, theorem 2.2."""
    generator = np.random.default_rng(0)
    step, shift = 0.9 * np.linalg.qr(generator.normal(size=(8, 8)))[0], generator.normal(size=8)
    memory, x = Mixing.empty(torch.zeros(1, 8, dtype=torch.float64), 8), torch.zeros(1, 8, dtype=torch.float64)
    memory = memory.mixed(x, torch.ones_like(x))  # the first iterate
    for k in range(9):
        x = memory.at
        memory = memory.mixed(x @ torch.from_numpy(step.T) + torch.from_numpy(shift), torch.ones_like(x))
        if 0 < k < 8:
            theirs, _ = gmres(np.eye(8) - step, shift, x0=np.zeros(8), restart=k, maxiter=1, rtol=1e-15)
            np.testing.assert_allclose(memory.at[0].numpy(), step @ theirs + shift, atol=1e-7)
    np.testing.assert_allclose(memory.at[0].numpy(), np.linalg.solve(np.eye(8) - step, shift), atol=1e-6)


def test_weights_and_problems_of_a_batch_are_their_own():
    """Entries of no weight have no say, but follow; each problem goes its own way."""
    generator = torch.Generator().manual_seed(1)
    step = 0.5 * torch.rand(2, 6, 6, generator=generator, dtype=torch.float64) / 3
    shift, weights = (torch.rand(2, 6, generator=generator, dtype=torch.float64) for _ in "xx")
    step[:, :5, 5], weights[:, 5] = 0.0, 0.0

    def run(k, size, window=4, steps=12):
        part = slice(k, k + 1)
        memory = Mixing.empty(shift[part, :size], window)
        memory = memory.mixed(torch.zeros_like(shift[part, :size]), weights[part, :size])
        for _ in range(steps):
            image = (step[part, :size, :size] @ memory.at.unsqueeze(-1)).squeeze(-1) + shift[part, :size]
            memory = memory.mixed(image, weights[part, :size])
        return memory.at

    both = Mixing.empty(shift, 4).mixed(torch.zeros_like(shift), weights)
    for _ in range(12):
        both = both.mixed((step @ both.at.unsqueeze(-1)).squeeze(-1) + shift, weights)
    for k in range(2):
        torch.testing.assert_close(both.at[k : k + 1], run(k, 6), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(both.at[k : k + 1, :5], run(k, 5), rtol=1e-9, atol=1e-12)
    fixed = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - step, shift)
    torch.testing.assert_close(both.at, fixed, rtol=1e-6, atol=1e-6)


def test_small_systems_are_solved_in_steps_that_a_graph_records():
    factor = torch.randn(4, 15, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, right = factor @ factor.mT + 1e-3 * torch.eye(15, dtype=torch.float64), factor[:, :, :1]
    found = eliminated(matrix, right)
    torch.testing.assert_close(matrix @ found, right, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=1e-7, atol=1e-8)


def test_on_a_device_the_way_is_the_same(monkeypatch):
    """As far as one can tell without one: the other arithmetic leads to the same answer in as many steps."""
    problem = Problem(Points(*clouds()), epsilon=0.005)
    here = solve(problem, MIXED)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    there = solve(problem, MIXED)
    assert here.steps == there.steps
    torch.testing.assert_close(here.f, there.f, rtol=1e-7, atol=1e-9)


def test_a_map_that_jumps_away_is_followed_and_its_past_forgotten():
    memory = Mixing.empty(torch.zeros(1, 3), 5).mixed(torch.zeros(1, 3), torch.ones(1, 3))
    centre = torch.tensor([[1.0, 2.0, 3.0]])
    for k in range(60):
        if k == 20:
            centre = -100 * centre
        memory = memory.mixed(centre + 0.5 * (memory.at - centre).roll(1, 1), torch.ones(1, 3))
        if k == 20:
            assert int(memory.known) == 1
    torch.testing.assert_close(memory.at, centre, rtol=1e-5, atol=1e-4)


def test_entries_that_are_not_finite_stay_as_the_map_makes_them():
    memory = Mixing.empty(torch.zeros(1, 3), 5)
    for k in range(6):
        image = torch.tensor([[0.5**k, torch.inf if k > 2 else 1.0, -torch.inf]])
        memory = memory.mixed(image, torch.tensor([[1.0, 1.0, 0.0]]))
        assert float(memory.at[0, 2]) == -torch.inf and float(memory.at[0, 1]) == (torch.inf if k > 2 else 1.0)
        assert memory.at[0, 0].isfinite()


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("epsilon", [0.05, 0.005])
def test_the_answer_is_that_of_second_order(name, epsilon):
    problem = Problem(Points(*clouds()), epsilon=epsilon, **REGIMES[name])
    solution, theirs = solve(problem, MIXED), solve(problem, Newton(tolerance=1e-10))
    assert solution.converged and solution.certificate.holds
    torch.testing.assert_close(solution.value, theirs.value, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(solution.plan, theirs.plan, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["balanced", "kl", "semi-unbalanced", "tv"])
def test_at_a_small_epsilon_the_sweeps_are_a_quarter(name):
    problem = Problem(Points(*clouds()), epsilon=0.002, **REGIMES[name])
    plain, mixed = (solve(problem, Sinkhorn(mixing=k, max_steps=4000), throw=False) for k in (0, 15))
    assert mixed.converged and 4 * mixed.steps < plain.steps


def test_a_problem_of_kinks_that_plain_sweeps_do_not_end():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(k, 3, generator=generator, dtype=torch.float64) for k in (300, 250))
    problem = Problem(Points(x, y), epsilon=0.05, rows=TV(0.3))
    assert not solve(problem, Sinkhorn(stationary=True, max_steps=1000, mixing=0), throw=False).converged
    assert solve(problem, MIXED).certificate.holds


def test_what_mixing_gets_nowhere_with_is_swept_as_before(monkeypatch):
    """As of a mixture that leads astray, again and again: as many sweeps as without, after those it has cost."""
    problem = Problem(Points(*clouds()), epsilon=0.01)
    plain = solve(problem, Sinkhorn(mixing=0))
    mixed = Mixing.mixed

    def astray(self, image, weights, most):
        found = mixed(self, image, weights, most)
        lost = torch.where((found.idle > 4 * 15).unsqueeze(-1), found.at, image + 0.1)
        return replace(found, at=lost + torch.linspace(0, 0.1, image.shape[1]) * (found.idle <= 4 * 15).unsqueeze(-1))

    monkeypatch.setattr(Mixing, "mixed", astray)
    lost = solve(problem, Sinkhorn())
    assert lost.certificate.holds and plain.steps < lost.steps < plain.steps + 8 * 45


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_is_its_problems(dtype):
    x, y = (torch.stack(z).to(dtype) for z in zip(*(clouds(30, 25, seed=k) for k in range(4)), strict=True))
    x[2] *= 2  # which anneals longer
    together = solve(Problem(Points(x, y), epsilon=0.02, columns=KL(1.0)), Sinkhorn(mixing=8))
    for k in range(4):
        alone = solve(Problem(Points(x[k], y[k]), epsilon=0.02, columns=KL(1.0)), Sinkhorn(mixing=8))
        close = 1e-7 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(together.f[k], alone.f, rtol=close, atol=close)
        assert dtype == torch.float32 or abs(int(together.steps[k]) - alone.steps) <= 8


@given(problem=problems(exact=False, smallest_epsilon=0.1), tolerance=st.sampled_from([1e-2, 1e-4, 1e-10]))
def test_what_it_calls_solved_is(problem, tolerance):
    check_certificate(problem, solve(problem, Sinkhorn(tolerance=tolerance, mixing=5, max_steps=500), throw=False))
