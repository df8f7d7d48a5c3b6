"""A problem whose rows live on many processes: what they exchange, and the derivative of every exchange.

Each process computes its own share of one number, and :meth:`Ranks.total` adds the shares. So whatever a process receives
from another has a derivative that is summed over all of them (the adjoint of a gather), and the total's is the identity.
Potentials and weights are whole on every process, and exchanged: O(n + m) numbers an iteration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from iotsolve.costs import Points, Scalar

__all__ = ["Alone", "Ranks", "Sharded", "meet", "own_plan"]


@dataclass(frozen=True)
class Alone:
    """One process: nothing is exchanged."""

    count: int = 1

    def gather(self, x: Tensor) -> Tensor:
        return x

    def whole(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x

    def log_sum(self, x: Tensor) -> Tensor:
        return x

    def total(self, x: Tensor) -> Tensor:
        return x

    def shared(self, x: Any) -> Any:
        return x

    def scaled(self, x: Tensor) -> Tensor:
        return x

    def own(self, x: Tensor, repeat: int = 1) -> Tensor:
        return x

    def first(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, each with ``sizes[rank]`` pairs of the batch."""

    group: Any
    rank: int
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.sizes)

    def gather(self, x: Tensor) -> Tensor:
        """``x`` of all ranks one after the other, along the first dimension; its derivative is summed over the ranks."""
        return _Gather.apply(x, self) if x.requires_grad else _gathered(x, self)

    def whole(self, x: Tensor) -> Tensor:
        """As :meth:`gather`, for what every rank then does the same with: the derivative is its own rows'."""
        return _Whole.apply(x, self)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, of which every rank then uses a part of its own; its derivative is summed over the ranks."""
        return _Sum.apply(x, self.group)

    def log_sum(self, x: Tensor) -> Tensor:
        """``log sum exp`` over ranks of numbers that every rank has some summands of."""
        highest = x.detach().clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        highest = torch.where(highest.isfinite(), highest, 0.0)
        return self.sum((x - highest).exp()).log() + highest

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks of the shares of one number."""
        return _Total.apply(x, self.group)

    def shared(self, x: Any) -> Any:
        """A tensor that every rank has a copy of and computes its share from; the derivatives are summed."""
        return _Shared.apply(x, self.group) if isinstance(x, Tensor) and x.requires_grad else x

    def scaled(self, x: Tensor) -> Tensor:
        """``x`` with a derivative times the number of ranks, which averaging over them, as DDP does, takes back."""
        return _Scaled.apply(x, self.count) if x.requires_grad else x

    def part(self, x: Tensor) -> Tensor:
        """``x`` with a derivative divided by the number of ranks, each of which finds the whole of it, before they are added."""
        return _Scaled.apply(x, 1 / self.count) if x.requires_grad else x

    def own(self, x: Tensor, repeat: int = 1) -> Tensor:
        """This rank's part of a vector over the whole batch, of which each pair has ``repeat`` entries."""
        start = repeat * sum(self.sizes[: self.rank])
        return x[start : start + repeat * self.sizes[self.rank]]

    def stack(self, x: Tensor) -> Tensor:
        """Every rank's ``x``, of one shape, in a dimension before the others; without a derivative."""
        pieces = [torch.empty_like(x) for _ in self.sizes]
        dist.all_gather(pieces, x.contiguous(), group=self.group)
        return torch.stack(pieces)

    def first(self, x: Tensor) -> Tensor:
        """The first rank's ``x``, so that all go on from the same numbers."""
        x = x.contiguous()
        dist.broadcast(x, dist.get_global_rank(self.group, 0) if self.group is not None else 0, group=self.group)
        return x


def meet(gather: bool, group: Any, *views: Tensor) -> Alone | Ranks:
    """Who takes part in this batch: the processes agree on shapes before any exchange that could wait for ever.

    Raises:
        ValueError: on every rank, if the ranks' representations do not fit each other.
    """
    if not gather or not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return Alone()
    if dist.get_rank(group) < 0:
        raise ValueError(
            "process_group does not contain this rank: a loss is computed by the members of its group alone. Give every rank "
            "the group it is in."
        )
    z = views[0]
    code = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}.get(z.dtype, 4)
    mine = torch.tensor([len(z), z.shape[-1], len(views), code, int(torch.is_grad_enabled())], device=z.device)
    world = dist.get_world_size(group)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone).tolist()
    if any(row[1:] != table[0][1:] for row in table):
        raise ValueError(
            f"representations differ between ranks: (N, D, views, dtype, grad) = {[tuple(row) for row in table]}. N may "
            "differ, the rest must not: is one rank in another precision, in evaluation, or given another encoder?"
        )
    return Ranks(group, dist.get_rank(group), tuple(row[0] for row in table))


