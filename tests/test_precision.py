"""Products of float32 numbers are made in float32, whatever torch was told to do for the networks beside us."""

import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive import ClipLoss, DCLLoss, InfoNCELoss, MatchingGapLoss, SinkhornNCELoss
from iotsolve import AT_MOST, KL, Implicit, Points, Problem, solve
from iotsolve.kernels import precision, threads
from iotsolve.kernels.precision import in_full, product

HAS_BACKENDS = hasattr(torch.backends.cuda.matmul, "fp32_precision")
OURS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}  # what tensor cores would take


def told():
    """What torch makes products in, on a GPU and on a CPU."""
    if not HAS_BACKENDS:
        return (torch.get_float32_matmul_precision(),)
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


class Products(TorchDispatchMode):
    """The settings under which products of float32 numbers are made."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in OURS and any(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in args):
            self.seen.append(told())
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["high", "medium"])
def loose(request, monkeypatch):
    monkeypatch.setattr(threads, "allowed", lambda: 1)  # what other threads do would not be seen
    torch.set_float32_matmul_precision(request.param)
    before = told()
    yield before
    assert told() == before and torch.get_float32_matmul_precision() == request.param
    torch.set_float32_matmul_precision("highest")


def clouds(n=600, m=600, d=8):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(k, d, generator=draw).requires_grad_() for k in (n, m)]


def potentials():
    x, y = clouds()
    solution = solve(Problem(Points(x, y), epsilon=200.0), gradient=Implicit())  # so small exponents are made in float32
    (solution.f.sum() + solution.apply(y).sum() + solution.transport_cost).backward()
    assert solution.certificate.holds


def dense():
    x, y = clouds(40, 30)
    solution = solve(Problem(Points(x, y, "cosine").dense(), epsilon=0.5, rows=KL(1.0)), gradient=Implicit())
    (solution.value + solution.apply(y).sum()).backward()


def loss(kind):
    def made():
        kind(0.2)(*clouds()).backward()

    return made


WORK = {"points": potentials, "dense": dense} | {
    kind.__name__: loss(kind) for kind in (InfoNCELoss, ClipLoss, DCLLoss, SinkhornNCELoss, MatchingGapLoss)
}


@pytest.mark.parametrize("name", WORK)
def test_no_product_is_made_in_less_than_float32(name, loose):
    with Products() as products:
        WORK[name]()
    assert products.seen
    assert all(set(seen) <= {"highest", "ieee", "none"} for seen in products.seen)


def test_the_count_sees_a_product_in_less(loose):
    with Products() as products:
        torch.ones(3, 3) @ torch.ones(3, 3)
    assert products.seen == [loose]


def test_a_product_has_the_derivatives_of_torchs(loose):
    """Of first and second order, against float64, to float32's rounding of the largest entry."""
    draw, found = torch.Generator().manual_seed(0), []
    given = [torch.randn(shape, generator=draw) for shape in ((2, 3, 4), (4, 5))]
    for dtype, times in ((torch.float32, product), (torch.float64, torch.matmul)):
        inputs = [z.to(dtype).requires_grad_() for z in given]
        made = times(*inputs)
        slopes = torch.autograd.grad(made.square().sum(), inputs, create_graph=True)
        again = torch.autograd.grad(sum(z.square().sum() for z in slopes), inputs)
        found.append([made, *slopes, *again])
    for mine, exact in zip(*found, strict=True):
        assert float((mine.double() - exact).detach().abs().max()) <= 1e-6 * float(exact.detach().abs().max())


def test_who_leaves_last_puts_the_setting_back(loose):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with in_full():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with in_full():
        thread.start()
        assert inside.wait(10)
    assert told() != loose  # one is still at it
    leave.set()
    thread.join()
    assert told() == loose


def test_an_older_torch_has_one_setting(monkeypatch):
    monkeypatch.setattr(precision, "_settings", lambda: ())
    torch.set_float32_matmul_precision("high")
    try:
        with in_full():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_where_torch_is_exact_nothing_is_touched():
    before = told()
    with in_full():
        assert told() == before
    np.testing.assert_array_equal(product(torch.eye(2), torch.eye(2)), np.eye(2))


OUTPUTS = {
    "f": lambda solution, values: solution.f,
    "plan": lambda solution, values: solution.plan,
    "transport cost": lambda solution, values: solution.transport_cost,
    "P V": lambda solution, values: solution.apply(values),
    "P' V": lambda solution, values: solution.apply(2 - values.sum(-1).tanh()[: solution.problem.shape[-2]], axis=-2),
}
COSTS = {
    "dense": lambda x, y: (x[:, None] - y).square().sum(-1),  # torch.cdist would be cast
    "points": Points,
    "distances": lambda x, y: Points(x, y, "euclidean"),
    "batch": lambda x, y: Points(torch.stack([x, y[: len(x)]]), y),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", COSTS)
def test_autocast_is_for_the_networks_beside_us(kind, output):
    def found():
        x, y = clouds(60, 90)
        values = y if kind != "batch" else torch.stack([y, y + 1])
        if kind == "batch" and output == "P' V":
            pytest.skip("one vector of weights for each problem is asked for elsewhere")
        solution = solve(Problem(COSTS[kind](x, y), epsilon=5.0, columns=KL(1.0)), gradient=Implicit())
        made = OUTPUTS[output](solution, values)
        made.square().sum().backward()
        return made.detach(), x.grad, y.grad

    before = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = found()
    for a, b in zip(before, within, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def test_a_product_under_autocast_is_in_full_and_leaves_the_context_as_it_was():
    x, y = (z.detach() for z in clouds(50, 40, 30))
    exact = x.double() @ y.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ y.T).dtype == torch.bfloat16
        assert (product(x, y.T) - exact).abs().max() < 1e-5
        with in_full():
            assert not torch.is_autocast_enabled("cpu") and (x @ y.T - exact).abs().max() < 1e-5
            with in_full():
                assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_half_precision_are_certified_whose_totals_rounding_has_set_apart(dtype):
    apart = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        drawn = draw.random((5, 7)), draw.dirichlet(np.ones(5)), draw.dirichlet(np.ones(7))
        cost, a, b = (torch.tensor(x, dtype=dtype) for x in drawn)
        found = solve(Problem(cost, a, b, epsilon=0.2))
        assert found.status.name == "CONVERGED" and found.certificate.holds
        exact = solve(Problem(cost.double(), a.double() / a.double().sum(), b.double() / b.double().sum(), epsilon=0.2))
        unit = torch.finfo(dtype).eps
        assert float(found.value) == pytest.approx(float(exact.value), rel=4 * unit, abs=4 * unit)
        apart.append(found.certificate.mismatch)
    assert max(apart) > 1e-4


@pytest.mark.parametrize("dtype, apart", [(torch.float32, 9e-6), (torch.float64, 9e-10)], ids=str)
def test_totals_apart_excuse_no_gap_in_the_other_precisions(dtype, apart):
    draw = np.random.default_rng(0)
    drawn = draw.random((5, 7)), draw.dirichlet(np.ones(5)), draw.dirichlet(np.ones(7)) * (1 + apart)
    found = solve(Problem(*(torch.tensor(x, dtype=dtype) for x in drawn), epsilon=0.2, rows=AT_MOST)).certificate
    assert found.holds and found.mismatch > 0.8 * apart
    assert found.rounding < 32 * torch.finfo(dtype).eps * (found.scale + 1.0)
