"""What is known of coefficients beforehand: that few of them matter, that they are small, or a matrix of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iotsolve.inverse.features import FeatureMap

__all__ = ["L1", "Group", "Nuclear", "Penalty", "Ridge"]


@dataclass(frozen=True)
class Penalty:
    """A convex price of coefficients, added to the loss: ``strength`` times a norm.

    Args:
        strength: in units of the loss per unit of the coefficient; positive.

    Raises:
        ValueError: if it is not positive and finite.
    """

    strength: float

    def __post_init__(self) -> None:
        if not 0 < self.strength < np.inf:
            raise ValueError(f"{type(self).__name__}({self.strength!r}): strength must be positive and finite.")

    def value(self, theta: np.ndarray, features: FeatureMap) -> float:
        """The price."""
        raise NotImplementedError

    def prox(self, theta: np.ndarray, step: float, features: FeatureMap) -> np.ndarray:
        """``argmin_x value(x) + |x - theta|^2 / (2 step)``."""
        raise NotImplementedError

    def largest(self, gradient: np.ndarray, features: FeatureMap) -> float:
        """The strength from which on all coefficients are 0, given the gradient of the loss there: the dual norm."""
        raise NotImplementedError


@dataclass(frozen=True)
class L1(Penalty):
    """``strength * sum |theta_k|``: few coefficients other than 0 (Carlier, Dupuy, Galichon, Sun, SIAM J. Optim. 2023)."""

    def value(self, theta: np.ndarray, features: FeatureMap) -> float:
        return self.strength * float(abs(theta).sum())

    def prox(self, theta: np.ndarray, step: float, features: FeatureMap) -> np.ndarray:
        return np.sign(theta) * np.maximum(abs(theta) - self.strength * step, 0.0)

    def largest(self, gradient: np.ndarray, features: FeatureMap) -> float:
        return float(abs(gradient).max())


@dataclass(frozen=True)
class Ridge(Penalty):
    """``strength / 2 * sum theta_k^2``: small coefficients; finite ones where the data would send them to infinity."""

    def value(self, theta: np.ndarray, features: FeatureMap) -> float:
        return self.strength / 2 * float(theta @ theta)

    def largest(self, gradient: np.ndarray, features: FeatureMap) -> float:
        return np.inf


@dataclass(frozen=True)
class Group(Penalty):
    """``strength * sum_g sqrt(|g|) |theta_g|``: groups of coefficients come and go together (Yuan and Lin, JRSS B 2006).

    Args:
        strength: as above.
        groups: one label per coefficient.
    """

    groups: Sequence[int | str] = ()

    def _parts(self, features: FeatureMap) -> list[np.ndarray]:
        labels = np.asarray(self.groups)
        if labels.shape != (features.count,):
            raise ValueError(
                f"groups of shape {labels.shape}: must be one label for each of {features.count} coefficients."
            )
        return [np.flatnonzero(labels == label) for label in dict.fromkeys(labels.tolist())]

    def value(self, theta: np.ndarray, features: FeatureMap) -> float:
        return self.strength * sum(len(g) ** 0.5 * float(np.linalg.norm(theta[g])) for g in self._parts(features))

    def prox(self, theta: np.ndarray, step: float, features: FeatureMap) -> np.ndarray:
        found = np.zeros_like(theta)
        for g in self._parts(features):
            size, limit = np.linalg.norm(theta[g]), self.strength * step * len(g) ** 0.5
            found[g] = theta[g] * (1 - limit / size) if size > limit else 0.0
        return found

    def largest(self, gradient: np.ndarray, features: FeatureMap) -> float:
        return max(float(np.linalg.norm(gradient[g])) / len(g) ** 0.5 for g in self._parts(features))


@dataclass(frozen=True)
class Nuclear(Penalty):
    """``strength`` times the sum of singular values of the affinity matrix: few dimensions (Dupuy, Galichon, Sun, 2019).

    For features whose coefficients are a full matrix: ``Bilinear``, ``FreeCost``.
    """

    def _matrix(self, theta: np.ndarray, features: FeatureMap) -> np.ndarray:
        matrix = features.gains(theta)
        if matrix is None or matrix.size != theta.size:
            raise ValueError(
                f"Nuclear with {type(features).__name__}: its coefficients are no matrix. It is for Bilinear and FreeCost."
            )
        return matrix

    def value(self, theta: np.ndarray, features: FeatureMap) -> float:
        return self.strength * float(np.linalg.svd(self._matrix(theta, features), compute_uv=False).sum())

    def prox(self, theta: np.ndarray, step: float, features: FeatureMap) -> np.ndarray:
        u, s, v = np.linalg.svd(self._matrix(theta, features), full_matrices=False)
        return ((u * np.maximum(s - self.strength * step, 0.0)) @ v).ravel()

    def largest(self, gradient: np.ndarray, features: FeatureMap) -> float:
        return float(np.linalg.svd(self._matrix(gradient, features), compute_uv=False)[0])
