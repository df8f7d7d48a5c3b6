"""What was observed: who goes where, and how many of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from iotsolve.marginals import FIXED, Marginal

__all__ = ["Coupling", "Table", "possible"]


@dataclass(frozen=True, eq=False)
class Table:
    """An observed plan with what belongs to it, per unit of the rows' weights: ``a`` sums to 1, and ``unit`` is what it was.

    ``known`` says of rows and of columns whether their weights were given.
    """

    plan: np.ndarray
    a: np.ndarray
    b: np.ndarray
    allowed: np.ndarray | None
    observations: float | None
    cluster: Clusters | None
    unit: float
    known: tuple[bool, bool] = (False, False)

    def observed(self) -> np.ndarray:
        """The plan."""
        return self.plan

    def possible(self) -> np.ndarray:
        """What the weights alone would make of it: something wherever there can be."""
        product = np.outer(self.a, self.b)
        return product if self.allowed is None else np.where(self.allowed, product, 0.0)

    @property
    def scale(self) -> float:
        """Observations per unit; without their number, one for all."""
        return (1.0 if self.observations is None else self.observations) / float(self.plan.sum())


@dataclass(frozen=True)
class Clusters:
    """Which cells vary together: a number for each cell ``(n, m)``, and the names of the first numbers.

    A name is the same cluster in every table of a panel. A number without a name is its table's own; names are None where none
    has one.
    """

    codes: np.ndarray
    names: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Coupling:
    """An observed coupling, in one of four shapes.

    Args:
        counts: how often a row met a column, shape ``(n, m)``, non-negative; its total is the number of observations.
        plan: the same as shares or flows in any unit, of which nothing can be said about the number of observations; give
            ``observations`` for standard errors.
        pairs: ``(i, j)`` or ``(i, j, weight)``: index of the row, of the column, and how often, 1 by default.
        matched: True where row ``i`` met column ``i``, once each.
        a: weights of the rows in the same unit, if they are not the sums of what was observed: of a population, say. Of a FREE
            side, whose totals are the outcome of choices, all weights are the same by default; the total is that of the data.
        b: weights of the columns, likewise.
        mask: cells that were possible, boolean, shape ``(n, m)``; all by default.
        cluster: labels whose cells vary together: ``"rows"``, ``"columns"``, one label per cell ``(n, m)``, or one per pair. In
            a panel the same label is the same cluster in every table; rows and columns are their table's own.
        observations: their number, if the data do not tell it.

    Raises:
        ValueError: on data of another shape, negative or not finite, without mass, or where the mask has a hole.

    Example:
        >>> Coupling([[3, 1], [1, 3]]).table((2, 2)).plan
        array([[0.375, 0.125],
               [0.125, 0.375]])
    """

    counts: Any = None
    plan: Any = None
    pairs: Any = None
    matched: bool = False
    a: Any = None
    b: Any = None
    mask: Any = None
    cluster: Any = None
    observations: float | None = None

    def __post_init__(self) -> None:
        given = [self.counts is not None, self.plan is not None, self.pairs is not None, bool(self.matched)]
        if sum(given) != 1:
            raise ValueError(
                f"{sum(given)} of counts, plan, pairs and matched were given: an observed coupling is exactly one of them."
            )
        if self.observations is not None and not 0 < self.observations < np.inf:
            raise ValueError(f"observations = {self.observations!r}: must be a positive number of matches.")

    def table(self, shape: tuple[int, int], rows: Marginal = FIXED, columns: Marginal = FIXED) -> Table:
        """The coupling between ``n`` rows and ``m`` columns with these sides, per unit of the rows' weights."""
        n, m = shape
        flows = self._flows(n, m)
        if flows.shape != (n, m):
            raise ValueError(
                f"a coupling of shape {flows.shape} for features of {n} rows and {m} columns: is it transposed, or are these the "
                "features of something else?"
            )
        bad = ~(np.isfinite(flows) & (flows >= 0))
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise ValueError(f"coupling[{i}, {j}] = {flows[i, j]}: must be finite and not negative.")
        total = flows.sum()
        if not 0 < total < np.inf:
            raise ValueError(f"the coupling has total {total}: nothing was observed, or it overflows.")
        allowed = None
        if self.mask is not None:
            allowed = possible(self.mask, (n, m))
            if (flows[~allowed] > 0).any():
                i, j = np.argwhere((flows > 0) & ~allowed)[0]
                raise ValueError(f"coupling[{i}, {j}] = {flows[i, j]} where the mask forbids it. Is the mask inverted?")
            allowed = None if allowed.all() else allowed
        a, b = (
            self._weights(name, given, sums, side)
            for name, given, sums, side in (("a", self.a, flows.sum(1), rows), ("b", self.b, flows.sum(0), columns))
        )
        known = self.a is not None, self.b is not None
        observations = self.observations
        if observations is None and self.plan is None:
            observations = total
        unit = float(a.sum())
        return Table(flows / unit, a / unit, b / unit, allowed, observations, self._labels(n, m), unit, known)

    def _flows(self, n: int, m: int) -> np.ndarray:
        if self.matched:
            if n != m:
                raise ValueError(
                    f"matched=True with {n} rows and {m} columns: couples need as many of the one as of the other."
                )
            return np.eye(n)
        if self.pairs is None:
            try:
                return np.array(self.counts if self.plan is None else self.plan, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"the coupling must be a matrix of numbers. Are there strings in it, or rows of unequal length? ({error})"
                ) from error
        i, j, weight = self._listed(n, m)
        flows = np.zeros((n, m))
        np.add.at(flows, (i, j), weight)
        return flows

    def _listed(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if len(self.pairs) not in (2, 3):
            raise ValueError(f"pairs has {len(self.pairs)} parts: must be (i, j) or (i, j, weight).")
        i, j = (np.asarray(x) for x in self.pairs[:2])
        weight = np.asarray(self.pairs[2], dtype=np.float64) if len(self.pairs) == 3 else np.ones(len(i))
        if not len(i) == len(j) == len(weight) or i.dtype.kind not in "iu" or j.dtype.kind not in "iu":
            raise ValueError("pairs: i, j and weight must have one entry per pair, i and j whole numbers.")
        if len(i) == 0 or min(i.min(), j.min()) < 0 or i.max() >= n or j.max() >= m:
            raise ValueError(
                f"pairs: rows must be from 0 to {n - 1} and columns from 0 to {m - 1}, and there must be one."
            )
        return i, j, weight

    def _weights(self, name: str, given: Any, sums: np.ndarray, side: Marginal) -> np.ndarray:
        size = len(sums)
        if given is None:
            return np.full(size, sums.sum() / size) if side.is_free else sums
        weights = np.asarray(given, dtype=np.float64)
        if weights.shape != (size,) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.sum() > 0:
            raise ValueError(
                f"{name} of shape {weights.shape}: must be {size} finite, non-negative weights, not all 0."
            )
        return weights

    def _labels(self, n: int, m: int) -> Clusters | None:
        if self.cluster is None:
            return None
        if isinstance(self.cluster, str):
            if self.cluster not in ("rows", "columns"):
                raise ValueError(f"cluster = {self.cluster!r}: must be 'rows', 'columns', or labels.")
            own = np.arange(n)[:, None] if self.cluster == "rows" else np.arange(m)[None, :]
            return Clusters(np.broadcast_to(own, (n, m)), None)
        labels = np.asarray(self.cluster)
        if self.pairs is not None and labels.shape == np.shape(self.pairs[0]):
            i, j, _ = self._listed(n, m)
            names, codes = np.unique(labels, return_inverse=True)
            found = np.arange(n * m).reshape(n, m) + len(names)  # a cell that no pair names varies alone
            found[i, j] = codes
            return Clusters(found, names)
        if labels.shape != (n, m):
            raise ValueError(f"cluster of shape {labels.shape}: must be one label per cell {(n, m)}, or one per pair.")
        names, codes = np.unique(labels, return_inverse=True)
        return Clusters(codes.reshape(n, m), names)


def possible(mask: Any, shape: tuple[int, int]) -> np.ndarray:
    """A mask of the cells of a table."""
    allowed = np.asarray(mask, dtype=bool)
    if allowed.shape != shape:
        raise ValueError(f"mask of shape {allowed.shape}: must be {shape}, True where a match is possible.")
    return allowed
