"""The family: a contrastive loss is an inverse optimal-transport problem whose cost an encoder makes.

    C_ij = 1 - cos(z0_i, z1_j),   epsilon = temperature,   target = the positive pairs,
    loss = (primal(target) - optimal value) / temperature  [ + uniformity KL(Q | P) ]

How far the inner problem relaxes its marginals decides which loss it is (Shi, Zhang, Zhen, Fan, Yan, ICML 2023). Where the
sides are hard or free the first term is KL(target | P), the cross-entropy people know; with soft sides it adds what the
plan's marginals pay against the target's, which keeps the loss convex in the cost and its gradient ``target - P``.

The matrix of similarities is never kept: soft-minima are computed block by block, and again in the backward pass.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.arguments import (
    COLDEST,
    check_arguments,
    check_batch,
    check_choice,
    check_labels,
    check_queue,
    check_views,
    choice_of,
    labels_of,
    temperature_of,
)
from contrastive.queue import FeatureQueue, told_of
from contrastive.targets import Choice, Entries, Matches, matches, paired
from iotsolve.accelerated import Accelerated
from iotsolve.costs import Dense, Points
from iotsolve.distributed import Alone, Ranks, Sharded, meet
from iotsolve.gradient import Envelope, Implicit, Unroll
from iotsolve.kernels.backends import check as check_backend
from iotsolve.kernels.directions import cross_entropies, normalised
from iotsolve.kernels.once import Backward
from iotsolve.kernels.uncompiled import uncompiled
from iotsolve.marginals import Marginal, number, times
from iotsolve.problem import Potentials, Problem, log_scaling
from iotsolve.sinkhorn import Sinkhorn
from iotsolve.solve import run
from iotsolve.solver import Outcome, Status
from iotsolve.validation import why_impossible

__all__ = [
    *("Batch", "Found", "IOTLoss", "Side"),
    *("cross_entropy", "log_ratio", "log_total", "settled", "similar", "uniformity_penalty"),
]


@dataclass(frozen=True)
class Batch:
    """Anchors against candidates: what one inner problem is about.

    Attributes:
        points: this rank's anchors and all candidates, on the unit sphere, with the arcs that are forbidden.
        matches: the target.
        filled: which candidates exist, shape ``(m,)``; None if all do.
        ranks: who has the other anchors.
        repeat: anchors per pair of the batch: the number of views where they are stacked.
        mirrored: whether the candidates are anchors too, for the loss's other half.
        queued: how many of the candidates come from a queue, behind the others.
    """

    points: Points
    matches: Matches
    filled: Tensor | None
    ranks: Alone | Ranks
    repeat: int
    mirrored: bool
    queued: int = 0

    @property
    def size(self) -> int:
        """How many of the candidates belong to the batch; they come first."""
        return len(self.points.y) if self.filled is None else len(self.points.y) - self.queued

    @cached_property
    def pairs(self) -> Tensor:
        """Cosine of every row and the column of its number."""
        return (self.points.x * self.points.y[: len(self.points.x)]).sum(1)

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of a vector over all rows, or over all columns that are anchors too."""
        return self.ranks.own(x, self.repeat)

    def of(self, points: Points) -> Batch:
        """The same with other points."""
        return replace(self, points=points)


