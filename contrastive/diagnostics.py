"""Numbers that tell how a batch of representations is doing, computed when asked for and never inside the loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from contrastive.losses import IOTLoss

__all__ = ["diagnose"]


def diagnose(criterion: IOTLoss, z0: Tensor, z1: Tensor, *, t: float = 2.0) -> dict[str, float]:
    """Alignment, uniformity, in-batch retrieval and the state of the inner transport, detached.

    Args:
        criterion: the loss whose inner problem is looked at.
        z0, z1: representations of the two views, shape ``(N, D)``.
        t: exponent of the uniformity.

    Returns:
        ``alignment``: mean squared distance of positive pairs on the sphere, in [0, 4]; ``uniformity``: log mean
        ``exp(-t |x - y|^2)`` over distinct pairs of each view, averaged (both Wang and Isola, ICML 2020); ``top1``: share of
        anchors whose positive is their nearest candidate; ``plan_entropy``: ``-sum P log P`` in nats;
        ``marginal_error``: L1 violation of the sides and the mass.

    Example:
        >>> from contrastive import InfoNCELoss
        >>> diagnose(InfoNCELoss(), torch.eye(3), torch.eye(3))["top1"]
        1.0
    """
    with torch.no_grad():
        problem, target = criterion.problem(z0, z1)
        plan = problem.plan(criterion.potentials(problem))
        x, y = functional.normalize(z0.float(), dim=1), functional.normalize(z1.float(), dim=1)
        nearest = problem.cost.dense().argmin(1)
        return {
            "alignment": float((x - y).square().sum(1).mean()),
            "uniformity": float((_uniformity(x, t) + _uniformity(y, t)) / 2),
            "top1": float((nearest == target.indices()[1]).float().mean()),
            "plan_entropy": float(-torch.special.xlogy(plan, plan).sum()),
            "marginal_error": float(sum(problem.violations(plan.sum(1), plan.sum(0)))),
        }


def _uniformity(x: Tensor, t: float) -> Tensor:
    """Through ``functional.pdist``: one number per unordered pair."""
    return functional.pdist(x).square().mul(-t).exp().mean().log()
