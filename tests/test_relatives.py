"""Targets, views, queues and relatives of the family, against the formulas of their papers written out here in float64."""

import copy
import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from torch.nn import functional

from contrastive import (
    ClipLoss,
    DCLLoss,
    DoubleBoundedLoss,
    FeatureQueue,
    GCAINCELoss,
    GCAUOTLoss,
    GlobalNCELoss,
    HardNegativeLoss,
    InfoNCELoss,
    IOTLoss,
    MatchingGapLoss,
    NTXentLoss,
    PartialNCELoss,
    RINCELoss,
    SinkhornNCELoss,
    SupConLoss,
    SwAVLoss,
    UnbalancedNCELoss,
    balanced_assignment,
    rankme,
)
from contrastive.family import Side
from iotsolve import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared, Envelope, Implicit, Unroll

TIGHT = dict(tolerance=1e-12, max_steps=5000)
LABELS = torch.tensor([0, 1, 0, 2, 1, 3, 0, 1])  # class 2 and 3 occur once


def views(n=8, d=5, count=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = [torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(base + 0.7 * z).to(dtype).requires_grad_() for z in noise]


def unit(z):
    return functional.normalize(z, dim=-1)


def cosines(x, y):
    return unit(x) @ unit(y).T


def assert_same(ours, theirs, inputs, *, value=1e-10, gradient=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=value, atol=value)
    found = torch.autograd.grad(ours, inputs, torch.ones_like(ours), retain_graph=True)
    expected = torch.autograd.grad(theirs, inputs, torch.ones_like(theirs), retain_graph=True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=gradient, atol=gradient)


def supcon(z, labels, t):
    """Khosla et al., equation 2, with the authors' treatment of anchors without a positive."""
    logits = cosines(z, z) / t
    itself = torch.eye(len(z), dtype=torch.bool)
    log_p = logits - torch.logsumexp(logits.masked_fill(itself, -math.inf), 1, keepdim=True)
    positive = (labels[:, None] == labels) & ~itself
    count = positive.sum(1)
    return -(torch.where(positive, log_p, 0.0).sum(1) / count.clamp(min=1)).mean()


# -- targets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.1, 0.5])
def test_supcon_of_two_views_and_of_one_batch(t):
    z0, z1 = views()
    both, twice = torch.cat([z0, z1]), torch.cat([LABELS, LABELS])
    assert_same(SupConLoss(t)(z0, z1, labels=LABELS), supcon(both, twice, t), (z0, z1))
    assert_same(SupConLoss(t)(both, twice), supcon(both, twice, t), (z0, z1))
    assert_same(SupConLoss(t)(z0, LABELS), supcon(z0, LABELS, t), (z0,))


def test_supcon_is_the_divergence_and_a_constant():
    z0, z1 = views()
    count = (LABELS[:, None] == LABELS).sum(1) * 2 - 1
    plain = IOTLoss(FIXED, FREE, negatives="all", temperature=0.2)
    constant = count.double().log().mean()
    assert_same(SupConLoss(0.2)(z0, z1, labels=LABELS), plain(z0, z1, labels=LABELS) + constant, (z0, z1))


def test_anchors_without_a_positive_add_nothing():
    (z,) = views(count=1)
    alone = torch.arange(8)
    loss = SupConLoss(0.2)(z, alone)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, z)[0].abs().max() == 0.0
    one_pair = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    assert_same(SupConLoss(0.2)(z, one_pair), supcon(z, one_pair, 0.2), (z,))
    for make in (GlobalNCELoss, lambda: UnbalancedNCELoss(rho=0.5)):
        z0, z1 = views()
        with_gaps = make()(z0, z1, positive_mask=torch.eye(8, dtype=torch.bool) & (torch.arange(8) < 5))
        assert all(g.isfinite().all() for g in torch.autograd.grad(with_gaps, (z0, z1)))


def multi_positive(z0, z1, positive, t, seen=None):
    """Cross-entropy of the positives' even mixture, less its entropy: a divergence."""
    logits = cosines(z0, z1) / t
    logits = logits if seen is None else logits.masked_fill(~(seen | positive), -math.inf)
    log_p, share = torch.log_softmax(logits, 1), positive.double() / positive.sum(1, keepdim=True)
    return (torch.where(positive, share * (share.log() - log_p), 0.0)).sum(1).mean()


def test_ids_of_both_sides_apart():
    z0, z1 = views()
    left, right = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]), torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    positive = left[:, None] == right
    ours = InfoNCELoss(0.3)(z0, z1, ids=(left, right))
    assert_same(ours, multi_positive(z0, z1, positive, 0.3), (z0, z1))
    both = ClipLoss(0.3)(z0, z1, ids=(left, right))
    there, back = multi_positive(z0, z1, positive, 0.3), multi_positive(z1, z0, positive.T, 0.3)
    assert_same(both, (there + back) / 2, (z0, z1))


