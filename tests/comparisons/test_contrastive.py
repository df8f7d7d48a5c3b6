"""The same inputs to other libraries' losses and to ours: values and gradients, in float64."""

import inspect

import pytest
import torch
from torch.nn import functional

from contrastive import ClipLoss, DCLLoss, FeatureQueue, InfoNCELoss, NTXentLoss, SupConLoss, SwAVLoss
from tests.comparisons import module


def batch(n=12, d=6, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z0, z1 = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return (z0 + z1).requires_grad_(), z1.requires_grad_()


def assert_same(ours, theirs, inputs, close=1e-10):
    torch.testing.assert_close(ours, theirs.reshape(()), rtol=close, atol=close)
    slopes = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (ours, theirs))
    for x, y in zip(*slopes, strict=True):
        torch.testing.assert_close(x, y, rtol=close, atol=close)


@pytest.mark.parametrize("t", [0.07, 0.5])
def test_ntxent_of_lightly(t):
    theirs = module("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=t)
    inputs = batch()
    assert_same(NTXentLoss(temperature=t)(*inputs), theirs(*inputs), inputs)


def test_the_memory_bank_of_lightly():
    """Theirs starts with random vectors, ours with empty slots: they agree once every slot has been written to."""
    theirs = module("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=0.2, memory_bank_size=(24, 6))
    ours = NTXentLoss(temperature=0.2, memory_bank_size=(24, 6)).double()
    theirs = theirs.double()
    for step in range(2):
        filling = batch(seed=step)
        theirs(*filling)
        if step == 0:
            with pytest.warns(RuntimeWarning, match="bank is empty"):
                ours(*filling)
        else:
            ours(*filling)
    inputs = batch(seed=7)
    assert_same(ours(*inputs), theirs(*inputs), inputs)


def test_dcl_of_lightly():
    """Its denominator leaves out the positive and oneself: all views, as ours by default."""
    theirs = module("lightly.loss.dcl_loss").DCLLoss(temperature=0.2)
    inputs = batch()
    assert_same(DCLLoss(temperature=0.2)(*inputs), theirs(*inputs), inputs)


def test_swav_of_lightly():
    """Theirs runs a number of sweeps from zero: enough of them are ours."""
    theirs = module("lightly.loss.swav_loss").SwaVLoss(temperature=0.1, sinkhorn_iterations=500, sinkhorn_epsilon=0.05)
    z0, z1 = batch()
    prototypes = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scores = [functional.normalize(z, dim=1) @ functional.normalize(prototypes, dim=1).T for z in (z0, z1)]
    ours = SwAVLoss(0.1, epsilon=0.05, tolerance=1e-12)(z0, z1, prototypes)
    assert_same(ours, theirs(scores, []), (z0, z1), close=1e-8)


@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_clip_of_open_clip(scale):
    theirs = module("open_clip.loss").ClipLoss()
    z0, z1 = batch()
    features = [functional.normalize(z, dim=1) for z in (z0, z1)]
    logit_scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    inputs = (z0, z1, logit_scale)
    assert_same(ClipLoss()(z0, z1, logit_scale), theirs(*features, logit_scale), inputs)


@pytest.mark.parametrize("t", [0.07, 0.5])
def test_ntxent_of_pytorch_metric_learning(t):
    """Labels that say which rows are views of one image; with two views of each its loss is SimCLR's."""
    theirs = pytest.importorskip("pytorch_metric_learning.losses").NTXentLoss(temperature=t)
    inputs = batch()
    labels = torch.arange(12).repeat(2)
    assert_same(NTXentLoss(temperature=t)(*inputs), theirs(torch.cat(inputs), labels), inputs)


def test_supcon_of_pytorch_metric_learning():
    theirs = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(temperature=0.1)
    (z, _), labels = batch(), torch.arange(12) % 4
    assert_same(SupConLoss(temperature=0.1)(z, labels), theirs(z, labels), (z,))


def test_where_pytorch_metric_learning_counts_anchors_otherwise():
    """Its mean is over anchors with a positive; ours, as the paper's code, over all."""
    theirs = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(temperature=0.1)
    (z, _), labels = batch(), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 5, 6])
    share = (torch.bincount(labels)[labels] > 1).double().mean()
    assert_same(SupConLoss(temperature=0.1)(z, labels), theirs(z, labels) * share, (z,))


@pytest.mark.parametrize(("symmetric", "ours"), [(True, NTXentLoss), (False, InfoNCELoss)])
def test_two_views_of_pytorch_metric_learning(symmetric, ours):
    """Its wrapper for views without labels: all views stacked, or one view against the other."""
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = theirs.SelfSupervisedLoss(theirs.NTXentLoss(temperature=0.2), symmetric=symmetric)
    inputs = batch()
    assert_same(ours(temperature=0.2)(*inputs), theirs(*inputs), inputs)


def test_three_views_of_pytorch_metric_learning():
    """It sets each positive apart against the negatives alone: in ours one call for each, with masks that say so."""
    theirs = pytest.importorskip("pytorch_metric_learning.losses").NTXentLoss(temperature=0.2)
    views = (*batch(), batch(seed=1)[0])
    ids, rows, loss = torch.arange(12).repeat(3), torch.arange(36), NTXentLoss(temperature=0.2)
    strangers, shared = ids[:, None] != ids, 0.0
    for step in (12, 24):
        positive = torch.zeros(36, 36, dtype=torch.bool)
        positive[rows, (rows + step) % 36] = True
        shared = shared + loss(*views, positive_mask=positive, negative_mask=strangers) / 2
    expected = theirs(torch.cat(views), ids)
    assert_same(shared, expected, views)
    assert not torch.isclose(loss(*views), expected, rtol=1e-2)  # where an anchor's positives share one denominator


def test_the_memory_of_pytorch_metric_learning():
    """Its memory holds the batch too, as constants: the value is that of a queue, the derivative that of the anchors alone."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.CrossBatchMemory(losses.SupConLoss(temperature=0.1), 6, memory_size=36)
    ours, queue = SupConLoss(temperature=0.1), FeatureQueue(24, 6).double()
    anchored, itself = SupConLoss(temperature=0.1, negatives="cross"), torch.eye(12, 36, dtype=torch.bool)
    for step in range(5):
        z, labels = batch(seed=step)[0], torch.arange(12) * (step + 2) % 4
        expected, found = theirs(z, labels), ours(z, labels, queue=queue)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        alike = labels[:, None] == torch.cat([labels, queue.ids])
        masks = {"positive_mask": alike & ~itself, "negative_mask": ~alike}
        assert_same(anchored(z, z.detach(), queue=queue, **masks), expected, (z,))
        queue.update(z, labels)


def test_defaults():
    """A call without a temperature means the same, but for NTXentLoss, which the two libraries start differently."""

    def default(theirs):
        return inspect.signature(theirs).parameters["temperature"].default

    lightly, metric = "lightly.loss", pytest.importorskip("pytorch_metric_learning.losses")
    assert NTXentLoss().temperature == default(module(f"{lightly}.ntx_ent_loss").NTXentLoss) == 0.5
    assert DCLLoss().temperature == default(module(f"{lightly}.dcl_loss").DCLLoss) == 0.1
    assert SwAVLoss().temperature == default(module(f"{lightly}.swav_loss").SwaVLoss) == 0.1
    assert SupConLoss().temperature == default(metric.SupConLoss) == 0.1
    assert default(metric.NTXentLoss) == 0.07 == ClipLoss().temperature != NTXentLoss().temperature