@dataclass(frozen=True, init=False)
class Sharded:
    """The cost of points whose rows are spread over ranks; every rank has all columns, and whole potentials and weights.

    Every rank builds the same :class:`iotsolve.Problem` of it, with the weights of *all* rows, and solves it at the same time;
    what they exchange is O(n + m) numbers an iteration. First and second order, certificates and the gradient of the value work
    as for one process, for every marginal at ``epsilon > 0``. What a solution makes when asked for (value, certificate,
    marginals) all ranks make together: ask for it on every rank, not on the first alone. Gradients in the rows are those of
    this rank's; those in the columns, weights and numbers, which all have, are whole on every rank.

    Args:
        cost: :class:`iotsolve.Points` of this rank's rows against all columns, without a batch; metric sqeuclidean, cosine,
            sphere or dot.
        group: the ``torch.distributed`` process group, gloo or NCCL; None is all ranks. Without one it is a single process.

    Raises:
        ValueError: on every rank, if the ranks' points do not fit each other.

    Example:
        >>> from iotsolve import Points, Problem, solve
        >>> x, y = torch.rand(5, 2), torch.rand(4, 2)
        >>> solve(Problem(Sharded(Points(x, y)), epsilon=0.1)).status.name
        'CONVERGED'
    """

    local: Points
    ranks: Alone | Ranks
    repeat: int

    def __init__(self, cost: Points, group: Any = None) -> None:
        if not isinstance(cost, Points):
            raise ValueError(
                f"cost = {type(cost).__name__}: Sharded is for Points, this rank's rows against all columns."
            )
        x, y = (z if isinstance(z, Tensor) else torch.from_numpy(np.asarray(z)) for z in (cost.x, cost.y))
        cost = replace(cost, x=x, y=y)
        if x.dim() != 2 or y.dim() != 2 or not cost.is_bilinear:
            raise ValueError(
                f"points of shapes {tuple(x.shape)} and {tuple(y.shape)} under {cost.metric!r}: Sharded takes (n, d) and (m, d) "
                "without a batch, and the metrics sqeuclidean, cosine, sphere and dot."
            )
        self._set(cost, _meet_points(group, cost), 1)

    def _set(self, local: Points, ranks: Alone | Ranks, repeat: int) -> None:
        for name, value in {"local": local, "ranks": ranks, "repeat": repeat}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def joined(cls, local: Points, ranks: Alone | Ranks, repeat: int = 1) -> Sharded:
        """Of ranks that have met, each pair of which stands for ``repeat`` rows."""
        cost = object.__new__(cls)
        cost._set(local, ranks, repeat)
        return cost

    @property
    def shape(self) -> torch.Size:
        *batch, n, m = self.local.shape
        return torch.Size((*batch, n if isinstance(self.ranks, Alone) else self.repeat * sum(self.ranks.sizes), m))

    @property
    def own(self) -> slice:
        """This rank's rows among all."""
        if isinstance(self.ranks, Alone):
            return slice(0, self.shape[-2])
        start = self.repeat * sum(self.ranks.sizes[: self.ranks.rank])
        return slice(start, start + self.local.shape[-2])

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device

    @property
    def is_compiled(self) -> bool:
        """Whether compiled passes read these points, on every rank: as :attr:`iotsolve.Points.is_compiled`."""
        return self.local.is_compiled

    @property
    def most(self) -> int:
        """The rows of the rank that has most."""
        return self.local.shape[-2] if isinstance(self.ranks, Alone) else self.repeat * max(self.ranks.sizes)

    @property
    def barred(self) -> Tensor | None:
        return self.local.barred

    def tensors(self) -> dict[str, Tensor]:
        return self.local.tensors()

    def with_tensors(self, named: dict[str, Tensor]) -> Sharded:
        return Sharded.joined(self.local.with_tensors(named), self.ranks, self.repeat)

    def expand(self, batch: tuple[int, ...]) -> Sharded:
        return Sharded.joined(self.local.expand(batch), self.ranks, self.repeat) if batch else self

    def bilinear_form(self, epsilon: Scalar) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As of :class:`iotsolve.Points`, of this rank's."""
        return self.local.bilinear_form(epsilon)

    def rough(self) -> tuple[Sharded, float] | None:
        """As of :class:`iotsolve.Points`."""
        found = self.local.rough()
        return None if found is None else (Sharded.joined(found[0], self.ranks, self.repeat), found[1])

    def all_finite(self) -> bool:
        return self.local.all_finite()

    def range(self) -> Tensor:
        """A bound of largest minus smallest entry, of all rows together: that of any two ranks' rows."""
        x = self.local.x.detach().flatten(0, -2)
        if isinstance(self.ranks, Alone):
            return self.local.range()
        corners = self.ranks.stack(torch.stack([x.amin(0), x.amax(0), x[x.norm(dim=1).argmax()]]))
        points = corners.reshape(-1, x.shape[1]).expand(*self.local.x.shape[:-2], -1, -1)
        found = replace(self.local, x=points, barred=None)
        return found.across if self.local.metric == "sqeuclidean" else found.range()  # of corners, which no point is in

    @property
    def ceiling(self) -> float:
        reach = float(self.range().amax())
        return math.inf if self.barred is not None else reach if self.local.metric != "sphere" else reach / 2 + 1.0

    def ceiling_between(self, rows: Tensor, columns: Tensor) -> float:
        """A bound of all entries."""
        return self.ceiling

    def between(self, rows: Tensor, columns: Tensor) -> Sharded:
        """All rows: what this is asked for is their range, of which a bound will do."""
        return self

    def softmin(self, log_weights: Tensor, epsilon: Scalar, *, axis: int) -> Tensor:
        """As of :class:`iotsolve.Points`, over the rows of all ranks."""
        if axis == -1:
            own = self.local.softmin(log_weights, epsilon, axis=-1)
            return self.ranks.gather(own.flatten()).reshape(*own.shape[:-1], -1)
        own = self.local.softmin(log_weights[..., self.own], epsilon, axis=-2)
        return own if isinstance(self.ranks, Alone) else -epsilon * self.ranks.log_sum(-own / epsilon)

    def dense(self) -> Tensor:
        raise ValueError(
            "this needs the whole cost or plan as a matrix, and its rows are on many ranks: of a sharded problem there are "
            "value, potentials, marginals, transport cost, certificate and the value's gradient; own_plan(solution) has this "
            "rank's rows of the plan."
        )

    def gibbs(self, *given: Any) -> Tensor:
        return self.dense()

    def slack(self, *given: Any) -> tuple[Tensor, Tensor]:
        return self.dense(), self.dense()


