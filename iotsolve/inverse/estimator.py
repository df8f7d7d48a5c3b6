"""``InverseOT``: the coefficients whose optimal plan has the observed moments.

Newton's method on the loss, every step of which is also taken by the potentials, so that the forward problem is nearly solved
when it is asked again; a penalty without derivative turns the step into a small quadratic program. Differs from the SISTA of
Carlier, Dupuy, Galichon and Sun (2023) in that it is of second order throughout.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from iotsolve.inverse.data import Coupling
from iotsolve.inverse.features import FeatureMap
from iotsolve.inverse.fit import Fit, IdentifiabilityWarning, predicted
from iotsolve.inverse.market import Market, Point, check_totals
from iotsolve.inverse.penalties import Penalty, Ridge
from iotsolve.inverse.steps import Constraints, quadratic
from iotsolve.marginals import FIXED, Marginal

__all__ = ["InverseOT"]


@dataclass(frozen=True, eq=False)
class InverseOT:
    """Estimate the score ``Phi = sum theta_k phi^k`` behind observed couplings, or the cost ``-Phi``, which is the same.

    The loss is the Fenchel-Young loss of the forward problem (:func:`iotsolve.inverse_loss`). Between fixed sides its minimum is
    that of Poisson pseudo-maximum likelihood with effects of rows and columns; with ``columns=FREE``, of conditional logit.

    Args:
        features: what the score is made of, a :class:`FeatureMap`; for a panel a list of them, or one for all.
        epsilon: strength of the entropy. The data tell ``theta / epsilon`` and no more, so that it is a unit: leave it 1.
        rows: marginal object of the rows; the weights are the observed ones unless the coupling has its own.
        columns: marginal object of the columns.
        penalty: :class:`L1`, :class:`Ridge`, :class:`Group`, :class:`Nuclear`; or a pair of a ridge and another one.
        nonnegative: whether coefficients must not be negative.
        fixed: coefficients that are known, by name or number.
        equalities: ``(A, r)``: linear equations ``A theta = r``.
        tolerance: size of the last step, in standard deviations of the score: 1e-9 is far below any standard error.
        max_steps: Newton steps.

    Raises:
        ValueError: when fitted, on features and data that do not belong together.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.standard_normal((20, 1)), rng.standard_normal((30, 1))
        >>> from iotsolve import inverse
        >>> model = InverseOT(inverse.Bilinear(x, y))
        >>> fit = model.fit(Coupling(plan=model.plan([1.5], np.ones(20) / 20, np.ones(30) / 30)))
        >>> round(float(fit.coefficients[0]), 8)
        1.5
    """

    features: FeatureMap | Sequence[FeatureMap]
    epsilon: float = 1.0
    rows: Marginal = FIXED
    columns: Marginal = FIXED
    penalty: Penalty | Sequence[Penalty] | None = None
    nonnegative: bool = False
    fixed: Mapping[Any, float] | None = None
    equalities: tuple[Any, Any] | None = None
    tolerance: float = 1e-9
    max_steps: int = 60

    # -- scikit-learn's conventions ----------------------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def set_params(self, **params: Any) -> InverseOT:
        """The same estimator with other arguments; this one stays as it is."""
        return replace(self, **params)

    # -- the forward problem -----------------------------------------------------------------------------------------

    def plan(self, theta: Any, a: Any, b: Any) -> np.ndarray:
        """The optimal plan at known coefficients, for one coupling's features; what :meth:`fit` takes back apart.

        Weights and plan are in any unit; a problem with a soft side is posed per unit of the rows' weights.
        """
        score = self._maps(1)[0].apply(np.asarray(theta, dtype=np.float64))
        return predicted(self, -score, a, b, unit=float(np.sum(a)))

    # -- the inverse problem -----------------------------------------------------------------------------------------

    def fit(self, data: Coupling | Any, *, start: Any = None) -> Fit:
        """The coefficients that explain the data best.

        Args:
            data: a :class:`Coupling`, a table of counts, or a list of couplings that share the coefficients.
            start: coefficients to start from: a :class:`Fit`, or an array.

        Raises:
            ValueError: on data that are none.

        Returns:
            A :class:`Fit`. Coefficients that the data cannot tell apart get the smallest values that explain them, and an
            :class:`IdentifiabilityWarning` names them.
        """
        couplings = list(data) if isinstance(data, list | tuple) else [data]
        couplings = [x if isinstance(x, Coupling) else Coupling(x) for x in couplings]
        maps = self._maps(len(couplings))
        if not 0 < self.epsilon < math.inf:
            raise ValueError(
                f"epsilon = {self.epsilon!r}: must be positive and finite; for epsilon = 0 see inverse.ExactInverse."
            )
        tables = [coupling.table(features.shape) for coupling, features in zip(couplings, maps, strict=True)]
        for table in tables:
            check_totals(table, self.rows, self.columns)
        sizes = np.array([table.scale for table in tables])
        shares = sizes / sizes.sum()
        absorbing = self.rows.is_fixed and self.columns.is_fixed
        markets = [
            Market(f.centred(t.a, t.b) if absorbing else f, t, self.epsilon, self.rows, self.columns)
            for f, t in zip(maps, tables, strict=True)
        ]
        smooth, other = self._penalties()
        constraints = Constraints.of(maps[0], self.nonnegative, self.fixed, self.equalities)
        theta = np.zeros(maps[0].count) if start is None else _coefficients(start, maps[0])
        search = _Search(self, markets, shares, smooth, other, constraints)
        end = search.run(constraints.projected(theta))
        fit = Fit(self, maps, end.points, shares, end.hessian, end.effects, float(sizes.sum()), end.steps, end.converged,
                  end.residual, end.unseen, end.separated, constraints)  # fmt: skip
        for message in fit.warnings:
            warnings.warn(message, IdentifiabilityWarning, stacklevel=2)
        return fit

    def _maps(self, count: int) -> list[FeatureMap]:
        maps = [self.features] * count if isinstance(self.features, FeatureMap) else list(self.features)
        if len(maps) != count or not all(isinstance(x, FeatureMap) for x in maps):
            raise ValueError(
                f"{len(maps)} feature maps for {count} couplings: give one for all, or one for each, such as Bilinear(X, Y)."
            )
        if len({x.names for x in maps}) > 1:
            raise ValueError(
                "the couplings of a panel share their coefficients: their features must have the same names."
            )
        return maps

    def _penalties(self) -> tuple[float, Penalty | None]:
        given = self.penalty if isinstance(self.penalty, list | tuple) else [self.penalty]
        given = [x for x in given if x is not None]
        if not all(isinstance(x, Penalty) for x in given):
            raise ValueError(
                f"penalty = {self.penalty!r}: must be L1, Ridge, Group or Nuclear, or a pair with a Ridge."
            )
        ridges, others = [x for x in given if isinstance(x, Ridge)], [x for x in given if not isinstance(x, Ridge)]
        if len(others) > 1:
            raise ValueError(f"penalty = {self.penalty!r}: at most one besides a Ridge.")
        return sum(x.strength for x in ridges), others[0] if others else None


@dataclass(frozen=True, eq=False)
class _End:
    """Where a search ended."""

    points: list[Point]
    hessian: np.ndarray
    effects: list[tuple[np.ndarray, np.ndarray]]
    steps: int
    converged: bool
    residual: float
    unseen: np.ndarray
    separated: bool


@dataclass(frozen=True, eq=False)
class _Search:
    """Proximal Newton steps on the weighted losses of all markets."""

    model: InverseOT
    markets: list[Market]
    shares: np.ndarray
    smooth: float
    other: Penalty | None
    constraints: Constraints

    def run(self, theta: np.ndarray) -> _End:
        features, eps = self.markets[0].features, self.model.epsilon
        points = self._at(theta, None, _LOOSE)
        unseen, decrement, converged, residual = None, math.inf, False, math.inf
        for steps in range(self.model.max_steps + 1):
            hessian, effects = self._hessian(points)
            if unseen is None:
                unseen = self._unseen(points, hessian)
            gradient = sum(s * p.gradient for s, p in zip(self.shares, points, strict=True))
            if self.smooth:
                gradient, bent = gradient + self.smooth * theta, hessian + self.smooth * np.eye(len(theta))
            else:
                bent = hessian + _beyond(hessian) * unseen @ unseen.T
                gradient = gradient - unseen @ (unseen.T @ gradient)
            fresh, residual = quadratic(theta, gradient, bent, self.other, features, self.constraints)
            step = fresh - theta
            decrement = math.sqrt(max(0.0, float(step @ bent @ step)) / eps)
            if decrement <= self.model.tolerance or steps == self.model.max_steps:
                converged = decrement <= self.model.tolerance and all(p.solution.converged for p in points)
                break
            now, length = self._objective(theta, points), 1.0
            falls = float(gradient @ step) + self._price(fresh) - self._price(theta)
            tolerance = min(_LOOSE, max(_TIGHT, 0.01 * decrement**2))
            for _ in range(_TRIES):
                target = theta + length * step
                starts = [p.moved(length * step, *effect) for p, effect in zip(points, effects, strict=True)]
                there = self._at(target, starts, tolerance)
                rounding = 1e-12 * (1 + abs(now)) + tolerance * sum(abs(p.loss) for p in there)
                if self._objective(target, there) <= now + 1e-4 * length * falls + rounding:
                    break
                length /= 2
            theta, points = target, there
        separated = not self.smooth and self.other is None and _fades(points, effects, hessian, unseen, steps)
        return _End(points, hessian, effects, steps, converged, residual, unseen, separated)

    def _at(self, theta: np.ndarray, starts: list[Any] | None, tolerance: float) -> list[Point]:
        starts = [None] * len(self.markets) if starts is None else starts
        return [market.at(theta, tolerance, start) for market, start in zip(self.markets, starts, strict=True)]

    def _hessian(self, points: list[Point]) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        total, effects = 0.0, []
        for share, point in zip(self.shares, points, strict=True):
            own, over_rows, over_columns = point.hessian()
            total = total + share * own
            effects.append((over_rows, over_columns))
        return total, effects

    def _price(self, theta: np.ndarray) -> float:
        return 0.0 if self.other is None else self.other.value(theta, self.markets[0].features)

    def _objective(self, theta: np.ndarray, points: list[Point]) -> float:
        loss = sum(float(s) * p.loss for s, p in zip(self.shares, points, strict=True))
        return loss + self.smooth / 2 * float(theta @ theta) + self._price(theta)

    def _unseen(self, points: list[Point], hessian: np.ndarray) -> np.ndarray:
        """An orthonormal basis of the directions in which the loss is constant, ``(K, k)``."""
        raw = (
            sum(s * p.market.features.gram(p.plan) for s, p in zip(self.shares, points, strict=True))
            / self.model.epsilon
        )
        size = np.sqrt(np.diag(raw))
        scale = np.where(size > 0, size, 1.0)
        values, vectors = np.linalg.eigh(hessian / np.outer(scale, scale))
        found = vectors[:, values <= _BLIND * max(float(values[-1]), 1.0)] / scale[:, None]
        return np.linalg.qr(found)[0]


_LOOSE, _TIGHT = 1e-3, 1e-12  # tolerances of the forward problem
_TRIES = 12
_BLIND = 1e-10  # of a feature's size, what must be left of it for its coefficient to be told


def _beyond(hessian: np.ndarray) -> float:
    return max(float(np.trace(hessian)) / len(hessian), 1e-300)


def _fades(
    points: list[Point],
    effects: list[tuple[np.ndarray, np.ndarray]],
    hessian: np.ndarray,
    unseen: np.ndarray,
    steps: int,
) -> bool:
    """Whether the coefficients were on their way to infinity: cells that carry nothing are fitted ever better by them."""
    if unseen.shape[1] == len(hessian) or not any((p.market.table.plan[p.plan > 0] == 0).any() for p in points):
        return False
    seen = np.eye(len(hessian)) - unseen @ unseen.T
    size = np.sqrt(np.maximum(np.diag(hessian), 1e-300))
    values, vectors = np.linalg.eigh(hessian / np.outer(size, size))
    weakest = seen @ (vectors[:, unseen.shape[1]] / size)
    if steps < _LONG and values[unseen.shape[1]] > 1e-6:
        return False
    # in the weakest direction, what remains of the score lies where nothing was observed
    mass = 0.0
    for point, (over_rows, over_columns) in zip(points, effects, strict=True):
        left = point.market.features.apply(weakest) + (over_rows @ weakest)[:, None] + over_columns @ weakest
        weight = point.plan * left**2
        mass = max(mass, float(weight[point.market.table.plan > 0].sum() / max(weight.sum(), 1e-300)))
    return steps >= _LONG or mass < 0.999


_LONG = 25  # Newton steps


def _coefficients(start: Any, features: FeatureMap) -> np.ndarray:
    theta = np.array(getattr(start, "coefficients", start), dtype=np.float64).reshape(-1)
    if theta.shape != (features.count,):
        raise ValueError(f"start has {theta.size} coefficients, the features have {features.count}.")
    return theta
