"""One Newton step with a price and constraints: a small quadratic program in the coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iotsolve.inverse.features import FeatureMap
from iotsolve.inverse.penalties import L1, Penalty

__all__ = ["Constraints", "quadratic"]


@dataclass(frozen=True, eq=False)
class Constraints:
    """``A theta = r``, and perhaps ``theta >= 0``."""

    matrix: np.ndarray
    right: np.ndarray
    nonnegative: bool

    @classmethod
    def of(
        cls,
        features: FeatureMap,
        nonnegative: bool,
        fixed: Mapping[Any, float] | None,
        equalities: tuple[Any, Any] | None,
    ) -> Constraints:
        names, count = list(features.names), features.count
        matrix, right = np.zeros((0, count)), np.zeros(0)
        for key, value in (fixed or {}).items():
            if key not in names and not (isinstance(key, int | np.integer) and 0 <= key < count):
                raise ValueError(
                    f"fixed coefficient {key!r}: must be one of {', '.join(names[:8])}, ... or its number."
                )
            if not np.isfinite(value):
                raise ValueError(f"fixed coefficient {key!r} = {value!r}: must be finite.")
            row = np.zeros(count)
            row[names.index(key) if key in names else key] = 1.0
            matrix, right = np.vstack([matrix, row]), np.append(right, float(value))
        if equalities is not None:
            more, values = (
                np.atleast_2d(np.asarray(equalities[0], float)),
                np.atleast_1d(np.asarray(equalities[1], float)),
            )
            if more.shape != (len(values), count):
                raise ValueError(
                    f"equalities of shape {more.shape}: must be one row of {count} numbers per right-hand side."
                )
            matrix, right = np.vstack([matrix, more]), np.append(right, values)
        if len(right):
            reachable = matrix @ np.linalg.lstsq(matrix, right, rcond=None)[0]
            if not np.allclose(reachable, right, rtol=1e-9, atol=1e-12):
                raise ValueError("the fixed coefficients and equalities contradict each other.")
            if nonnegative and not _meets_signs(matrix, right):
                raise ValueError(
                    "nonnegative=True, and the fixed coefficients and equalities ask for a negative one. Leave out the one or "
                    "the other."
                )
        return cls(matrix, right, nonnegative)

    def projected(self, theta: np.ndarray) -> np.ndarray:
        """The nearest coefficients that satisfy the equations, then the signs."""
        if len(self.right):
            theta = theta + np.linalg.lstsq(self.matrix, self.right - self.matrix @ theta, rcond=None)[0]
        return np.maximum(theta, 0.0) if self.nonnegative and not len(self.right) else theta

    def free(self, theta: np.ndarray | None = None) -> np.ndarray:
        """An orthonormal basis of the directions that the equations leave, ``(K, k)``, and at these coefficients the signs."""
        matrix = self.matrix
        if self.nonnegative and theta is not None:
            matrix = np.vstack([matrix, np.eye(len(theta))[theta <= 0]])
        if not len(matrix):
            return np.eye(matrix.shape[1])
        values = np.linalg.svd(matrix)
        rank = int((values[1] > 1e-12 * values[1][0]).sum())
        return values[2][rank:].T


def _meets_signs(matrix: np.ndarray, right: np.ndarray) -> bool:
    """Whether ``A theta = r`` has a solution without a negative entry: the residual of non-negative least squares is 0."""
    from scipy.optimize import nnls  # scipy is imported where it is needed

    return nnls(matrix, right)[1] <= 1e-9 * (1 + float(np.linalg.norm(right)))


def quadratic(
    theta: np.ndarray,
    gradient: np.ndarray,
    hessian: np.ndarray,
    price: Penalty | None,
    features: FeatureMap,
    constraints: Constraints,
) -> tuple[np.ndarray, float]:
    """``argmin_x g'(x - theta) + (x - theta)' H (x - theta) / 2 + price(x)`` under the constraints, and how far ``theta`` is
    from satisfying the optimality conditions of the loss, in the unit of the gradient."""
    if price is None and not constraints.nonnegative:
        basis = constraints.free()
        theta = constraints.projected(theta)
        slope = basis.T @ gradient
        step = _solved(basis.T @ hessian @ basis, slope) if basis.shape[1] else slope
        return theta - basis @ step, float(abs(slope).max(initial=0.0))
    # in units in which all features are alike; a price has units of its own
    size = np.sqrt(np.maximum(np.diag(hessian), 1e-300)) if price is None else np.ones(len(theta))
    scaled = replace(constraints, matrix=constraints.matrix / size)
    bent = hessian / np.outer(size, size)
    fresh, multiplier = _split(theta * size, gradient / size, bent, price, features, scaled)
    fresh = fresh / size
    slope = gradient + constraints.matrix.T @ multiplier
    residual = _natural(theta, slope, hessian, price, features, constraints)
    return fresh, residual


def _prox(x: np.ndarray, step: float, price: Penalty | None, features: FeatureMap, nonnegative: bool) -> np.ndarray:
    """Of the price and the signs together; exact where the price is a sum over coefficients."""
    if price is None:
        return np.maximum(x, 0.0)
    if not nonnegative:
        return price.prox(x, step, features)
    if not isinstance(price, L1):
        raise ValueError(f"nonnegative=True with {type(price).__name__}: only L1 and Ridge know signs.")
    return np.maximum(x - price.strength * step, 0.0)


def _natural(
    theta: np.ndarray,
    slope: np.ndarray,
    hessian: np.ndarray,
    price: Penalty | None,
    features: FeatureMap,
    constraints: Constraints,
) -> float:
    step = 1.0 / max(float(np.linalg.eigvalsh(hessian)[-1]), 1e-300)
    there = _prox(theta - step * slope, step, price, features, constraints.nonnegative)
    return float(abs(theta - there).max() / step)


def _solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """By Cholesky after scaling; a matrix that is singular to rounding gives the shortest solution."""
    size = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
    scaled = matrix / np.outer(size, size)
    try:
        factor = np.linalg.cholesky(scaled)
        return np.linalg.solve(factor.T, np.linalg.solve(factor, right / size)) / size
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(scaled, right / size, rcond=1e-13)[0] / size


def _split(
    theta: np.ndarray,
    gradient: np.ndarray,
    hessian: np.ndarray,
    price: Penalty | None,
    features: FeatureMap,
    constraints: Constraints,
) -> tuple[np.ndarray, np.ndarray]:
    """Alternating directions (Boyd et al., 2011) on ``x`` of the quadratic and the equations, ``z`` of the price and signs."""
    count, rows = len(theta), len(constraints.right)
    values = np.linalg.eigvalsh(hessian)
    least = 1e-6 * float(values[-1])
    weight = float(np.sqrt(max(values[0], 1e-4 * values[-1]) * values[-1]))
    system = np.zeros((count + rows, count + rows))
    system[:count, count:], system[count:, :count] = constraints.matrix.T, constraints.matrix
    target = hessian @ theta - gradient
    z, dual = theta.copy(), np.zeros(count)
    inverse = None
    for step in range(_ROUNDS):
        if inverse is None:
            system[:count, :count] = hessian + weight * np.eye(count)
            inverse = np.linalg.pinv(system) if rows else np.linalg.inv(system)
        both = inverse @ np.concatenate([target + weight * (z - dual), constraints.right])
        x, old = both[:count], z
        z = _prox(x + dual, 1 / weight, price, features, constraints.nonnegative)
        dual = dual + x - z
        apart, moved = float(abs(x - z).max()), float(abs(z - old).max())
        size = max(float(abs(z).max()), float(abs(theta).max()), 1e-300)
        if max(apart, moved) <= 1e-14 * size:
            break
        if step % _LOOK == _LOOK - 1 and (polished := _polished(z, theta, gradient, hessian, price, constraints)):
            return polished
        if step % 20 == 19 and step < _ROUNDS // 2 and not 0.1 < apart / max(moved, 1e-300) < 10:
            factor = 2.0 if apart > moved else 0.5
            if weight * factor < least:
                continue
            weight, dual, inverse = weight * factor, dual / factor, None
    polished = _polished(z, theta, gradient, hessian, price, constraints)
    return (z, both[count:]) if polished is None else polished


_ROUNDS, _LOOK = 5000, 100


def _polished(
    z: np.ndarray,
    theta: np.ndarray,
    gradient: np.ndarray,
    hessian: np.ndarray,
    price: Penalty | None,
    constraints: Constraints,
) -> tuple[np.ndarray, np.ndarray] | None:
    """The solution on the support found, if the price is known there to all digits; what has the wrong sign leaves the support,
    and what would pay joins it.
    """
    if not (price is None or isinstance(price, L1)):
        return None
    strength = 0.0 if price is None else price.strength
    limit = strength + 1e-9 * max(strength, float(abs(gradient).max()))
    sign, target = np.sign(z), hessian @ theta - gradient
    for _ in range(_EXCHANGES):
        support = sign != 0
        rows, count = constraints.matrix[:, support], int(support.sum())
        system = np.zeros((count + len(rows),) * 2)
        system[:count, :count] = hessian[np.ix_(support, support)]
        system[:count, count:], system[count:, :count] = rows.T, rows
        right = np.concatenate([target[support] - strength * sign[support], constraints.right])
        both = np.linalg.lstsq(system, right, rcond=1e-14)[0] if system.size else np.zeros(0)
        found, multiplier = np.zeros_like(z), both[count:] if len(rows) else np.zeros(0)
        found[support] = both[:count]
        if (wrong := support & (np.sign(found) != sign)).any():
            sign[wrong] = 0.0
            continue
        slope = gradient + hessian @ (found - theta) + constraints.matrix.T @ multiplier
        rounding = 1e-13 * (abs(gradient) + abs(hessian) @ abs(found - theta))
        off = constraints.matrix @ found - constraints.right
        if (abs(off) > 1e-9 * (1 + abs(constraints.right))).any():
            return None
        if (abs(slope + strength * sign) > limit - strength + rounding)[support].any():
            return None
        pays = np.where(support, 0.0, -slope if constraints.nonnegative else abs(slope))
        if not (pays > limit + rounding).any():
            return found, multiplier
        best = int((pays - rounding).argmax())
        sign[best] = 1.0 if constraints.nonnegative else -np.sign(slope[best])
    return None


_EXCHANGES = 100
