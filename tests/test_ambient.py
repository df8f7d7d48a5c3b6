"""What a process is set to for its own purposes changes nothing: NumPy's and Python's warnings, torch's defaults, autocast."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import contrastive
from iotsolve import (
    AT_MOST,
    FIXED,
    FREE,
    KL,
    TV,
    Between,
    ChiSquared,
    Implicit,
    Interior,
    Newton,
    Points,
    Problem,
    Sinkhorn,
    Unroll,
    inverse,
    inverse_loss,
    sinkhorn_divergence,
    solve,
)


def drawn(*shape, seed=0):
    draw = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float32, device="cpu")


def outputs(solution):
    m = solution.problem.shape[-1]
    ones = np.ones(m) if solution.problem.as_numpy else drawn(m).fill_(1.0)
    made = solution.value, solution.f.sum(), solution.plan.sum(), solution.apply(ones).sum(), solution.transport_cost
    return [float(x) for x in (*made, solution.certificate.dual, solution.certificate.primal)]


def of_arrays():
    rng, found = np.random.default_rng(0), []
    cost = rng.random((12, 10))
    cost[0, 1:3] = np.inf
    a = np.ones(12)
    a[1] = 0.0
    for rows in (FIXED, KL(1.0), TV(0.3), Between(0.5, 1.5), ChiSquared(1.0)):
        for epsilon, solver in ((0.0, None), (0.002, None), (0.1, None), (0.1, Sinkhorn()), (0.1, Newton()), (0.1, Interior())):
            solution = solve(Problem(cost, a / a.sum(), epsilon=epsilon, rows=rows, columns=KL(0.5)), solver, throw=False)
            found += outputs(solution)
            if epsilon:
                found.append(float(solution.gradient().cost.sum()))
    found += outputs(solve(Problem(cost, a / a.sum(), epsilon=0.1, rows=AT_MOST, columns=AT_MOST, mass=0.5)))
    return found


def of_batches():
    """Sixteen at once; and what is said of one that has no plan."""
    cost, found = np.random.default_rng(0).random((16, 6, 5)), []
    cost[:, 0, 1] = np.inf
    for rows in (FIXED, TV(0.3), ChiSquared(1.0)):
        for epsilon in (0.0, 0.1):
            solution = solve(Problem(cost, epsilon=epsilon, rows=rows))
            found += [float(x) for x in (solution.value.sum(), solution.certificate.dual.sum(), abs(solution.plan[3]).sum())]
    cost[3, :4, 1:] = np.inf
    with pytest.raises(ValueError, match=r"of problem 3 carry at most") as said:
        Problem(cost)
    return [*found, float(len(str(said.value)))]


def of_points():
    x, y, found = drawn(70, 4), drawn(60, 4, seed=1), []
    for metric in ("sqeuclidean", "euclidean", "cosine"):
        for gradient in (Implicit(), Unroll(20)):
            leaf = x.clone().requires_grad_()
            solution = solve(Problem(Points(leaf, y, metric), epsilon=0.5, columns=KL(1.0)), gradient=gradient)
            (solution.f.sum() + solution.value).backward()
            found += [float(solution.value.detach()), float(leaf.grad.sum())]
    found += solve(Problem(drawn(9, 7, 8).abs(), epsilon=0.05)).value.tolist()
    found += outputs(solve(Problem(Points(x, y), columns=FREE)))
    return [*found, float(sinkhorn_divergence(x, y, epsilon=1.0))]


def of_losses():
    x, found = drawn(40, 8), []
    for name in ("InfoNCELoss", "NTXentLoss", "SinkhornNCELoss", "UnbalancedNCELoss", "PartialNCELoss", "RINCELoss"):
        leaf = x.clone().requires_grad_()
        value = getattr(contrastive, name)()(leaf, x + 0.1)
        value.backward()
        found += [float(value.detach()), float(leaf.grad.abs().sum())]
    cost = drawn(6, 6).requires_grad_()
    loss = inverse_loss(Problem(cost, epsilon=0.5), torch.eye(6, device="cpu", dtype=torch.float32) / 6)
    loss.backward()
    return [*found, float(loss.detach()), float(cost.grad.abs().sum())]


def of_estimates():
    rng = np.random.default_rng(0)
    features = inverse.Features(rng.standard_normal((3, 6, 5)))
    counts = rng.poisson(1.0, (6, 5)) * (rng.random((6, 5)) < 0.6)
    found = []
    for model in (inverse.InverseOT(features), inverse.InverseOT(features, columns=Between(0.5, 1.5), penalty=inverse.L1(0.01))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", inverse.IdentifiabilityWarning)
            fit = model.fit(counts)
        fit.report()
        found += fit.coefficients.tolist()
    return found


WORK = {"arrays": of_arrays, "batches": of_batches, "points": of_points, "losses": of_losses, "estimates": of_estimates}


@contextmanager
def raising():
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT = {
    "errors for warnings": raising,
    "double by default": lambda: default(torch.float64),
    "half by default": lambda: default(torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),  # on which a number cannot be read
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
    "anomalies": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


@pytest.fixture(scope="module")
def known():
    return {name: work() for name, work in WORK.items()}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("ambient", AMBIENT)
def test_nothing_depends_on_what_the_process_is_set_to(known, ambient, work):
    with AMBIENT[ambient]():
        found = WORK[work]()
    np.testing.assert_allclose(found, known[work], rtol=1e-6, atol=1e-7)
