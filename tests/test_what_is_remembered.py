"""What is remembered of a problem between passes is never that of other numbers: arrays changed in place, inference mode."""

import numpy as np
import pytest
import torch

from contrastive import ClipLoss, InfoNCELoss, NTXentLoss, SinkhornNCELoss
from iotsolve import KL, Points, Problem, Sinkhorn, solve

SOLVERS = [None, Sinkhorn(annealing=None)]


def draw(*shape):
    return np.random.default_rng(0).random(shape)


def as_given(kind, x):
    return x if kind == "numpy" else torch.from_numpy(x)


@pytest.mark.parametrize("solver", SOLVERS, ids=["automatic", "sinkhorn"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "dot"])
def test_points_changed_in_place_are_solved_anew(metric, kind, solver):
    x, y = draw(30, 4), draw(20, 4) + 0.1
    problem = Problem(Points(as_given(kind, x), as_given(kind, y), metric), epsilon=0.5)
    before = float(solve(problem, solver).value)
    x[:, 0] *= 3.0
    y[:, 1] += 1.0
    again = solve(problem, solver)
    anew = solve(Problem(Points(as_given(kind, x.copy()), as_given(kind, y.copy()), metric), epsilon=0.5), solver)
    assert float(again.value) == pytest.approx(float(anew.value), rel=1e-9)
    assert again.certificate.holds and abs(float(anew.value) - before) > 1e-2


@pytest.mark.parametrize("solver", SOLVERS, ids=["automatic", "sinkhorn"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("sides", [{}, {"rows": KL(0.5)}], ids=["fixed", "kl"])
def test_weights_changed_in_place_are_solved_anew(sides, batch, kind, solver):
    cost, a = draw(*batch, 6, 5), draw(*batch, 6) + 0.1
    a /= a.sum(-1, keepdims=True)
    problem = Problem(as_given(kind, cost), as_given(kind, a), epsilon=0.3, **sides)
    before = np.asarray(solve(problem, solver).value)
    a[...] = np.roll(a, 1, -1)
    again = solve(problem, solver)
    anew = solve(Problem(as_given(kind, cost), as_given(kind, a.copy()), epsilon=0.3, **sides), solver)
    np.testing.assert_allclose(again.value, anew.value, rtol=1e-9)
    assert np.all(again.certificate.holds) and np.abs(np.asarray(anew.value) - before).max() > 1e-4


@pytest.mark.parametrize("n", [40, 2100], ids=["few", "many"])
def test_points_are_solved_in_inference_mode(n):
    """Whose tensors do not tell whether they were changed; many are read by threads of our own."""
    x = torch.from_numpy(draw(n, 3)).float()
    expected = solve(Problem(Points(x, x + 0.1), epsilon=0.5), Sinkhorn(tolerance=1e-5))
    with torch.inference_mode():
        z = x.clone()
        found = solve(Problem(Points(z, z + 0.1), epsilon=0.5), Sinkhorn(tolerance=1e-5))
        assert float(found.value) == pytest.approx(float(expected.value), rel=1e-6)
        assert found.certificate.holds


@pytest.mark.parametrize("kind", [InfoNCELoss, ClipLoss, NTXentLoss, SinkhornNCELoss])
def test_losses_are_evaluated_in_inference_mode(kind):
    z0, z1 = (torch.from_numpy(draw(12, 4) - shift).float() for shift in (0.5, 0.4))
    with torch.inference_mode():
        found = kind(0.2)(z0.clone(), z1.clone())
    assert float(found) == pytest.approx(float(kind(0.2)(z0, z1)), rel=1e-6)
