"""Which arcs can carry mass: questions of forbidden arcs, answered by one maximum flow each (scipy).

Capacities are rounded to 2^-30 of the total, so a deficit below about (n + m) 1e-9 of the mass goes unnoticed here; the
certificate still sees it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["carrying_arcs", "largest_mass"]

_UNIT = 2**30


def largest_mass(
    allowed: Bool[np.ndarray, "n m"], supply: Float[np.ndarray, " n"], demand: Float[np.ndarray, " m"]
) -> tuple[float, float]:
    """Largest mass that fits from ``supply`` to ``demand`` over the allowed arcs, and the rounding error of that number.

    Example:
        >>> largest_mass(np.array([[True, False], [True, False]]), np.array([0.5, 0.5]), np.array([0.5, 0.5]))[0]
        0.5
    """
    flow, total = _flow(allowed, supply, demand)
    return float(flow.sum() / _UNIT * total), float(sum(allowed.shape) / _UNIT * total)


def carrying_arcs(
    allowed: Bool[np.ndarray, "n m"], a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]
) -> Bool[np.ndarray, "n m"]:
    """The arcs that are positive in some plan with marginals a and b; the others are 0 in every one.

    An arc can carry mass exactly if the residual graph of one feasible plan has a cycle through it. Without this, a problem
    whose support is not total has a dual that is not attained, and scaling converges like one over the number of steps.

    Example:
        >>> carrying_arcs(np.array([[True, False], [True, True]]), np.array([0.5, 0.5]), np.array([0.5, 0.5]))
        array([[ True, False],
               [False,  True]])
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    flow, _ = _flow(allowed, a, b)
    n, m = allowed.shape
    used = flow > n + m  # less is the rounding of the capacities
    rows, columns = np.nonzero(allowed)
    back_rows, back_columns = np.nonzero(used)
    tails, heads = np.r_[rows, n + back_columns], np.r_[n + columns, back_rows]
    graph = csr_matrix((np.ones(len(tails), dtype=np.int8), (tails, heads)), shape=(n + m, n + m))
    _, label = connected_components(graph, directed=True, connection="strong")
    return allowed & (used | (label[:n, None] == label[None, n:]))


def _flow(allowed: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> tuple[np.ndarray, float]:
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_flow

    n, m = allowed.shape
    total = max(supply.sum(), demand.sum())
    rows, columns = np.nonzero(allowed)
    source, sink = n + m, n + m + 1
    tails = np.r_[np.full(n, source), rows, n + np.arange(m)]
    heads = np.r_[np.arange(n), n + columns, np.full(m, sink)]
    capacity = np.r_[np.round(supply / total * _UNIT), np.full(len(rows), _UNIT), np.round(demand / total * _UNIT)]
    graph = csr_matrix((capacity.astype(np.int32), (tails, heads)), shape=(n + m + 2, n + m + 2))
    return maximum_flow(graph, source, sink).flow[:n, n : n + m].toarray().clip(min=0), total
