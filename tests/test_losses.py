"""The contrastive family against torch's own cross-entropy, closed forms and finite differences."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch.nn import functional

import contrastive
from contrastive import (
    ClipLoss,
    GlobalNCELoss,
    InfoNCELoss,
    IOTLoss,
    NTXentLoss,
    SinkhornNCELoss,
    UnbalancedNCELoss,
    family,
)
from contrastive.diagnostics import diagnose
from contrastive.losses import NAMES, make
from contrastive.targets import Entries
from iotsolve import AT_MOST, FIXED, FREE, KL, TV, Between
from iotsolve.kernels.directions import normalised

TIGHT = dict(tolerance=1e-13, max_steps=20_000)
MEMBERS = {
    "global": lambda **k: GlobalNCELoss(**k),
    "infonce": lambda **k: InfoNCELoss(**k),
    "ntxent": lambda **k: NTXentLoss(**k),
    "clip": lambda **k: ClipLoss(**k),
    "sinkhorn": lambda **k: SinkhornNCELoss(**k, **TIGHT),
    "unbalanced": lambda **k: UnbalancedNCELoss(**k, **TIGHT),
}


def pair(n=12, d=5, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z0, z1 = (torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return (z1 + 1.5 * z0).requires_grad_(), z1.requires_grad_()


def logits(z0, z1, temperature):
    return functional.normalize(z0, dim=1) @ functional.normalize(z1, dim=1).T / temperature


def reference_infonce(z0, z1, t):
    return functional.cross_entropy(logits(z0, z1, t), torch.arange(len(z0)))


def reference_clip(z0, z1, t):
    return (reference_infonce(z0, z1, t) + reference_infonce(z1, z0, t)) / 2


def reference_ntxent(z0, z1, t):
    z, n = torch.cat([z0, z1]), len(z0)
    scores = logits(z, z, t).masked_fill(torch.eye(2 * n, dtype=torch.bool), -math.inf)
    return functional.cross_entropy(scores, torch.arange(2 * n).roll(-n))


def reference_global(z0, z1, t):
    scores = logits(z0, z1, t)
    return torch.logsumexp(scores.flatten(), 0) - scores.diagonal().mean() - math.log(len(z0))


@pytest.mark.parametrize("t", [0.05, 0.2, 1.0])
@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (InfoNCELoss, reference_infonce),
        (ClipLoss, reference_clip),
        (NTXentLoss, reference_ntxent),
        (GlobalNCELoss, reference_global),
    ],
)
def test_value_and_gradient_equal_cross_entropy(loss, reference, t):
    inputs = pair()
    ours, theirs = loss(t)(*inputs), reference(*inputs, t)
    assert abs(float(ours.detach() - theirs.detach())) < 1e-12 * max(1.0, abs(float(theirs.detach())))
    for got, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def log_domain_sinkhorn(scores, sweeps=5000):
    """Balanced uniform plan of ``exp(scores)``, by plain alternating normalisation in the log domain."""
    log_plan, n = scores, len(scores)
    for _ in range(sweeps):
        log_plan = log_plan - torch.logsumexp(log_plan, 1, keepdim=True) - math.log(n)
        log_plan = log_plan - torch.logsumexp(log_plan, 0, keepdim=True) - math.log(n)
    return log_plan


def test_sinkhorn_equals_the_unrolled_balanced_coupling():
    z0, z1 = pair(n=8)
    ours = SinkhornNCELoss(0.3, **TIGHT)(z0, z1)
    log_plan = log_domain_sinkhorn(logits(z0, z1, 0.3), sweeps=400)
    unrolled = -log_plan.diagonal().mean() - math.log(8)
    torch.testing.assert_close(ours, unrolled, rtol=1e-10, atol=1e-12)
    for got, expected in zip(torch.autograd.grad(ours, (z0, z1)), torch.autograd.grad(unrolled, (z0, z1)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("t", [0.1, 0.5])
def test_relaxing_marginals_raises_the_loss(seed, t):
    z0, z1 = (z.detach() for z in pair(seed=seed))
    chain = [float(loss(z0, z1)) for loss in (GlobalNCELoss(t), InfoNCELoss(t), SinkhornNCELoss(t, **TIGHT))]
    assert chain[0] > chain[1] > chain[2] > 0


def test_gap_between_global_and_infonce_is_the_divergence_of_the_row_sums():
    z0, z1 = (z.detach() for z in pair())
    joint = torch.softmax(logits(z0, z1, 0.2).flatten(), 0).view(12, 12).sum(1)
    divergence = -(joint * 12).log().mean()
    assert float(GlobalNCELoss(0.2)(z0, z1) - InfoNCELoss(0.2)(z0, z1)) == pytest.approx(float(divergence), abs=1e-12)


def test_unbalanced_runs_from_global_to_sinkhorn():
    z0, z1 = (z.detach() for z in pair())
    by_rho = [float(UnbalancedNCELoss(0.2, rho=rho, **TIGHT)(z0, z1)) for rho in (1e-7, 0.1, 1.0, 1e7)]
    assert by_rho[0] == pytest.approx(float(GlobalNCELoss(0.2)(z0, z1)), abs=1e-6)
    assert by_rho[-1] == pytest.approx(float(SinkhornNCELoss(0.2, **TIGHT)(z0, z1)), abs=1e-6)
    assert by_rho == sorted(by_rho, reverse=True)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("uniformity", [0.0, 0.4])
def test_gradients_against_finite_differences(name, uniformity):
    inputs = pair(n=5, d=4)
    loss = MEMBERS[name](temperature=0.2, uniformity=uniformity)
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("uniformity", [0.0, 0.4])
def test_learnable_temperature(name, uniformity):
    z0, z1 = (z.detach() for z in pair(n=5, d=4))
    loss = MEMBERS[name](temperature=0.2, uniformity=uniformity, learn_temperature=True).double()
    start, values = loss.log_temperature.detach().clone(), []
    loss(z0, z1).backward()
    for step in (1e-5, -1e-5):
        loss.log_temperature.data = start + step
        values.append(float(loss(z0, z1).detach()))
    assert float(loss.log_temperature.grad) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("sides", [(KL(0.5), TV(0.3)), (Between(0.5, 2.0), FIXED), (TV(0.5), TV(0.2)), (KL(0.1), FREE)])
def test_any_pair_of_marginals_has_the_right_gradient(sides):
    loss = IOTLoss(*sides, mass=1.0, temperature=0.3, **TIGHT)
    assert torch.autograd.gradcheck(loss, pair(n=4, d=3), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_partial_loss_at_full_mass_is_the_balanced_one():
    z0, z1 = (z.detach() for z in pair(n=6))
    partial = IOTLoss(AT_MOST, AT_MOST, 1.0, temperature=0.3, tolerance=1e-10, max_steps=50_000)
    assert float(partial(z0, z1)) == pytest.approx(float(SinkhornNCELoss(0.3, **TIGHT)(z0, z1)), abs=1e-8)


def uniformity_by_hand(plan, positive, allowed):
    """KL(Q | P) entry by entry: Q keeps the positives and gives every negative their mean."""
    negative = allowed & ~positive
    spread = torch.where(negative, plan[negative].mean(), plan)
    return (spread[allowed] * (spread[allowed] / plan[allowed]).log() - spread[allowed] + plan[allowed]).sum()


@pytest.mark.parametrize("name", MEMBERS)
def test_uniformity_penalty_is_the_divergence_from_even_negatives(name):
    z0, z1 = (z.detach() for z in pair(n=6))
    with_penalty, without = (MEMBERS[name](temperature=0.3, uniformity=u) for u in (0.7, 0.0))
    plan, n = without.coupling(z0, z1), 6
    if name == "ntxent":
        positive = torch.eye(2 * n, dtype=torch.bool).roll(n, 1)
        allowed = ~torch.eye(2 * n, dtype=torch.bool)
        mirrored = plan
    else:
        positive, allowed = torch.eye(n, dtype=torch.bool), torch.ones(n, n, dtype=torch.bool)
        mirrored = without.coupling(z1, z0) if name == "clip" else plan
    expected = 0.7 * (uniformity_by_hand(plan, positive, allowed) + uniformity_by_hand(mirrored, positive, allowed)) / 2
    assert float(with_penalty(z0, z1) - without(z0, z1)) == pytest.approx(float(expected), rel=1e-6, abs=1e-10)


def test_identical_representations_have_the_chance_level():
    z = torch.ones(7, 3, dtype=torch.float64)
    for name, loss in MEMBERS.items():
        expected = math.log(13) if name == "ntxent" else math.log(7)
        assert float(loss(temperature=0.1)(z, z)) == pytest.approx(expected, abs=1e-10), name


def test_length_does_not_matter_and_order_of_pairs_does_not():
    z0, z1 = (z.detach() for z in pair())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for name, make_loss in MEMBERS.items():
        loss = make_loss(temperature=0.2, uniformity=0.2)
        expected = pytest.approx(float(loss(z0, z1)), abs=1e-9)
        assert float(loss(3.7 * z0, 0.01 * z1)) == expected, name
        assert float(loss(z0[order], z1[order])) == expected, name


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.float16, 5e-2), (torch.bfloat16, 2e-1)])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_inputs_are_computed_in_float32(name, dtype, error):
    z0, z1 = (z.detach() for z in pair(n=32, d=16))
    low = [z.to(dtype).requires_grad_() for z in (z0, z1)]
    loss = make(name, temperature=0.2, uniformity=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*low)
    value.backward()
    assert value.dtype == torch.float32
    exact = loss(z0, z1)
    assert abs(float(value.detach() - exact)) < error
    assert all(z.grad.isfinite().all() and z.grad.dtype == dtype for z in low)
    rounded = [z.detach().double() for z in low]
    assert abs(float(value.detach() - loss(*rounded))) < 2e-4  # the arithmetic itself, not the inputs' rounding


def test_no_gradient_is_kept_for_constants_and_modules_copy():
    for name in NAMES:
        loss = make(name, temperature=0.2)
        assert list(loss.parameters()) == []
        z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert float(twin(z, z + 0.1)) == float(loss(z, z + 0.1))


def test_a_shared_parameter_is_trained_with_the_loss():
    temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = InfoNCELoss(temperature)
    loss(*pair()).backward()
    assert temperature.grad is not None and [id(p) for p in loss.parameters()] == [id(temperature)]


def test_slow_inner_transport_is_said_not_hidden(monkeypatch):
    """Where the matrix is too large to be held there are only sweeps on its kernel and then plain ones, three of each."""
    z0, z1 = (z.detach() for z in pair(n=20, d=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SinkhornNCELoss(0.02, tolerance=1e-9, max_steps=3)(z0, z1)
    monkeypatch.setattr(family, "_DENSE", 0)
    with pytest.warns(RuntimeWarning, match="stopped after 6 steps above its tolerance"):
        SinkhornNCELoss(0.02, tolerance=1e-9, max_steps=3)(z0, z1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SinkhornNCELoss(0.2)(z0, z1)


def test_nan_representations_give_nan_and_a_warning():
    z0, z1 = (z.detach().clone() for z in pair())
    z0[3, 2] = math.nan
    with pytest.warns(RuntimeWarning, match="check the representations for NaN"):
        assert math.isnan(float(SinkhornNCELoss(0.2)(z0, z1)))


def test_directions_and_their_derivatives():
    """Against the quotient written out and finite differences, to the second order."""
    z, _ = pair(n=6, d=4)
    expected = z.detach() / z.detach().square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(normalised(z).detach(), expected)
    assert torch.autograd.gradcheck(normalised, (z,))
    assert torch.autograd.gradgradcheck(normalised, (z,))
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(normalised(zero).sum(), zero)
    assert (normalised(zero) == 0).all() and (g == 0).all()


@pytest.mark.parametrize("share", [0.1, 0.9], ids=["few", "many"])
def test_entries_are_their_matrix(share):
    """Sums and similarities, with derivatives, of a plan by its entries: gathered where they are few, by a matrix where not."""
    generator = torch.Generator().manual_seed(0)
    plan = torch.rand(9, 14, generator=generator, dtype=torch.float64)
    plan = torch.where(plan < share, plan, 0.0)
    entries = Entries.of(plan)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True) for n in plan.shape)
    assert (len(entries.values) > 4 * 14) == (share > 0.5)
    torch.testing.assert_close(entries.sparse().to_dense(), plan)
    for axis in (0, 1):
        torch.testing.assert_close(entries.sums(entries.values, axis), plan.sum(1 - axis))
        found, expected = entries.similar(x, y, axis), (plan * (x @ y.mT)).sum(1 - axis)
        torch.testing.assert_close(found, expected)
        up = torch.randn(len(found), generator=generator, dtype=torch.float64)
        for ours, theirs in zip(
            torch.autograd.grad(found, (x, y), up), torch.autograd.grad(expected, (x, y), up), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("make_bad", "says"),
    [
        (lambda: InfoNCELoss(0.0), r"temperature = 0.0: must be positive"),
        (lambda: InfoNCELoss(math.nan), r"temperature = nan"),
        (lambda: InfoNCELoss(0.1, uniformity=-1.0), r"uniformity = -1.0: .* must be >= 0"),
        (lambda: IOTLoss(FREE, FREE), r"Pass mass=1.0, which is U\(1\)"),
        (lambda: IOTLoss("fixed", FREE), r"rows = 'fixed': must be a marginal object"),
        (lambda: IOTLoss(FIXED, FIXED, 0.5), r"mass = 0.5 with rows .* violate that side"),
        (lambda: IOTLoss(FIXED, FREE, negatives="some"), r"negatives = 'some'"),
        (lambda: make("simclr"), r"loss = 'simclr'.*Known: infonce, ntxent"),
        (
            lambda: InfoNCELoss()(torch.ones(3, 2), torch.ones(4, 2)),
            r"shapes \(3, 2\) and \(4, 2\): both must be \(N, D\)",
        ),
        (lambda: InfoNCELoss()(torch.ones(3, 2, 2), torch.ones(3, 2, 2)), r"Flatten feature maps"),
        (lambda: InfoNCELoss()(torch.ones(1, 2), torch.ones(1, 2)), r"N >= 2"),
        (lambda: InfoNCELoss()(torch.ones(3, 2)), r"1 batch of representations.* Pass two views"),
        (lambda: NTXentLoss()(torch.ones(4, 2)), r"or one with labels="),
        (lambda: InfoNCELoss()(), r"no batch of representations"),
    ],
)
def test_misuse_is_explained(make_bad, says):
    with pytest.raises(ValueError, match=says):
        make_bad()


def test_diagnostics_of_a_known_batch():
    z0 = torch.eye(4, dtype=torch.float64)
    found = diagnose(InfoNCELoss(0.5), z0, z0)
    assert found["alignment"] == 0.0 and found["top1"] == 1.0
    assert found["uniformity"] == pytest.approx(-4.0, abs=1e-6)  # all distances squared are 2, t = 2
    row = torch.tensor([2.0, 0, 0, 0]).softmax(0)
    assert found["plan_entropy"] == pytest.approx(float(-(row * (row / 4).log()).sum()), abs=1e-6)
    assert found["marginal_error"] < 1e-12
    assert diagnose(GlobalNCELoss(0.5), *(z.detach() for z in pair()))["marginal_error"] < 1e-9


def test_every_public_name_is_there():
    for name in contrastive.__all__:
        assert callable(getattr(contrastive, name))
    with pytest.raises(AttributeError, match="no attribute 'SimCLRLoss'"):
        contrastive.SimCLRLoss  # noqa: B018