@dataclass(frozen=True)
class Side:
    """One half of the loss: the batch's rows as anchors, or its columns; with the weights of both.

    Attributes:
        target: plan of total ``mass``, over this rank's rows.
        anchors: marginal object of the anchors.
        others: marginal object of the candidates.
        a: weights of all rows.
        b: weights of all columns.
        by_rows: whether the anchors are the rows.
        share: of all anchors, those that have positives; weights and target are theirs, of total 1.
    """

    batch: Batch
    target: Entries
    anchors: Marginal
    others: Marginal
    mass: float | None
    a: Tensor
    b: Tensor
    by_rows: bool
    share: float | Tensor = 1.0

    @property
    def is_uniform(self) -> bool:
        """Whether every anchor has as many positives, and every bin the same weight."""
        return self.batch.matches.inside and self.batch.matches.partners is not None and self.batch.filled is None

    @property
    def is_even(self) -> bool:
        """Whether moreover one soft-minimum is the solution."""
        return self.is_uniform and self.mass is None and self.anchors.is_fixed and self.others.is_free

    @property
    def weights(self) -> Tensor:
        """Of all anchors."""
        return self.a if self.by_rows else self.b

    @property
    def other_weights(self) -> Tensor:
        return self.b if self.by_rows else self.a

    @property
    def log_each(self) -> float | Tensor:
        """Logarithm of the weight of a candidate that exists."""
        filled = self.batch.filled
        return -math.log(len(self.other_weights)) if filled is None else -filled.sum().to(self.a.dtype).log()

    def problem(self, epsilon: Any, cost: Any = None) -> Problem:
        """The inner problem over all ranks' rows, or with another cost."""
        ranks, points = self.batch.ranks, self.batch.points
        if cost is None:
            cost = points if isinstance(ranks, Alone) else Sharded.joined(points, ranks, self.batch.repeat)
        rows, columns = (self.anchors, self.others) if self.by_rows else (self.others, self.anchors)
        return Problem.unchecked(cost, self.a, self.b, epsilon=epsilon, rows=rows, columns=columns, mass=self.mass)

    def shared(self) -> Side:
        """With parameters of the marginals that every rank has and computes its share from."""
        ranks = self.batch.ranks

        def of(marginal: Marginal) -> Marginal:
            live = {name: x for name, x in marginal.tensors().items() if x.requires_grad}
            return replace(marginal, **{name: ranks.shared(x) for name, x in live.items()}) if live else marginal

        return replace(self, anchors=of(self.anchors), others=of(self.others))

    def following(self, p: Potentials, epsilon: Any) -> Potentials:
        """The potentials with the derivative of the inner problem's solution, for shares of a loss that are added over ranks."""
        problem, ranks = self.problem(epsilon), self.batch.ranks
        if isinstance(ranks, Ranks):  # each finds the whole derivative in what all have, and these are added too
            all_have = {name: x for name, x in problem.tensors().items() if name != "x"}
            problem = problem.with_tensors({name: ranks.part(x) for name, x in all_have.items()})
        p = Implicit().potentials(problem, p)
        return Potentials(*(ranks.shared(x) for x in (p.f, p.g, p.lam)))

    def split(self, p: Potentials) -> tuple[Tensor, Tensor]:
        """Potentials of all anchors and of all candidates."""
        return (p.f, p.g) if self.by_rows else (p.g, p.f)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Of the target over all ranks: this rank's anchors', and all candidates'."""
        if self.is_uniform:
            sides = self.batch.own(self.weights), self.other_weights
            return sides if self.mass in (None, 1.0) else (sides[0] * self.mass, sides[1] * self.mass)
        rows = self.target.sums(self.target.values, 0)
        columns = self.batch.ranks.sum(self.target.sums(self.target.values, 1))
        return (rows, columns) if self.by_rows else (self.batch.own(columns), self.batch.ranks.gather(rows))


@dataclass(frozen=True)
class Found:
    """What a half knows of its inner problem.

    Attributes:
        own: potentials of this rank's anchors.
        other: potentials of all candidates.
        lam: multiplier of the mass.
        s: soft-minima of this rank's anchors over the candidates at ``other``.
    """

    own: Tensor
    other: Tensor
    lam: Tensor
    s: Tensor


