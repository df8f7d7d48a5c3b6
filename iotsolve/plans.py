"""Plans as sums and products see them: in chunks, made when read, so that none need be held.

The plan of a dense cost is one chunk, computed once; that of points is computed again, block by block, at every pass; an
exact plan may be a list of arcs. What is done to a plan (its certificate, its rounding) is written once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iotsolve.costs import Cost, Dense, Points, busy
from iotsolve.distributed import Sharded
from iotsolve.kernels import bilinear, products
from iotsolve.kernels.precision import in_full
from iotsolve.marginals import number
from iotsolve.problem import Judged, Potentials, Problem, log_scaling

__all__ = ["Chunk", "Factors", "Plan", "QuickPlan", "is_quick", "plan_of", "quick_plan", "streams"]


@dataclass(frozen=True)
class Chunk:
    """A block of rows of the plan, with its costs; both ``(B, k, m)``."""

    values: Tensor
    cost: Tensor
    part: slice

    def rows(self, u: Tensor) -> Tensor:
        """Values per row ``(B, n)`` as every entry sees them."""
        return u[..., self.part].unsqueeze(-1)

    def columns(self, v: Tensor) -> Tensor:
        """Values per column ``(B, m)`` as every entry sees them."""
        return v.unsqueeze(-2)

    def problems(self, w: Tensor) -> Tensor:
        """Values per problem ``(B,)`` as every entry sees them."""
        return w[..., None, None]

    def add_rows(self, total: Tensor, x: Tensor) -> None:
        total[..., self.part] += x.sum(-1)

    def add_columns(self, total: Tensor, x: Tensor) -> None:
        total += x.sum(-2)

    def add(self, total: Tensor, x: Tensor) -> None:
        total += x.sum((-2, -1))

    def add_times(self, total: Tensor, v: Tensor) -> None:
        total[..., self.part, :] += self.values @ v

    def add_times_back(self, total: Tensor, u: Tensor) -> None:
        total += self.values.mT @ u[..., self.part, :]


@dataclass(frozen=True)
class Arcs(Chunk):
    """A list of arcs: values and costs ``(k,)`` at problem, row and column indices."""

    index: tuple[Tensor, Tensor, Tensor]

    def rows(self, u: Tensor) -> Tensor:
        return u[self.index[0], self.index[1]]

    def columns(self, v: Tensor) -> Tensor:
        return v[self.index[0], self.index[2]]

    def problems(self, w: Tensor) -> Tensor:
        return w[self.index[0]]

    def add_rows(self, total: Tensor, x: Tensor) -> None:
        total.index_put_((self.index[0], self.index[1]), x, accumulate=True)

    def add_columns(self, total: Tensor, x: Tensor) -> None:
        total.index_put_((self.index[0], self.index[2]), x, accumulate=True)

    def add(self, total: Tensor, x: Tensor) -> None:
        total.index_put_((self.index[0],), x, accumulate=True)

    def add_times(self, total: Tensor, v: Tensor) -> None:
        problem, i, j = self.index
        total.index_put_((problem, i), self.values.unsqueeze(-1) * v[problem, j], accumulate=True)

    def add_times_back(self, total: Tensor, u: Tensor) -> None:
        problem, i, j = self.index
        total.index_put_((problem, j), self.values.unsqueeze(-1) * u[problem, i], accumulate=True)


@dataclass(frozen=True)
class Factors:
    """``P -> alpha beta (1 + u + v + w) P + x y``: all that a rounding does to a plan. ``u, alpha, x`` per row."""

    u: Tensor
    v: Tensor
    w: Tensor
    alpha: Tensor
    beta: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def identity(cls, problem: Problem) -> Factors:
        zero_r, zero_c = torch.zeros_like(problem.a), torch.zeros_like(problem.b)
        return cls(zero_r, zero_c, zero_r[..., 0], zero_r + 1, zero_c + 1, zero_r, zero_c)

    @property
    def is_linear(self) -> Tensor:
        """Of which problems ``(1 + u + v + w) P`` is all they are."""
        return (self.alpha == 1).all(-1) & (self.beta == 1).all(-1) & (self.x == 0).all(-1)

    def marginals(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Those of the new plan; of a linear change from products with vectors."""
        if not self.is_linear.all():
            return plan.marginals(self.on)
        (r, c), w = plan.marginals(), self.w.unsqueeze(-1)
        return r + r * (self.u + w) + plan.times(self.v), c + c * (self.v + w) + plan.times_back(self.u)

    def on(self, chunk: Chunk) -> Tensor:
        """The new values of a chunk."""
        return chunk.values * self.added(chunk) * chunk.rows(self.alpha) * chunk.columns(self.beta) + self.piece(chunk)

    def added(self, chunk: Chunk) -> Tensor:
        return 1 + chunk.rows(self.u) + chunk.columns(self.v) + chunk.problems(self.w)

    def piece(self, chunk: Chunk) -> Tensor:
        return chunk.rows(self.x) * chunk.columns(self.y)

    def where(self, mine: Tensor, other: Factors) -> Factors:
        """These factors for some problems, others for the rest."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return Factors(*(torch.where(mine.reshape(-1, *[1] * (x.dim() - 1)), x, y) for x, y in pairs))


@dataclass(frozen=True)
class Plan:
    """A flat batch of plans, read by passes over its chunks."""

    problem: Problem
    read: Callable[[], Iterator[Chunk]]

    def sum(self, of: Callable[[Chunk], Tensor]) -> Tensor:
        """Sum of a function of the entries, per problem: ``(B,)``."""
        total = torch.zeros_like(self.problem.a[..., 0])
        with busy(self.problem.cost):
            for chunk in self.read():
                chunk.add(total, of(chunk))
        return total

    def any(self, of: Callable[[Chunk], Tensor]) -> Tensor:
        """Whether some entry satisfies ``of``, per problem."""
        return self.sum(lambda chunk: of(chunk).to(self.problem.a.dtype)) > 0

    def marginals(self, of: Callable[[Chunk], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Row and column sums of a function of the entries; of the plan itself, once."""
        return self._marginals if of is None else self._sums(of)

    @cached_property
    def _marginals(self) -> tuple[Tensor, Tensor]:
        return self._sums(lambda chunk: chunk.values)

    def _sums(self, of: Callable[[Chunk], Tensor]) -> tuple[Tensor, Tensor]:
        r, c = torch.zeros_like(self.problem.a), torch.zeros_like(self.problem.b)
        with busy(self.problem.cost):
            for chunk in self.read():
                values = of(chunk)
                chunk.add_rows(r, values)
                chunk.add_columns(c, values)
        return r, c

    def apply(self, values: Tensor, *, axis: int) -> Tensor:
        """``P V`` of ``V (B, m, k)``, or with ``axis=-2`` ``P' V`` of ``V (B, n, k)``."""
        total = values.new_zeros(*(self.problem.a if axis == -1 else self.problem.b).shape, values.shape[-1])
        with busy(self.problem.cost), in_full():
            for chunk in self.read():
                (chunk.add_times if axis == -1 else chunk.add_times_back)(total, values)
        return total

    def normal(self, w: Tensor, v: Tensor) -> Tensor:
        """``P' (w P v)``, shape ``(B, m)``."""
        return self.times_back(w * self.times(v))

    def times(self, v: Tensor) -> Tensor:
        """``P v``, shape ``(B, n)``."""
        return self.apply(v.unsqueeze(-1), axis=-1).squeeze(-1)

    def times_back(self, u: Tensor) -> Tensor:
        """``P' u``, shape ``(B, m)``."""
        return self.apply(u.unsqueeze(-1), axis=-2).squeeze(-1)

    def spread(self, w: Tensor, rows: Tensor) -> Tensor:
        """``sum_i P_ij w_i (rows_i - P_ij)``, shape ``(B, m)``: what leaves a column's rows by another one."""
        c = torch.zeros_like(self.problem.b)
        with busy(self.problem.cost):
            for chunk in self.read():
                chunk.add_columns(c, chunk.values * chunk.rows(w) * (chunk.rows(rows) - chunk.values))
        return c