def own_plan(solution: Any) -> Tensor:
    """The rows of the plan that are this rank's, shape ``(k, m)``, detached.

    Args:
        solution: of a problem whose cost is :class:`Sharded`.
    """
    problem, p = solution.problem, solution.found
    cost = problem.cost
    with torch.no_grad():
        f = p.f[cost.own] + p.lam
        eps = problem.epsilon
        logs = problem.a[cost.own].log() + f / eps, problem.b.log() + p.g / eps
        return cost.local.gibbs(*logs, eps)


def _meet_points(group: Any, cost: Points) -> Alone | Ranks:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return Alone()
    world = dist.get_world_size(group)
    x, y = cost.x.detach().double(), cost.y.detach().double()
    metric = ("sqeuclidean", "cosine", "sphere", "dot").index(cost.metric)
    told = [len(x), x.shape[1], len(y), y.shape[1], metric, float(cost.barred is not None), float(cost.dtype.itemsize)]
    mine = torch.tensor([*told, float(y.sum()), float(y.square().sum())], dtype=torch.float64, device=x.device)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone).tolist()
    if any(row[1:] != table[0][1:] for row in table):
        raise ValueError(
            "the ranks' points differ in more than their rows: (n, d, m, d of columns, metric, barred, bytes a number, sum and "
            f"sum of squares of the columns) = {[tuple(row) for row in table]}. All must have the same columns, in the same "
            "precision: broadcast y from one rank."
        )
    return Ranks(group, dist.get_rank(group), tuple(int(row[0]) for row in table))


def _gathered(x: Tensor, ranks: Ranks) -> Tensor:
    """Pieces of unequal length are padded on the way."""
    per_pair = len(x) // ranks.sizes[ranks.rank]
    longest = per_pair * max(ranks.sizes)
    mine = x if len(x) == longest else torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    pieces = [torch.empty_like(mine) for _ in ranks.sizes]
    dist.all_gather(pieces, mine.contiguous(), group=ranks.group)
    return torch.cat([piece[: per_pair * n] for piece, n in zip(pieces, ranks.sizes, strict=True)])


def _reduced(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.per_pair = ranks, len(x) // ranks.sizes[ranks.rank]
        return _gathered(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        return ctx.ranks.own(_reduced(upstream, ctx.ranks.group), ctx.per_pair), None


class _Whole(_Gather):
    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        return ctx.ranks.own(upstream, ctx.per_pair), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduced(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        return _reduced(upstream, ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        return _reduced(x, group)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        return _reduced(upstream, ctx.group), None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream * ctx.by, None
