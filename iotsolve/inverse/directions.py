"""Spaces of coefficients: directions in which a loss has no curvature, what two of them span, what one has beside another.

A basis has shape ``(K, k)`` and is orthonormal. Spaces are compared where every coefficient counts by its feature's ``size``,
``(K,)``, so that units do not matter.
"""

from __future__ import annotations

import numpy as np

__all__ = ["beside", "faint", "joint", "orthonormal", "weakest"]


def faint(hessian: np.ndarray, size: np.ndarray, limit: float, within: np.ndarray) -> np.ndarray:
    """Directions in a space in which there is no curvature but for ``limit``, relative to the whole."""
    scaled = hessian / np.outer(size, size)
    basis = orthonormal(within * size[:, None])
    values, vectors = np.linalg.eigh(basis.T @ scaled @ basis)
    top = max(float(np.trace(scaled)), 1.0)  # no less than the largest, and a few times that at most
    return orthonormal(basis @ vectors[:, values <= limit * top] / size[:, None])


def weakest(hessian: np.ndarray, size: np.ndarray) -> float:
    """About the least curvature there is: what errors of a gradient are divided by; 0 if there is none."""
    try:
        return float(np.diag(np.linalg.cholesky(hessian / np.outer(size, size))).min()) ** 2
    except np.linalg.LinAlgError:
        return 0.0


def orthonormal(space: np.ndarray) -> np.ndarray:
    """A basis of linearly independent directions."""
    return np.linalg.qr(space)[0]


def joint(size: np.ndarray, *spaces: np.ndarray) -> np.ndarray:
    """What these span."""
    return _spanned(np.hstack([orthonormal(x * size[:, None]) for x in spaces]), size)


def beside(size: np.ndarray, space: np.ndarray, part: np.ndarray) -> np.ndarray:
    """What a space has beside a part of it."""
    space, part = (orthonormal(x * size[:, None]) for x in (space, part))
    return _spanned(space - part @ (part.T @ space), size)


def _spanned(scaled: np.ndarray, size: np.ndarray) -> np.ndarray:
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    basis = u[:, s > 0.1]
    basis[np.linalg.norm(basis, axis=1) < _ROUNDING] = 0.0
    return orthonormal(basis / size[:, None])


_ROUNDING = 1e-6  # of a direction, what a coefficient that has no part in it may seem to have
