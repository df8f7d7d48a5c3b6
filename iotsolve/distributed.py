"""A problem whose rows live on many processes: what they exchange, and the derivative of every exchange.

Each process computes its own share of one number, and :meth:`Ranks.total` adds the shares. So whatever a process receives
from another has a derivative that is summed over all of them (the adjoint of a gather), and the total's is the identity.
Potentials and weights are whole on every process, and exchanged: O(n + m) numbers an iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from iotsolve.costs import METRICS, Points, Scalar

__all__ = ["Alone", "Ranks", "Sharded", "meet", "own_plan", "ranks_of"]


@dataclass(frozen=True)
class Alone:
    """One process: nothing is exchanged."""

    count: int = 1

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, x: Tensor) -> Tensor:
        return x

    def whole(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x

    def log_sum(self, x: Tensor) -> Tensor:
        return x

    def softmin(self, t: Tensor, epsilon: Scalar) -> Tensor:
        return t

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

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around checks that exchange nothing: an error on one rank is one on all, so that none waits for it."""
        failed = None
        try:
            yield
        except Exception as error:
            failed = error
        _told(self.group, lambda: _raised(failed))

    def agree(self, what: str, told: dict[str, float], *, within: float = 0.0) -> None:
        """Raise a ValueError on every rank if these numbers are not the same on all, but for this relative error."""
        _check_same(what, _told(self.group, lambda: told), within)

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
        found = self.sum((x - highest).exp())
        some = found > 0
        return torch.where(some, torch.where(some, found, 1.0).log() + highest, -math.inf)

    def softmin(self, t: Tensor, epsilon: Scalar) -> Tensor:
        """The soft-minimum over all rows, of every rank's over its own: +inf, without derivatives, where nothing is reached."""
        here = t < math.inf
        found = self.log_sum(torch.where(here, -torch.where(here, t, 0.0) / epsilon, -math.inf))
        there = found > -math.inf
        return torch.where(there, -epsilon * torch.where(there, found, 0.0), math.inf)

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


def meet(
    gather: bool,
    group: Any,
    *views: Tensor,
    check: Callable[[], None],
    tell: Callable[[], dict[str, float]] = dict,
) -> Alone | Ranks:
    """Who takes part in this batch: the processes agree on it before any exchange that could wait for ever.

    Args:
        gather: whether there are others at all.
        group: the processes; None is all.
        views: this rank's representations, shape ``(N, D)`` each.
        check: raises a ValueError at what this rank must not be given.
        tell: the numbers, beside these shapes, that must be the same on all ranks, always by the same names.

    Raises:
        ValueError: on every rank, if one was given what is no batch, or the ranks' representations do not fit each other.
    """
    if not gather or _is_alone(group):
        check()
        return Alone()
    codes = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

    def told() -> dict[str, float]:
        check()
        n, d = views[0].shape
        if not n:
            raise ValueError("there are no rows: every rank needs one. Drop what is left of the last batch on all of them.")
        shapes = {"N": n, "D": d, "views": len(views), "dtype": codes.get(views[0].dtype, 4)}
        return {**shapes, "grad": torch.is_grad_enabled(), **tell()}

    table = _told(group, told)
    _check_same(
        "representations differ between ranks. N may differ, the rest must not: is one rank in another precision, in evaluation, "
        "or given another encoder, another temperature, a queue of its own, or labels where others have none?",
        table,
        within=1e-6,
        free="N",
    )
    return _ranks(group, [row["N"] for row in table])


def _is_alone(group: Any) -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1


def _ranks(group: Any, sizes: list[float]) -> Ranks:
    return Ranks(group, dist.get_rank(group), tuple(int(n) for n in sizes))


def _told(group: Any, tell: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
    """What every rank tells of itself, by the same names; an error in telling it is one on all."""
    if dist.get_rank(group) < 0:
        raise ValueError(
            "process_group does not contain this rank: a loss, or a problem, is computed by the members of its group alone. "
            "Give every rank the group it is in."
        )
    failed, told = None, {}
    try:
        told = tell()
    except Exception as error:
        failed = error
    backend = dist.get_backend(group)
    on_device = "nccl" in backend and "gloo" not in backend
    row = [float(failed is not None), *map(float, told.values())]
    device = torch.device("cuda", torch.cuda.current_device()) if on_device else "cpu"
    mine = torch.tensor([*row, *[0.0] * (_ROW - len(row))], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone).tolist()
    if any(row[0] for row in table):
        words: list[Any] = [None] * len(table)
        dist.all_gather_object(words, None if failed is None else str(failed), group=group)
        rank = next(k for k, word in enumerate(words) if word is not None)
        raise failed or ValueError(f"rank {rank} of {len(table)} cannot take part, so that none can: {words[rank]}")
    return [dict(zip(told, row[1:], strict=False)) for row in table]


_ROW = 24  # numbers that a rank tells of itself, of which the first is whether it failed


def _raised(error: Exception | None) -> dict[str, float]:
    if error is not None:
        raise error
    return {}


def _check_same(what: str, table: list[dict[str, float]], within: float, free: str = "") -> None:
    """That every rank has told the same, but for what is free; NaN is the failure of somebody else."""
    first = table[0]
    differ = {
        name: [row[name] for row in table]
        for name in first
        if name != free
        and not all(math.isclose(row[name], first[name], rel_tol=within) or math.isnan(row[name]) for row in table)
    }
    if differ:
        shown = "; ".join(f"{name} = {', '.join(f'{x:.10g}' for x in values)}" for name, values in differ.items())
        raise ValueError(f"{what} By rank: {shown}.")


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
        if _is_alone(group):
            self._set(_local(cost), Alone(), 1)
            return

        def told() -> dict[str, float]:
            local = _local(cost)
            x, y = local.x.detach(), local.y.detach().double()
            if not len(x):
                raise ValueError(
                    "there are no rows: every rank of a group needs one. Spread them evenly, or make the group smaller."
                )
            metric = list(METRICS).index(local.metric)
            shapes = {"n": len(x), "d": x.shape[1], "m": len(y), "d of columns": y.shape[1], "metric": metric}
            return {
                **shapes,
                "barred": local.barred is not None,
                "bytes a number": local.dtype.itemsize,
                "sum of columns": float(y.sum()),
                "sum of their squares": float(y.square().sum()),
            }

        table = _told(group, told)
        _check_same(
            "the ranks' points differ in more than their rows. All must have the same columns, in the same precision: broadcast "
            "y from one rank.",
            table,
            within=0.0,
            free="n",
        )
        self._set(_local(cost), _ranks(group, [row["n"] for row in table]), 1)

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
        return self.ranks.softmin(own, epsilon)

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


def ranks_of(cost: Any) -> Alone | Ranks:
    """Who has the rows of a cost."""
    return cost.ranks if isinstance(cost, Sharded) else Alone()


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


def _local(cost: Any) -> Points:
    """This rank's points, as tensors."""
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
    return cost


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