class QuickPlan(Plan):
    """A plan whose marginals are known, in float64, and whose products are quick, with an error of their own.

    The products are for what is small already, corrections and directions.
    """

    sums: tuple[Tensor, Tensor]

    @property
    def in_numpy(self) -> bool:
        """Whether :meth:`product` serves it: on a CPU, where small vectors cost a tenth in NumPy."""
        return self.sums[0].device.type == "cpu"

    @property
    def _marginals(self) -> tuple[Tensor, Tensor]:
        return self.sums

    @property
    def exact(self) -> Plan:
        """The same plan in float64, computed again at every pass."""
        return Plan(self.problem, self.read)

    def product(self, w: np.ndarray, v: np.ndarray, *, as_given: bool) -> tuple[np.ndarray, np.ndarray]:
        """``P v`` with ``P' (w P v)``, or with ``P' w`` if that is ``as_given``."""
        raise NotImplementedError

    def normal_product(self, w: np.ndarray, v: np.ndarray) -> np.ndarray:
        """:meth:`normal` of arrays."""
        return self.product(w, v, as_given=False)[1]

    def times(self, v: Tensor) -> Tensor:
        nothing = np.zeros(tuple(self.sums[0].shape))
        return torch.from_numpy(self.product(nothing, v.numpy(), as_given=True)[0])

    def times_back(self, u: Tensor) -> Tensor:
        nothing = np.zeros(tuple(self.sums[1].shape))
        return torch.from_numpy(self.product(u.numpy(), nothing, as_given=True)[1])


