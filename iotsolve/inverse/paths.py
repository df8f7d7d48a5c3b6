"""Fits along a path of penalties, and which of them predicts best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iotsolve.inverse.data import Coupling
from iotsolve.inverse.estimator import InverseOT
from iotsolve.inverse.fit import Fit
from iotsolve.inverse.market import Market
from iotsolve.progress import bar

__all__ = ["Path", "largest_strength", "path"]


@dataclass(frozen=True, eq=False)
class Path:
    """Fits from the strongest penalty to the weakest.

    Args:
        strengths: falling, shape ``(L,)``.
        fits: one for each.
        scores: mean log-likelihood of held-out observations, shape ``(L, folds)``; None without cross-validation.
    """

    strengths: np.ndarray
    fits: list[Fit]
    scores: np.ndarray | None

    @property
    def coefficients(self) -> np.ndarray:
        """Shape ``(L, K)``."""
        return np.stack([fit.coefficients for fit in self.fits])

    @property
    def best(self) -> Fit:
        """The fit that predicts held-out observations best."""
        if self.scores is None:
            raise ValueError("which fit is best is told by held-out observations: path(..., folds=5).")
        return self.fits[int(self.scores.mean(1).argmax())]


def largest_strength(model: InverseOT, data: Coupling | Any) -> float:
    """The strength from which on the penalty leaves nothing: the dual norm of the gradient at coefficients 0.

    There the plan is that of the weights alone, so that nothing is solved for between fixed sides.
    """
    _, penalty = model._penalties()
    if penalty is None:
        raise ValueError("a path needs a penalty that can leave nothing: L1, Group or Nuclear.")
    coupling = data if isinstance(data, Coupling) else Coupling(data)
    features = model._maps(1)[0]
    market = Market(features, coupling.table(features.shape, model.rows, model.columns), model.epsilon, model.rows, model.columns)
    return penalty.largest(market.at(np.zeros(features.count), 1e-12).gradient, features)


def path(
    model: InverseOT,
    data: Coupling | Any,
    *,
    strengths: Sequence[float] | None = None,
    count: int = 50,
    ratio: float = 1e-3,
    folds: int = 0,
    seed: int = 0,
) -> Path:
    """Fit a model at many strengths of its penalty, each from the one before; on a terminal a bar shows how far it is.

    Args:
        model: with a penalty, whose own strength does not matter.
        data: a coupling, or a table of counts.
        strengths: to fit at; by default ``count`` of them on a logarithmic scale from the one that leaves nothing to ``ratio``
            times that.
        count: how many.
        ratio: least strength over the largest.
        folds: parts into which the observations are dealt at random, each held out once; 0 for none. Needs whole counts.
        seed: of the dealing.

    Raises:
        ValueError: without a penalty that can leave nothing, or on folds of data that are no counts.
    """
    coupling = data if isinstance(data, Coupling) else Coupling(data)
    largest = largest_strength(model, coupling)
    if strengths is None:
        strengths = largest * np.geomspace(1.0, ratio, count)
    strengths = np.sort(np.asarray(strengths, dtype=np.float64))[::-1]
    dealt = _dealt(coupling, model, folds, seed) if folds else []
    with bar("path", (1 + len(dealt)) * len(strengths)) as advance:
        fits = _along(model, coupling, strengths, advance)
        held_out = [[fit.score(held) for fit in _along(model, kept, strengths, advance)] for kept, held in dealt]
    return Path(strengths, fits, np.array(held_out).T if folds else None)


def _along(model: InverseOT, coupling: Coupling, strengths: np.ndarray, advance: Callable[[str], None]) -> list[Fit]:
    fits, start = [], None
    for strength in strengths:
        fits.append(_at(model, float(strength)).fit(coupling, start=start))
        start = fits[-1]
        advance(f"{int((start.coefficients != 0).sum())} coefficients")
    return fits


def _at(model: InverseOT, strength: float) -> InverseOT:
    smooth, penalty = model._penalties()
    given = replace(penalty, strength=strength)
    if not smooth:
        return replace(model, penalty=given)
    others = [x for x in model.penalty if not isinstance(x, type(penalty))]
    return replace(model, penalty=(*others, given))


def _dealt(coupling: Coupling, model: InverseOT, folds: int, seed: int) -> list[tuple[Coupling, Coupling]]:
    """Observations dealt into folds, as pairs of what is kept and what is held out, each with its share of known weights."""
    if folds < 2:
        raise ValueError(f"folds = {folds}: must be at least 2, or 0 for none.")
    table = coupling.table(model._maps(1)[0].shape, model.rows, model.columns)
    counts = table.plan * (table.observations or 0.0)
    whole = np.rint(counts).astype(np.int64)
    if table.observations is None or not np.allclose(counts, whole, atol=1e-6) or whole.sum() < folds:
        raise ValueError("folds deal single observations: the coupling must be whole counts, pairs or couples.")
    rng = np.random.default_rng(seed)
    left, parts = whole.copy(), []
    for k in range(folds, 1, -1):
        part = rng.binomial(left, 1 / k)
        parts.append(part)
        left = left - part
    parts.append(left)

    def dealt(part: np.ndarray) -> Coupling:
        share = part.sum() / whole.sum()
        known = {
            name: share * np.asarray(weights, dtype=np.float64)
            for name, weights, side in (("a", coupling.a, model.rows), ("b", coupling.b, model.columns))
            if weights is not None and not side.is_fixed
        }
        return Coupling(part, mask=table.allowed, **known)

    return [(dealt(whole - part), dealt(part)) for part in parts]
