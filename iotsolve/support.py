"""Which arcs can carry mass: questions of forbidden arcs, answered by one maximum flow each (scipy).

Capacities are rounded to 2^-30 of the total, so a deficit below about (n + m) 1e-9 of the mass goes unnoticed here; the
certificate still sees it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["carrying_arcs", "fits", "largest_mass", "separation"]

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


def fits(
    allowed: Bool[np.ndarray, "batch n m"],
    supply: Float[np.ndarray, "batch n"],
    demand: Float[np.ndarray, "batch m"],
    need: Float[np.ndarray, " batch"],
) -> Bool[np.ndarray, " batch"]:
    """Whether so much fits from ``supply`` to ``demand``, by plans that some scalings find: True proves it, False says nothing.

    Example:
        >>> fits(np.array([[[True, False], [True, True]]]), np.array([[0.4, 0.6]]), np.array([[0.5, 0.5]]), np.array([0.999]))
        array([ True])
    """
    if len(need) > (each := max(1, _AT_ONCE // allowed[0].size)):  # the kernel is in float64
        given = allowed, supply, demand, need
        return np.concatenate([fits(*(x[k : k + each] for x in given)) for k in range(0, len(need), each)])
    kernel = allowed * supply[:, :, None] * demand[:, None, :]
    tight = np.isclose(supply.sum(1), demand.sum(1), rtol=1e-9, atol=0.0)[:, None]
    v, found = np.ones_like(demand), np.zeros(len(need), bool)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for sweep in range(_SWEEPS):
            u = np.nan_to_num(supply / (kernel @ v[:, :, None])[:, :, 0], nan=0.0, posinf=0.0)
            ratio = np.nan_to_num(demand / (u[:, None] @ kernel)[:, 0], nan=0.0, posinf=0.0)
            v = np.where(tight, ratio, np.minimum(ratio, 1.0))
            if sweep % 8 == 7:  # no column has too much; rows that have are cut
                found |= np.minimum(u * (kernel @ v[:, :, None])[:, :, 0], supply).sum(1) >= need
                if found.all():
                    break
    return found


_SWEEPS = 64
_AT_ONCE = 2**20  # entries


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


def separation(
    kept: Bool[np.ndarray, "n m"], dropped: Bool[np.ndarray, "n m"], excess: Float[np.ndarray, "n m"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]:
    """Shifts ``(u, v)`` that change ``u + v`` on no kept arc and bring ``excess + u + v`` to at most 0 on the dropped ones.

    Kept arcs hold bins together in components, whose potentials may move against each other; dropped arcs lead from component
    to component without a cycle, or they could carry mass.

    Example:
        >>> separation(np.eye(2, dtype=bool), np.array([[False, False], [True, False]]), np.ones((2, 2)))
        (array([ 0., -1.]), array([0., 1.]))
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    n, m = kept.shape
    rows, columns = np.nonzero(kept)
    graph = csr_matrix((np.ones(len(rows), dtype=np.int8), (rows, n + columns)), shape=(n + m, n + m))
    count, label = connected_components(graph, directed=False)
    rows, columns = np.nonzero(dropped)
    from_, to, least = label[rows], label[n + columns], excess[rows, columns]
    shift = np.zeros(count)
    for _ in range(count):  # the longest path to each component
        higher = shift.copy()
        np.maximum.at(higher, from_, shift[to] + least)
        if np.array_equal(higher, shift):
            break
        shift = higher
    return 0.0 - shift[label[:n]], shift[label[n:]]


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