class _Copy:
    """An array in a borrowed buffer, which goes back when nobody reads the plan any more."""

    def __init__(self, shape: tuple[int, ...], dtype: type) -> None:
        from iotsolve.kernels import workspace

        self.values = workspace.lend_to(self, shape, dtype)


@dataclass(frozen=True)
class StoredPlan(QuickPlan):
    """The plan of a dense cost on a CPU: its products are those of a copy, in float32 if large; compiled."""

    sums: tuple[Tensor, Tensor]
    kept: _Copy | Judged | Callable[[], _Copy]
    finer: Callable[[], Plan] | None = None
    """Makes the same plan with products in float64, where those of the copy are not."""

    @classmethod
    def of(
        cls, problem: Problem, p: Potentials, *, single: bool = False, lazy: bool = False, double: bool = False
    ) -> StoredPlan:
        """``single``: the copy is in float32 whatever its size, ``double``: in float64; ``lazy``: it is made when asked for.

        Either is asked for by who judges, and then a problem that remembers keeps what there is to see.
        """
        from iotsolve.kernels import passes  # numba is imported where it runs

        def read() -> Iterator[Chunk]:
            blocks = zip(problem.plan_blocks(p), problem.cost.blocks(), strict=True)
            yield from (Chunk(values.double(), cost.dense(), part) for (part, values), (_, cost) in blocks)

        read = _kept(read) if problem.cost.matrix.numel() <= _KEPT_DOUBLE else read
        memory = problem.memory if single or lazy else None
        if memory is not None and (known := memory.of(p)) is not None:
            return cls(problem, read, known.sums, known)
        eps = number(problem.epsilon)
        cost = problem.cost.matrix.numpy()
        lifted = (p.f + p.lam.unsqueeze(-1)).double().numpy() / eps
        alpha = passes.logs(problem.a.double().numpy(), lifted)
        beta = passes.logs(problem.b.double().numpy(), p.g.double().numpy() / eps)
        dtype = np.float32 if single or (cost.size > _KEPT_DOUBLE and not double) else np.float64

        def summed(into: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return passes.marginals(cost, alpha, beta, passes.LOG2E / eps, into)

        def copied() -> _Copy:
            made = _Copy(cost.shape, dtype)
            summed(made.values)
            return made

        if memory is not None:
            values = np.empty(cost.shape)
            judged = memory.keep(Judged(p.arrays(), tuple(map(torch.from_numpy, summed(values))), values))
            return cls(problem, read, judged.sums, judged)
        kept = copied if lazy else _Copy(cost.shape, dtype)
        r, c = summed(np.empty((len(cost), 0, 0), dtype) if lazy else kept.values)

        def finer() -> Plan:
            return cls.of(problem, p, double=True) if cost.size <= _HELD_DOUBLE else Plan(problem, read)

        sums = torch.from_numpy(r), torch.from_numpy(c)
        return cls(problem, read, sums, kept, None if dtype is np.float64 else finer)

    @cached_property
    def _copy(self) -> _Copy | Judged:
        return self.kept() if callable(self.kept) else self.kept

    @property
    def exact(self) -> Plan:
        return self if self.finer is None else self.finer()

    def product(self, w: np.ndarray, v: np.ndarray, *, as_given: bool) -> tuple[np.ndarray, np.ndarray]:
        from iotsolve.kernels import passes

        return passes.product(self._copy.values, v, w, as_given=as_given)

    def spread(self, w: Tensor, rows: Tensor) -> Tensor:
        from iotsolve.kernels import passes

        return torch.from_numpy(passes.spread(self._copy.values, w.numpy(), rows.numpy()))


class _Passed(QuickPlan):
    """A quick plan whose products are passes over tensors: of one vector, or of two at once."""

    def one(self, z: Tensor, *, turned: bool) -> Tensor:
        """``P z``, or ``P' z``."""
        raise NotImplementedError

    def pair(self, w: Tensor, v: Tensor, *, as_given: bool) -> tuple[Tensor, Tensor]:
        """:meth:`product` of tensors."""
        raise NotImplementedError

    def product(self, w: np.ndarray, v: np.ndarray, *, as_given: bool) -> tuple[np.ndarray, np.ndarray]:
        return tuple(z.numpy() for z in self.pair(*map(torch.from_numpy, (w, v)), as_given=as_given))

    def normal(self, w: Tensor, v: Tensor) -> Tensor:
        return self.pair(w, v, as_given=False)[1] if self.in_numpy else super(QuickPlan, self).normal(w, v)

    def times(self, v: Tensor) -> Tensor:
        return self.one(v, turned=False)

    def times_back(self, u: Tensor) -> Tensor:
        return self.one(u, turned=True)


@dataclass(frozen=True)
class StreamedPlan(_Passed):
    """The plan of points whose cost is bilinear: every sum is a pass over blocks, and nothing is kept of them.

    Products are those of a copy, where a CPU has one to read that is not too large, and passes elsewhere; in float32 where that
    leaves them enough digits.
    """

    sums: tuple[Tensor, Tensor]
    double: tuple[Tensor, ...]
    is_precise: bool = False

    @classmethod
    def of(cls, problem: Problem, p: Potentials) -> StreamedPlan:
        x, y, own_x, own_y = problem.cost.bilinear_form(number(problem.epsilon))
        u = log_scaling(problem.a, p.f + p.lam.unsqueeze(-1), problem.epsilon)[0] + own_x
        v = log_scaling(problem.b, p.g, problem.epsilon)[0] + own_y
        r, c = bilinear.plan_sums(x, y, u, v, problem.cost.barred)

        def read() -> Iterator[Chunk]:
            blocks = zip(problem.plan_blocks(p), problem.cost.blocks(), strict=True)
            yield from (Chunk(values, cost.dense(), part) for (part, values), (_, cost) in blocks)

        return cls(problem, read, (r[None], c[None]), (x, y, u, v))

    @cached_property
    def form(self) -> tuple[Tensor, ...]:
        """What products are made of."""
        if self.is_precise:
            return self.double
        large = max(float(torch.where(z.isfinite(), z, 0.0).abs().max()) for z in self.double[2:])
        return self.double if large > _RESOLVED else tuple(z.float() for z in self.double)

    @cached_property
    def _kernel(self) -> Any:
        """The plan as compiled passes read it: a copy, or where that is too large made at every pass; or None."""
        cost = self.problem.cost
        shape = cost.shape[-2:]
        if not self.in_numpy:
            return None
        from iotsolve.kernels import gibbs, workspace

        dtype = np.float64 if self.is_precise else np.float32
        if math.prod(shape) * np.dtype(dtype).itemsize <= workspace.STORED:
            copy = _Copy(shape, dtype)
            kernel = gibbs.OfPoints(copy.values, self.double, cost.barred)
            kernel.kept = copy  # for as long
        else:
            kernel = gibbs.Streamed(self.form, cost.barred)
        kernel.absorb(*(np.zeros(size) for size in shape))
        return kernel

    @property
    def exact(self) -> Plan:
        return self.precise

    @property
    def precise(self) -> StreamedPlan:
        """The same plan with products in float64."""
        return self if self.is_precise else replace(self, is_precise=True)

    def one(self, z: Tensor, *, turned: bool) -> Tensor:
        if self._kernel is not None:
            nothing = z.new_zeros(1, len(self.double[int(turned)]))
            return self.pair(*((z, nothing) if turned else (nothing, z)), as_given=True)[int(turned)]
        column = z[0].to(self.form[0].dtype).unsqueeze(-1)
        return products.plan_times(*self.form, column, self.problem.cost.barred, turned=turned)[:, 0].double()[None]

    def pair(self, w: Tensor, v: Tensor, *, as_given: bool) -> tuple[Tensor, Tensor]:
        if self._kernel is not None:
            w, v = (np.ascontiguousarray(z[0].numpy()) for z in (w, v))
            return tuple(torch.from_numpy(z)[None] for z in self._kernel.product(w, v, as_given=as_given))
        given = (z[0].to(self.form[0].dtype) for z in (w, v))
        found = bilinear.plan_product(*self.form, self.problem.cost.barred, *given, as_given=as_given)
        return tuple(z.double()[None] for z in found)

    def spread(self, w: Tensor, rows: Tensor) -> Tensor:
        if self._kernel is not None and (found := self._kernel.spread(w.numpy(), rows.numpy())) is not None:
            return torch.from_numpy(found)
        given = (z[0].to(self.form[0].dtype) for z in (w, rows))
        return bilinear.plan_spread(*self.form, self.problem.cost.barred, *given).double()[None]


_RESOLVED = 200.0  # exponents up to which float32 leaves an entry five digits
_KEPT_DOUBLE, _HELD_DOUBLE = 2**19, 2**22  # entries of plans that are copied in float64, at once and where float32 is not enough


@dataclass(frozen=True)
class ShardedPlan(_Passed):
    """A plan whose rows are on many ranks: every rank has a plan of its own, and what it finds is added to the others'."""

    sums: tuple[Tensor, Tensor]
    mine: StreamedPlan

    @classmethod
    def of(cls, problem: Problem, p: Potentials) -> ShardedPlan:
        cost = problem.cost
        local = Problem.unchecked(cost.local, problem.a[..., cost.own], problem.b, epsilon=problem.epsilon)
        mine = StreamedPlan.of(local, Potentials(p.f[..., cost.own], p.g, p.lam))
        rows = cost.ranks.gather(mine.sums[0][0])[None]

        def read() -> Iterator[Chunk]:
            for chunk in mine.read():
                start = chunk.part.start + cost.own.start
                yield Chunk(chunk.values, chunk.cost, slice(start, start + chunk.values.shape[-2]))

        return cls(problem, read, (rows, cost.ranks.sum(mine.sums[1])), mine)

    @property
    def exact(self) -> Plan:
        return _Spread(self.problem, self.read)

    @property
    def precise(self) -> ShardedPlan:
        return replace(self, mine=self.mine.precise)

    def sum(self, of: Callable[[Chunk], Tensor]) -> Tensor:
        return self.exact.sum(of)

    def _sums(self, of: Callable[[Chunk], Tensor]) -> tuple[Tensor, Tensor]:
        return self.exact._sums(of)

    def one(self, z: Tensor, *, turned: bool) -> Tensor:
        cost = self.problem.cost
        if turned:
            return cost.ranks.sum(self.mine.one(z[..., cost.own], turned=True))
        return cost.ranks.gather(self.mine.one(z, turned=False)[0])[None]

    def pair(self, w: Tensor, v: Tensor, *, as_given: bool) -> tuple[Tensor, Tensor]:
        cost = self.problem.cost
        rows, columns = self.mine.pair(w[..., cost.own], v, as_given=as_given)
        return cost.ranks.gather(rows[0])[None], cost.ranks.sum(columns)

    def normal(self, w: Tensor, v: Tensor) -> Tensor:
        """Of which each rank needs its own rows alone, so that they are not gathered."""
        cost = self.problem.cost
        return cost.ranks.sum(self.mine.pair(w[..., cost.own], v, as_given=False)[1])

    def normal_product(self, w: np.ndarray, v: np.ndarray) -> np.ndarray:
        return self.normal(*map(torch.from_numpy, (w, v))).numpy()

    def spread(self, w: Tensor, rows: Tensor) -> Tensor:
        own = self.problem.cost.own
        return self.problem.cost.ranks.sum(self.mine.spread(w[..., own], rows[..., own]))


@dataclass(frozen=True)
class _Spread(Plan):
    """Chunks that are read by their ranks, in float64."""

    def sum(self, of: Callable[[Chunk], Tensor]) -> Tensor:
        return self.problem.cost.ranks.sum(super().sum(of))

    def _sums(self, of: Callable[[Chunk], Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(self.problem.cost.ranks.sum(x) for x in super()._sums(of))

    def apply(self, values: Tensor, *, axis: int) -> Tensor:
        return self.problem.cost.ranks.sum(super().apply(values, axis=axis))

    def spread(self, w: Tensor, rows: Tensor) -> Tensor:
        return self.problem.cost.ranks.sum(super().spread(w, rows))


def streams(cost: Cost) -> bool:
    """Whether plans of this cost are read block by block, by one process or by many: points, bilinear."""
    return isinstance(cost, Sharded) or (isinstance(cost, Points) and cost.is_bilinear)


def is_quick(cost: Cost) -> bool:
    """Whether :func:`quick_plan` has a plan for this cost whose products are as quick as sweeps: on a CPU."""
    return cost.is_compiled if isinstance(cost, Dense) else streams(cost) and cost.device.type == "cpu"


def quick_plan(problem: Problem, p: Potentials, *, single: bool = False, lazy: bool = False) -> QuickPlan:
    """The plan of potentials in float64, of a flat problem whose cost is quick or streams; the options are a stored plan's."""
    if isinstance(problem.cost, Dense):
        return StoredPlan.of(problem, p, single=single, lazy=lazy)
    return (ShardedPlan if isinstance(problem.cost, Sharded) else StreamedPlan).of(problem, p)


def plan_of(problem: Problem, p: Potentials, exact: Tensor | None = None, *, lazy: bool = False) -> Plan:
    """The plan of potentials, or an exact one, dense or sparse, of a flat problem; ``lazy`` if only its sums are wanted."""
    streamed = streams(problem.cost) and p.f.dtype == torch.float64
    if exact is None and (streamed or (isinstance(problem.cost, Dense) and is_quick(problem.cost))):
        return quick_plan(problem, p, lazy=lazy)
    if exact is None:

        def gibbs() -> Iterator[Chunk]:
            blocks = zip(problem.plan_blocks(p), problem.cost.blocks(), strict=True)
            yield from (Chunk(values, cost.dense(), part) for (part, values), (_, cost) in blocks)

        return Plan(problem, _kept(gibbs) if "cost" in problem.cost.tensors() and not lazy else gibbs)
    if exact.is_sparse:
        exact = exact.coalesce()
        index = tuple(exact.indices())
        arcs = [Arcs(exact.values(), problem.cost.entries(index), slice(None), index)]
        return Plan(problem, lambda: iter(arcs))
    whole = [Chunk(exact, problem.cost.dense(), slice(0, exact.shape[-2]))]
    return Plan(problem, lambda: iter(whole))


def in_batch(plan: Tensor) -> Tensor:
    """A sparse plan as a batch of one; torch's own ways forget that it is sorted."""
    plan = plan.coalesce()
    index = torch.cat([torch.zeros_like(plan.indices()[:1]), plan.indices()])
    return _sorted(index, plan.values(), (1, *plan.shape))


def out_of_batch(plan: Tensor) -> Tensor:
    """The one sparse plan of a batch."""
    plan = plan.coalesce()
    return _sorted(plan.indices()[1:], plan.values(), plan.shape[1:])


def _sorted(index: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.sparse_coo_tensor(index, values, tuple(shape), check_invariants=False, is_coalesced=True)


def _kept(read: Callable[[], Iterator[Chunk]]) -> Callable[[], Iterator[Chunk]]:
    """What is read, once somebody has."""
    chunks: list[Chunk] = []

    def again() -> Iterator[Chunk]:
        chunks.extend(() if chunks else read())
        return iter(chunks)

    return again
