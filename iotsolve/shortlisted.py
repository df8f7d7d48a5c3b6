"""Exact balanced transport of a dense cost by a shortlist of its arcs.

1. Potentials at a moderate epsilon, found loosely on the way down from large ones, say which arcs may matter: those that are
nearly as cheap as their row's cheapest. 2. An optimal plan on these arcs alone: an assignment by augmenting paths where all
weights are equal, else the network simplex. 3. All arcs are priced by the potentials of that plan; those that would have been
cheaper join the list, until there are none. Nothing rests on the shortlist being right: the last step is the proof. Where it
does not pay, because too many arcs are equally cheap or too few remain, it is given up, and None returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Matched", "balanced"]

_FIRST = 0.06  # of the typical cost: the largest epsilon
_SHRINK = 7.0
_WINDOW = 8.0  # epsilons within which arcs are counted
_REACH = 16.0  # epsilons within which they are taken
_ENOUGH = 12.0  # arcs a row, on average, at which epsilon is small enough
_LEVELS = 12
_SPAN = 60.0  # epsilons that costs may span without potentials
_SAMPLE, _TYPICAL = 64, 64  # rows in which they are counted; columns whose median is taken
_MOST = 32  # arcs a row on the list
_MORE = 16  # arcs a row that join it
_PIVOTS = 6  # for every bin
_ROUNDS = 20
_LOOSE, _SWEEPS = 0.03, 32  # marginal error and steps at each epsilon
_DEAR, _DEAREST = 16.0, 1e9  # price of not being transported, in the unit of the list's costs
_LEFT = 1e-13  # of the total, that may stay behind for the rounding of the flows
_ROUNDING = 1e-12  # of a reduced cost, relative to that unit or to the costs


@dataclass
class Matched:
    """An optimal plan as arcs with flow, its potentials, and the steps it took."""

    rows: np.ndarray
    columns: np.ndarray
    flow: np.ndarray
    f: np.ndarray
    g: np.ndarray
    steps: int


def balanced(
    cost: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    low: float,
    high: float,
    max_steps: int,
    *,
    wide: tuple[np.ndarray, np.ndarray] | None = None,
) -> Matched | None:
    """An optimal plan between positive weights of equal totals, None if this is not the way to it.

    Args:
        cost: shape ``(n, m)``, finite or ``+inf``; ``low`` and ``high`` are its least and largest finite entry.
        a: shape ``(n,)``, float64.
        b: shape ``(m,)``.
        max_steps: pivots of the network simplex.
        wide: rows and columns so heavy that all of their arcs may matter, and are on the list.
    """
    f, g, reach = _potentials(cost, a, b, low, high)
    arcs = _Arcs(cost, f, g, reach)
    if wide is not None:
        arcs.widen(*wide)
    if not arcs.covers():
        return None
    equal = len(a) == len(b) and np.ptp(a) == 0 and np.ptp(b) == 0
    engine = _Assignment(arcs, a) if equal else _Simplex(arcs, a, b)
    for _ in range(_ROUNDS):
        if not engine.run(max_steps):
            return None
        total = g + engine.change()
        lowest = arcs.lowest(total)
        excess = engine.held(total) - lowest
        rounding = 2.0**-48 * (abs(lowest) + abs(total).max())
        cheaper = np.flatnonzero(excess > np.maximum(rounding, _ROUNDING * reach))
        if not len(cheaper):
            if engine.insists():
                continue
            found = engine.answer()
            shift = (lowest @ a - total @ b) / (a.sum() + b.sum())
            if max(abs(lowest - shift).max(), abs(total + shift).max()) <= rounding.max():  # of what should be 0
                total = np.zeros_like(total)
                lowest = arcs.lowest(total)
            return None if found is None else Matched(*found, lowest, total, engine.steps)
        engine.extend(cheaper, *arcs.cheapest(cheaper, total, excess[cheaper]))
        if arcs.count > cost.size // 4:
            return None
    return None


def _potentials(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, low: float, high: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Loose entropic potentials ``f, g`` at an epsilon small enough that few arcs matter, and the reach that goes with it."""
    from iotsolve.kernels import gibbs, passes, scaling, sparse, workspace

    n, m = cost.shape
    f, g = np.full(n, low), np.zeros(m)
    sample = np.arange(0, n, max(1, n // _SAMPLE))
    typical, magnitude = _typical(cost[sample])
    if typical <= 2.0**-40 * magnitude:  # all arcs are equally cheap, but for rounding
        f = -passes.highest(cost, g, 1.0, axis=-1)
        return f, -passes.highest(cost, f, 1.0, axis=-2), magnitude or 1.0
    fixed = (1.0, -math.inf, 0.0, 0.0, 0.0)
    rules = scaling.Rules(fixed, fixed, 0.0, 0.0, 0.0)
    lowest, columns, count = np.empty(len(sample)), np.empty((len(sample), m), np.int32), np.empty(len(sample))
    a, b = a / a.sum(), b / b.sum()
    first = epsilon = _FIRST * min(high - low, typical)
    if high - low > _SPAN * epsilon:  # the kernel's exponentials would not span it
        passes.lowest(cost[None], a[None] > 0, b[None] > 0, f[None], g[None])
    before = math.inf
    kept = f, g, _REACH * epsilon
    for _ in range(_LEVELS):
        u, v = f / epsilon, g / epsilon
        settings = _LOOSE, _SWEEPS, 1.0, False
        with workspace.borrow((n, m), np.float32) as array:
            kernel = gibbs.Stored(array, cost, passes.LOG2E / epsilon)
            end, *_ = scaling.relax_alone(kernel, a, b, u, v, 0.0, rules, settings)
        if end == scaling.BROKEN or not (np.isfinite(u).all() and np.isfinite(v).all()):
            break
        f, g = epsilon * u, epsilon * v
        window = np.full(len(sample), _WINDOW * epsilon)
        sparse.shortlist(cost, sample, lowest, g, window, m, columns, count, 0, len(sample))
        kept, mean = (f, g, _REACH * epsilon), float(count.mean())
        if mean <= _ENOUGH or mean > 0.8 * before:
            break
        before = mean if epsilon < first else math.inf  # at first all may be within reach
        epsilon /= min(_SHRINK, max(2.0, mean / (_ENOUGH / 2)))
    return kept


def _typical(cost: np.ndarray) -> tuple[float, float]:
    """Of some rows: the median cost beyond the cheapest of its row and column, the mean where that is 0; the median cost."""
    with np.errstate(invalid="ignore"):
        reduced = cost - cost.min(1, keepdims=True)
        reduced = reduced - reduced.min(0)
    whole, (reduced, cost) = reduced, (x[:, :: max(1, x.shape[1] // _TYPICAL)] for x in (reduced, cost))
    finite = np.isfinite(reduced)
    if not finite.any():
        return 0.0, 0.0
    return float(np.median(reduced[finite]) or whole[np.isfinite(whole)].mean()), float(np.median(abs(cost[finite])))


@dataclass
class _Arcs:
    """The shortlist: row and column of every arc, and its cost less potentials that nearly pay for it."""

    cost: np.ndarray
    f: np.ndarray
    g: np.ndarray
    reach: float
    rows: np.ndarray = field(init=False)
    columns: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        everywhere = np.full(len(self.f), self.reach)
        self.f, self.rows, self.columns = self._listed(np.arange(len(self.f)), self.g, everywhere, _MOST)
        missing = np.flatnonzero(np.bincount(self.columns, minlength=len(self.g)) == 0)
        if len(missing):
            from iotsolve.kernels import sparse

            best = np.empty(len(missing), np.int64)
            sparse.lowest_arcs(self.cost, self.f, missing, best)
            self.rows, self.columns = np.r_[self.rows, best[best >= 0]], np.r_[self.columns, missing[best >= 0]]

    def widen(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """All arcs of some rows and columns join the list."""
        n, m = self.cost.shape
        some = np.unique(np.r_[(rows[:, None] * m + np.arange(m)).ravel(), (np.arange(n)[:, None] * m + columns).ravel()])
        new = some[np.isfinite(self.cost.ravel()[some]) & ~np.isin(some, self.rows * m + self.columns)]
        self.rows, self.columns = np.r_[self.rows, new // m], np.r_[self.columns, new % m]

    @property
    def count(self) -> int:
        return len(self.rows)

    def covers(self) -> bool:
        """Whether every bin has an arc."""
        n, m = self.cost.shape
        reached = np.bincount(self.rows, minlength=n).all() and np.bincount(self.columns, minlength=m).all()
        return bool(reached and np.isfinite(self.f).all())

    def prices(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """``C - f - g`` at some arcs."""
        return self.cost[rows, columns].astype(np.float64) - self.f[rows] - self.g[columns]

    def lowest(self, g: np.ndarray) -> np.ndarray:
        """``min_j C_ij - g_j`` of every row: one pass over the cost."""
        from iotsolve.kernels import passes

        return -passes.highest(self.cost, g, 1.0, axis=-1)

    def cheapest(self, rows: np.ndarray, g: np.ndarray, excess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """More arcs of some rows, by the potentials ``g``, that join the list: at most ``excess`` above the cheapest."""
        _, more_rows, more_columns = self._listed(rows, g, np.minimum(excess, self.reach), _MORE)
        concerned = np.zeros(len(self.f), bool)
        concerned[rows] = True
        old, m = np.flatnonzero(concerned[self.rows]), len(self.g)
        new = ~np.isin(more_rows * m + more_columns, self.rows[old] * m + self.columns[old])
        self.rows, self.columns = np.r_[self.rows, more_rows[new]], np.r_[self.columns, more_columns[new]]
        return more_rows[new], more_columns[new]

    def _listed(
        self, rows: np.ndarray, g: np.ndarray, reach: np.ndarray, most: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        from iotsolve.kernels import sparse
        from iotsolve.kernels.threads import each_piece

        lowest, columns, count = (
            np.empty(len(rows)),
            np.empty((len(rows), most), np.int32),
            np.empty(len(rows), np.int64),
        )
        shared = (self.cost, rows, lowest, g, reach, most, columns, count)  # an entry takes as long as four to read
        each_piece(len(rows), 4 * len(rows) * len(g), lambda k, first, last: sparse.shortlist(*shared, first, last))
        taken = columns[np.arange(most) < count[:, None]].astype(np.int64)
        return lowest, np.repeat(rows, count), taken


class _Assignment:
    """Equal weights: a permutation, its columns' potentials kept from one list to the next."""

    def __init__(self, arcs: _Arcs, a: np.ndarray) -> None:
        n = len(a)
        self.arcs, self.weight, self.v, self.steps = arcs, float(a[0]), np.zeros(n), 0
        self.row_of, self.column_of, self.free, self.dear = np.full(n, -1), np.full(n, -1), np.arange(n), arcs.reach

    def run(self, max_steps: int) -> bool:
        from iotsolve.kernels import sparse

        n, order = len(self.v), np.argsort(self.arcs.rows, kind="stable")
        columns, start = self.arcs.columns[order], np.zeros(n + 1, np.int64)
        np.cumsum(np.bincount(self.arcs.rows, minlength=n), out=start[1:])
        price = self.arcs.prices(self.arcs.rows[order], columns)
        self.steps += len(self.free)
        shared = (self.v, self.row_of, self.column_of, self.free, self.dear, self.arcs.cost.size // 4)
        failed = sparse.assign(start, columns, price, *shared)
        self.dear *= 4.0 if failed > 0 else 1.0
        return failed >= 0 and self.dear < _DEAREST * self.arcs.reach

    def insists(self) -> bool:
        """Nothing to insist on: a row without a match would pay anything."""
        return False

    def change(self) -> np.ndarray:
        return self.v

    def held(self, g: np.ndarray) -> np.ndarray:
        """What every row pays now; infinite if it is not matched."""
        matched = self.column_of >= 0
        paid = np.full(len(g), math.inf)
        columns = self.column_of[matched]
        paid[matched] = self.arcs.cost[np.flatnonzero(matched), columns] - g[columns]
        return paid

    def extend(self, cheaper: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        """Rows that something would be cheaper for are matched anew; the others' potentials remain right."""
        former = self.column_of[cheaper]
        self.row_of[former[former >= 0]], self.column_of[cheaper], self.free = -1, -1, cheaper

    def answer(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = len(self.v)
        return np.arange(n), self.column_of, np.full(n, self.weight)


class _Simplex:
    """Any weights: a tree of arcs, to which the arcs that join the list are appended."""

    def __init__(self, arcs: _Arcs, a: np.ndarray, b: np.ndarray) -> None:
        from iotsolve.kernels import sparse

        self.arcs, self.a, self.b, self.steps = arcs, a, b * (a.sum() / b.sum()), 0
        self.n, self.nodes, self.dear = len(a), len(a) + len(b), _DEAR
        self.unit, paid = arcs.reach, arcs.prices(arcs.rows, arcs.columns)
        self.size = float(abs(arcs.cost[arcs.rows, arcs.columns]).max() + abs(arcs.g).max())
        self.tail = np.r_[np.zeros(self.nodes, np.int64), arcs.rows]
        self.head = np.r_[np.zeros(self.nodes, np.int64), self.n + arcs.columns]
        self.price, self.flow = np.r_[np.zeros(self.nodes), paid / self.unit], np.zeros(len(self.tail))
        self.tree = tuple(np.empty(self.nodes + 1, np.int32) for _ in range(5))
        self.pi = np.empty(self.nodes + 1)
        order = self.nodes + np.argsort(paid, kind="stable")
        lists = (self.tail, self.head, self.price, order, self.dear, self.flow)
        sparse.plant(self.a, self.b, *lists, *self.tree, self.pi)

    @property
    def lists(self) -> tuple[np.ndarray, ...]:
        return self.tail, self.head, self.price, self.flow

    def run(self, max_steps: int) -> bool:
        """False if so many pivots did not do: there are too many ties, or potentials of no use."""
        from iotsolve.kernels import sparse

        limit = min(max_steps, _PIVOTS * self.nodes)
        tolerance = max(_ROUNDING, 2.0**-48 * self.dear, 2.0**-50 * self.size / self.unit)
        taken = sparse.simplex(*self.lists, *self.tree, self.pi, tolerance, limit - self.steps)
        self.steps += taken
        return taken >= 0 and self.steps < limit

    def insists(self) -> bool:
        """Whether something is not transported, and is to be at a higher price."""
        if self.flow[: self.nodes].sum() <= _LEFT * self.a.sum() or self.dear > _DEAREST:
            return False
        from iotsolve.kernels import sparse

        self.dear *= _DEAR
        parent, arc, _, after, _ = self.tree
        sparse.reprice(self.tail, self.price, parent, arc, after, self.pi, self.dear)
        return True

    def change(self) -> np.ndarray:
        return self.unit * self.pi[self.n : self.nodes]

    def held(self, g: np.ndarray) -> np.ndarray:
        return self.arcs.f - self.unit * self.pi[: self.n]

    def extend(self, cheaper: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        self.tail, self.head = np.r_[self.tail, rows], np.r_[self.head, self.n + columns]
        self.price = np.r_[self.price, self.arcs.prices(rows, columns) / self.unit]
        self.flow = np.r_[self.flow, np.zeros(len(rows))]

    def answer(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """None if something is not transported even so: the price for that was too low, or there is no way."""
        from iotsolve.kernels import sparse

        parent, arc, size, *_ = self.tree
        sparse.settle_flows(self.a, self.b, self.tail, self.head, self.flow, parent, arc, size)
        if self.flow[: self.nodes].sum() > _LEFT * self.a.sum():
            return None
        used = self.nodes + np.flatnonzero(self.flow[self.nodes :] > 0)
        return self.tail[used], self.head[used] - self.n, self.flow[used]
