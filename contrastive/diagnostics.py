"""Numbers that tell how a batch of representations is doing, computed when asked for and never inside the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from contrastive.family import Batch, IOTLoss
from iotsolve.costs import Points
from iotsolve.problem import Potentials

__all__ = ["Diagnostics", "diagnose", "rankme"]


class Diagnostics:
    """What can be said of one batch; each number is a scalar tensor, computed when first asked for, without a full matrix.

    A loss hands one to its ``watch``; :func:`diagnose` makes a dictionary of it. Over many ranks the numbers are of this rank's
    anchors against all candidates.

    Args:
        criterion: the loss whose inner problem is looked at.
        batch: what its ``watch`` was given to look at.
        epsilon: the temperature in force.
        t: exponent of the uniformity.

    Example:
        >>> from contrastive import InfoNCELoss
        >>> seen = []
        >>> loss = InfoNCELoss(watch=seen.append)(torch.eye(3), torch.eye(3))
        >>> float(seen[0].top1), round(float(seen[0].chance), 4)
        (1.0, 1.0986)
    """

    def __init__(self, criterion: IOTLoss, batch: Batch, epsilon: Any, *, t: float = 2.0) -> None:
        points = batch.points
        detached = replace(points, x=points.x.detach(), y=points.y.detach())
        self._criterion, self._batch, self.t = criterion, batch.of(detached), t
        self._epsilon = epsilon.detach() if isinstance(epsilon, Tensor) else epsilon

    NAMES = (
        "alignment",
        "uniformity",
        "top1",
        "top5",
        "chance",
        "plan_entropy",
        "marginal_error",
        "mass",
        "effective_negatives",
        "hubness",
        "rankme",
        "feature_std",
    )

    def numbers(self) -> dict[str, float]:
        """All of them, by name."""
        return {name: float(getattr(self, name)) for name in self.NAMES}

    @cached_property
    def alignment(self) -> Tensor:
        """Mean squared distance of positives on the sphere, in [0, 4] (Wang and Isola, ICML 2020)."""
        target, points = self._batch.matches.target, self._batch.points
        return 2.0 - 2.0 * target.similar(points.x, points.y, 0).sum() / target.values.sum()

    @cached_property
    def uniformity(self) -> Tensor:
        """``log mean exp(-t |x - y|^2)`` over distinct pairs of anchors, and of candidates, averaged (Wang and Isola, 2020)."""
        points = self._batch.points
        own = [points.x] if points.y is points.x else [points.x, points.y[: self._batch.size]]
        return torch.stack([_uniformity(z, self.t) for z in own]).mean()

    @cached_property
    def top1(self) -> Tensor:
        """Share of the anchors, of those with a positive, that have no negative nearer than their nearest positive."""
        return (self._before < 1).to(self._dtype).mean()

    @cached_property
    def top5(self) -> Tensor:
        """Share of them with fewer than five nearer negatives."""
        return (self._before < 5).to(self._dtype).mean()

    @cached_property
    def chance(self) -> Tensor:
        """``log`` of the mean number of candidates that an anchor sees: what InfoNCE is if all look alike."""
        return (sum(block.isfinite().sum() for _, block in self._costs()) / len(self._batch.points.x)).log()

    @cached_property
    def plan_entropy(self) -> Tensor:
        """``-sum P log P`` in nats."""
        return -sum(torch.special.xlogy(plan, plan).sum() for _, plan in self._plans())

    @cached_property
    def marginal_error(self) -> Tensor:
        """L1 distance of the plan's marginals from the hard sides, and of its mass from the one given."""
        rows, columns = self._marginals
        return sum(self._problem.violations(rows, columns))

    @cached_property
    def mass(self) -> Tensor:
        """Transported mass."""
        return self._marginals[0].sum()

    @cached_property
    def effective_negatives(self) -> Tensor:
        """Mean over anchors of ``exp`` of the entropy of what the plan gives the negatives: how many of them matter."""
        found = []
        for part, plan in self._plans():
            plan = plan.masked_fill(self._positive(part), 0.0)
            share = plan / plan.sum(1, keepdim=True).clamp(min=torch.finfo(plan.dtype).tiny)
            found.append((-torch.special.xlogy(share, share).sum(1)).exp())
        return torch.cat(found).mean()

    @cached_property
    def hubness(self) -> Tensor:
        """Skewness of how often a candidate is among the ten nearest of an anchor (Radovanovic et al., JMLR 2010)."""
        count = torch.zeros(len(self._batch.points.y), dtype=self._dtype, device=self._batch.points.device)
        k = min(10, len(count) - 1)
        for _, cost in self._costs():
            nearest = cost.topk(k, 1, largest=False).indices.flatten()
            count.index_add_(0, nearest, torch.ones_like(nearest, dtype=self._dtype))
        centred = count - count.mean()
        spread = centred.square().mean().sqrt()
        return centred.pow(3).mean() / spread.pow(3).clamp(min=torch.finfo(self._dtype).tiny)

    @cached_property
    def rankme(self) -> Tensor:
        """Effective rank of the anchors' representations, in [1, min(N, D)] (Garrido et al., ICML 2023)."""
        return rankme(self._batch.points.x)

    @cached_property
    def feature_std(self) -> Tensor:
        """Mean over dimensions of the anchors' standard deviation on the sphere: ``D ** -0.5`` at best, 0 in a collapse."""
        return self._batch.points.x.std(0).mean()

    # -- what they are made of ---------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return self._batch.points.dtype

    @cached_property
    def _solution(self) -> tuple[Any, Potentials]:
        with torch.no_grad():
            return self._criterion.solution(self._batch, self._epsilon)

    @property
    def _problem(self) -> Any:
        return self._solution[0]

    def _plans(self) -> Iterator[tuple[slice, Tensor]]:
        problem, p = self._solution
        return problem.plan_blocks(p)

    def _costs(self) -> Iterator[tuple[slice, Tensor]]:
        """The cost in blocks of rows, ``inf`` at what an anchor does not see."""
        filled = self._batch.filled
        for part, block in self._batch.points.blocks():
            yield part, block.matrix if filled is None else block.matrix.masked_fill(~filled, math.inf)

    @cached_property
    def _marginals(self) -> tuple[Tensor, Tensor]:
        plans = [(plan.sum(1), plan.sum(0)) for _, plan in self._plans()]
        return torch.cat([rows for rows, _ in plans]), torch.stack([columns for _, columns in plans]).sum(0)

    def _positive(self, part: slice) -> Tensor:
        """The positives of some anchors, as a mask."""
        i, j = self._batch.matches.target.index
        mine = (i >= part.start) & (i < part.stop)
        mask = torch.zeros(part.stop - part.start, len(self._batch.points.y), dtype=torch.bool, device=i.device)
        mask[i[mine] - part.start, j[mine]] = True
        return mask

    @cached_property
    def _before(self) -> Tensor:
        """How many negatives are nearer than the nearest positive, for each anchor with one."""
        found = []
        for part, cost in self._costs():
            positive = self._positive(part)
            best = cost.masked_fill(~positive, math.inf).amin(1, keepdim=True)
            nearer = ((cost < best) & ~positive).sum(1)
            found.append(nearer[best[:, 0].isfinite()])
        return torch.cat(found)


