"""What is asked of a loss's arguments, in sentences that say value, rule, likely cause and fix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from contrastive.queue import FeatureQueue
from contrastive.targets import Choice
from iotsolve.distributed import Alone, Ranks
from iotsolve.gradient import Envelope, Implicit, Unroll
from iotsolve.marginals import Marginal, number
from iotsolve.validation import one_number

__all__ = [
    "check_arguments",
    "check_batch",
    "check_choice",
    "check_labels",
    "check_queue",
    "check_queued",
    "check_views",
    "choice_of",
    "labels_of",
    "temperature_of",
    "with_labels",
]


COLDEST = 0.01  # where a learnable temperature stops, as CLIP's does


def check_arguments(
    rows: Marginal,
    columns: Marginal,
    mass: float | None,
    temperature: float | Tensor,
    uniformity: float,
    negatives: str,
    reduction: str,
    gradient: Any,
    learns: bool,
) -> None:
    for name, side in (("rows", rows), ("columns", columns)):
        if not isinstance(side, Marginal):
            raise ValueError(
                f"{name} = {side!r}: must be a marginal object from iotsolve, such as FIXED, FREE or KL(1.0)."
            )
    if not 0 < one_number("temperature", temperature, "in cosines") < math.inf:
        raise ValueError(f"temperature = {temperature}: must be positive and finite; 0.05 to 0.5 is usual.")
    if learns and number(temperature) < COLDEST:
        raise ValueError(
            f"temperature = {number(temperature):g} with learn_temperature=True: a learnable temperature stops at {COLDEST:g}. "
            "Start above it, or keep the temperature constant."
        )
    if not 0 <= uniformity < math.inf:
        raise ValueError(
            f"uniformity = {uniformity}: is the weight of a penalty, so must be >= 0; 0.2 is usual, 0 switches it off."
        )
    if mass is not None and not 0 < mass < math.inf:
        raise ValueError(f"mass = {mass}: must be positive and finite, or None; the weights of each side total 1.")
    if mass is None and rows.is_free and columns.is_free:
        raise ValueError(
            "rows and columns are both FREE: nothing then ties the plan's total mass. Pass mass=1.0, which is U(1)."
        )
    total = 1.0 if mass is None else mass
    for name, side in (("rows", rows), ("columns", columns)):
        lo, hi = (number(x) for x in side.bounds)
        if not lo <= total <= hi:
            raise ValueError(
                f"mass = {total} with {name} = {side}: the positive pairs then violate that side and the loss would be infinite. "
                "Choose a mass inside the side's bounds, or a soft side."
            )
    if negatives not in ("cross", "all"):
        raise ValueError(
            f"negatives = {negatives!r}: must be 'cross' (the other view) or 'all' (all views, oneself left out)."
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction = {reduction!r}: must be 'mean' or 'sum' over anchors, or 'none': one per anchor.")
    if not isinstance(gradient, Envelope | Implicit | Unroll | None):
        raise ValueError(f"gradient = {gradient!r}: must be Envelope(), Implicit() or Unroll(k) from iotsolve.")


def check_views(views: tuple[Tensor, ...]) -> None:
    shapes = [tuple(z.shape) if isinstance(z, Tensor) else z for z in views]
    if not views or any(not isinstance(z, Tensor) or z.dim() != 2 for z in views) or len(set(shapes)) > 1:
        raise ValueError(
            f"representations have shapes {' and '.join(map(str, shapes))}: both must be (N, D) with the same "
            "N, row i of the one positive to row i of the other. Flatten feature maps."
        )


def check_batch(anchors: int, queue: Any) -> None:
    if anchors < 2 and queue is None:
        raise ValueError(
            f"a batch of {anchors}: a contrastive loss needs N >= 2, since the other rows are the "
            "negatives. Drop an incomplete last batch of one, or pass a queue."
        )


def check_queue(queue: FeatureQueue, columns: Marginal, views: tuple[Tensor, ...]) -> None:
    if not isinstance(queue, FeatureQueue):
        raise ValueError(f"queue = {queue!r}: must be a FeatureQueue(size, dim), filled by its update(z).")
    queue.check(views[0])
    check_queued(columns)


def check_queued(columns: Marginal) -> None:
    """Whether a side of candidates may hold a queue's."""
    lo = number(columns.bounds[0])
    if lo > 0:
        raise ValueError(
            f"columns = {columns} with a queue: its features are nobody's positives, but this side must give each of them "
            f"at least {lo:g} of an even share, so the loss could never come near 0. Use columns=FREE or KL(rho)."
        )


def choice_of(
    labels: Any = None,
    ids: Any = None,
    positive_mask: Tensor | None = None,
    target: Tensor | None = None,
    negative_mask: Tensor | None = None,
) -> Choice:
    given = {"labels": labels, "ids": ids, "positive_mask": positive_mask, "target": target}
    said = tuple(name for name, value in given.items() if value is not None)
    return Choice(labels if ids is None else ids, positive_mask, target, negative_mask, said)


def check_choice(choice: Choice) -> None:
    if len(choice.said) > 1:
        raise ValueError(f"{' and '.join(choice.said)}: each says what the positives are. Pass one of them.")


def with_labels(views: tuple[Tensor, ...], labels: Any) -> tuple[tuple[Tensor, ...], Any]:
    """A second argument that is a vector of whole numbers is the labels of the first."""
    if len(views) == 2 and isinstance(views[1], Tensor) and views[1].dim() == 1 and not views[1].is_floating_point():
        if labels is not None:
            raise ValueError("labels were given twice: as the second argument and as labels=.")
        return views[:1], views[1]
    return views, labels


def check_labels(labels: Any, n: int, stacked: bool) -> None:
    """Whether labels are whole numbers, one for each of ``n`` rows, or for two views that are not stacked a pair of such vectors.

    Raises:
        ValueError: if they are not.
    """
    if labels is None:
        return
    if isinstance(labels, tuple) and (len(labels) != 2 or stacked):
        raise ValueError(
            f"labels is a tuple of {len(labels)}: must be one vector for all views, or for two views and negatives='cross' a "
            "pair."
        )
    for one in labels if isinstance(labels, tuple) else (labels,):
        try:
            one = torch.as_tensor(one)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"labels = {one!r:.80}: must be whole numbers, one per row of a view. Number the classes of names, as "
                "numpy.unique(names, return_inverse=True)[1] does."
            ) from error
        if one.is_floating_point() or tuple(one.shape) != (n,):
            raise ValueError(
                f"labels have shape {tuple(one.shape)} and dtype {one.dtype}: must be whole numbers of shape ({n},), one per row "
                "of a view. Of several views one vector serves all."
            )


def labels_of(labels: Any, repeat: int, ranks: Alone | Ranks, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of this rank's anchors and of all candidates of the batch."""
    both = labels if isinstance(labels, tuple) else (labels, labels)
    mine, theirs = (torch.as_tensor(one, device=device).long().repeat(repeat) for one in both)
    return mine, ranks.gather(theirs)


def temperature_of(logit_scale: float | Tensor) -> Any:
    if isinstance(logit_scale, Tensor) and logit_scale.numel() != 1:
        raise ValueError(f"logit_scale has shape {tuple(logit_scale.shape)}: must be one number, 1 / temperature.")
    if not isinstance(logit_scale, Tensor) and not 0 < one_number("logit_scale", logit_scale, "1 / temperature") < math.inf:
        raise ValueError(
            f"logit_scale = {logit_scale}: is 1 / temperature, so must be positive; did you pass its logarithm?"
        )
    return 1.0 / (logit_scale.reshape(()) if isinstance(logit_scale, Tensor) else logit_scale)
