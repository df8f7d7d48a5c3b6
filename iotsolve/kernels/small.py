"""Exact transport of many small balanced problems, each on the list of all its arcs: the compiled loop around
:mod:`iotsolve.kernels.sparse`.
"""

from __future__ import annotations

import numpy as np

from iotsolve.kernels.numeric import compiled
from iotsolve.kernels.sparse import plant, reprice, settle_flows, simplex

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
def _carrying(weights, found):
    """The bins of positive weight, written to ``found``: their number, their total, and whether all weigh the same."""
    count, total, first, same = 0, 0.0, 0.0, True
    for i in range(len(weights)):
        if weights[i] > 0.0:
            found[count] = i
            count, total = count + 1, total + weights[i]
            first = weights[i] if count == 1 else first
            same = same and weights[i] == first
    return count, total, same


@compiled
def _solve(cost, a, b, plan, f, g, max_steps):
    """The steps taken; -1 if there is no plan, if it is not known whether there is one, or if there would be too many.

    Loops throughout: expressions of arrays take seconds to compile.
    """
    rows, columns = np.empty(len(a), np.int64), np.empty(len(b), np.int64)
    n, total, same = _carrying(a, rows)
    m, beyond, even = _carrying(b, columns)
    price, u, v, supply, demand = np.empty((n, m)), np.empty(n), np.empty(m), np.empty(n), np.empty(m)
    for j in range(m):
        v[j], demand[j] = np.inf, b[columns[j]] / beyond
    low, high, count = np.inf, -np.inf, 0
    for i in range(n):
        least, supply[i] = np.inf, a[rows[i]] / total
        for j in range(m):
            x = cost[rows[i], columns[j]]
            price[i, j] = x
            if x < np.inf:
                least, high, count = min(least, x), max(high, x), count + 1
        if least == np.inf:
            return -1
        u[i], low = least, min(low, least)
        for j in range(m):
            price[i, j] -= least
            v[j] = min(v[j], price[i, j])
    unit = high - low if high > low else 1.0
    for j in range(m):
        if v[j] == np.inf:
            return -1
        for i in range(n):
            price[i, j] = (price[i, j] - v[j]) / unit
    if n == m and same and even:
        prices, column_of = np.zeros(n), np.empty(n, np.int64)
        if not _match(price, prices, column_of):
            return -1
        for i in range(n):
            j = column_of[i]
            g[columns[j]] = v[j] + unit * prices[j]
            f[rows[i]] = cost[rows[i], columns[j]] - g[columns[j]]
            plan[rows[i], columns[j]] = a[rows[i]]
        return n
    size = max(abs(low), abs(high)) / unit + 1.0
    flow, pi = np.zeros((n, m)), np.empty(n + m + 1)
    taken = _flow(price, count, supply, demand, size, flow, pi, max_steps)
    if taken >= 0:
        for i in range(n):
            f[rows[i]] = u[i] - unit * pi[i]
            for j in range(m):
                plan[rows[i], columns[j]] = flow[i, j] * total
        for j in range(m):
            g[columns[j]] = v[j] + unit * pi[n + j]
    return taken


