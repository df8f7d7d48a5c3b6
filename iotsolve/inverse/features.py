"""What a score is made of: ``Phi = sum_k theta_k phi^k``, as operators that never hold all features of all pairs.

A feature map gives its block of rows, ``(rows, m, K)``; everything else follows by streaming. Where there is structure, products
of matrices take the place of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

__all__ = ["Bilinear", "FeatureMap", "Features", "FreeCost", "GraphPath", "Mahalanobis", "Symmetric", "Toeplitz"]

_BLOCK = 2**21  # numbers that a block of features may have


class FeatureMap:
    """Base of all features: subclasses give :attr:`shape`, :attr:`names` and :meth:`block`, and may do better than streaming."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, m)``: rows and columns it describes."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """One name per coefficient."""
        raise NotImplementedError

    def block(self, rows: slice) -> np.ndarray:
        """Features of some rows with every column, shape ``(rows, m, K)``."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """Number of coefficients, ``K``."""
        return len(self.names)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows, some at a time."""
        n, m = self.shape
        step = max(1, _BLOCK // max(1, m * self.count))
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            yield rows, self.block(rows)

    def apply(self, theta: np.ndarray) -> np.ndarray:
        """``Phi = sum_k theta_k phi^k``, shape ``(n, m)``."""
        found = np.empty(self.shape)
        for rows, block in self.blocks():
            found[rows] = block @ theta
        return found

    def sums(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``sum_j W_ij phi_ij`` and ``sum_i W_ij phi_ij``, shapes ``(n, K)`` and ``(m, K)``, of weights ``(n, m)``."""
        n, m = self.shape
        over_columns, over_rows = np.empty((n, self.count)), np.zeros((m, self.count))
        for rows, block in self.blocks():
            weighted = weights[rows, :, None] * block
            over_columns[rows] = weighted.sum(1)
            over_rows += weighted.sum(0)
        return over_columns, over_rows

    def adjoint(self, weights: np.ndarray) -> np.ndarray:
        """``sum_ij W_ij phi_ij``, shape ``(K,)``."""
        return sum(np.einsum("ij,ijk->k", weights[rows], block) for rows, block in self.blocks())

    def gram(self, weights: np.ndarray) -> np.ndarray:
        """``sum_ij W_ij phi_ij phi_ij'``, shape ``(K, K)``."""
        found = np.zeros((self.count, self.count))
        for rows, block in self.blocks():
            flat = block.reshape(-1, self.count)
            found += flat.T @ (weights[rows].reshape(-1, 1) * flat)
        return found

    def centred(self, a: np.ndarray, b: np.ndarray) -> FeatureMap:
        """The same up to effects of rows and columns alone, for sides that take those up; better conditioned if it can be."""
        return self

    def gains(self, theta: np.ndarray) -> np.ndarray | None:
        """The coefficients as the matrix that they are, or None."""
        return None


@dataclass(frozen=True, eq=False)
class Bilinear(FeatureMap):
    """Affinities, every trait of a row times every trait of a column: ``phi^(p, q)_ij = X_ip Y_jq`` (Dupuy, Galichon, JPE 2014).

    Args:
        x: traits of the rows, shape ``(n, p)``; an array, or a data frame whose columns give the names.
        y: traits of the columns, shape ``(m, q)``.

    Example:
        >>> Bilinear(np.ones((3, 2)), np.ones((4, 1))).names
        ('x1*y1', 'x2*y1')
    """

    x: Any
    y: Any

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            given = getattr(self, name)
            object.__setattr__(self, f"_{name}_names", _columns(given, name))
            object.__setattr__(self, name, _matrix(f"traits {name}", given))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.x), len(self.y)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{p}*{q}" for p in self._x_names for q in self._y_names)

    def block(self, rows: slice) -> np.ndarray:
        return np.einsum("ip,jq->ijpq", self.x[rows], self.y).reshape(-1, len(self.y), self.count)

    def gains(self, theta: np.ndarray) -> np.ndarray:
        return theta.reshape(self.x.shape[1], self.y.shape[1])

    def apply(self, theta: np.ndarray) -> np.ndarray:
        return self.x @ self.gains(theta) @ self.y.T

    def sums(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        over_columns = self.x[:, :, None] * (weights @ self.y)[:, None, :]
        over_rows = (weights.T @ self.x)[:, :, None] * self.y[:, None, :]
        return over_columns.reshape(len(self.x), -1), over_rows.reshape(len(self.y), -1)

    def adjoint(self, weights: np.ndarray) -> np.ndarray:
        return (self.x.T @ weights @ self.y).ravel()

    def gram(self, weights: np.ndarray) -> np.ndarray:
        p, q = self.x.shape[1], self.y.shape[1]
        upper_x, upper_y = np.triu_indices(p), np.triu_indices(q)
        products = (self.x[:, upper_x[0]] * self.x[:, upper_x[1]]).T @ weights
        packed = products @ (self.y[:, upper_y[0]] * self.y[:, upper_y[1]])
        found = np.empty((p, p, q, q))
        for first, second in (upper_x, upper_x[::-1]):
            for third, fourth in (upper_y, upper_y[::-1]):
                found[first[:, None], second[:, None], third, fourth] = packed
        return found.transpose(0, 2, 1, 3).reshape(self.count, self.count)

    def centred(self, a: np.ndarray, b: np.ndarray) -> Bilinear:
        centred = object.__new__(Bilinear)
        named = {"x": self.x - a @ self.x / a.sum(), "y": self.y - b @ self.y / b.sum()}
        for name, value in (named | {"_x_names": self._x_names, "_y_names": self._y_names}).items():
            object.__setattr__(centred, name, value)
        return centred


@dataclass(frozen=True, eq=False)
class Features(FeatureMap):
    """Any features, given as one matrix per coefficient.

    Args:
        values: shape ``(K, n, m)``, or a dictionary from names to matrices ``(n, m)``.
        names: one per coefficient, if ``values`` does not tell them.

    Example:
        >>> Features({"distance": np.eye(2)}).adjoint(np.ones((2, 2)))
        array([2.])
    """

    values: Any
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        values, labels = self.values, self.labels
        if isinstance(values, dict):
            labels, values = tuple(map(str, values)), list(values.values())
        if not len(values):
            raise ValueError("no features: pass at least one matrix of what the cost may depend on, by name.")
        stacked = np.stack([_matrix("features", x) for x in values])
        labels = tuple(f"feature{k + 1}" for k in range(len(stacked))) if labels is None else tuple(labels)
        if len(labels) != len(stacked):
            raise ValueError(f"{len(labels)} names for {len(stacked)} features: there must be one each.")
        object.__setattr__(self, "values", stacked)
        object.__setattr__(self, "labels", labels)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[1:]

    @property
    def names(self) -> tuple[str, ...]:
        return self.labels

    def block(self, rows: slice) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(self.values[:, rows], 0, -1))

    def apply(self, theta: np.ndarray) -> np.ndarray:
        return np.tensordot(theta, self.values, 1)

    def centred(self, a: np.ndarray, b: np.ndarray) -> Features:
        a, b = a / a.sum(), b / b.sum()
        rows, columns = self.values @ b, np.einsum("i,kij->kj", a, self.values)
        both = (columns @ b)[:, None, None]
        return Features(self.values - rows[:, :, None] - columns[:, None, :] + both, self.labels)


@dataclass(frozen=True, eq=False)
class Mahalanobis(FeatureMap):
    """Minus the entries of a squared distance ``(x - y)' M (x - y)``: a learned metric, whose coefficients are those of ``M``.

    ``M`` is symmetric: the coefficient of an entry off the diagonal counts twice. Sides that are fixed take up what belongs to
    one of the two points alone, so that ``M`` is identified by ``2 x' M y``.

    Args:
        x: points of the rows, shape ``(n, d)``.
        y: points of the columns, shape ``(m, d)``.
    """

    x: Any
    y: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "_names", _columns(self.x, "x"))
        for name in ("x", "y"):
            object.__setattr__(self, name, _matrix(f"points {name}", getattr(self, name)))
        if self.x.shape[1] != self.y.shape[1]:
            raise ValueError(f"points x {self.x.shape} and y {self.y.shape} must have the same number of coordinates.")

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.x), len(self.y)

    @property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        return np.triu_indices(self.x.shape[1])

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"M[{self._names[p]}, {self._names[q]}]" for p, q in zip(*self._pairs, strict=True))

    def block(self, rows: slice) -> np.ndarray:
        first, second = self._pairs
        apart = self.x[rows, None, :] - self.y[None]
        return -np.where(first == second, 1.0, 2.0) * apart[..., first] * apart[..., second]

    def gains(self, theta: np.ndarray) -> np.ndarray:
        found = np.zeros((self.x.shape[1],) * 2)
        first, second = self._pairs
        found[first, second] = found[second, first] = theta
        return found


