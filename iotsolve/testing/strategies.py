"""Hypothesis strategies for problems that have an answer.

Each builds the answer first: a plan on the allowed arcs, and from its marginals weights that the plan satisfies. What
comes out is small and awkward: empty bins, tied and negative costs, forbidden arcs, repeated rows, tiny and huge units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from iotsolve.marginals import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared, Marginal
from iotsolve.problem import Problem

__all__ = ["costs", "marginals", "points", "problems", "weights"]

_LARGEST = 8
_CURVED = (KL, ChiSquared, L2)
_EITHER = st.booleans()
_LEVELS = st.sampled_from([4, 4000])  # of costs: few tie, and none is so near another that rounding decides


def costs(
    rows: int | None = None, columns: int | None = None, *, lowest: float = -2.0, highest: float = 2.0
) -> st.SearchStrategy[np.ndarray]:
    """Finite costs of shape ``(n, m)``, up to 8 x 8: smooth or with many ties, and sometimes with repeated rows.

    Args:
        rows: number of rows, drawn if not given.
        columns: number of columns, drawn if not given.
        lowest: smallest entry.
        highest: largest entry.
    """

    @st.composite
    def build(draw: st.DrawFn) -> np.ndarray:
        return _cost(draw, rows or draw(_sizes()), columns or draw(_sizes()), lowest, highest)

    return build()


def points(
    rows: int | None = None, columns: int | None = None, *, dimensions: int | None = None
) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Two point clouds of shapes ``(n, d)`` and ``(m, d)``, coordinates in [-1, 1], some points repeated or shared.

    Args:
        rows: number of points of the first cloud, drawn up to 8 if not given.
        columns: number of points of the second.
        dimensions: ``d``, drawn from 1 to 3 if not given.
    """

    @st.composite
    def build(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
        n, m = rows or draw(_sizes()), columns or draw(_sizes())
        d = dimensions or draw(st.integers(1, 3))
        known = draw(_whole(200, n + m, d)) / 100 - 1.0
        if draw(_EITHER):
            known = known[draw(_whole(n + m - 1, n + m))]
        return known[:n], known[n:]

    return build()


def weights(size: int | None = None) -> st.SearchStrategy[np.ndarray]:
    """Weights of shape ``(size,)``: uniform, or uneven with empty bins; the total is positive and rarely 1."""

    @st.composite
    def build(draw: st.DrawFn) -> np.ndarray:
        n = size or draw(_sizes())
        if draw(_EITHER):
            return np.full(n, 1.0 / n)
        drawn = draw(_amounts(n))
        drawn[draw(_index(n))] += 0.5
        return drawn

    return build()


@cache
def marginals() -> st.SearchStrategy[Marginal]:
    """A marginal object, its strength against costs near 1."""
    bounds = st.builds(Between, st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([1.0, 1.1, 2.5, math.inf]))
    plain = [st.just(FIXED), st.just(FREE), st.just(AT_MOST), bounds, st.builds(TV, st.floats(0.05, 5.0))]
    curved = [st.builds(kind, st.floats(0.05, 20.0)) for kind in _CURVED]
    return st.one_of(*plain, *curved)


def problems(
    *,
    rows: Marginal | st.SearchStrategy[Marginal] | None = None,
    columns: Marginal | st.SearchStrategy[Marginal] | None = None,
    exact: bool | None = None,
    mass: bool | None = None,
    shape: Sequence[int] | None = None,
    smallest_epsilon: float = 0.02,
    largest_epsilon: float = 5.0,
    forbidden: bool = True,
    largest_scale: float = 1e6,
) -> st.SearchStrategy[Problem]:
    """Problems without a batch that have an answer, NumPy in float64.

    Args:
        rows: marginal object of the rows, or a strategy for it; any if not given.
        columns: the same for the columns.
        exact: True for ``epsilon = 0`` only, False for ``epsilon > 0`` only.
        mass: True for problems with ``mass`` only, False for problems without.
        shape: ``(n, m)``, drawn up to 8 x 8 if not given.
        smallest_epsilon: least epsilon in ranges of the cost.
        largest_epsilon: greatest epsilon in ranges of the cost.
        forbidden: whether arcs may be forbidden.
        largest_scale: cost, epsilon and rho are multiplied by a power of ten between its inverse and itself.

    Example:
        >>> from hypothesis import given
        >>> @given(problems(rows=FIXED, exact=False))
        ... def test_mine(problem):
        ...     assert problem.epsilon > 0
    """

    @st.composite
    def build(draw: st.DrawFn) -> Problem:
        given = [draw(side) if isinstance(side, st.SearchStrategy) else side for side in (rows, columns)]
        entropic = draw(_EITHER) if exact is None else not exact
        sides = tuple(side or draw(marginals()) for side in given)
        answer = _answer(draw, shape, forbidden)
        with_mass = draw(_EITHER) if mass is None else mass
        epsilon = draw(_epsilons(smallest_epsilon, largest_epsilon)) * (answer.range or 1.0) if entropic else 0.0
        if not with_mass and not _bounding(sides):
            answer = answer.shifted(-answer.cost.min() - epsilon)  # no gain above epsilon: the mass stays small
        if not with_mass and not entropic and not _asks(answer, sides):
            with_mass = mass is None
            assume(with_mass or _bounding(sides))
            answer = answer if with_mass else answer.shifted(-answer.cost[answer.plan > 0].max() - 1.0)
        a, b = (_weights_for(draw, side, r) for side, r in zip(sides, answer.marginals, strict=True))
        unit = draw(_units(largest_scale))
        return Problem(
            unit * answer.cost,
            a,
            b,
            epsilon=unit * epsilon,
            rows=_in_units(sides[0], unit),
            columns=_in_units(sides[1], unit),
            mass=float(answer.plan.sum()) if with_mass else None,
        )

    return build()


@dataclass(frozen=True)
class _Answer:
    """A cost and a plan that it allows."""

    cost: np.ndarray
    plan: np.ndarray

    @property
    def marginals(self) -> tuple[np.ndarray, np.ndarray]:
        return self.plan.sum(1), self.plan.sum(0)

    @property
    def range(self) -> float:
        return float(np.ptp(self.cost[np.isfinite(self.cost)]))

    def shifted(self, amount: float) -> _Answer:
        return _Answer(self.cost + amount, self.plan)


@cache
def _hundredths(lowest: float, highest: float) -> st.SearchStrategy[float]:
    """Numbers that are equal or clearly apart: next to a kink, first-order methods crawl and rounding decides."""
    return st.integers(math.ceil(100 * lowest), math.floor(100 * highest)).map(lambda k: k / 100)


@cache
def _index(size: int) -> st.SearchStrategy[int]:
    return st.integers(0, size - 1)


@cache
def _sizes() -> st.SearchStrategy[int]:
    return st.sampled_from([*range(1, _LARGEST + 1), _LARGEST])


@cache
def _units(largest: float) -> st.SearchStrategy[float]:
    digits = int(math.log10(largest))
    extremes = st.sampled_from([0, digits, -digits])
    return st.one_of(extremes, st.integers(-digits, digits)).map(lambda k: 10.0**k)


@cache
def _epsilons(smallest: float, largest: float) -> st.SearchStrategy[float]:
    return st.one_of(st.just(smallest), st.floats(smallest, largest))


@cache
def _whole(most: int, *shape: int) -> st.SearchStrategy[np.ndarray]:
    """Whole numbers from 0 to ``most`` < 2^16, made of bytes: an array that is drawn in one piece, in a tenth of the time."""
    size, kind = math.prod(shape), np.uint8 if most < 256 else np.uint16
    count = size * np.dtype(kind).itemsize
    return st.binary(min_size=count, max_size=count).map(
        lambda drawn: (np.frombuffer(drawn, kind).astype(np.int64) % (most + 1)).reshape(shape)
    )


@cache
def _amounts(*shape: int) -> st.SearchStrategy[np.ndarray]:
    """Half of them 0, the others .05 to 1 in hundredths."""
    return _whole(255, *shape).map(lambda k: np.where(k < 128, 0.0, (5 + (k - 128) * 95 // 127) / 100))


def _cost(draw: st.DrawFn, n: int, m: int, lowest: float, highest: float) -> np.ndarray:
    levels = draw(_LEVELS)
    cost = lowest + (highest - lowest) * draw(_whole(levels, n, m)) / levels
    return cost[draw(_whole(n - 1, n))] if draw(_EITHER) else cost


def _answer(draw: st.DrawFn, shape: Sequence[int] | None, forbidden: bool) -> _Answer:
    n, m = shape or (draw(_sizes()), draw(_sizes()))
    plan = draw(_amounts(n, m))
    plan[draw(_index(n)), draw(_index(m))] += 0.5
    cost = _cost(draw, n, m, -2.0, 2.0)
    if forbidden and draw(_EITHER):
        cost = np.where((plan == 0) & (draw(_whole(1, n, m)) > 0), np.inf, cost)
    return _Answer(cost, plan)


def _bounding(sides: tuple[Marginal, ...]) -> bool:
    """Whether a side sets a limit to the mass."""
    return any(math.isfinite(float(side.bounds[1])) for side in sides)


def _asks(answer: _Answer, sides: tuple[Marginal, ...]) -> bool:
    """Whether some mass pays without entropy: a side asks for it, or an arc of the plan gains."""
    asked = any(isinstance(side, (TV, *_CURVED)) or float(side.bounds[0]) > 0 for side in sides)
    return asked or float(answer.cost[answer.plan > 0].min()) < 0


def _weights_for(draw: st.DrawFn, side: Marginal, r: np.ndarray) -> np.ndarray:
    """Weights under which the side allows the marginal ``r``."""
    lo, hi = (float(x) for x in side.bounds)
    ratio = draw(_hundredths(max(lo, 0.4), min(hi, 2.5)))
    if lo > 0:
        return r / ratio
    spare = draw(_amounts(len(r)))
    return r / ratio + np.where(r == 0, spare, 0.0)


def _in_units(side: Marginal, unit: float) -> Any:
    return replace(side, rho=side.rho * unit) if hasattr(side, "rho") else side