class IOTLoss(nn.Module):
    """The contrastive loss of a pair of marginals; every other class of this module is a name for a point of this one.

    Args:
        rows: marginal object of the anchors ``z0``: FIXED, FREE, AT_MOST, Between, KL, TV from iotsolve.
        columns: marginal object of the candidates ``z1``.
        mass: total mass of the plan, as a share of the anchors that have positives; 1 for two FREE or two soft sides, None where
            a side fixes it.
        temperature: ``epsilon`` of the inner problem, in cosines, positive; a float, or a tensor that may require grad.
        learn_temperature: make the temperature a parameter: its logarithm, started at ``temperature`` and floored at 0.01, where
            its derivative is 0 if it leads further down, and the way back if it leads up.
        uniformity: weight ``>= 0`` of the penalty ``KL(Q | P)``, where Q spreads the plan's negatives evenly.
        negatives: ``"cross"``: candidates of ``z0_i`` are all of ``z1``; ``"all"``: all views stacked, oneself left out.
        symmetric: mean of the loss and of its mirror image with rows and columns exchanged.
        reduction: ``"mean"`` over anchors; ``"sum"``; or ``"none"``: one loss per anchor, those of the mirror image behind.
        gradient: ``Envelope()`` (default): exact at convergence, nothing of the batch's square is kept; ``Implicit()``: the
            same where the positives satisfy the hard sides, and the exact derivative where not; ``Unroll(k)``: the loss of
            ``k`` sweeps from zero, differentiated through them.
        tolerance: relative marginal error of the inner solve. The loss errs by its square, the gradient by itself.
        max_steps: sweeps of first order; what they leave undone goes to second order. Not used by ``Unroll``.
        gather_distributed: candidates are those of all ranks of ``torch.distributed``. The gradient is that of the one loss
            over all, times the number of ranks: after the mean that DDP takes it equals one process's. A learnable
            temperature has the whole derivative on every rank.
        process_group: the ranks to gather from; None is all.
        watch: called with a :class:`contrastive.Diagnostics` after every forward pass; it computes what it is asked for.
        backend: ``"auto"``: passes over similarities by Triton kernels on a GPU, where they are installed and agree with torch
            on a small case tried once; by torch in blocks elsewhere. ``"eager"``: by torch. ``"triton"``: by Triton or not at
            all. On a CPU every choice that is possible means the same.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on inputs that are no views of one batch.

    Example:
        >>> from iotsolve import FIXED, FREE
        >>> z0, z1 = torch.eye(4), torch.eye(4)
        >>> IOTLoss(FIXED, FREE, temperature=0.5)(z0, z1)
        tensor(0.3408)
    """

    def __init__(
        self,
        rows: Marginal,
        columns: Marginal,
        mass: float | None = None,
        *,
        temperature: float | Tensor = 0.1,
        learn_temperature: bool = False,
        uniformity: float = 0.0,
        negatives: str = "cross",
        symmetric: bool = False,
        reduction: str = "mean",
        gradient: Envelope | Implicit | Unroll | None = None,
        tolerance: float = 1e-4,
        max_steps: int = 200,
        gather_distributed: bool = False,
        process_group: Any = None,
        watch: Callable[[Any], None] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = check_backend(backend)
        check_arguments(rows, columns, mass, temperature, uniformity, negatives, reduction, gradient, learn_temperature)
        self.rows, self.columns, self.mass = rows, columns, mass
        self.uniformity, self.negatives, self.symmetric, self.reduction = uniformity, negatives, symmetric, reduction
        self.gradient = gradient or Envelope()
        self.solver = Sinkhorn(tolerance=tolerance, max_steps=max_steps, annealing=None, stationary=True)
        self.gather_distributed, self.process_group, self.watch = gather_distributed, process_group, watch
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.as_tensor(number(temperature)).log())
        elif isinstance(temperature, nn.Parameter):
            self.shared_temperature = temperature
        else:
            self.constant_temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """The ``epsilon`` in force."""
        if "constant_temperature" in self.__dict__:  # a module takes its time to say what it does not have
            return self.constant_temperature
        if hasattr(self, "log_temperature"):
            return _Floored.apply(self.log_temperature, math.log(COLDEST)).exp()
        return self.shared_temperature

    @uncompiled
    def forward(
        self,
        *views: Float[Tensor, "n d"],
        labels: Any = None,
        ids: Any = None,
        positive_mask: Tensor | None = None,
        target: Tensor | None = None,
        negative_mask: Tensor | None = None,
        queue: FeatureQueue | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Positives are the pairs, rows of the same number, or what one of ``labels``, ``ids``, ``positive_mask`` and ``target``
        says. An anchor without a positive adds nothing to the loss; the mean is over all anchors. With more than two views
        ``"cross"`` takes the mean over pairs of views, ``"all"`` makes all views of a row its positives.

        Args:
            views: two or more batches of representations, each of shape ``(N, D)``; normalised here, so any length will do.
            labels: class of each row, shape ``(N,)``: rows of the same class are positives, each anchor's with equal weight.
                Of a side apart: a pair of them, for ``z0`` and ``z1``.
            ids: the same, for instances that may occur more than once in a batch.
            positive_mask: boolean, anchors by candidates: ``(N, N)``, with a queue ``(N, N + size)``, stacked ``(VN, VN)``.
            target: a plan of the same shape, non-negative with total 1, dense or sparse COO; detached. Its row sums are the
                anchors' weights, in the loss as in the inner problem.
            negative_mask: boolean, the same shape: the only candidates an anchor sees beside its positives.
            queue: further candidates, and no one's positives unless its ids say so.
            logit_scale: ``1 / temperature`` of this call, instead of the loss's own.

        Returns:
            A scalar, or one number per anchor with ``reduction="none"``; float32 for half-precision inputs and in the inputs'
            dtype otherwise. Of half-precision inputs Triton's kernels multiply 11 bits, and sum in float32.
        """
        choice = choice_of(labels, ids, positive_mask, target, negative_mask)
        place = next((z.device.type for z in views if isinstance(z, Tensor)), "cpu")
        with torch.autocast(device_type=place, enabled=False):
            if self.is_cross_entropy and choice.is_pairs and queue is None and len(views) == 2:
                return self._cross_entropy(*views, logit_scale)
            epsilon, batches = self._read(
                views,
                choice,
                queue=queue,
                logit_scale=logit_scale,
            )
            losses = [self._loss(batch, batch.ranks.shared(epsilon)) for batch in batches]
            if self.watch is not None:
                from contrastive.diagnostics import Diagnostics  # which looks at losses

                self.watch(Diagnostics(self, batches[0], epsilon))
            return self._reduced(losses, batches)

    def __deepcopy__(self, memo: dict[int, Any]) -> IOTLoss:
        """A copy of its own, in the same group of processes."""
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __copy__(self) -> IOTLoss:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group is not None:
            raise ValueError(
                "a loss with a process_group cannot be pickled: the group is of this run. Save its state_dict(), and make the "
                "loss anew with the group of the other run."
            )
        return super().__reduce_ex__(protocol)

    # -- where nothing has to be solved -----------------------------------------------------------------------------------

    _decoupled = False  # whether positives are left out of the sum over candidates

    @property
    def is_cross_entropy(self) -> bool:
        """Whether of two views and their pairs alone one soft-minimum is the solution, and the loss the cross-entropy of it."""
        return self._is_plain and type(self)._terms is IOTLoss._terms

    @property
    def _is_plain(self) -> bool:
        plain = self.mass is None and self.uniformity == 0 and self.watch is None and not self.gather_distributed
        return plain and self.rows.is_fixed and self.columns.is_free

    def _cross_entropy(self, x: Tensor, y: Tensor, logit_scale: Any) -> Tensor:
        """The loss by its closed form, which is :meth:`_terms` at the solution, without anything in between."""
        check_views((x, y))
        stacked = self.negatives == "all"
        check_batch(2 * len(x) if stacked else len(x), None)
        epsilon = self.temperature if logit_scale is None else temperature_of(logit_scale)
        how = {"both": self.symmetric, "stacked": stacked, "decoupled": self._decoupled, "backend": self.backend}
        found = cross_entropies(x, y, epsilon, **how)
        if self._decoupled and len(x) == 1:  # a pair alone has no negatives
            found = found.masked_fill(found == -math.inf, 0.0)
        if self.reduction == "none":
            return found.flatten()
        return found.mean() if self.reduction == "mean" else found.sum()

    # -- what the loss is about ------------------------------------------------------------------------------------------

    def _read(
        self, views: tuple[Tensor, ...], choice: Choice, *, queue: FeatureQueue | None, logit_scale: Any
    ) -> tuple[Any, list[Batch]]:
        """The temperature and the batches, from what ``forward`` was given."""
        found: list[Any] = []

        def check() -> None:
            found.append(self.temperature if logit_scale is None else temperature_of(logit_scale))
            self._check(views, choice, queue)

        def tell() -> dict[str, float]:
            return {"temperature": number(found[0]), **choice.told(), **told_of(queue)}

        ranks = meet(self.gather_distributed, self.process_group, *views, check=check, tell=tell)
        (epsilon,) = found
        precise = any(z.dtype in (torch.float32, torch.float64) for z in views)
        wide = torch.float64 if any(z.dtype == torch.float64 for z in views) else torch.float32
        epsilon = epsilon.to(wide) if isinstance(epsilon, Tensor) else epsilon
        stacked = (torch.cat(views),) if self.negatives == "all" else views
        batches = self._batches([ranks.scaled(normalised(z.to(wide))) for z in stacked], len(views), choice, queue, ranks)
        return epsilon, [batch.of(replace(batch.points, precise=precise, unit=True)) for batch in batches]

    def _check(self, views: tuple[Tensor, ...], choice: Choice, queue: FeatureQueue | None) -> None:
        """What can be said of this rank's arguments alone."""
        check_choice(choice)
        if len(views) < 2 and (self.negatives == "cross" or choice.is_pairs):
            raise ValueError(
                f"{len(views) or 'no'} batch of representations: row i of one is positive to row i of another. Pass two views; "
                "or one with labels=, ids=, a mask or a target, to a loss with negatives='all'."
            )
        check_views(views)
        check_labels(choice.labels, len(views[0]), self.negatives == "all")
        if queue is not None:
            check_queue(queue, self.columns, views)
            if self.symmetric and self.negatives == "cross":
                choice.swapped()
        of_two = not choice.is_pairs and (choice.labels is None or isinstance(choice.labels, tuple))
        if self.negatives == "cross" and len(views) > 2 and of_two:
            raise ValueError(
                f"{len(views)} views with a mask or a target: it says nothing of which views. Pass labels= or ids=, two views, "
                "or negatives='all' with a mask over all stacked views."
            )

    def _batches(
        self, views: list[Tensor], count: int, choice: Choice, queue: FeatureQueue | None, ranks: Alone | Ranks
    ) -> Iterator[Batch]:
        if self.negatives == "all":
            yield self._batch(views[0], None, choice, queue, ranks, count)
            return
        for k, z in enumerate(views):
            for other in views[k + 1 :]:
                if queue is None:
                    yield self._batch(z, other, choice, None, ranks, 1)
                    continue
                yield self._batch(z, other, choice, queue, ranks, 1)
                if self.symmetric:
                    yield self._batch(other, z, choice.swapped(), queue, ranks, 1)

    def _batch(
        self,
        x: Tensor,
        y: Tensor | None,
        choice: Choice,
        queue: FeatureQueue | None,
        ranks: Alone | Ranks,
        repeat: int,
    ) -> Batch:
        """Anchors ``x`` against ``y``, or against themselves."""
        stacked = y is None
        mirrored = self.symmetric and queue is None
        anchors = len(x)
        candidates = ranks.gather(x if stacked else y)
        batch = len(candidates)
        first = repeat * sum(ranks.sizes[: ranks.rank]) if isinstance(ranks, Ranks) else 0
        labels = None
        if choice.labels is not None:
            labels = labels_of(choice.labels, repeat, ranks, x.device)
        filled = None
        if queue is not None:
            features, filled = queue.candidates(x)
            filled = torch.cat([filled.new_ones(batch), filled])
            candidates = torch.cat([candidates, features])
            if labels is not None:
                labels = (labels[0], torch.cat([labels[1], queue.ids.to(x.device)]))
        m, total = len(candidates), batch
        check_batch(total, queue)
        diagonal = not stacked and isinstance(ranks, Alone) and anchors == total
        if choice.is_pairs:
            found = paired(anchors, first, total, m, repeat, stacked, mirrored, diagonal, like=x)
        else:
            found = matches(
                choice,
                (anchors, first, total),
                (m, batch),
                stacked=stacked,
                mirrored=mirrored,
                labels=labels,
                repeat=repeat,
                ranks=ranks,
                like=x,
            )
        if queue is not None:
            found = replace(found, inside=found.inside and (self.columns.is_free or not self.columns.is_hard))
        points = Points(x, candidates, "sphere", found.barred, self.backend)
        return Batch(points, found, filled, ranks, repeat, mirrored, m - batch)

    def _sides(self, batch: Batch) -> Iterator[Side]:
        """The halves of the loss, with their weights: an anchor's is its positives' mass, the candidates share evenly."""
        found, ranks, dtype = batch.matches, batch.ranks, batch.points.dtype
        mass = 1.0 if self.mass is None else self.mass
        n = batch.repeat * (sum(ranks.sizes) if isinstance(ranks, Ranks) else len(batch.points.x) // batch.repeat)
        m = len(batch.points.y)
        for by_rows, target in ((True, found.target), (False, found.backward if batch.mirrored else None)):
            if target is None:
                continue
            if found.inside:
                anchors = batch.points.x.new_full((n if by_rows else m,), 1.0 / (n if by_rows else m))
                share = 1.0
            else:
                own = target.sums(target.values, 0 if by_rows else 1)
                anchors = ranks.gather(own) if by_rows else ranks.sum(own)
                share = anchors.sum()
                anchors, target = _share(anchors, share), replace(target, values=_share(target.values, share))
            if batch.filled is not None:
                others = batch.filled.to(dtype) / batch.filled.sum().to(dtype)
            else:
                others = batch.points.x.new_full((m if by_rows else n,), 1.0 / (m if by_rows else n))
            a, b = (anchors, others) if by_rows else (others, anchors)
            scaled = target if mass == 1.0 else target.times(mass)
            yield Side(batch, scaled, self.rows, self.columns, self.mass, a, b, by_rows, share)

    # -- the loss --------------------------------------------------------------------------------------------------------

    def _loss(self, batch: Batch, epsilon: Any) -> list[Tensor]:
        """Of every half, the shares of this rank's anchors; their sum over ranks is the loss."""
        sides = [side.shared() for side in self._sides(batch)]
        closed = [_is_closed(side) for side in sides]
        found = [None if shut else self._potentials(side, epsilon) for side, shut in zip(sides, closed, strict=True)]
        logs: list[Tensor | None] = [None, None]
        for side, p in zip(sides, found, strict=True):
            weights, other = side.other_weights, None if p is None else side.split(p)[1]
            if not side.is_uniform:
                log = weights.log() if p is None else log_scaling(weights, other, epsilon)
            else:
                log = torch.full_like(weights, side.log_each) if p is None else other / epsilon + side.log_each
            logs[1 if side.by_rows else 0] = log
        if logs[0] is not None:
            logs[0] = batch.own(logs[0])
        s, t = batch.points.soft_minima(*logs, epsilon)
        if t is not None:
            t = batch.own(batch.ranks.softmin(t, epsilon))
        return [self._half(side, p, s if side.by_rows else t, epsilon) for side, p in zip(sides, found, strict=True)]

    def _half(self, side: Side, p: Potentials | None, s: Tensor, epsilon: Any) -> Tensor:
        """One half's shares, and those of its uniformity penalty."""
        if p is None:
            own, lam = _closed(side, s, epsilon)
            other = s.new_zeros(()).expand_as(side.other_weights)
        else:
            f, other = side.split(p)
            own, lam = side.batch.own(f), p.lam
        terms = self._terms(side, Found(own, other, lam, s), epsilon)
        if self.uniformity > 0:
            terms = terms + self.uniformity * uniformity_penalty(side, own, other, lam, epsilon) * side.batch.own(side.weights)
        return terms if side.batch.matches.inside else terms * side.share

    def _terms(self, side: Side, found: Found, epsilon: Any) -> Tensor:
        """``eps KL(target | P_fg)`` and the Fenchel-Young terms of soft sides, in nats, anchor by anchor.

        It is ``primal(target) - dual`` at any potentials, frozen or live, and at the plan's own potentials the loss; where the
        target violates a hard side it is the divergence from the plan alone.
        """
        terms = (_uniform_divergence if side.is_uniform else _divergence)(side, found, epsilon)
        if all(marginal.is_fixed or marginal.is_free for marginal in (side.anchors, side.others)):
            return terms
        weights, (r, c) = side.batch.own(side.weights), side.marginals()
        inside = side.batch.matches.inside or not _is_outside(side, c)
        for marginal, mine in ((side.anchors.at(weights), True), (side.others.at(side.other_weights), False)):
            if marginal.is_fixed or marginal.is_free or (marginal.is_hard and not inside):
                continue
            if mine:
                terms = terms + marginal.fenchel_young(r, found.own, weights) / epsilon
            else:
                paid = marginal.fenchel_young(c, found.other, side.other_weights).sum() / epsilon
                terms = terms + paid * (weights if side.is_uniform else _share(r, c.sum()))
        return terms

    def _potentials(self, side: Side, epsilon: Any) -> Potentials:
        """The inner problem's solution, frozen or with the derivative that was asked for."""
        how, outside = self.gradient, not side.batch.matches.inside and _is_outside(side, side.marginals()[1])
        if outside and not bool(side.weights.any()):
            return Potentials(*(torch.zeros_like(x) for x in (side.a, side.b, side.a[0])))
        if outside:
            _warn_of_floor(side)
        live = torch.is_grad_enabled()
        if isinstance(how, Unroll):
            problem = side.problem(epsilon)
            method = Sinkhorn(annealing=None)
            flat = problem.flat() if problem.batch_shape == () else problem
            state = method.init(flat, None)
            for _ in range(how.steps):
                state = method.step(flat, state, flat.epsilon)
            return Potentials(*(x[0] for x in (state.potentials.f, state.potentials.g, state.potentials.lam)))
        p = self._solved(side, epsilon)
        if live and (outside or isinstance(how, Implicit) or self.uniformity > 0 or self.reduction == "none"):
            p = side.following(p, epsilon)
        return p

    def _solved(self, side: Side, epsilon: Any) -> Potentials:
        """Solve the inner problem: the library's own solvers, without validation or certificate."""
        with torch.no_grad():
            epsilon = epsilon.detach() if isinstance(epsilon, Tensor) else epsilon
            points, ranks = side.batch.points, side.batch.ranks
            cost = None
            small = len(side.a) * len(side.b) <= _DENSE
            if small:
                x = ranks.gather(points.x.detach())
                barred = None if points.barred is None else ranks.gather(points.barred)
                cost = Dense(Points(x, points.y.detach(), "sphere", barred).dense())
            outcome, impossible = settled(side.problem(epsilon, cost).detach().flat(), self.solver)
            p = Potentials(
                *(ranks.first(x[0]) for x in (outcome.potentials.f, outcome.potentials.g, outcome.potentials.lam))
            )
        if outcome.status[0] is not Status.CONVERGED:
            hint = "Raise max_steps, the temperature or the tolerance, or check the representations for NaN."
            warnings.warn(
                f"the inner transport stopped after {outcome.steps[0]} steps above its tolerance {self.solver.tolerance:g} at "
                f"temperature {number(epsilon):g} ({outcome.status[0].name}): the gradient is as wrong as the marginals are. "
                f"{impossible or hint}",
                RuntimeWarning,
                stacklevel=2,
            )
        return p

    def _reduced(self, losses: list[list[Tensor]], batches: list[Batch]) -> Tensor:
        """One number of the anchors' shares, or the losses of the anchors."""
        ranks, parts = batches[0].ranks, [share for shares in losses for share in shares]
        anchors = sum(ranks.sizes) * batches[0].repeat if isinstance(ranks, Ranks) else len(parts[0])
        if self.reduction == "none":
            return torch.cat(parts) * anchors
        total = ranks.total(reduce(torch.add, [part.sum() for part in parts]))
        return total / len(parts) if self.reduction == "mean" else total * anchors

    # -- looking inside ----------------------------------------------------------------------------------------------------

    def read(self, *views: Tensor, **given: Any) -> tuple[Any, list[Batch]]:
        """The temperature and the batches of what :meth:`forward` would be given."""
        logit_scale, queue = given.pop("logit_scale", None), given.pop("queue", None)
        return self._read(views, choice_of(**given), queue=queue, logit_scale=logit_scale)

    def problem(self, *views: Tensor, **given: Any) -> tuple[Problem, Tensor]:
        """The inner problem, live in the views and the temperature, and the sparse target plan."""
        epsilon, batches = self.read(*views, **given)
        batch, points = batches[0], batches[0].points
        if points.barred is not None:  # what is remembered of sizes is nobody's to change, nor is the target
            batch = batch.of(replace(points, barred=points.barred.clone()))
        side = next(self._sides(batch))
        return side.problem(epsilon), side.target.sparse().clone()

    def coupling(self, *views: Tensor, **given: Any) -> Float[Tensor, "n m"]:
        """The plan the inner problem gives this batch, detached: what the loss compares with the positive pairs."""
        with torch.no_grad():
            epsilon, batches = self.read(*views, **given)
            problem, p = self.solution(batches[0], epsilon)
            return problem.plan(p)

    def solution(self, batch: Batch, epsilon: Any) -> tuple[Problem, Potentials]:
        """The inner problem of this rank's anchors, and its potentials."""
        side = next(self._sides(batch))
        if _is_closed(side):
            s = batch.points.softmin(log_scaling(side.b, torch.zeros_like(side.b), epsilon), epsilon, axis=-1)
            f, lam = _closed(side, s, epsilon)
            p = Potentials(f, torch.zeros_like(side.b), lam)
        else:
            p = self._potentials(side, epsilon)
            p = Potentials(batch.own(p.f), p.g, p.lam)
        return replace(side, a=batch.own(side.a)).problem(epsilon, batch.points), p

    def extra_repr(self) -> str:
        return (
            f"rows={self.rows}, columns={self.columns}, mass={self.mass}, temperature={number(self.temperature):.4g}, "
            f"uniformity={self.uniformity}, negatives={self.negatives!r}, symmetric={self.symmetric}"
        )


_DENSE = 2**24  # arcs of an inner problem that is solved as a matrix, which is then forgotten


def settled(problem: Problem, solver: Sinkhorn) -> tuple[Outcome, str]:
    """A detached flat problem solved by the library's own solvers, without validation or certificate, and why that is impossible
    where forbidden arcs make it so: then nothing further is tried.
    """
    first = Accelerated(solver.tolerance, solver.max_steps)
    fits, dense = first.fits(problem), isinstance(problem.cost, Dense)
    outcome = run(problem, first if fits else solver)
    if outcome.status[0] is Status.CONVERGED or not (dense or fits):
        return outcome, ""
    if dense and (impossible := why_impossible(problem)):
        return replace(outcome, status=[Status.INFEASIBLE]), impossible
    further = run(problem, None if dense else solver, _usable(outcome.potentials), tolerance=solver.tolerance)
    return replace(further, steps=[outcome.steps[0] + further.steps[0]]), ""


class _Floored(Backward):
    """The larger of two numbers, from below which a derivative that leads up leads back."""

    @staticmethod
    def forward(ctx, x: Tensor, least: float) -> Tensor:
        ctx.save_for_backward(x < least)
        return x.clamp(min=least)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (below,) = ctx.saved_tensors
        return torch.where(below & (upstream > 0), 0.0, upstream), None


def _usable(p: Potentials) -> Potentials | None:
    return p if all(bool(x.isfinite().all()) for x in (p.f, p.g, p.lam)) else None


def _is_closed(side: Side) -> bool:
    """Whether one soft-minimum is the solution: the candidates are FREE, and a mass, if any, is the anchors' own."""
    free, own = side.others.is_free, side.anchors
    return free and (own.is_fixed or own.is_free or side.mass is None)


def _closed(side: Side, s: Tensor, epsilon: Any) -> tuple[Tensor, Tensor]:
    """Potentials of this rank's anchors, and the mass's multiplier, as a function of their soft-minimum."""
    if side.anchors.is_fixed:
        return s, s.new_zeros(())
    if not side.anchors.is_free:
        return side.anchors.at(side.batch.own(side.weights)).aprox(s, epsilon), s.new_zeros(())
    weights = side.batch.own(side.weights)
    held = _log_sum(log_scaling(weights, -s, epsilon))
    return torch.zeros_like(s), times(math.log(side.mass) - side.batch.ranks.log_sum(held), epsilon)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """The part over the whole; 0 where there is nothing."""
    return part / torch.where(whole > 0, whole, 1.0)


def _log_sum(logs: Tensor) -> Tensor:
    """``log sum exp``, which of nothing but -inf is -inf, with derivative 0."""
    some = logs > -math.inf
    return torch.where(some.any(), torch.logsumexp(torch.where(some.any(), logs, 0.0), 0), -math.inf)


def _moved(weights: Tensor, potential: Tensor, s: Tensor, epsilon: Any) -> Tensor:
    """The plan's marginal at this rank's anchors; 0 at one that has no weight."""
    carries = weights > 0
    return weights * torch.where(carries, torch.where(carries, potential - s, 0.0) / epsilon, 0.0).exp()


def _divergence(side: Side, found: Found, epsilon: Any) -> Tensor:
    """``KL(target | P_fg)`` anchor by anchor."""
    weights, potential = side.batch.own(side.weights), found.own + found.lam
    r, _ = side.marginals()
    log_scale = torch.where(weights > 0, log_scaling(weights, potential, epsilon), 0.0)
    terms = _moved(weights, potential, found.s, epsilon) - r + log_ratio(side, found.other, epsilon) - r * log_scale
    return terms + (r - similar(side)) / epsilon


def _uniform_divergence(side: Side, found: Found, epsilon: Any) -> Tensor:
    """The same where every anchor has as many positives, and every bin the same weight."""
    n, m, mass = len(side.weights), len(side.other_weights), 1.0 if side.mass is None else side.mass
    partners, paired = side.batch.matches.partners, side.target.is_diagonal
    nearest = side.batch.pairs if paired else similar(side) * (n / mass)
    level = math.log(mass * m / partners.shape[1])
    if side.is_even:  # then the anchors' potentials are the soft-minima, and the others' 0
        return (found.s + nearest) / (-n * epsilon) + (1.0 / epsilon + level) / n
    potential, other = found.own + found.lam, found.other if paired else found.other[partners].mean(1)
    moved = ((potential - found.s) / epsilon).exp()
    return (moved + mass * ((1.0 - nearest - other - potential) / epsilon + (level - 1.0))) / n


def similar(side: Side) -> Tensor:
    """``sum_j Q_ij cos_ij`` for every anchor of this rank, Q the target."""
    points = side.batch.points
    if side.target.is_diagonal:
        return side.target.values * side.batch.pairs
    if side.by_rows:
        return side.target.similar(points.x, points.y, 0)
    return side.batch.own(side.batch.ranks.sum(side.target.similar(points.x, points.y, 1)))


def log_ratio(side: Side, other: Tensor, epsilon: Any) -> Tensor:
    """``sum_j Q_ij log(Q_ij / (b_j exp(g_j / eps)))`` for every anchor of this rank, Q the target, g and b the candidates'."""
    target, values = side.target, side.target.values
    beyond = log_scaling(torch.where(side.other_weights > 0, side.other_weights, 1.0), other, epsilon)
    if side.by_rows:
        return target.sums(values * (values.log() - beyond.index_select(0, target.index[1])), 0)
    beyond = side.batch.own(beyond)
    found = target.sums(values * (values.log() - beyond.index_select(0, target.index[0])), 1)
    return side.batch.own(side.batch.ranks.sum(found))


def _is_outside(side: Side, c: Tensor) -> bool:
    """Whether the target violates the candidates' side."""
    if side.others.is_free or not side.others.is_hard:
        return False
    off = side.others.violation(c, side.other_weights).sum()
    return bool(off > 1e-4 * c.sum())


def _warn_of_floor(side: Side) -> None:
    warnings.warn(
        f"the positives violate the candidates' side {side.others}: their column sums are not those of even weights, so that no "
        "plan equals them and the loss has a floor above 0. Its derivative is exact, by one linear system. To have none use "
        "columns=FREE or KL(rho), or positives that meet every candidate equally often.",
        RuntimeWarning,
        stacklevel=2,
    )


def uniformity_penalty(side: Side, own: Tensor, other: Tensor, lam: Tensor, epsilon: Any) -> Tensor:
    """This rank's share of ``KL(Q | P)``: Q keeps the plan's positives and replaces every negative by their mean.

    With M the total mass of the negatives it is ``M (log mean P - mean log P)``, means over negatives only; masked arcs and
    positives are in neither (Shi et al., ICML 2023). No plan is made: M is a soft-minimum over negatives, and the mean of log P
    a sum of potentials and of scalar products.
    """
    batch, ranks, points = side.batch, side.batch.ranks, side.batch.points
    f, g = (own, other) if side.by_rows else (batch.own(other), ranks.gather(own))
    a, b = batch.own(side.a), side.b
    others = replace(points, barred=batch.matches.all_but_negatives(points))
    s, _ = others.soft_minima(None, log_scaling(b, g, epsilon), epsilon)
    held = _log_sum(log_scaling(a, f + lam - s, epsilon))
    log_mass = ranks.log_sum(held)
    rows, columns, spent = _census(others, a > 0, b > 0)
    of_rows = torch.where(rows > 0, rows * log_scaling(a, f + lam, epsilon), 0.0).sum()
    of_columns = torch.where(columns > 0, columns * log_scaling(b, g, epsilon), 0.0).sum()
    count, logs = ranks.sum(torch.stack([rows.sum(), of_rows + of_columns - spent / epsilon]))
    some = (count > 0) & log_mass.isfinite()  # negatives, and mass on them
    log_mass, logs, count = (torch.where(some, x, y) for x, y in ((log_mass, 0.0), (logs, 0.0), (count, 1.0)))
    return torch.where(some, log_mass.exp() * (log_mass - count.log() - logs / count), 0.0)


def _census(points: Points, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many arcs of every row and of every column are not barred, and the sum of their costs, without a matrix of them."""
    n, m = points.shape
    barred, rows, columns = points.barred, rows.to(points.dtype), columns.to(points.dtype)
    if barred.dtype == torch.bool:
        i, j = barred.nonzero().T
    else:
        i = torch.arange(n, device=points.device).repeat_interleave(barred.shape[1])
        j = barred.sort(1).values.flatten()
    left_out = Entries(torch.stack([i, j]), rows[i] * columns[j], (n, m))
    of_rows = rows * columns.sum() - left_out.sums(left_out.values, 0)
    of_columns = columns * rows.sum() - left_out.sums(left_out.values, 1)
    similar = (rows @ points.x) @ (columns @ points.y) - left_out.similar(points.x, points.y, 0).sum()
    return of_rows, of_columns, of_rows.sum() - similar


def cross_entropy(side: Side, s: Tensor, epsilon: Any) -> Tensor:
    """``-sum_j Q_ij log(exp(cos_ij / eps) / sum_k exp(cos_ik / eps))`` for every anchor of this rank, Q the target, its sums the
    weights, and the sum over k known by its soft-minimum: of one that has no positives, or sees nothing, 0.
    """
    weights = side.batch.own(side.weights)
    seen = (weights > 0) & (s != math.inf)
    return torch.where(seen, weights * log_total(side, torch.where(seen, s, 0.0), epsilon) - similar(side) / epsilon, 0.0)


def log_total(side: Side, s: Tensor, epsilon: Any) -> Tensor:
    """``log sum_j exp(cos_ij / eps)`` over the candidates, from a soft-minimum with their even weights."""
    return (1.0 - s) / epsilon - side.log_each