@dataclass(frozen=True, eq=False)
class Toeplitz(FeatureMap):
    """Scores that depend on ``j - i`` alone, or on ``|j - i|``: a free number per distance, 0 at distance 0.

    Args:
        n: rows.
        m: columns; ``n`` by default.
        symmetric: whether there and back are the same.
    """

    n: int
    m: int | None = None
    symmetric: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.n if self.m is None else self.m

    @cached_property
    def _lags(self) -> np.ndarray:
        n, m = self.shape
        lags = np.arange(1, max(n, m)) if self.symmetric else np.arange(1 - n, m)
        return lags[lags != 0]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"lag {k}" for k in self._lags)

    def block(self, rows: slice) -> np.ndarray:
        n, m = self.shape
        lag = np.arange(m) - np.arange(n)[rows, None]
        return ((abs(lag) if self.symmetric else lag)[..., None] == self._lags).astype(float)


@dataclass(frozen=True, eq=False)
class Symmetric(FeatureMap):
    """A free symmetric score on ``n`` types; with ``zero_diagonal`` that of a pair of unlike ones. For up to some tens of types.

    For more see :func:`iotsolve.inverse.free_cost`, which needs no iteration.

    Args:
        n: number of types.
        zero_diagonal: whether like pairs have score 0, which fixes the gauge between fixed sides.
    """

    n: int
    zero_diagonal: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.n

    @property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        return np.triu_indices(self.n, int(self.zero_diagonal))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"({i}, {j})" for i, j in zip(*self._pairs, strict=True))

    def block(self, rows: slice) -> np.ndarray:
        first, second = self._pairs
        i, j = np.arange(self.n)[rows, None, None], np.arange(self.n)[:, None]
        return (((i == first) & (j == second)) | ((i == second) & (j == first))).astype(float)

    def gains(self, theta: np.ndarray) -> np.ndarray:
        found = np.zeros((self.n, self.n))
        first, second = self._pairs
        found[first, second] = found[second, first] = theta
        return found