@compiled
def _flow(price, count, supply, demand, size, into, pi, max_steps):
    """Flows and potentials by the network simplex on all arcs that there are."""
    n, m = price.shape
    nodes, e = n + m, n + m
    tail, head = np.zeros(nodes + count, np.int64), np.zeros(nodes + count, np.int64)
    paid, flow, dear = np.zeros(nodes + count), np.zeros(nodes + count), _DEAR
    for i in range(n):
        for j in range(m):
            if price[i, j] < np.inf:
                tail[e], head[e], paid[e] = i, n + j, price[i, j]
                e += 1
    parent, arc, sizes = np.empty(nodes + 1, np.int32), np.empty(nodes + 1, np.int32), np.empty(nodes + 1, np.int32)
    after, before = np.empty(nodes + 1, np.int32), np.empty(nodes + 1, np.int32)
    plant(supply, demand, tail, head, paid, _by_price(paid, nodes), dear, flow, parent, arc, sizes, after, before, pi)
    most, taken = min(max_steps, _PIVOTS * nodes), 0
    while True:
        tolerance = max(_ROUNDING, max(2.0**-48 * dear, 2.0**-50 * size))
        more = simplex(tail, head, paid, flow, parent, arc, sizes, after, before, pi, tolerance, most - taken)
        taken += more
        if more < 0 or taken >= most:
            return -1
        if _sum(flow, nodes) <= _LEFT:
            break
        dear *= _DEAR
        if dear > _DEAREST:
            return -1
        reprice(tail, paid, parent, arc, after, pi, dear)
    settle_flows(supply, demand, tail, head, flow, parent, arc, sizes)
    if _sum(flow, nodes) > _LEFT:
        return -1
    for e in range(nodes, nodes + count):
        into[tail[e], head[e] - n] = max(flow[e], 0.0)
    return taken


@compiled
def _sum(x, count):
    total = 0.0
    for k in range(count):
        total += x[k]
    return total


@compiled
def _match(price, v, column_of):
    """A cheapest permutation by shortest augmenting paths, whose potentials of columns are ``v``; False if there is none.

    Rows take columns that cost them nothing; what is left is augmented by Dijkstra's algorithm without a heap (Jonker,
    Volgenant, Computing 38, 1987; Crouse, IEEE TAES 52, 2016).
    """
    n = len(price)
    u, row_of = np.zeros(n), np.empty(n, np.int64)
    for i in range(n):
        row_of[i] = column_of[i] = -1
    for i in range(n):
        for j in range(n):
            if price[i, j] == 0.0 and row_of[j] < 0:
                row_of[j], column_of[i] = i, j
                break
    for _ in range(2):  # a free row takes its cheapest column at what it would pay elsewhere, and frees that one's row
        for free in range(n):
            i, turns = free, n
            while i >= 0 and column_of[i] < 0 and turns > 0:
                best, second, one, two = np.inf, np.inf, -1, -1
                for j in range(n):
                    x = price[i, j] - v[j]
                    if x < second:
                        if x < best:
                            best, second, one, two = x, best, j, one
                        else:
                            second, two = x, j
                if best == np.inf:
                    return False
                other, turns = row_of[one], turns - 1
                if best < second and second < np.inf:
                    v[one] -= second - best
                elif other >= 0 and two >= 0:
                    if row_of[two] >= 0:
                        break
                    one, other = two, -1
                elif other >= 0:
                    break
                row_of[one], column_of[i] = i, one
                if other >= 0:
                    column_of[other] = -1
                i = other
    for i in range(n):
        least = np.inf
        for j in range(n):
            least = min(least, price[i, j] - v[j])
        u[i] = least
    shortest, origin, waiting, seen = np.empty(n), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    for free in range(n):
        if column_of[free] >= 0:
            continue
        for j in range(n):
            shortest[j], waiting[j] = np.inf, j
        left, done, i, reached, end = n, 0, free, 0.0, -1
        while end < 0:
            lowest, at = np.inf, -1
            for k in range(left):
                j = waiting[k]
                x = reached + price[i, j] - u[i] - v[j]
                if x < shortest[j]:
                    shortest[j], origin[j] = x, i
                if shortest[j] < lowest or (shortest[j] == lowest and row_of[j] < 0):
                    lowest, at = shortest[j], k
            if lowest == np.inf:
                return False
            reached, j = lowest, waiting[at]
            left -= 1
            waiting[at] = waiting[left]
            seen[done] = j
            done += 1
            if row_of[j] < 0:
                end = j
            else:
                i = row_of[j]
        u[free] += reached
        for k in range(done - 1):  # of the last column the distance is what is reached
            j = seen[k]
            u[row_of[j]] += reached - shortest[j]
            v[j] -= reached - shortest[j]
        while True:
            i = origin[end]
            row_of[end] = i
            end, column_of[i] = column_of[i], end
            if i == free:
                break
    return True


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
