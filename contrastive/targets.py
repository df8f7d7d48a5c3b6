"""Which candidates are an anchor's positives, and which it may not see: the target plan and the forbidden arcs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iotsolve.costs import Points
from iotsolve.distributed import Alone, Ranks
from iotsolve.kernels.directions import remembered

__all__ = ["Choice", "Entries", "Matches", "matches", "paired"]


@dataclass(frozen=True)
class Choice:
    """What the caller says of positives and negatives; at most one way of the first kind.

    Attributes:
        labels: class or instance of every pair, shape ``(N,)``, or a pair of tensors, of the anchors and of the candidates;
            equal ones are positive.
        positive_mask: boolean, shape of the cost.
        target: non-negative, shape of the cost, total 1 over all ranks; dense or sparse COO.
        negative_mask: boolean, shape of the cost: the candidates that are seen, beside the positives.
        said: which of the first kind the caller gave.
    """

    labels: Any = None
    positive_mask: Tensor | None = None
    target: Tensor | None = None
    negative_mask: Tensor | None = None
    said: tuple[str, ...] = ()

    @property
    def is_pairs(self) -> bool:
        return all(x is None for x in (self.labels, self.positive_mask, self.target, self.negative_mask))

    def told(self) -> dict[str, float]:
        """Which of these were given, as numbers."""
        names = "labels", "positive_mask", "target", "negative_mask"
        return {name: getattr(self, name) is not None for name in names} | {"pair of labels": isinstance(self.labels, tuple)}

    def check(self, shape: tuple[int, int]) -> None:
        """Whether masks and target are such, and of the shape of the cost.

        Raises:
            ValueError: if they are not.
        """
        for name, mask in (("positive_mask", self.positive_mask), ("negative_mask", self.negative_mask)):
            if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == shape):
                given = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
                raise ValueError(
                    f"{name} = {given}: must be a boolean tensor of shape {shape}, anchors by candidates. Two stacked views have "
                    "2N of each; a queue adds its size to the candidates."
                )
        if self.target is not None and not (isinstance(self.target, Tensor) and tuple(self.target.shape) == shape):
            given = tuple(self.target.shape) if isinstance(self.target, Tensor) else repr(self.target)
            raise ValueError(
                f"target = {given}: must be a tensor of shape {shape}, anchors by candidates, dense or sparse."
            )

    def swapped(self) -> Choice:
        """Of the second view against the first and a queue."""
        if self.is_pairs:
            return self
        if self.labels is None:
            raise ValueError(
                "symmetric=True with a queue and a mask or a target: the two halves have other candidates, so one matrix cannot "
                "say both. Pass labels= or ids=, or call the loss twice with symmetric=False."
            )
        return replace(self, labels=self.labels[::-1]) if isinstance(self.labels, tuple) else self


@dataclass(frozen=True)
class Entries:
    """A plan of few entries, in order and each once.

    Attributes:
        index: rows and columns of the entries, shape ``(2, k)``.
        values: shape ``(k,)``, positive.
        shape: of the plan.
        is_diagonal: whether every row has one entry, in the column of its number.
    """

    index: Tensor
    values: Tensor
    shape: tuple[int, int]
    is_diagonal: bool = False

    @classmethod
    def of(cls, plan: Tensor) -> Entries:
        """The positive entries of a matrix, dense or sparse, and those that are NaN, which nobody is to overlook."""
        plan = (plan if plan.is_sparse else plan.to_sparse()).coalesce()
        kept = ~(plan.values() <= 0)
        return cls(plan.indices()[:, kept], plan.values()[kept], tuple(plan.shape))

    def times(self, factor: float) -> Entries:
        return replace(self, values=self.values * factor)

    def sums(self, entries: Tensor, axis: int) -> Tensor:
        """Of a number for each entry, the sums over rows (axis 0: one for every row) or over columns."""
        return entries.new_zeros(self.shape[axis]).index_add(0, self.index[axis], entries)

    def similar(self, x: Tensor, y: Tensor, axis: int) -> Tensor:
        """``sum_j Q_ij x_i . y_j`` for every row (axis 0), or over i for every column."""
        if len(self.values) <= _FEW * max(self.shape):
            i, j = self.index
            return self.sums(self.values * (x.index_select(0, i) * y.index_select(0, j)).sum(1), axis)
        if axis == 0:
            return (x * torch.sparse.mm(self.sparse(), y)).sum(1)
        return (y * torch.sparse.mm(self.sparse().t(), x)).sum(1)

    def sparse(self) -> Tensor:
        """The plan as a sparse tensor of torch."""
        return torch.sparse_coo_tensor(self.index, self.values, self.shape, check_invariants=False, is_coalesced=True)


_FEW = 4  # entries for each anchor, whose points are gathered


@dataclass(frozen=True)
class Matches:
    """The target of one batch of anchors (rows) and candidates (columns).

    Attributes:
        target: shape ``(n, m)``, total 1 over all ranks where every anchor has a positive: row sums ``1 / N``, or 0.
        backward: the same for the candidates as anchors: column sums ``1 / M``, or 0; None if nobody asks.
        barred: the arcs that are forbidden, as of :class:`iotsolve.Points`; None if all are allowed.
        inside: whether target and backward have row and column sums that are known to be uniform.
    """

    target: Entries
    backward: Entries | None
    barred: Tensor | None
    inside: bool
    partners: Tensor | None = None
    """The columns of every row's positives, shape ``(n, k)``, where each row has as many."""
    no_negatives: Tensor | None = None
    """And then those of all that is barred or positive."""

    def all_but_negatives(self, points: Points) -> Tensor:
        """The arcs that are barred or positive."""
        if self.no_negatives is not None and points.barred is self.barred:
            return self.no_negatives
        mask = torch.zeros(points.shape, dtype=torch.bool, device=points.device)
        if points.barred is not None:
            mask = points.barred.clone() if points.barred.dtype == torch.bool else mask.scatter(1, points.barred, True)
        mask[tuple(self.target.index)] = True
        return mask


