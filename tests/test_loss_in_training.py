"""What a training loop does with a loss: memory, autocast, scalers, cached gradients, checkpoints, compilation, copies."""

import copy
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

from contrastive import (
    ClipLoss,
    DCLLoss,
    Diagnostics,
    InfoNCELoss,
    NTXentLoss,
    SinkhornNCELoss,
    SupConLoss,
    SwAVLoss,
    diagnose,
)
from iotsolve import Problem, Unroll, solve
from iotsolve.kernels import bilinear, threads

CLOSED = {"infonce": InfoNCELoss, "clip": ClipLoss, "ntxent": NTXentLoss, "dcl": DCLLoss}
LOSSES = {**CLOSED, "sinkhorn": SinkhornNCELoss}


def batch(n, d=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z0, z1 = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return z0.to(dtype).requires_grad_(), (z0 + z1).to(dtype).detach().requires_grad_()


def kept(loss, n):
    """Bytes that autograd keeps of a forward pass."""
    total = 0

    def pack(x):
        nonlocal total
        total += x.numel() * x.element_size() if not x.is_sparse else 0
        return x

    inputs = batch(n)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = loss(*inputs)
    value.backward()
    return total


@pytest.mark.parametrize(
    "make", [*LOSSES.values(), lambda t: SinkhornNCELoss(t, gradient=Unroll(3))], ids=[*LOSSES, "unroll"]
)
def test_what_autograd_keeps_grows_as_the_batch(make):
    """Four times the anchors, at most a little over four times the bytes, where a matrix would be sixteen; and far below one."""
    small, large = kept(make(0.2), 512), kept(make(0.2), 2048)
    assert large < 4.4 * small
    assert large < 2048 * 2048 * 4


def test_the_count_sees_a_matrix():
    def plain(z0, z1):
        return torch.logsumexp((z0 @ z1.T).exp(), 1).mean()

    assert kept(plain, 512) >= 512 * 512 * 4


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("t", [0.03, 0.2])
def test_both_ways_to_take_exponentials_agree(name, t, monkeypatch):
    inputs = batch(40, dtype=torch.float64)
    first = LOSSES[name](t)(*inputs)
    slopes = torch.autograd.grad(first, inputs)
    asked = []
    monkeypatch.setattr(bilinear, "_is_tame", lambda *given: asked.append(1) or False)
    second = LOSSES[name](t)(*inputs)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    for x, y in zip(slopes, torch.autograd.grad(second, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    assert len(asked) >= 2


@pytest.mark.parametrize("name", CLOSED)
def test_no_temporary_is_as_large_as_the_matrix(name, monkeypatch):
    """The largest tensor made, forward and backward, is a block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and not x.is_sparse:
                    self.size = max(self.size, x.numel())
            return out

    inputs = batch(4096, 8)
    monkeypatch.setattr(threads, "allowed", lambda: 1)  # other threads' blocks would not be seen
    with Largest() as largest:
        CLOSED[name](0.2)(*inputs).backward()
    assert 2**18 < largest.size <= 2**19


@pytest.mark.parametrize("name", LOSSES)
def test_cached_gradients_are_those_of_the_whole(name):
    """GradCache: representations first, the loss's gradient in them, then the encoder chunk by chunk."""
    encoder, images = nn.Linear(6, 5).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    loss = LOSSES[name](0.2)
    loss(encoder(images[0]), encoder(images[1])).backward()
    whole = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    with torch.no_grad():
        cached = [encoder(x) for x in images]
    for z in cached:
        z.requires_grad_()
    loss(*cached).backward()
    for x, z in zip(images, cached, strict=True):
        for part in range(0, 12, 4):
            rows = slice(part, part + 4)
            torch.autograd.backward(encoder(x[rows]), z.grad[rows])
    for p, expected in zip(encoder.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_under_checkpointing_and_twice_backward(name):
    z0, z1 = batch(10, dtype=torch.float64)
    loss = LOSSES[name](0.2)
    plain = torch.autograd.grad(loss(z0, z1), (z0, z1))
    value = checkpoint(loss, z0, z1, use_reentrant=False)
    for got, expected in zip(torch.autograd.grad(value, (z0, z1)), plain, strict=True):
        torch.testing.assert_close(got, expected)
    again = loss(z0, z1)
    (once,) = torch.autograd.grad(again, z0, retain_graph=True)
    (twice,) = torch.autograd.grad(again, z0)
    assert torch.equal(once, twice)


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_not_wrong(name):
    z0, z1 = batch(6, dtype=torch.float64)
    (first,) = torch.autograd.grad(LOSSES[name](0.2)(z0, z1), z0, create_graph=True)
    with pytest.raises(RuntimeError, match="was differentiated twice"):
        torch.autograd.grad(first.square().sum(), z1)


@pytest.mark.parametrize("name", LOSSES)
def test_with_autocast_and_a_scaler(name):
    encoder, images = nn.Linear(6, 5), torch.randn(2, 12, 6)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = LOSSES[name](0.2, learn_temperature=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*(encoder(x) for x in images))
    scaler.scale(value).backward()
    scaled = encoder.weight.grad.clone()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(encoder.weight.grad, scaled / 1024.0)
    before = encoder.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(encoder.weight, before) and loss.log_temperature.grad is not None


@pytest.mark.parametrize("name", ["clip", "sinkhorn", "bank", "swav"])  # closed, with an inner problem, with a state, with more
def test_compiled_with_one_break(name):
    """The loss is a break in the graph, as documented, even before anything else has been compiled: Dynamo does not read what
    numba has compiled. The encoder around it is compiled once for all sizes."""
    make = {
        "bank": lambda: NTXentLoss(0.2, memory_bank_size=(16, 5)),
        "swav": lambda: SwAVLoss(0.2),
    }.get(name, lambda: LOSSES[name](0.2))
    encoder, prototypes = nn.Linear(6, 5), torch.randn(4, 5)

    def step(loss, x, y):
        return loss(encoder(x), encoder(y), *([prototypes] if name == "swav" else []))

    torch._dynamo.reset()
    seen = torch._dynamo.testing.CompileCounter()
    compiled, mine, theirs = torch.compile(step, backend=seen), make(), make()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the memory bank is empty")
        for size in (12, 12, 9, 7):
            images = torch.randn(2, size, 6)
            value, expected = compiled(mine, *images), step(theirs, *images)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
            grads = []
            for of in (value, expected):
                encoder.zero_grad()
                of.backward()
                grads.append(encoder.weight.grad.clone())
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert 1 <= seen.frame_count <= 3  # for one size, and for any


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_of_torch_func_are_refused_in_words(name):
    z0, z1 = (z.detach() for z in batch(6))
    loss = LOSSES[name](0.2)
    for call in (
        lambda: torch.func.grad(loss)(z0, z1),
        lambda: torch.func.vmap(loss)(z0[None], z1[None]),
        lambda: torch.func.jvp(loss, (z0, z1), (z0, z1)),
        lambda: torch.func.grad(lambda x: solve(Problem(x, epsilon=0.1)).value)(z0),
    ):
        with pytest.raises(RuntimeError, match=r"inside torch.func.*torch.autograd.grad"):
            call()
    assert torch.func.functional_call(loss, {}, (z0, z1)) == loss(z0, z1)


def test_a_copy_stays_in_its_group_and_a_pickle_is_refused():
    group = type("Group", (), {"__reduce_ex__": lambda self, protocol: (_ for _ in ()).throw(TypeError("no"))})()
    loss = InfoNCELoss(0.2, process_group=group)
    assert copy.deepcopy(loss).process_group is group
    assert copy.deepcopy(nn.ModuleDict({"loss": loss}))["loss"].process_group is group
    assert copy.copy(loss).process_group is group and copy.copy(loss) is not loss
    with pytest.raises(ValueError, match="Save its state_dict"):
        pickle.dumps(loss)


def test_copies_and_pickles_behave_alike():
    for make in (*LOSSES.values(), SupConLoss):
        loss = make(0.2, learn_temperature=True, uniformity=0.1)
        z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert float(twin(z, z + 0.1).detach()) == float(loss(z, z + 0.1).detach())


def test_the_watch_sees_the_batch_and_costs_nothing_unasked():
    seen = []
    z0, z1 = batch(20, dtype=torch.float64)
    loss = SinkhornNCELoss(0.2, watch=seen.append)
    plain = SinkhornNCELoss(0.2)(z0, z1)
    assert torch.equal(loss(z0, z1), plain)
    assert isinstance(seen[0], Diagnostics)
    numbers = seen[0].numbers()
    assert set(numbers) == set(Diagnostics.NAMES) and numbers == diagnose(SinkhornNCELoss(0.2), z0, z1)
    assert numbers["marginal_error"] < 1e-3 and numbers["mass"] == pytest.approx(1.0, abs=1e-3)


def test_diagnostics_against_plain_formulas():
    z0, z1 = (z.detach() for z in batch(30, 8, dtype=torch.float64))
    x, y = (nn.functional.normalize(z, dim=1) for z in (z0, z1))
    found, plan = diagnose(InfoNCELoss(0.2), z0, z1), torch.softmax(x @ y.T / 0.2, 1) / 30
    assert found["alignment"] == pytest.approx(float((x - y).square().sum(1).mean()))
    wang = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (x, y)]
    assert found["uniformity"] == pytest.approx(float(sum(wang) / 2))
    order = (x @ y.T).argsort(1, descending=True)
    rank = (order == torch.arange(30)[:, None]).double().argmax(1)
    assert found["top1"] == pytest.approx(float((rank < 1).double().mean()))
    assert found["top5"] == pytest.approx(float((rank < 5).double().mean()))
    assert found["plan_entropy"] == pytest.approx(float(-(plan * plan.log()).sum()))
    assert found["chance"] == pytest.approx(float(torch.tensor(30.0).log()))
    off = plan * (1 - torch.eye(30, dtype=torch.float64))
    share = off / off.sum(1, keepdim=True)
    expected = (-torch.special.xlogy(share, share).sum(1)).exp().mean()
    assert found["effective_negatives"] == pytest.approx(float(expected))
    from scipy.stats import skew

    assert found["hubness"] == pytest.approx(skew(torch.bincount(order[:, :10].flatten(), minlength=30).numpy()))
    values = torch.linalg.svdvals(x)
    share = values / values.sum()
    assert found["rankme"] == pytest.approx(float((-(share * share.log()).sum()).exp()))
    assert found["feature_std"] == pytest.approx(float(x.std(0).mean()))


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_form_never_waits_for_the_device(name, monkeypatch):
    """No number is read back and no size depends on data, forward or backward: what would stall a GPU.

    On the path that a device takes: a CPU looks at the size of the exponents first.
    """
    monkeypatch.setattr(bilinear, "_is_tame", lambda *given: False)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name.split("::")[1] in (
                "_local_scalar_dense",
                "item",
                "nonzero",
                "equal",
                "_coalesce",
                "unique",
            ):
                self.seen = (*self.seen, func._schema.name)
            return func(*args, **(kwargs or {}))

    loss, inputs = CLOSED[name](0.2, learn_temperature=True), batch(16)
    with Waits() as waits:
        loss(*inputs).backward()
    assert waits.seen == ()
    with Waits() as waits:
        float(loss(*inputs).detach())
    assert waits.seen  # the count sees one
