"""Bounds, total variation and ``mass`` as balanced problems with one more bin a side, the outside.

What leaves a bin of the rows unfilled goes to the columns' outside, at its price; what lies beyond the bins of a side comes from
there by the cheapest arc. Between the outsides mass is free, or with ``mass``, which fixes how much stays there, forbidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iotsolve.marginals import Marginal, number
from iotsolve.problem import Problem

__all__ = ["Answers", "with_outsides"]

_DUST = 1e-12  # share of the mass on arcs that are forbidden, which is rounding


@dataclass(frozen=True)
class Answers:
    """What is known of the problems of a batch: plans, potentials, steps, of which it is known, and of which proved."""

    plan: np.ndarray
    f: np.ndarray
    g: np.ndarray
    lam: np.ndarray
    steps: np.ndarray
    known: np.ndarray
    proved: np.ndarray


@dataclass(frozen=True)
class _Bins:
    """One side as bins that are filled or left, in layers of one for every weight: what must be, and what may be.

    Attributes:
        caps: how much each holds, shape ``(batch, layers, n)``.
        added: what a unit in it pays beside its arc, of the same shape.
        left: what a unit not in it pays; inf where it must be filled.
        beyond: what a unit pays beyond all bins of the side; inf where there is no such unit.
    """

    caps: np.ndarray
    added: np.ndarray
    left: np.ndarray
    beyond: float

    @classmethod
    def over(cls, side: Marginal, weights: np.ndarray) -> _Bins:
        base, pieces = side.pieces(weights)
        left, beyond, layers = np.full(weights.shape, math.inf), math.inf, []
        for piece in pieces:
            if piece.sign < 0:
                left = np.minimum(left, piece.price)
            elif np.isinf(piece.cap).all():
                beyond = min(beyond, float(piece.price.min()))
            else:
                layers.append((piece.cap, piece.price, 0.0 * base))
        layers = [layer for layer in ((base, 0.0 * base, left), *layers) if layer[0].any()]
        caps, added, left = (np.stack(x, 1) for x in zip(*(layers or [(base, 0.0 * base, left)]), strict=True))
        return cls(caps, added, left, beyond)

    def flat(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1)

    def fold(self, potentials: np.ndarray) -> np.ndarray:
        """The potentials of the weights, by those of the bins that hold anything; ``-inf`` where none does."""
        by_layer = potentials.reshape(self.caps.shape) - self.added
        return np.where(self.caps > 0, by_layer, -math.inf).max(1)

    def priced(self, f: np.ndarray, weights: np.ndarray, r: np.ndarray) -> np.ndarray:
        """Potentials, exactly the price where a marginal is not what is asked for, which the simplex has but for rounding."""
        must = self.left > 0
        asked, room = np.where(must, self.caps, 0.0).sum(1), self.caps.sum(1)
        price = np.where(must & (self.caps > 0), self.left, 0.0).max(1)
        dust = _DUST * r.sum(-1, keepdims=True)
        f = np.where((r < asked - dust) & np.isfinite(price), price, f)
        return np.where((r > room + dust) & (weights > 0), -self.beyond, f)


_Balanced = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, ...]]


def with_outsides(problem: Problem, cost: np.ndarray, a: np.ndarray, b: np.ndarray, balanced: _Balanced) -> Answers | None:
    """Solve a flat batch whose sides are bounds or total variation; None if its mass is not one that this fixes.

    Args:
        problem: whose sides and mass are meant.
        cost: shape ``(batch, n, m)``, float64.
        a: shape ``(batch, n)``.
        b: shape ``(batch, m)``.
        balanced: given costs, supplies and demands, the last bins of which are the outsides, flows, potentials of rows and of
            columns, steps, which are known and which are proved.
    """
    rows, columns = _Bins.over(problem.rows, a), _Bins.over(problem.columns, b)
    if problem.mass is not None and min(rows.beyond, columns.beyond) < math.inf:
        return None  # what lies beyond is no part of a fixed total
    count, (n, m) = len(a), cost.shape[1:]
    down, across = rows.caps.shape[1], columns.caps.shape[1]
    used = np.where((a > 0)[:, :, None] & (b > 0)[:, None, :], cost, math.inf)
    column, row = used.argmin(2), used.argmin(1)  # the nearest
    out = columns.beyond + rows.added + used.min(2)[:, None], rows.left
    into = rows.beyond + columns.added + used.min(1)[:, None], columns.left
    del used  # no copies of the cost are held while others work
    whole = np.zeros((count, down * n + 1, across * m + 1))
    prices = rows.added[:, :, :, None, None] + columns.added[:, None, None]
    whole[:, :-1, :-1] = (cost[:, None, :, None, :] + prices).reshape(count, down * n, across * m)
    whole[:, :-1, -1], whole[:, -1, :-1] = (rows.flat(np.minimum(*x)) for x in (out, into))
    whole[:, -1, -1] = 0.0 if problem.mass is None else math.inf
    stays = 0.0 if problem.mass is None else number(problem.mass)
    supply, demand = (
        np.c_[x.flat(x.caps), np.maximum(y.caps.sum((1, 2)) - stays, 0.0)] for x, y in ((rows, columns), (columns, rows))
    )
    flow, u, v, steps, known, proved = balanced(whole, supply, demand)
    barred = np.where(np.isinf(whole), flow, 0.0).sum((1, 2))
    known = known & (barred <= _DUST * supply.sum(1))
    _complete(whole, u, v, supply, demand)
    plan = flow[:, :-1, :-1].reshape(count, down, n, across, m).sum((1, 3))
    each = np.arange(count)[:, None]
    for part, (through, aside), at in (
        (flow[:, :-1, -1].reshape(rows.caps.shape), out, (each, np.arange(n), column)),
        (flow[:, -1, :-1].reshape(columns.caps.shape), into, (each, row, np.arange(m))),
    ):
        np.add.at(plan, at, np.where(through < aside, part, 0.0).sum(1))
    f, g = rows.fold(u[:, :-1]), columns.fold(v[:, :-1])
    f, g = np.where(np.isfinite(f), f + v[:, -1:], 0.0), np.where(np.isfinite(g), g + u[:, -1:], 0.0)
    f, g = rows.priced(f, a, plan.sum(2)), columns.priced(g, b, plan.sum(1))
    lam = np.zeros(count) if problem.mass is None else -(u[:, -1] + v[:, -1])
    return Answers(plan, f, g, lam, steps, known, proved)


def _complete(whole: np.ndarray, u: np.ndarray, v: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> None:
    """Potentials of outsides that are empty, which have none of the simplex's."""
    ceiling = np.where((supply > 0) & np.isfinite(whole[:, :, -1]), whole[:, :, -1] - u, 0.0).min(1)
    v[:, -1] = np.where(demand[:, -1] > 0, v[:, -1], np.minimum(ceiling, 0.0))
    counts = demand > 0
    counts[:, -1] = True
    ceiling = np.where(counts & np.isfinite(whole[:, -1]), whole[:, -1] - v, 0.0).min(1)
    u[:, -1] = np.where(supply[:, -1] > 0, u[:, -1], np.minimum(ceiling, 0.0))