def matches(
    choice: Choice,
    rows: tuple[int, int, int],
    columns: tuple[int, int],
    *,
    stacked: bool,
    mirrored: bool,
    labels: tuple[Tensor, Tensor] | None,
    repeat: int,
    ranks: Alone | Ranks,
    like: Tensor,
) -> Matches:
    """The target of ``views`` stacked views (``stacked``), or of one view against another.

    Args:
        choice: what the caller gave.
        rows: number of this rank's anchors, its first anchor's column, and the number of all ranks' anchors.
        columns: number of candidates, and of those among them that belong to the batch, which come first.
        stacked: the anchors are themselves candidates, which must not be seen.
        mirrored: also the target with candidates as anchors.
        labels: of the anchors and of the candidates, gathered; None if the caller gave none.
        repeat: number of views that are stacked, of which the pairs are made where the caller says nothing else.
        ranks: who else has anchors.
        like: a tensor of the dtype and device wanted.

    Raises:
        ValueError: on masks and targets that do not fit, or are no plan; on every rank.
    """
    n, first, total = rows
    m, batch = columns
    if any(x is not None for x in (choice.positive_mask, choice.target, choice.negative_mask)):
        with ranks.together():
            choice.check((n, m))
    pairs = paired(n, first, total, m, repeat, stacked, mirrored, False, like=like)
    own = pairs.barred
    if choice.target is not None:
        target = _plan(choice.target, ranks, like)
        return Matches(target, target if mirrored else None, _barred(choice, target, own), False)
    if labels is not None:
        positive = labels[0][:, None] == labels[1][None, :]
    elif choice.positive_mask is None:
        positive = torch.zeros(n, m, dtype=torch.bool, device=like.device).scatter_(1, pairs.partners, True)
    else:
        positive = choice.positive_mask
    if own is not None:
        positive = positive.scatter(1, own, False)
    each = positive.sum(1, dtype=like.dtype)
    index = positive.nonzero().T
    target = Entries(index, 1.0 / (total * each[index[0]]), (n, m))
    backward = None
    if mirrored:
        each = ranks.sum(positive.sum(0, dtype=like.dtype))
        backward = Entries(index, 1.0 / (batch * each[index[1]]), (n, m))
    return Matches(target, backward, _barred(choice, target, own), False)


@remembered
def paired(
    n: int,
    first: int,
    total: int,
    m: int,
    repeat: int,
    stacked: bool,
    mirrored: bool,
    diagonal: bool,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Matches:
    """The target of pairs alone; ``diagonal``: row ``i`` has the column ``i``.

    Args:
        n: number of this rank's anchors.
        first: the first one's column.
        total: number of all ranks' anchors.
        m: number of candidates.
        repeat: number of views that are stacked.
        stacked: the anchors are themselves candidates, which must not be seen.
        mirrored: also with candidates as anchors.
        diagonal: row ``i`` has the one positive ``i``.
        dtype: of the target.
        device: where to.
    """
    rows = torch.arange(n, device=device)[:, None]
    own, partners = rows + first, rows + first
    if stacked:
        partners = first + ((rows + torch.arange(1, repeat, device=device) * (n // repeat)) % n).sort(1).values
    k = partners.shape[1]
    index = torch.stack([rows.expand(n, k).flatten(), partners.flatten()])
    values = torch.full((n * k,), 1.0 / (total * max(k, 1)), dtype=dtype, device=device)
    target = Entries(index, values, (n, m), diagonal)
    left_out = torch.cat([own, partners], 1) if stacked else partners
    return Matches(target, target if mirrored else None, own if stacked else None, True, partners, left_out)


def _barred(choice: Choice, target: Entries, own: Tensor | None) -> Tensor | None:
    if choice.negative_mask is None:
        return own
    barred = ~choice.negative_mask
    if own is not None:
        barred = barred.scatter(1, own, True)
    return barred.index_put(tuple(target.index), torch.zeros((), dtype=torch.bool, device=barred.device))


def _plan(target: Tensor, ranks: Alone | Ranks, like: Tensor) -> Entries:
    plan = (
        (target if target.is_sparse else target.to_sparse())
        .detach()
        .to(device=like.device, dtype=like.dtype)
        .coalesce()
    )
    values = plan.values()
    negative = values.clamp(max=0.0).sum().double()
    total, below = ranks.sum(torch.stack([values.sum().double(), negative])).tolist()
    if not (below == 0 and abs(total - 1.0) < 1e-3):
        where = "" if isinstance(ranks, Alone) else " over the rows of all ranks"
        raise ValueError(
            f"target has total {total:g}{where}, of which {below:g} below 0: it is a plan, non-negative with total 1{where}. Is "
            "every row of it normalised? Then divide by the number of rows."
        )
    return Entries.of(plan)
