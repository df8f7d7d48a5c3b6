"""A problem whose rows live on many processes: what they exchange, and the derivative of every exchange.

Each process computes its own share of one number, and :meth:`Ranks.total` adds the shares. So whatever a process receives
from another has a derivative that is summed over all of them (the adjoint of a gather), and the total's is the identity.
Potentials and weights are whole on every process, and exchanged: O(n + m) numbers an iteration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from iotsolve.costs import Points, Scalar

__all__ = ["Alone", "Ranks", "Sharded", "meet"]


@dataclass(frozen=True)
class Alone:
    """One process: nothing is exchanged."""

    count: int = 1

    def gather(self, x: Tensor) -> Tensor:
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

    def own(self, x: Tensor, repeat: int = 1) -> Tensor:
        """This rank's part of a vector over the whole batch, of which each pair has ``repeat`` entries."""
        start = repeat * sum(self.sizes[: self.rank])
        return x[start : start + repeat * self.sizes[self.rank]]

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


@dataclass(frozen=True)
class Sharded:
    """The cost of points whose rows are spread over ranks, for first-order solvers: every rank gets whole soft-minima.

    Args:
        local: this rank's rows against all columns.
        ranks: who has the others; each rank's pairs stand for ``repeat`` rows.
        repeat: rows per pair.
    """

    local: Points
    ranks: Ranks
    repeat: int = 1

    @property
    def shape(self) -> torch.Size:
        *batch, _, m = self.local.shape
        return torch.Size((*batch, self.repeat * sum(self.ranks.sizes), m))

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device

    def tensors(self) -> dict[str, Tensor]:
        return self.local.tensors()

    def with_tensors(self, named: dict[str, Tensor]) -> Sharded:
        return replace(self, local=self.local.with_tensors(named))

    def all_finite(self) -> bool:
        return self.local.all_finite()

    def softmin(self, log_weights: Tensor, epsilon: Scalar, *, axis: int) -> Tensor:
        """As of :class:`iotsolve.Points`, over the rows of all ranks."""
        if axis == -1:
            own = self.local.softmin(log_weights, epsilon, axis=-1)
            return self.ranks.gather(own.flatten()).reshape(*own.shape[:-1], -1)
        weights = self.ranks.own(log_weights.flatten(), self.repeat).reshape(*log_weights.shape[:-1], -1)
        return -epsilon * self.ranks.log_sum(-self.local.softmin(weights, epsilon, axis=-2) / epsilon)


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
    def forward(ctx, x: Tensor, by: int) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream * ctx.by, None
