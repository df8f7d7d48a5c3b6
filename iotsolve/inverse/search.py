"""Newton's method on the loss of an inverse problem, which may have a price, constraints, kinks, or no minimum.

Every step is also taken by the potentials, so that the forward problem is nearly solved when it is asked again; a penalty without
derivative turns the step into a small quadratic program. Steps that overshoot are damped (Levenberg, Marquardt). Differs from the
SISTA of Carlier, Dupuy, Galichon and Sun (2023) in that it is of second order throughout.

Where nothing was observed, coefficients may go to infinity (separation): the loss falls for ever along directions that empty
such cells and leave what was observed as it is. They are followed until next to nothing is left there and then left alone, so
that the other coefficients come out as if those cells had been masked (Correia, Guimaraes, Zylkin, 2019). Between kinked sides
the loss is flat or straight in pieces: along a straight one a step has unit length, and is doubled while that pays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from iotsolve.inverse.data import Table
from iotsolve.inverse.directions import beside, faint, joint, orthonormal, weakest
from iotsolve.inverse.features import FeatureMap
from iotsolve.inverse.market import Market, Point
from iotsolve.inverse.penalties import Penalty
from iotsolve.inverse.steps import Constraints, quadratic
from iotsolve.problem import Potentials

if TYPE_CHECKING:
    from iotsolve.inverse.estimator import InverseOT

__all__ = ["End", "Search"]

Effects = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class End:
    """Where a search ended."""

    points: list[Point]
    hessian: np.ndarray
    effects: Effects
    steps: int
    converged: bool
    residual: float
    unseen: np.ndarray
    diverging: np.ndarray


@dataclass(frozen=True, eq=False)
class _Here:
    """Where a search is; ``tolerance`` is that of the forward problems. Derivatives are made when asked for: not of every try."""

    search: Search
    theta: np.ndarray
    points: list[Point]
    tolerance: float

    @cached_property
    def gradient(self) -> np.ndarray:
        return sum(s * p.gradient for s, p in zip(self.search.shares, self.points, strict=True))

    @cached_property
    def _second(self) -> tuple[np.ndarray, Effects]:
        return self.search.hessian(self.points)

    @property
    def hessian(self) -> np.ndarray:
        return self._second[0]

    @property
    def effects(self) -> Effects:
        return self._second[1]

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.hessian).all())

    def starts(self, target: np.ndarray) -> list[Potentials]:
        """Where the potentials would be at other coefficients."""
        return [p.moved(target - self.theta, *own) for p, own in zip(self.points, self.effects, strict=True)]


@dataclass(frozen=True, eq=False)
class _Local:
    """What a step is made by: derivatives in which directions that lead nowhere are made to.

    ``idle`` are those in which there is nowhere to go, ``gone`` those among them in which coefficients have gone so far that what
    they empty is empty, and ``straight``, of unit length, one in which the loss is a straight line here.
    """

    gradient: np.ndarray
    hessian: np.ndarray
    idle: np.ndarray
    gone: np.ndarray
    straight: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Search:
    """Proximal Newton steps on the weighted losses of all markets; ``maps`` are their features as they were given."""

    model: InverseOT
    maps: list[FeatureMap]
    markets: list[Market]
    shares: np.ndarray
    smooth: float
    other: Penalty | None
    constraints: Constraints

    def run(self, theta: np.ndarray) -> End:
        """Search from these coefficients. Some tries, and perhaps the start, lead out of the finite: nobody will believe them."""
        with np.errstate(all="ignore"):
            return self._run(theta)

    def _run(self, theta: np.ndarray) -> End:
        model, here, damping = self.model, self._at(theta, None, _LOOSE), 0.0
        size, converged, residual = self._sizes(here), False, math.inf
        unseen = gone = idle = np.zeros((len(theta), 0))
        if not self._has_kinks and here.is_finite:
            unseen = faint(here.hessian, size, _BLIND, self.constraints.free())
        for steps in range(model.max_steps + 1):
            if not here.is_finite:
                break
            local = self._local(here, size, unseen, gone)
            exact = max(_TIGHT, 0.1 * max(weakest(local.hessian, size), _BLIND))
            if here.tolerance > exact:  # or the errors of the gradient would be steps in what hardly bends the loss
                here = self._at(here.theta, [p.solution.found for p in here.points], exact)
                local = self._local(here, size, unseen, gone)
            idle, gone = local.idle, local.gone
            fresh, residual = self._step(here, local, None)
            step = fresh - here.theta
            decrement = float(np.sqrt(np.maximum(step @ local.hessian @ step, 0.0) / model.epsilon))
            # where what is left of the gradient is what forward problems leave open
            blurred = decrement <= _NEAR and residual <= _TIGHT * math.sqrt(model.epsilon) * float(size.max())
            ended = decrement <= model.tolerance or blurred
            if ended and here.tolerance > _SURE:  # at the start, where nobody has asked for more
                here = self._at(here.theta, [p.solution.found for p in here.points], _TIGHT)
                continue
            converged = ended and all(p.solution.converged for p in here.points)
            if ended or not math.isfinite(decrement) or steps == model.max_steps:
                break
            tolerance = min(_LOOSE, max(_TIGHT, 0.01 * decrement**2))
            found, damping = self._stepped(here, local, fresh, size, tolerance, damping)
            if found is None:
                break
            here = found
        diverging = unseen[:, :0]
        if here.is_finite and not (self.smooth or self.other):
            room = self.constraints.free(here.theta)
            if self._has_kinks:  # which hold other bins than at the start
                unseen = faint(self.hessian(here.points, Table.possible)[0], size, _BLIND, room)
            if self._has_gaps:
                gone = self._gone(here, size, room, max(_FADED, 10 * model.tolerance**2))
                diverging = beside(size, gone, unseen)
            unseen = beside(size, joint(size, unseen, idle), diverging)
        return End(here.points, here.hessian, here.effects, steps, converged, residual, unseen, diverging)

    # -- one step ----------------------------------------------------------------------------------------------------

    def _step(self, here: _Here, local: _Local, damping: np.ndarray | None) -> tuple[np.ndarray, float]:
        bent = local.hessian if damping is None else local.hessian + np.diag(damping)
        return quadratic(here.theta, local.gradient, bent, self.other, self.markets[0].features, self.constraints)

    def _stepped(
        self, here: _Here, local: _Local, fresh: np.ndarray, size: np.ndarray, tolerance: float, damping: float
    ) -> tuple[_Here | None, float]:
        """Where a step leads that is damped as far as need be, and how far that was; None if no step is an improvement."""
        now, weights = self._objective(here), np.diag(local.hessian) + size**2

        def at(target: np.ndarray) -> tuple[_Here, float]:
            there = self._at(target, here.starts(target), tolerance)
            return there, self._objective(there)

        for _ in range(_TRIES):
            if damping:
                fresh, _ = self._step(here, local, damping * weights)
            there, value = at(fresh)
            falls = float(local.gradient @ (fresh - here.theta)) + self._price(fresh) - self._price(here.theta)
            rounding = 1e-12 * (1 + abs(now)) + tolerance**1.5 * sum(abs(p.loss) for p in here.points)  # of a maximum: flat
            if value <= now + 1e-4 * falls + rounding:
                break
            damping = max(10 * damping, _DAMPED)
        else:
            return None, damping
        for _ in range(_TRIES if local.straight is not None else 0):
            target = 2 * there.theta - here.theta
            if self.constraints.nonnegative and (target < 0).any():
                break
            further, less = at(target)
            if not less < value:
                break
            there, value = further, less
        return there, damping / 10 if damping > _DAMPED else 0.0

    # -- what it is made by ------------------------------------------------------------------------------------------

    def _local(self, here: _Here, size: np.ndarray, unseen: np.ndarray, gone: np.ndarray) -> _Local:
        if self.smooth:
            bent = here.hessian + self.smooth * np.eye(len(size))
            return _Local(here.gradient + self.smooth * here.theta, bent, gone, gone, None)
        idle, gone, straight = self._idle(here, size, unseen, gone)
        basis = orthonormal(idle * size[:, None])
        kept = np.eye(len(size)) - (basis / size[:, None]) @ (basis.T * size)
        bent = kept.T @ here.hessian @ kept + (basis * size[:, None]) @ (basis.T * size)  # so that no step leads there
        # where the data say nothing a price or a constraint is to decide; what a price keeps finite need not be felt so well
        bent = bent + (_LITTLE if self.other else _ALMOST_NOTHING) * np.diag(size**2)
        gradient = kept.T @ here.gradient
        gradient = gradient - unseen @ (unseen.T @ gradient)
        if straight is not None:
            bent = bent + abs(straight @ gradient) * np.linalg.norm(straight * size) * np.outer(straight, straight)
        return _Local(gradient, bent, idle, gone, straight)

    def _idle(
        self, here: _Here, size: np.ndarray, unseen: np.ndarray, gone: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Directions with nowhere to go, those among them that have gone far enough, and a straight one: see :class:`_Local`."""
        room = self.constraints.free(here.theta)
        if not self._has_kinks:
            filled = here.hessian + np.mean(size**2) * unseen @ unseen.T
            if gone.shape[1] or (self._has_gaps and not self.other and weakest(filled, size) <= _SUSPECT):
                # longer than it takes: where some of many go, which of them are weak enough changes from step to step
                kept = gone[:, :0] if self.constraints.nonnegative else faint(here.hessian, size, _FADED, gone)
                gone = joint(size, kept, beside(size, self._gone(here, size, room, _FAINT), unseen))
            return gone, gone, None
        flat, straight = faint(here.hessian, size, _BLIND, room), None
        slope = flat @ (flat.T @ here.gradient)
        length = float(np.linalg.norm(slope))
        if length > _SPENT * np.linalg.norm(slope / max(length, 1e-300) * size):
            straight = slope / length
            flat = beside(size, flat, straight[:, None])
        return flat[:, :0] if self.other else flat, gone, straight  # a price may lead where the loss is flat

    def _gone(self, here: _Here, size: np.ndarray, room: np.ndarray, limit: float) -> np.ndarray:
        """Directions that leave what was observed as it is, in which next to nothing else is left, and nothing to gain."""
        if not faint(here.hessian, size, limit, room).shape[1]:
            return room[:, :0]
        still = faint(self.hessian(here.points, Table.observed)[0], size, _BLIND, room)
        found = faint(here.hessian, size, limit, still)
        values, vectors = np.linalg.eigh(found.T @ here.hessian @ found)
        found = found @ vectors
        return found[:, (found.T @ here.gradient) ** 2 <= _GAIN * np.maximum(values, 0.0) * self.model.epsilon]

    @cached_property
    def _has_kinks(self) -> bool:
        return any(side.kinks and not side.is_free for side in (self.model.rows, self.model.columns))

    @cached_property
    def _has_gaps(self) -> bool:
        """Whether something that was possible has not been observed: else no coefficient goes to infinity."""
        return any((market.table.plan == 0).any() for market in self.markets)

    def _sizes(self, here: _Here) -> np.ndarray:
        """Root mean squares of the features over the plans, ``(K,)``; of one that is rounding after it was centred, of its
        rounding, and 1 of one that is 0.
        """

        def squares(maps: list[FeatureMap]) -> np.ndarray:
            each = zip(self.shares, maps, here.points, strict=True)
            return np.diag(sum(s * features.gram(p.plan) for s, features, p in each)) / self.model.epsilon

        own = squares([market.features for market in self.markets])
        own = np.sqrt(np.maximum(own, _CENTRED**2 * squares(self.maps)))
        return np.where(own > 0, own, 1.0)

    # -- the loss ----------------------------------------------------------------------------------------------------

    def _at(self, theta: np.ndarray, starts: list[Potentials] | None, tolerance: float) -> _Here:
        starts = [None] * len(self.markets) if starts is None else starts
        points = [market.at(theta, tolerance, start) for market, start in zip(self.markets, starts, strict=True)]
        return _Here(self, theta, points, tolerance)

    def hessian(
        self, points: list[Point], of: Callable[[Table], np.ndarray] | None = None
    ) -> tuple[np.ndarray, Effects]:
        """The Hessian and the effects it took, of all markets; or what it were of other plans."""
        total, effects = 0.0, []
        for share, point in zip(self.shares, points, strict=True):
            own, *over = point.hessian() if of is None else point.hessian(of(point.market.table))
            total = total + share * own
            effects.append(tuple(over))
        return total, effects

    def _price(self, theta: np.ndarray) -> float:
        return 0.0 if self.other is None else self.other.value(theta, self.markets[0].features)

    def _objective(self, here: _Here) -> float:
        loss = sum(float(s) * p.loss for s, p in zip(self.shares, here.points, strict=True))
        return loss + self.smooth / 2 * float(here.theta @ here.theta) + self._price(here.theta)


_LOOSE, _TIGHT = 1e-3, 1e-12  # tolerances of the forward problem
_SURE = 1e-9  # of the forward problem, above which no plan is a result
_NEAR = 1e-6  # a last step, in standard deviations, from which on rounding may be what is left
_TRIES, _DAMPED = 24, 1e-6  # of one step; least damping, of a coefficient's own curvature
_LITTLE, _ALMOST_NOTHING = 1e-6, 1e-10  # curvature where there is none, of a feature's size
_CENTRED = 1e-7  # of a feature, what is left after the effects of rows and columns and may be rounding
_BLIND = 1e-10  # of a feature's size, what must be left of it for its coefficient to be told
_FAINT, _FADED = 1e-9, 1e-7  # the same of what was not observed: to go no further, and to be said to have no end
_SUSPECT = 1e-6  # the same from which on nobody need look
_GAIN = 1e-5  # of the loss in epsilons, what is nothing to gain
_SPENT = 1e-8  # of a feature's size, a slope that is none