@dataclass(frozen=True, eq=False)
class FreeCost(FeatureMap):
    """A score of its own for every pair. Between fixed sides only cross ratios are identified; see
    :func:`iotsolve.inverse.free_cost`.

    Args:
        n: rows.
        m: columns.
    """

    n: int
    m: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.m

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"({i}, {j})" for i in range(self.n) for j in range(self.m))

    def block(self, rows: slice) -> np.ndarray:
        return np.eye(self.n * self.m).reshape(self.n, self.m, -1)[rows]

    def gains(self, theta: np.ndarray) -> np.ndarray:
        return theta.reshape(self.n, self.m)

    def apply(self, theta: np.ndarray) -> np.ndarray:
        return self.gains(theta)

    def adjoint(self, weights: np.ndarray) -> np.ndarray:
        return weights.ravel().copy()


@dataclass(frozen=True, eq=False)
class GraphPath(FeatureMap):
    """Minus the length of the shortest way on a graph: one coefficient per edge, the price of passing it.

    The ways are those of the lengths given and stay so; with the fitted prices, ``GraphPath(edges, n, prices)`` finds new ones.

    Args:
        edges: pairs of nodes, shape ``(E, 2)``, passable both ways.
        n: number of nodes, which are rows and columns.
        lengths: by which the ways are found, positive, shape ``(E,)``; 1 by default.

    Raises:
        ValueError: if some node cannot be reached from another.
    """

    edges: Any
    n: int
    lengths: Any = None

    def __post_init__(self) -> None:
        edges = np.asarray(self.edges, dtype=np.int64)
        if edges.ndim != 2 or edges.shape[1] != 2 or not (edges.min() >= 0 and edges.max() < self.n):
            raise ValueError(f"edges of shape {edges.shape}: must be (E, 2), of nodes from 0 to n - 1 = {self.n - 1}.")
        lengths = np.ones(len(edges)) if self.lengths is None else np.asarray(self.lengths, dtype=np.float64)
        if lengths.shape != (len(edges),) or not (lengths > 0).all():
            raise ValueError(
                f"lengths of shape {lengths.shape}: must be one positive number for each of {len(edges)} edges."
            )
        if len({frozenset(edge) for edge in edges.tolist()}) < len(edges):
            raise ValueError(
                "edges: the same pair of nodes is listed twice; edges are passable both ways, so list each once."
            )
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "lengths", lengths)
        if (self._predecessors < 0).sum() > self.n:
            raise ValueError("some node cannot be reached from another: the graph must be connected.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.n

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{i}-{j}" for i, j in self.edges.tolist())

    @cached_property
    def _predecessors(self) -> np.ndarray:
        from scipy.sparse import csr_array  # scipy is imported where it is needed
        from scipy.sparse.csgraph import dijkstra

        ends = self.edges.T
        graph = csr_array((self.lengths, (ends[0], ends[1])), shape=(self.n, self.n))
        return dijkstra(graph, directed=False, return_predecessors=True)[1]

    @cached_property
    def _number(self) -> dict[tuple[int, int], int]:
        known = {}
        for k, (i, j) in enumerate(self.edges.tolist()):
            known[i, j] = known[j, i] = k
        return known

    def block(self, rows: slice) -> np.ndarray:
        found = np.zeros((len(range(self.n)[rows]), self.n, self.count))
        for k, start in enumerate(range(self.n)[rows]):
            before = self._predecessors[start]
            for end in range(self.n):
                node = end
                while node != start:
                    found[k, end, self._number[int(before[node]), node]] -= 1.0
                    node = int(before[node])
        return found


def _matrix(what: str, given: Any) -> np.ndarray:
    try:
        found = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what}: must be a matrix of numbers. Are there strings or missing cells in it? ({error})"
        ) from error
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or 0 in found.shape:
        raise ValueError(f"{what} of shape {found.shape}: must be a matrix with at least one row and column.")
    if not np.isfinite(found).all():
        i, j = np.argwhere(~np.isfinite(found))[0]
        raise ValueError(
            f"{what}[{i}, {j}] = {found[i, j]}: must be finite. Drop or fill in what is missing before the fit."
        )
    return found


def _columns(given: Any, letter: str) -> tuple[str, ...]:
    names = getattr(given, "columns", None)
    if names is not None:
        return tuple(map(str, names))
    shape = np.shape(given.detach() if hasattr(given, "detach") else given)
    return tuple(f"{letter}{k + 1}" for k in range(shape[1] if len(shape) > 1 else 1))