def rankme(z: Tensor) -> Tensor:
    """``exp`` of the entropy of the normalised singular values: an effective rank (Garrido et al., ICML 2023).

    Args:
        z: shape ``(N, D)``.

    Example:
        >>> round(float(rankme(torch.eye(4))), 3)
        4.0
    """
    if z.dim() != 2 or not z.numel() or not bool(z.isfinite().all()):
        raise ValueError(f"z of shape {tuple(z.shape)}: must be (N, D), finite. Has training diverged?")
    values = torch.linalg.svdvals(z.double())
    share = values / values.sum() if bool(values.any()) else values
    return (-torch.special.xlogy(share, share).sum()).exp()


def diagnose(criterion: IOTLoss, *views: Tensor, t: float = 2.0, **given: Any) -> dict[str, float]:
    """All numbers of :class:`Diagnostics` for a batch, detached.

    Args:
        criterion: the loss whose inner problem is looked at.
        views: as for the loss, as is everything else but ``t``.
        t: exponent of the uniformity.

    Returns:
        By the names in ``Diagnostics.NAMES``.

    Example:
        >>> from contrastive import InfoNCELoss
        >>> diagnose(InfoNCELoss(), torch.eye(3), torch.eye(3))["top1"]
        1.0
    """
    with torch.no_grad():
        epsilon, batches = criterion.read(*views, **given)
        return Diagnostics(criterion, batches[0], epsilon, t=t).numbers()


def _uniformity(z: Tensor, t: float) -> Tensor:
    """A log-sum of a bilinear form over distinct pairs, in blocks."""
    n = len(z)
    itself = torch.arange(n, device=z.device)[:, None]
    sums = Points(z, z, "sphere", itself).softmin(z.new_zeros(n), 1 / (2 * t), axis=-1)
    return torch.logsumexp(-2 * t * sums, 0) - math.log(n * (n - 1))
