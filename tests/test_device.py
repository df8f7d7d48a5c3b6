"""What only a GPU can show; skipped without one. The kernels' arithmetic is in interpreted.py, which runs on it as well."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from contrastive import ClipLoss, InfoNCELoss, NTXentLoss, SinkhornNCELoss, UnbalancedNCELoss
from iotsolve import FIXED, FREE, KL, Points, Problem, Sinkhorn, solve
from iotsolve.solver import Status

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

MEMBERS = (InfoNCELoss, NTXentLoss, ClipLoss, SinkhornNCELoss, UnbalancedNCELoss)
ERRORS = {torch.float32: (1e-5, 5e-5), torch.float16: (1e-5, 3e-3), torch.bfloat16: (2e-5, 5e-3)}  # loss, gradient


def views(n, d, dtype=torch.float32):
    draw = torch.Generator("cuda").manual_seed(0)
    x, noise = (torch.randn(n, d, generator=draw, device="cuda") for _ in range(2))
    return [z.to(dtype).requires_grad_() for z in (x, x + 0.7 * noise)]


@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
@pytest.mark.parametrize("kind", MEMBERS)
def test_losses_against_float64_on_the_cpu(kind, dtype):
    ours = views(1500, 96, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # nothing falls back
        loss = kind(0.1, tolerance=1e-5)(*ours)  # what is left is the arithmetic's
    found = torch.autograd.grad(loss, ours)
    assert all(g.dtype == dtype for g in found)
    wide = [z.detach().double().cpu().requires_grad_() for z in ours]
    exact = kind(0.1, tolerance=1e-7)(*wide)
    error, backward = ERRORS[dtype]
    assert abs(float(loss.detach()) - float(exact.detach())) < error
    for g, expected in zip(found, torch.autograd.grad(exact, wide), strict=True):
        assert float((g.double().cpu() - expected).norm() / expected.norm()) < backward


def test_the_same_bits_twice():
    for kind in MEMBERS:
        runs = []
        for _ in range(2):
            ours = views(3000, 64, torch.bfloat16)
            loss = kind(0.1)(*ours)
            runs.append((loss.detach(), *torch.autograd.grad(loss, ours)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), kind


@pytest.mark.parametrize("sides", [(FIXED, FIXED), (KL(0.5), KL(0.2)), (FIXED, FREE)], ids=str)
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "sphere"])
def test_solves_are_certified_and_equal_the_cpu(metric, sides):
    x, y = (z.detach() / 4 for z in views(700, 20))
    problem = dict(epsilon=0.2, rows=sides[0], columns=sides[1])
    found = solve(Problem(Points(x, y, metric), **problem))
    exact = solve(Problem(Points(x.double().cpu(), y.double().cpu(), metric), **problem))
    assert found.status is Status.CONVERGED and found.certificate.holds
    assert float(found.value) == pytest.approx(float(exact.value), rel=2e-5, abs=1e-6)
    again = solve(Problem(Points(x, y, metric), **problem))
    assert torch.equal(found.f, again.f) and torch.equal(found.g, again.g)


def test_a_small_epsilon_is_played_from_a_recording():
    x, y = (z.detach() for z in views(400, 3))
    cost = Points(x, y)
    for mixing in (0, 15):
        solver = Sinkhorn(tolerance=1e-5, annealing=None, max_steps=3000, mixing=mixing)
        found = solve(Problem(cost, epsilon=0.2), solver)
        exact = solve(Problem(Points(x.double().cpu(), y.double().cpu()), epsilon=0.2), solver)
        assert found.steps > (30 if mixing else 50)
        assert found.steps == pytest.approx(exact.steps, rel=0.3 if mixing else 0.1)  # float32 against float64
        assert float(found.value) == pytest.approx(float(exact.value), rel=1e-5)


def test_a_recording_takes_no_memory_from_the_caller_and_none_twice():
    x, y = (z.detach() for z in views(3000, 8))
    torch.empty(2**28, dtype=torch.uint8, device="cuda")  # which torch keeps for whoever asks next
    solver = Sinkhorn(tolerance=1e-6, annealing=None, max_steps=40)
    held = []
    for _ in range(4):
        solve(Problem(Points(x, y), epsilon=0.05), solver, throw=False)
        held.append(torch.cuda.memory_reserved())
    assert held[0] > 2**28 and held[1] == held[2] == held[3]


def test_a_sweep_never_waits_for_the_device():
    x, y = (z.detach() for z in views(2000, 32))
    for side in (FIXED, KL(0.5)):
        problem = Problem(Points(x, y, "cosine"), epsilon=0.1, rows=side, columns=side).flat()
        method = Sinkhorn(annealing=None)
        with torch.no_grad():
            state = method.step(problem, method.init(problem, None), problem.epsilon)
            for mixes in (False, True):
                state = method.hasten(problem, state) if mixes else state
                state = method.step(problem, state, problem.epsilon)
                torch.cuda.set_sync_debug_mode("error")
                try:
                    for _ in range(3):
                        state = method.step(problem, state, problem.epsilon)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        assert state.potentials.f.isfinite().all() and state.potentials.g.isfinite().all()


def test_matrices_and_batches():
    draw = np.random.default_rng(0)
    cost = torch.as_tensor(draw.random((20, 30, 40)))
    found = solve(Problem(cost.cuda(), epsilon=0.05))
    exact = solve(Problem(cost, epsilon=0.05))
    np.testing.assert_allclose(found.value.cpu(), exact.value, rtol=1e-7)
    assert found.certificate.holds.all()


def test_far_from_the_origin_and_in_other_units():
    x, y = (z.detach() for z in views(500, 8))
    plain = solve(Problem(Points(x, y), epsilon=0.5))
    shifted = solve(Problem(Points(x + 100, y + 100), epsilon=0.5))
    scaled = solve(Problem(Points(x / 1000, y / 1000), epsilon=0.5e-6))
    assert float(shifted.value) == pytest.approx(float(plain.value), rel=1e-4)
    assert float(scaled.value) * 1e6 == pytest.approx(float(plain.value), rel=1e-5)


@pytest.mark.parametrize(
    "n, m, d, epsilon, side", [(400, 400, 2, 0.01, FIXED), (1000, 900, 2, 0.003, KL(1.0)), (1500, 1500, 5, 0.05, FIXED)], ids=str
)
def test_what_float32_has_not_the_digits_for(n, m, d, epsilon, side):
    draw = torch.Generator().manual_seed(n)
    x, y = torch.randn(n, d, generator=draw), 0.8 * torch.randn(m, d, generator=draw)
    found = solve(Problem(Points(x.cuda(), y.cuda()), epsilon=epsilon, columns=side))
    exact = solve(Problem(Points(x.double(), y.double()), epsilon=epsilon, columns=side), tolerance=1e-6)
    assert found.status is Status.CONVERGED and found.certificate.holds
    assert float(found.value) == pytest.approx(float(exact.value), rel=1e-5)


def test_many_points_at_a_small_epsilon_say_what_they_are():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9000, 8, generator=draw).cuda(), 0.8 * torch.randn(8000, 8, generator=draw).cuda()
    found = solve(Problem(Points(x, y), epsilon=0.1), throw=False)
    assert found.certificate.holds or found.status is not Status.CONVERGED


def test_memory_is_that_of_the_points():
    n, d = 20_000, 64
    ours = views(n, d)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    ClipLoss(0.1)(*ours).backward()
    assert torch.cuda.max_memory_allocated() - held < 30 * n * d * 4  # the matrix would be 300 n d


SCRIPT = """
import json, sys, torch
from contrastive.trainer import train, TrainConfig
from contrastive.data import Dataset
draw = torch.Generator().manual_seed(0)
images = torch.rand(600, 1, 8, 8, generator=draw)
labels = torch.arange(600) % 3
data = Dataset(images, labels, images[:90], labels[:90], "noise")
words = dict(batch_size=100, epochs=2, augmentation="noise", device="cuda", precision=sys.argv[2])
found = train(TrainConfig(**words), sys.argv[1], data=data, progress=False)
print(json.dumps(found.history))
"""


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_an_encoder_is_trained(tmp_path, precision):
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), precision]
    place = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(words, capture_output=True, text=True, env=place, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads(done.stdout.splitlines()[-1])
    assert len(history) == 12 and all(map(math.isfinite, history)) and history[-1] < history[0]
