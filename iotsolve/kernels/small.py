"""Exact transport of many small balanced problems, each on the list of all its arcs: the compiled loop around
:mod:`iotsolve.kernels.sparse`.
"""

from __future__ import annotations

import numpy as np

from iotsolve.kernels.numeric import compiled
from iotsolve.kernels.sparse import assign, plant, reprice, settle_flows, simplex

__all__ = ["transport"]

_BUCKETS = 256  # in which arcs are put by their reduced costs: a first plan takes them in this order
_PIVOTS = 64  # for every bin
_ROUNDING = 1e-12  # of a reduced cost, relative to the range of costs
_DEAR, _DEAREST = 16.0, 1e9  # ranges that it costs not to be transported
_LEFT = 1e-13  # of the total, that may stay behind for the rounding of the flows


@compiled
def transport(cost, a, b, plan, f, g, steps, solved, max_steps, first, last):
    """Optimal plans and potentials of the problems ``first`` to ``last``; what is not ``solved`` is left as it was.

    Args:
        cost: float64, shape ``(batch, n, m)``, or ``(1, n, m)`` for all; ``inf`` where there is no arc.
        a: shape ``(batch, n)``; no mass goes to bins without weight, whose potentials are not written.
        b: shape ``(batch, m)``, of the same totals but for rounding.
        plan: shape ``(batch, n, m)``, zeros; written, as are ``f``, ``g``, ``steps`` and ``solved``.
    """
    for k in range(first, last):
        steps[k] = _solve(cost[k if len(cost) > 1 else 0], a[k], b[k], plan[k], f[k], g[k], max_steps)
        solved[k] = steps[k] >= 0


@compiled
def _solve(cost, a, b, plan, f, g, max_steps):
    """The steps taken; -1 if there is no plan, if it is not known whether there is one, or if there would be too many."""
    rows, columns = np.flatnonzero(a > 0), np.flatnonzero(b > 0)
    n, m = len(rows), len(columns)
    u, v, start = np.empty(n), np.full(m, np.inf), np.zeros(n + 1, np.int64)
    low, high = np.inf, -np.inf
    for i in range(n):
        least, count = np.inf, 0
        for j in range(m):
            x = cost[rows[i], columns[j]]
            if x < np.inf:
                least, high, count = min(least, x), max(high, x), count + 1
        u[i], start[i + 1], low = least, start[i] + count, min(low, least)
        if count == 0:
            return -1
        for j in range(m):
            v[j] = min(v[j], cost[rows[i], columns[j]] - least)
    if v.max() == np.inf:
        return -1
    unit = high - low if high > low else 1.0
    nodes, count = n + m, start[n]
    tail, head = np.zeros(nodes + count, np.int64), np.zeros(nodes + count, np.int64)
    price = np.zeros(nodes + count)
    e = nodes
    for i in range(n):
        for j in range(m):
            x = cost[rows[i], columns[j]]
            if x < np.inf:
                tail[e], head[e], price[e] = i, n + j, (x - u[i] - v[j]) / unit
                e += 1
    if n == m and a[rows].min() == a[rows].max() and b[columns].min() == b[columns].max():
        return _match(start, head[nodes:] - n, price[nodes:], cost, rows, columns, a, unit, v, plan, f, g)
    supply, demand, total = a[rows], b[columns], a[rows].sum()
    supply, demand = supply / total, demand / demand.sum()
    flow, pi, dear = np.zeros(nodes + count), np.empty(nodes + 1), _DEAR
    parent, arc, size = np.empty(nodes + 1, np.int32), np.empty(nodes + 1, np.int32), np.empty(nodes + 1, np.int32)
    after, before = np.empty(nodes + 1, np.int32), np.empty(nodes + 1, np.int32)
    order = _by_price(price, nodes)
    plant(supply, demand, tail, head, price, order, dear, flow, parent, arc, size, after, before, pi)
    most = min(max_steps, _PIVOTS * nodes)
    floor = 2.0**-50 * (max(abs(low), abs(high)) / unit + 1.0)
    taken = 0
    while True:
        tolerance = max(_ROUNDING, max(2.0**-48 * dear, floor))
        more = simplex(tail, head, price, flow, parent, arc, size, after, before, pi, tolerance, most - taken)
        taken += more
        if more < 0 or taken >= most:
            return -1
        if flow[:nodes].sum() <= _LEFT:
            break
        dear *= _DEAR
        if dear > _DEAREST:
            return -1
        reprice(tail, price, parent, arc, after, pi, dear)
    settle_flows(supply, demand, tail, head, flow, parent, arc, size)
    if flow[:nodes].sum() > _LEFT:
        return -1
    for e in range(nodes, nodes + count):
        if flow[e] > 0.0:
            plan[rows[tail[e]], columns[head[e] - n]] = flow[e] * total
    for i in range(n):
        f[rows[i]] = u[i] - unit * pi[i]
    for j in range(m):
        g[columns[j]] = v[j] + unit * pi[n + j]
    return taken


@compiled
def _match(start, column, price, cost, rows, columns, a, unit, v, plan, f, g):
    """Equal weights: a permutation."""
    n = len(rows)
    prices, row_of, column_of = np.zeros(n), np.full(n, -1), np.full(n, -1)
    if assign(start, column, price, prices, row_of, column_of, np.arange(n), _DEAR, n * n * n + 64) != 0:
        return -1
    for i in range(n):
        j = column_of[i]
        g[columns[j]] = v[j] + unit * prices[j]
        f[rows[i]] = cost[rows[i], columns[j]] - g[columns[j]]
        plan[rows[i], columns[j]] = a[rows[i]]
    return n


@compiled
def _by_price(price, first):
    """The arcs from the cheap to the dear, about: in buckets."""
    count = len(price) - first
    begin, order = np.zeros(_BUCKETS + 1, np.int64), np.empty(count, np.int64)
    for e in range(first, first + count):
        begin[_bucket(price[e]) + 1] += 1
    for k in range(_BUCKETS):
        begin[k + 1] += begin[k]
    for e in range(first, first + count):
        k = _bucket(price[e])
        order[begin[k]] = e
        begin[k] += 1
    return order


@compiled
def _bucket(price):
    return min(_BUCKETS - 1, max(0, int(_BUCKETS * price)))