def test_masks_say_who_is_positive_and_who_is_seen():
    z0, z1 = views()
    generator = torch.Generator().manual_seed(3)
    positive = (torch.rand(8, 8, generator=generator) < 0.2) | torch.eye(8, dtype=torch.bool)
    seen = torch.rand(8, 8, generator=generator) < 0.6
    ours = InfoNCELoss(0.3)(z0, z1, positive_mask=positive, negative_mask=seen)
    assert_same(ours, multi_positive(z0, z1, positive, 0.3, seen), (z0, z1))
    pairs = InfoNCELoss(0.3)(z0, z1, negative_mask=seen)
    assert_same(pairs, multi_positive(z0, z1, torch.eye(8, dtype=torch.bool), 0.3, seen), (z0, z1))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_soft_plan_as_target(sparse):
    z0, z1 = views()
    plan = torch.rand(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan = plan * (plan > 0.3)
    plan = plan / plan.sum()
    given = plan.to_sparse() if sparse else plan
    share = plan.sum(1)
    log_p = torch.log_softmax(cosines(z0, z1) / 0.3, 1) + share.log()[:, None]
    expected = torch.where(plan > 0, plan * (plan.clamp(min=1e-300).log() - log_p), 0.0).sum()
    assert_same(InfoNCELoss(0.3)(z0, z1, target=given), expected, (z0, z1))


def balanced(scores, a, b, sweeps=3000):
    """``a_i b_j exp(f + g + scores)`` with marginals a and b, by alternating normalisation that autograd follows."""
    g = torch.zeros_like(b)
    for _ in range(sweeps):
        f = -torch.logsumexp(scores + g + b.log(), 1)
        g = -torch.logsumexp(scores + f[:, None] + a.log()[:, None], 0)
    return f[:, None] + g + scores + a.log()[:, None] + b.log()


def test_targets_outside_the_balanced_set_have_the_exact_gradient():
    """Column sums that are not uniform: the naive target - plan is far off (design: 40 to 70 percent)."""
    z0, z1 = views(n=6)
    left, right = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([0, 1, 2, 3, 3, 4])
    positive = (left[:, None] == right).double()
    plan = positive / positive.sum(1, keepdim=True) / 6
    a, b = plan.sum(1), torch.full((6,), 1 / 6, dtype=torch.float64)
    log_p = balanced(cosines(z0, z1) / 0.3, a, b)
    expected = torch.where(plan > 0, plan * (plan.clamp(min=1e-300).log() - log_p), 0.0).sum()
    with pytest.warns(RuntimeWarning, match="column sums are not those of even weights.*floor above 0"):
        ours = SinkhornNCELoss(0.3, **TIGHT)(z0, z1, ids=(left, right))
    assert_same(ours, expected, (z0, z1))
    naive = torch.autograd.grad(expected, z0, retain_graph=True)[0]
    cost = cosines(z0, z1)
    wrong = torch.autograd.grad(cost, z0, (log_p.exp() - plan).detach() / 0.3)[0]
    assert (naive - wrong).norm() > 0.1 * naive.norm()


@pytest.mark.parametrize("kind", ["mean", "sum", "none"])
@pytest.mark.parametrize("make", [InfoNCELoss, ClipLoss, NTXentLoss, SinkhornNCELoss, GlobalNCELoss])
def test_reductions_agree(kind, make):
    inputs = views()
    options = TIGHT if make is SinkhornNCELoss else {}
    mean = make(0.3, **options)(*inputs)
    count = 16 if make in (ClipLoss, NTXentLoss) else 8
    other = make(0.3, reduction=kind, **options)(*inputs)
    total = {"mean": lambda x: x, "sum": lambda x: x / count, "none": lambda x: x.mean()}[kind](other)
    assert other.shape == (
        (16,) if kind == "none" and make in (ClipLoss, NTXentLoss) else (8,) if kind == "none" else ()
    )
    assert_same(total, mean, inputs, gradient=1e-9)


def test_one_loss_per_anchor_has_each_its_own_gradient():
    z0, z1 = views()
    weights = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = functional.cross_entropy(cosines(z0, z1) / 0.3, torch.arange(8), reduction="none")
    assert_same(weights @ InfoNCELoss(0.3, reduction="none")(z0, z1), weights @ each, (z0, z1))
    log_p = balanced(cosines(z0, z1) / 0.3, *2 * [torch.full((8,), 1 / 8, dtype=torch.float64)])
    assert_same(
        weights @ SinkhornNCELoss(0.3, reduction="none", **TIGHT)(z0, z1),
        weights @ (-log_p.diagonal() - math.log(8)),
        (z0, z1),
    )


def test_more_than_two_views():
    three = views(count=3)
    clip = ClipLoss(0.3)
    pairs = [clip(three[i], three[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert_same(clip(*three), sum(pairs) / 3, three)
    stacked, ids = torch.cat(three), torch.arange(8).repeat(3)
    assert_same(SupConLoss(0.3)(*three), supcon(stacked, ids, 0.3), three)
    same = IOTLoss(FIXED, FREE, negatives="all", temperature=0.3)
    assert_same(same(*three), supcon(stacked, ids, 0.3) - math.log(2), three)


# -- gradients -----------------------------------------------------------------------------------------------------------


def unrolled(scores, sweeps):
    """The paper's inner loop with uniform marginals, followed by autograd; the loss of its plan."""
    n = len(scores)
    f, g = scores.new_zeros(n), scores.new_zeros(n)
    for _ in range(sweeps):
        f = -torch.logsumexp(scores + g - math.log(n), 1)
        g = -torch.logsumexp(scores + f[:, None] - math.log(n), 0)
    log_p = scores + f[:, None] + g - 2 * math.log(n)
    return -log_p.diagonal().mean() - math.log(n) - 1 + log_p.exp().sum()


@pytest.mark.parametrize("sweeps", [1, 3, 10])
def test_unroll_is_the_truncated_loop_with_its_own_gradient(sweeps):
    inputs = views()
    ours = SinkhornNCELoss(0.2, gradient=Unroll(sweeps))(*inputs)
    assert_same(ours, unrolled(cosines(*inputs) / 0.2, sweeps), inputs)


@pytest.mark.parametrize("gradient", [Envelope(), Implicit(), Unroll(400)])
@pytest.mark.parametrize("sides", [(FIXED, FIXED), (KL(0.5), KL(0.5)), (FIXED, KL(0.2)), (FIXED, Between(0.8, 1.2))])
def test_every_way_to_differentiate_agrees_at_convergence(gradient, sides):
    inputs = views()
    mass = 1.0 if sides[0] is not FIXED else None
    reference = IOTLoss(*sides, mass, temperature=0.3, **TIGHT)(*inputs)
    assert_same(
        IOTLoss(*sides, mass, temperature=0.3, gradient=gradient, **TIGHT)(*inputs),
        reference,
        inputs,
        value=1e-9,
        gradient=1e-7,
    )


def entropy(p, q):
    return (torch.special.xlogy(p, p / q) - p + q).sum()


def kl_side(rho):
    return lambda s, eps: s * rho / (rho + eps), lambda r, a: rho * entropy(r, a)


def bounded_side(lo, hi):
    def aprox(s, eps):
        if lo == hi:
            return s + eps * math.log(lo)
        upper = torch.minimum(s + eps * math.log(hi), torch.zeros_like(s))
        return torch.maximum(upper, s + eps * math.log(lo)) if lo > 0 else upper

    return aprox, lambda r, a: 0.0


def by_sweeps(cost, eps, rows, columns, mass, sweeps):
    """The definition, ``(primal(target) - optimal value) / eps``, its optimum by plain sweeps that autograd follows."""
    n = len(cost)
    a, f, g, lam = torch.full((n,), 1 / n, dtype=cost.dtype), cost.new_zeros(n), cost.new_zeros(n), cost.new_zeros(())
    for _ in range(sweeps):
        f = rows[0](-eps * torch.logsumexp((g - cost) / eps - math.log(n), 1) - lam, eps)
        g = columns[0](-eps * torch.logsumexp((f[:, None] - cost) / eps - math.log(n), 0) - lam, eps)
        if mass is not None:
            held = torch.logsumexp((f[:, None] + g - cost) / eps - 2 * math.log(n), (0, 1))
            lam = eps * (math.log(mass) - held)

    def primal(p):
        paid = rows[1](p.sum(1), a) + columns[1](p.sum(0), a)
        return (p * cost).sum() + eps * entropy(p, a[:, None] * a) + paid

    target = torch.eye(n, dtype=cost.dtype) * (1.0 if mass is None else mass) / n
    return (primal(target) - primal(((f[:, None] + g + lam - cost) / eps).exp() / n**2)) / eps


@pytest.mark.parametrize(
    ("make", "rows", "columns", "mass"),
    [
        (lambda: UnbalancedNCELoss(0.3, rho=0.4, **TIGHT), kl_side(0.4), kl_side(0.4), 1.0),
        (lambda: GCAUOTLoss(0.3, rho=0.4, **TIGHT), kl_side(0.4), kl_side(0.4), None),
        (lambda: SinkhornNCELoss(0.3, **TIGHT), bounded_side(1.0, 1.0), bounded_side(1.0, 1.0), None),
        (lambda: DoubleBoundedLoss(0.3, lo=0.9, hi=1.1, **TIGHT), bounded_side(1.0, 1.0), bounded_side(0.9, 1.1), None),
        (lambda: PartialNCELoss(0.3, mass=0.8, **TIGHT), bounded_side(0.0, 1.0), bounded_side(0.0, 1.0), 0.8),
        (lambda: IOTLoss(FIXED, KL(0.3), temperature=0.3, **TIGHT), bounded_side(1.0, 1.0), kl_side(0.3), None),
    ],
    ids=["unbalanced", "uot", "sinkhorn", "bounded", "partial", "fixed-kl"],
)
def test_iterative_members_are_their_definition(make, rows, columns, mass):
    inputs = views()
    expected = by_sweeps(1 - cosines(*inputs), 0.3, rows, columns, mass, 1500)
    assert_same(make()(*inputs), expected, inputs)


def test_half_a_sweep_is_infonce_and_each_lowers_the_loss():
    scores = cosines(*[z.detach() for z in views()]) / 0.2
    n, f, g, losses = 8, torch.zeros(8).double(), torch.zeros(8).double(), []
    for k in range(6):
        if k % 2 == 0:
            f = -torch.logsumexp(scores + g - math.log(n), 1)
        else:
            g = -torch.logsumexp(scores + f[:, None] - math.log(n), 0)
        losses.append(float(-(scores + f[:, None] + g).diagonal().mean() + math.log(n)))
    z0, z1 = views()
    assert losses[0] == pytest.approx(float(InfoNCELoss(0.2)(z0, z1).detach()), abs=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert float(SinkhornNCELoss(0.2, gradient=Unroll(3))(z0, z1).detach()) == pytest.approx(losses[5], abs=1e-12)


# -- relatives -----------------------------------------------------------------------------------------------------------


def rince(z0, z1, t, q, lam):
    """Chuang et al., equation 5, for one positive and the other rows' candidates as negatives."""
    exp = (cosines(z0, z1) / t).exp()
    return (-(exp.diagonal() ** q) / q + (lam * exp.sum(1)) ** q / q).mean()


@pytest.mark.parametrize("q", [0.1, 0.5, 1.0])
def test_rince(q):
    inputs = views()
    assert_same(RINCELoss(0.5, q=q, lam=0.05)(*inputs), rince(*inputs, 0.5, q, 0.05), inputs)


def test_rince_becomes_infonce():
    z0, z1 = views()
    gaps = [
        float((RINCELoss(0.5, q=q, lam=0.05)(z0, z1) - InfoNCELoss(0.5)(z0, z1)).detach()) - math.log(0.05)
        for q in (1e-2, 1e-3, 1e-4)
    ]
    assert abs(gaps[2]) < 1e-2 and gaps[1] / gaps[2] == pytest.approx(10, rel=0.1)


def dcl(z, t, positive):
    logits = cosines(z, z) / t
    negative = ~positive & ~torch.eye(len(z), dtype=torch.bool)
    return (
        -(logits * positive).sum(1) / positive.sum(1) + logits.masked_fill(~negative, -math.inf).logsumexp(1)
    ).mean()


def test_dcl():
    z0, z1 = views()
    positive = torch.eye(16, dtype=torch.bool).roll(8, 1)
    assert_same(DCLLoss(0.1)(z0, z1), dcl(torch.cat([z0, z1]), 0.1, positive), (z0, z1))
    logits = cosines(z0, z1) / 0.2
    off = logits.masked_fill(torch.eye(8, dtype=torch.bool), -math.inf)
    expected = (off.logsumexp(1) + off.logsumexp(0)).mean() / 2 - logits.diagonal().mean()
    assert_same(DCLLoss(0.2, negatives="cross", symmetric=True)(z0, z1), expected, (z0, z1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
@pytest.mark.parametrize("negatives", ["cross", "all"])
@pytest.mark.parametrize("make", [InfoNCELoss, DCLLoss])
def test_closed_forms_are_what_the_inner_problem_says(make, negatives, symmetric, reduction):
    """Which is asked where somebody watches."""
    options = {"negatives": negatives, "symmetric": symmetric, "reduction": reduction, "learn_temperature": True}
    closed, open_ = make(0.3, **options).double(), make(0.3, watch=lambda _: None, **options).double()
    assert closed.is_cross_entropy and not open_.is_cross_entropy
    inputs = [torch.cat([z, torch.zeros_like(z[:1])]).detach().requires_grad_() for z in views()]  # one has no length
    found, expected = closed(*inputs), open_(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    weights = torch.linspace(-1.0, 1.0, found.numel(), dtype=torch.float64).reshape(found.shape) + 0.3
    ours, theirs = (
        torch.autograd.grad((value * weights).sum(), (*inputs, loss.log_temperature))
        for loss, value in ((closed, found), (open_, expected))
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
@pytest.mark.parametrize("negatives", ["cross", "all"])
@pytest.mark.parametrize("make", [InfoNCELoss, DCLLoss])
def test_views_of_two_precisions_are_read_in_the_higher_one(make, negatives, symmetric):
    z0, z1 = views()
    single = z1.detach().float().requires_grad_()
    loss = make(0.3, negatives=negatives, symmetric=symmetric)
    for given, wide in (((z0, single), (z0, single.double())), ((single, z0), (single.double(), z0))):
        assert_same(loss(*given), loss(*wide), given)


@pytest.mark.parametrize("gradient", [Envelope(), Implicit(), Unroll(4)], ids=lambda how: type(how).__name__)
@pytest.mark.parametrize(
    "views_and_options",
    [(2, {}), (2, {"symmetric": True}), (2, {"negatives": "all"}), (3, {"negatives": "all", "symmetric": True})],
    ids=str,
)
@pytest.mark.parametrize(
    "sides",
    [
        (FIXED, FIXED, None),
        (FREE, FREE, 1.0),
        (KL(0.5), KL(0.8), 1.0),
        (KL(0.5), KL(0.8), None),
        (AT_MOST, AT_MOST, 0.7),
        (FIXED, KL(0.5), None),
        (KL(0.5), FREE, None),
        (ChiSquared(0.5), FREE, 0.8),
    ],
    ids=str,
)
def test_pairs_alone_are_told_of_by_fewer_terms(sides, views_and_options, gradient, monkeypatch):
    """Which are those of any target: where every anchor has as many positives, and every bin the same weight."""
    count, options = views_and_options
    inputs = views(count=count)
    rows, columns, mass = sides
    found = []
    for uniform in (Side.is_uniform, property(lambda side: False)):
        monkeypatch.setattr(Side, "is_uniform", uniform)
        how = {"learn_temperature": True, "gradient": gradient, "tolerance": 1e-12, "watch": lambda _: None, **options}
        loss = IOTLoss(rows, columns, mass, temperature=0.3, **how).double()
        value = loss(*inputs)
        found.append((value, *torch.autograd.grad(value, (*inputs, loss.log_temperature))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("watch", [None, lambda _: None], ids=["closed", "open"])
def test_dcl_of_what_has_no_negatives_and_of_what_is_no_number(watch):
    z0, z1 = (z[:1].detach().requires_grad_() for z in views())
    found = DCLLoss(0.3, watch=watch)(z0, z1)
    assert float(found.detach()) == 0.0
    assert not any(g.any() for g in torch.autograd.grad(found, (z0, z1)))
    z0, z1 = (z.detach().clone() for z in views())
    z0[3, 2] = math.nan
    assert DCLLoss(0.3, watch=watch)(z0, z1).isnan()


@pytest.mark.filterwarnings("ignore:the balanced assignment did not converge")
@pytest.mark.parametrize("k", [3, 7], ids=["few prototypes", "more"])
def test_an_assignment_that_is_no_number_is_not_left_out(k):
    z0, z1 = (z.detach().clone() for z in views())
    prototypes = views(k)[0].detach()
    z0[3, 2] = z1[3, 1] = math.nan  # the same image's
    assert SwAVLoss(0.3)(z0, z1, prototypes).isnan()


def test_hard_negatives():
    z0, z1 = views()
    off = torch.eye(8, dtype=torch.bool)
    scores = cosines(z0, z1)
    even = torch.full((8,), 1 / 8, dtype=torch.float64)
    with torch.no_grad():
        weights = balanced((scores / 0.3).masked_fill(off, -math.inf), even, even).exp() * 8
    exp = (scores / 0.5).exp()
    expected = -(exp.diagonal() / (exp.diagonal() + 7 * (weights * exp.masked_fill(off, 0.0)).sum(1))).log().mean()
    assert_same(HardNegativeLoss(0.5, hardness=0.3, tolerance=1e-12)(z0, z1), expected, (z0, z1))
    limit = HardNegativeLoss(0.5, hardness=1e6, tolerance=1e-12)(z0, z1)
    assert float(limit - InfoNCELoss(0.5)(z0, z1)) == pytest.approx(0.0, abs=1e-5)


def test_matching_gap():
    z0, z1 = views()
    cost, even = 1 - cosines(z0, z1), torch.full((8,), 1 / 8, dtype=torch.float64)
    plan = balanced(-cost / 0.1, even, even).exp()
    value = (plan * cost).sum() + 0.1 * (plan * (plan * 64).log()).sum()
    assert_same(MatchingGapLoss(0.1, **TIGHT)(z0, z1), cost.diagonal().mean() - value, (z0, z1))
    family = 0.1 * (SinkhornNCELoss(0.1, **TIGHT)(z0, z1) - math.log(8))
    assert_same(MatchingGapLoss(0.1, **TIGHT)(z0, z1), family, (z0, z1))


def test_exact_matching_gap_is_the_assignment_problem():
    from scipy.optimize import linear_sum_assignment

    z0, z1 = views(seed=4)
    z1 = z1.detach()[torch.randperm(8, generator=torch.Generator().manual_seed(0))].requires_grad_()
    cost = 1 - cosines(z0, z1)
    i, j = linear_sum_assignment(cost.detach())
    expected = cost.diagonal().mean() - cost[i, j].mean()
    assert float(expected) > 0.1
    assert_same(MatchingGapLoss(0.0)(z0, z1), expected, (z0, z1))


def swav(z0, z1, c, t, epsilon):
    """Caron et al.: swapped prediction of codes, which are the balanced plan between a batch and the prototypes."""
    total = 0.0
    for z, other in ((z0, z1), (z1, z0)):
        n, k = len(z), len(c)
        with torch.no_grad():
            a, b = torch.full((n,), 1 / n, dtype=z.dtype), torch.full((k,), 1 / k, dtype=z.dtype)
            code = balanced(cosines(other, c) / epsilon, a, b).exp() * n
        total = total - (code * torch.log_softmax(cosines(z, c) / t, 1)).sum(1).mean() / 2
    return total


def test_swav():
    z0, z1 = views()
    c = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    ours = SwAVLoss(0.1, epsilon=0.05, tolerance=1e-12)(z0, z1, c)
    assert_same(ours, swav(z0, z1, c, 0.1, 0.05), (z0, z1, c))
    plan = balanced_assignment(z0.detach(), c.detach(), tolerance=1e-12)
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 1 / 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"prototypes \(3, 4\): must be \(N, D\) twice and \(K, D\)"):
        SwAVLoss()(z0, z1, c[:, :4])


def test_names_of_other_papers_are_points_of_the_family():
    z0, z1 = views()
    for ours, same in (
        (GCAINCELoss(0.3, **TIGHT), IOTLoss(FIXED, FIXED, temperature=0.3, **TIGHT)),
        (GCAUOTLoss(0.3, rho=0.4, **TIGHT), IOTLoss(KL(0.4), KL(0.4), temperature=0.3, **TIGHT)),
        (DoubleBoundedLoss(0.3, lo=0.7, hi=1.5, **TIGHT), IOTLoss(FIXED, Between(0.7, 1.5), temperature=0.3, **TIGHT)),
        (PartialNCELoss(0.3, mass=0.8, **TIGHT), IOTLoss(AT_MOST, AT_MOST, 0.8, temperature=0.3, **TIGHT)),
    ):
        assert_same(ours(z0, z1), same(z0, z1), (z0, z1))


def test_bounds_run_from_infonce_to_balanced():
    z0, z1 = [z.detach() for z in views()]
    bounds = ((0.0, 1e6), (0.5, 2.0), (0.9, 1.1), (1.0, 1.0))
    values = [float(DoubleBoundedLoss(0.1, lo=lo, hi=hi, **TIGHT)(z0, z1)) for lo, hi in bounds]
    assert values[0] == pytest.approx(float(InfoNCELoss(0.1)(z0, z1)), abs=1e-9)
    assert values[-1] == pytest.approx(float(SinkhornNCELoss(0.1, **TIGHT)(z0, z1)), abs=1e-9)
    assert values == sorted(values, reverse=True)


EVERY = {
    "infonce": lambda **k: InfoNCELoss(0.3, **k),
    "ntxent": lambda **k: NTXentLoss(0.3, **k),
    "clip": lambda **k: ClipLoss(0.3, **k),
    "supcon": lambda **k: SupConLoss(0.3, **k),
    "global": lambda **k: GlobalNCELoss(0.3, **k),
    "sinkhorn": lambda **k: SinkhornNCELoss(0.3, **TIGHT, **k),
    "unbalanced": lambda **k: UnbalancedNCELoss(0.3, **TIGHT, **k),
    "uot": lambda **k: GCAUOTLoss(0.3, **TIGHT, **k),
    "bounded": lambda **k: DoubleBoundedLoss(0.3, **TIGHT, **k),
    "partial": lambda **k: PartialNCELoss(0.3, **TIGHT, **k),
    "rince": lambda **k: RINCELoss(0.3, **k),
    "dcl": lambda **k: DCLLoss(0.3, **k),
    "hard": lambda **k: HardNegativeLoss(0.3, tolerance=1e-12, **k),
    "gap": lambda **k: MatchingGapLoss(0.3, **TIGHT, **k),
    "tv": lambda **k: IOTLoss(FIXED, TV(0.3), temperature=0.3, **TIGHT, **k),
}


def loose(name, **options):
    """At the tolerance that float32 can reach."""
    loss = EVERY[name](**options)
    loss.solver = dataclasses.replace(loss.solver, tolerance=1e-5)
    return loss


@pytest.mark.parametrize("name", [n for n in EVERY if n != "hard"])  # whose weights are detached on purpose
@pytest.mark.parametrize("uniformity", [0.0, 0.3])
def test_gradcheck(name, uniformity):
    inputs = views(n=5, d=4)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = EVERY[name](uniformity=uniformity)
    if name == "gap":
        assert torch.autograd.gradcheck(loss, inputs, atol=1e-7, rtol=1e-5)
        return
    slow = uniformity > 0 and name in ("partial", "tv")  # of those in random directions
    given = (*inputs, t)
    assert torch.autograd.gradcheck(
        lambda x, y, t: loss(x, y, logit_scale=1 / t), given, atol=1e-7, rtol=1e-5, fast_mode=slow
    )


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_low_precision(name, dtype, error):
    """Against float64 on the same rounded numbers: the arithmetic itself is float32's; the gradient is rounded to the dtype."""
    low = views(n=24, d=16, dtype=dtype)
    high = [z.detach().double().requires_grad_() for z in low]
    loss = loose(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*low)
    expected = loss(*high)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
    for x, y in zip(torch.autograd.grad(value, low), torch.autograd.grad(expected, high), strict=True):
        assert x.dtype == dtype and (x.double() - y).norm() < error * y.norm() + 1e-6


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("rince",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["apart", "alike", "zero", "mixed"])
def test_cold_and_degenerate_batches_are_finite(name, dtype, case):
    """Temperature .01 with similarities of at most .1, all alike, zero vectors: values of float64, gradients finite."""
    generator = torch.Generator().manual_seed(0)
    z0 = torch.nn.functional.one_hot(torch.arange(12), 16).double()
    z1 = {
        "apart": -z0 + 0.05 * torch.randn(12, 16, generator=generator).double(),
        "alike": torch.ones(12, 16).double(),
        "zero": torch.zeros(12, 16).double(),
        "mixed": torch.where(torch.arange(12)[:, None] < 6, 0.0, z0),
    }[case]
    z0 = torch.ones(12, 16).double() if case == "alike" else z0
    low = [z.to(dtype).requires_grad_() for z in (z0, z1)]
    if name == "gap":
        pytest.skip("its epsilon is that of the matching")
    loss = loose(name, learn_temperature=True)
    loss.log_temperature.data.fill_(math.log(0.01))
    value = loss(*low)
    value.backward()
    assert value.isfinite() and all(z.grad.isfinite().all() for z in low) and loss.log_temperature.grad.isfinite()
    exact = copy.deepcopy(loss).double()(*[z.detach().double() for z in low])
    assert float(value) == pytest.approx(float(exact), rel=2e-4, abs=2e-4)


# -- the queue -----------------------------------------------------------------------------------------------------------


def test_a_queue_adds_negatives():
    z0, z1 = views()
    queue = FeatureQueue(6, 5).double()
    extra = views(n=4, count=1, seed=7)[0].detach()
    queue.update(extra)
    logits = torch.cat([cosines(z0, z1), cosines(z0, extra)], 1) / 0.2
    assert_same(InfoNCELoss(0.2)(z0, z1, queue=queue), functional.cross_entropy(logits, torch.arange(8)), (z0, z1))
    back = torch.cat([cosines(z1, z0), cosines(z1, extra)], 1) / 0.2
    both = (functional.cross_entropy(logits, torch.arange(8)) + functional.cross_entropy(back, torch.arange(8))) / 2
    assert_same(ClipLoss(0.2)(z0, z1, queue=queue), both, (z0, z1))
    assert int(queue.fill) == 4 and int(queue.pointer) == 4


def test_a_queue_turns_round_and_keeps_the_newest():
    queue = FeatureQueue(5, 2)
    steps = [torch.tensor([[math.cos(x), math.sin(x)]]) for x in range(8)]
    for z in steps[:3]:
        queue.update(z)
    queue.update(torch.cat(steps[3:7]))
    kept = {round(float(torch.atan2(y, x)) % (2 * math.pi), 4) for x, y in queue.features}
    assert kept == {float(x) for x in range(2, 7)} and int(queue.fill) == 5
    queue.update(torch.cat(steps))
    assert int(queue.pointer) == (7 + 5) % 5 and int(queue.fill) == 5
    queue.eval()
    before = queue.features.clone()
    queue.update(steps[0])
    assert torch.equal(queue.features, before)


def test_a_queue_is_saved_with_pointer_and_fill():
    queue = FeatureQueue(5)
    queue.update(torch.eye(3), ids=torch.arange(3))
    other = FeatureQueue(5)
    other.load_state_dict(queue.state_dict())
    for twin in (other, copy.deepcopy(queue), pickle.loads(pickle.dumps(queue))):
        assert int(twin.fill) == 3 and int(twin.pointer) == 3
        assert torch.equal(twin.features, queue.features) and torch.equal(twin.ids, queue.ids)


def test_ids_in_a_queue_are_positives():
    z0, z1 = views()
    queue = FeatureQueue(4, 5).double()
    extra = views(n=3, count=1, seed=7)[0].detach()
    queue.update(extra, ids=torch.tensor([2, 50, 51]))
    candidates = torch.cat([z1, extra])
    positive = torch.arange(8)[:, None] == torch.tensor([*range(8), 2, 50, 51])
    expected = multi_positive(z0, candidates, positive, 0.2)
    assert_same(InfoNCELoss(0.2)(z0, z1, ids=torch.arange(8), queue=queue), expected, (z0, z1))


def test_a_queue_under_hard_columns_is_explained():
    queue = FeatureQueue(4, 5).double()
    queue.update(views(n=4, count=1)[0])
    with pytest.raises(ValueError, match=r"nobody's positives.*could never come near 0.*FREE or KL"):
        SinkhornNCELoss(0.2)(*views(), queue=queue)
    with pytest.warns(RuntimeWarning, match="floor above 0"):
        DoubleBoundedLoss(0.2, lo=0.0, hi=1.2)(*views(), queue=queue)
    inputs = views(n=5, d=5)
    loss = IOTLoss(FIXED, KL(0.3), temperature=0.3, **TIGHT)
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, queue=queue), inputs, atol=1e-7, rtol=1e-5)


def test_the_memory_bank_of_ntxent():
    """Of MoCo: the pair against the bank alone, then the second view goes in."""
    z0, z1 = views()
    loss = NTXentLoss(0.2, memory_bank_size=(12, 5)).double()
    with pytest.warns(RuntimeWarning, match="bank is empty, so that this batch has no negatives"):
        assert float(loss(z0, z1)) == pytest.approx(0.0, abs=1e-12)
    bank = unit(z1.detach())
    w0, w1 = views(seed=5)
    positive = (unit(w0) * unit(w1)).sum(1, keepdim=True)
    logits = torch.cat([positive, unit(w0) @ bank.T], 1) / 0.2
    assert_same(loss(w0, w1), functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long)), (w0, w1))
    assert int(loss.memory_bank.fill) == 12
    loss.eval()
    before = loss.memory_bank.features.clone()
    loss(z0, z1)
    assert torch.equal(loss.memory_bank.features, before)
    with pytest.raises(ValueError, match="a memory bank with 3 views"):
        loss(*views(count=3))


# -- spelling and misuse ---------------------------------------------------------------------------------------------------


def test_spellings_of_other_libraries():
    z0, z1 = views()
    scale = torch.tensor(1 / 0.3, dtype=torch.float64, requires_grad=True)
    ours = ClipLoss()(z0, z1, scale)
    logits = scale * cosines(z0, z1)
    theirs = (
        functional.cross_entropy(logits, torch.arange(8)) + functional.cross_entropy(logits.T, torch.arange(8))
    ) / 2
    assert_same(ours, theirs, (z0, z1, scale))
    assert isinstance(NTXentLoss(temperature=0.5, memory_bank_size=16, gather_distributed=True), IOTLoss)


def alone(n, kind):
    """Masks that leave an anchor, a candidate, or both of a number without anything."""
    positive, seen = torch.eye(n, dtype=torch.bool), torch.rand(n, n, generator=torch.Generator().manual_seed(1)) < 0.7
    positive = positive.roll(n // 2, 0) if n == 16 else positive
    for mask in (positive, seen):
        if kind != "candidate":
            mask[2] = False
        if kind != "anchor":
            mask[:, 2 if kind == "both" else 5] = False
    return {"positive_mask": positive, "negative_mask": seen}


@pytest.mark.parametrize("kind", ["anchor", "candidate", "both"])
@pytest.mark.parametrize(
    "make",
    [
        InfoNCELoss,
        NTXentLoss,
        ClipLoss,
        GlobalNCELoss,
        DCLLoss,
        RINCELoss,
        HardNegativeLoss,
        lambda *t, **k: ClipLoss(*t, uniformity=0.3, **k),
        lambda *t, **k: GlobalNCELoss(*t, uniformity=0.3, **k),
        lambda *t, **k: UnbalancedNCELoss(*t, rho=0.5, uniformity=0.3, tolerance=1e-12, **k),
        lambda *t, **k: IOTLoss(FIXED, KL(0.5), temperature=t[0], symmetric=True, tolerance=1e-12, **k),
        lambda *t, **k: IOTLoss(FIXED, KL(0.5), temperature=t[0], gradient=Unroll(5), **k),
        lambda *t, **k: IOTLoss(KL(1.0), ChiSquared(0.7), temperature=t[0], reduction="none", tolerance=1e-12, **k),
    ],
)
def test_what_nothing_reaches_has_no_part_in_the_temperatures_derivative(make, kind):
    """Its soft-minimum is infinite and does not move; once its derivative was NaN."""
    z0, z1 = views()
    loss = make(0.3, learn_temperature=True).double()
    given = alone(16 if loss.negatives == "all" else 8, kind)
    value = loss(z0, z1, **given).sum()
    slope, *others = torch.autograd.grad(value, (loss.log_temperature, z0, z1))
    assert all(x.isfinite().all() for x in others)
    step = 1e-5
    at = []
    for way in (step, -step):
        with torch.no_grad():
            moved = copy.deepcopy(loss)
            moved.log_temperature += way
            at.append(float(moved(z0, z1, **given).sum()))
    assert float(slope) == pytest.approx((at[0] - at[1]) / (2 * step), rel=2e-5, abs=2e-7)


@pytest.mark.parametrize(
    "loss",
    [
        InfoNCELoss(0.3),
        GlobalNCELoss(0.3),
        UnbalancedNCELoss(0.3, rho=0.5, tolerance=1e-12),
        UnbalancedNCELoss(0.3, rho=0.5, mass=None, tolerance=1e-12),
        PartialNCELoss(0.3, mass=0.9, tolerance=1e-12),
        PartialNCELoss(0.3, mass=0.4, tolerance=1e-12),
        IOTLoss(FIXED, KL(0.5), temperature=0.3, tolerance=1e-12),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{loss.mass}",
)
@pytest.mark.filterwarnings("ignore:the positives violate")
def test_anchors_without_positives_add_nothing(loss):
    """They are candidates, as what is in a queue, and their share of the batch is 0: the mass is of what has positives."""
    z0, z1 = views()
    positive = torch.eye(8, dtype=torch.bool)
    positive[5:] = False
    queue = FeatureQueue(3, 5).double()
    queue.update(z1[5:].detach())
    rest = loss(z0[:5], z1[:5], queue=queue)
    ours = loss(z0, z1, positive_mask=positive)
    torch.testing.assert_close(ours, 5 / 8 * rest, rtol=1e-8, atol=1e-10)
    (found,) = torch.autograd.grad(ours, z0)
    (expected,) = torch.autograd.grad(rest, z0)
    torch.testing.assert_close(found, 5 / 8 * expected, rtol=1e-6, atol=1e-9)


def test_without_any_negative_there_is_no_uniformity():
    z0, z1 = views()
    none = torch.zeros(8, 8, dtype=torch.bool)
    loss = InfoNCELoss(0.3, uniformity=0.5, learn_temperature=True).double()
    value = loss(z0, z1, negative_mask=none)
    value.backward()
    assert [float(value.detach()), float(loss.log_temperature.grad)] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_a_coupling_that_masks_forbid_is_told_at_once():
    """Of two classes, one of which is larger than all else together, negatives have no balanced coupling."""
    z0, z1 = views()
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    with pytest.warns(RuntimeWarning, match=r"did not converge \(INFEASIBLE\).*the allowed arcs carry at most 0.5"):
        value = HardNegativeLoss(0.5)(z0, z1, labels=labels)
    assert value.isfinite()


def test_a_side_of_squares_is_that_of_its_even_weights():
    """L2 pays by bins; between even weights it is the chi-squared side of a strength divided by their number."""
    z0, z1 = views()
    tight = dict(temperature=0.3, tolerance=1e-12)
    assert_same(IOTLoss(FIXED, L2(4.0), **tight)(z0, z1), IOTLoss(FIXED, ChiSquared(0.5), **tight)(z0, z1), (z0, z1))
    assert_same(IOTLoss(L2(4.0), FREE, **tight)(z0, z1), IOTLoss(ChiSquared(0.5), FREE, **tight)(z0, z1), (z0, z1))


def test_a_learnable_temperature_comes_back_from_below_its_floor():
    z0, z1 = views()
    loss = ClipLoss(0.011, learn_temperature=True).double()
    with torch.no_grad():
        loss.log_temperature -= 0.2  # as a step of an optimizer may
    assert float(loss.temperature) == pytest.approx(0.01)
    cold = loss(z0, z1)  # random pairs ask for a higher temperature
    (up,) = torch.autograd.grad(cold, loss.log_temperature)
    free = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    (constant,) = torch.autograd.grad(ClipLoss(free)(z0, z1), free)
    assert float(up) < 0 and float(up) == pytest.approx(float(constant) * 0.01)
    (down,) = torch.autograd.grad(loss(z0, z0.detach() + 1e-3), loss.log_temperature)
    assert float(down) == 0.0  # pairs that agree ask for a lower one


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda z: InfoNCELoss()(*z, labels=LABELS, ids=LABELS), "labels and ids: each says"),
        (lambda z: InfoNCELoss()(*z, labels=LABELS[:5]), r"labels have shape \(5,\).*shape \(8,\)"),
        (lambda z: InfoNCELoss()(*z, labels=LABELS.double()), "whole numbers"),
        (lambda z: SupConLoss()(*z, labels=(LABELS, LABELS)), "one vector for all views"),
        (lambda z: InfoNCELoss()(*z, positive_mask=torch.eye(8)), "must be a boolean tensor of shape"),
        (lambda z: InfoNCELoss()(*z, negative_mask=torch.ones(8, 7, dtype=torch.bool)), r"negative_mask = \(8, 7\)"),
        (lambda z: InfoNCELoss()(*z, target=torch.eye(8)), "total 8.*divide by the number of rows"),
        (lambda z: InfoNCELoss()(*z, target=torch.eye(3)), r"target = \(3, 3\)"),
        (lambda z: InfoNCELoss()(*z, queue=torch.eye(3)), r"must be a FeatureQueue\(size, dim\)"),
        (lambda z: InfoNCELoss()(*z, queue=FeatureQueue(3, 4)), r"queue of \(N, 4\)"),
        (lambda z: InfoNCELoss()(*z, logit_scale=-2.0), "did you pass its logarithm"),
        (lambda z: InfoNCELoss(reduction="avg"), "reduction = 'avg'"),
        (lambda z: SinkhornNCELoss(gradient="unroll"), r"gradient = 'unroll': must be Envelope\(\)"),
        (lambda z: InfoNCELoss()(*views(count=3), positive_mask=torch.eye(8, dtype=torch.bool)), "3 views with a mask"),
        (lambda z: RINCELoss(q=0.0), r"q = 0.0: must be in \(0, 1\]"),
        (lambda z: RINCELoss(0.01, q=1.0)(*(x.float() for x in z)), "leaves the range of torch.float32"),
        (lambda z: RINCELoss(q=0.5)(*z, logit_scale=2000.0), "leaves the range of torch.float64"),
        (lambda z: SwAVLoss(epsilon=-0.05), "epsilon = -0.05: must be a positive number"),
        (lambda z: balanced_assignment(*z, epsilon=0), "epsilon = 0: must be a positive number"),
        (lambda z: balanced_assignment(z[0], z[1][:, :2]), r"must be \(N, D\) and \(K, D\)"),
        (lambda z: InfoNCELoss()(*z, labels=list("abcdefgh")), "Number the classes of names"),
        (lambda z: InfoNCELoss()(*(x.detach().numpy() for x in z)), "representations have shapes"),
        (lambda z: InfoNCELoss(temperature=None), "temperature = None: must be one number"),
        (lambda z: InfoNCELoss(0.005, learn_temperature=True), "a learnable temperature stops at 0.01"),
        (lambda z: FeatureQueue(3, 5).update(z[0] * math.nan), "NaN or infinite"),
        (lambda z: rankme(z[0] * math.nan), r"must be \(N, D\), finite"),
        (lambda z: HardNegativeLoss(hardness=0.0), "hardness = 0.0"),
        (lambda z: HardNegativeLoss(symmetric=True), "symmetric = True with HardNegativeLoss"),
        (lambda z: MatchingGapLoss(-1.0), "epsilon = -1.0"),
        (lambda z: MatchingGapLoss(0.0, uniformity=0.1), "epsilon = 0 with uniformity"),
        (lambda z: SwAVLoss(symmetric=True), r"\['symmetric'\]: SwAVLoss knows"),
        (lambda z: FeatureQueue(0), "size = 0"),
        (lambda z: FeatureQueue(3, 5).update(z[0], ids=torch.arange(3)), r"ids have shape \(3,\)"),
        (
            lambda z: ClipLoss()(*z, queue=FeatureQueue(3, 5), positive_mask=torch.ones(8, 11, dtype=torch.bool)),
            "call the loss twice",
        ),
        (lambda z: InfoNCELoss()(*z, LABELS), "both must be"),
        (lambda z: SupConLoss()(z[0], LABELS, labels=LABELS), "given twice"),
    ],
)
def test_misuse_is_explained(call, says):
    with pytest.raises(ValueError, match=says):
        call(views())
