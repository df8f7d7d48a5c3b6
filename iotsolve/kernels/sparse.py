"""Exact transport on a list of arcs: an assignment by shortest augmenting paths, a plan by the network simplex.

Arcs are kept by rows (``start``, ``column``, ``cost``, as in a CSR matrix). A dense cost comes here as a shortlist of what an
optimal plan may use, and what was left off is priced afterwards: whoever calls knows by its reduced costs whether it is missed.
"""

from __future__ import annotations

import math

import numpy as np

from iotsolve.kernels.numeric import compiled

__all__ = ["assign", "lowest_arcs", "plant", "reprice", "settle_flows", "shortlist", "simplex"]

_LANES = 64


@compiled
def shortlist(cost, rows, f, g, reach, most, column, count, first, last):
    """The cheapest arcs of ``rows[first:last]``: at most ``most`` with ``C_ij - g_j <= f_i + reach_i``, ``f_i`` the least.

    Of more, those within a fifth of the reach come first; ties are taken from where the row's number points, so that equal
    costs make a well-spread list. ``f``, ``column (k, most)`` and ``count (k,)`` are written, in the order of ``rows``.
    """
    m = cost.shape[1]
    reduced, tops, near = np.empty(m + _LANES), np.empty(_LANES), np.empty(most + 1, np.int32)
    reduced[m:] = np.inf
    for at in range(first, last):
        i = rows[at]
        row = cost[i]
        for j in range(m):
            reduced[j] = np.float64(row[j]) - g[j]
        tops[:] = np.inf
        for j in range(0, m, _LANES):
            for lane in range(_LANES):
                x = reduced[j + lane]
                tops[lane] = x if x < tops[lane] else tops[lane]
        low = tops.min()
        f[at] = low
        found, begin, inner, outer = 0, (i * 7919) % m, low + reach[at] / 5, low + reach[at]
        if low < np.inf:
            known = _within(reduced, m, -np.inf, outer, begin, near, most + 1, 0)
            if known <= most:
                for share in range(2):
                    for k in range(known):
                        if (reduced[near[k]] <= inner) == (share == 0):
                            column[at, found] = near[k]
                            found += 1
            else:
                found = _within(reduced, m, -np.inf, inner, begin, column[at], most, 0)
                found = _within(reduced, m, inner, outer, begin, column[at], most, found)
        count[at] = found


@compiled
def _within(reduced, m, above, upto, begin, into, room, found):
    """Append the places of numbers in ``(above, upto]``, from ``begin`` on and around, while there is room; their number."""
    for part in range(2):
        lower, upper = (begin, m) if part == 0 else (0, begin)
        for j in range(lower // _LANES * _LANES, upper, _LANES):
            if found == room:
                break
            within = 0
            for lane in range(_LANES):
                within += np.int32(1) if reduced[j + lane] <= upto else np.int32(0)
            if within > 0:
                for k in range(max(j, lower), min(j + _LANES, upper)):
                    if found < room and reduced[k] <= upto and reduced[k] > above:
                        into[found] = k
                        found += 1
    return found


@compiled
def lowest_arcs(cost, f, columns, row):
    """For some columns the row in which ``C_ij - f_i`` is least; -1 where there is none."""
    for k in range(len(columns)):
        j, best = columns[k], np.inf
        row[k] = -1
        for i in range(cost.shape[0]):
            x = np.float64(cost[i, j]) - f[i]
            if x < best:
                best, row[k] = x, i


@compiled
def assign(start, column, cost, v, row_of, column_of, free, dear, budget):
    """Match the rows in ``free`` along shortest augmenting paths; all arrays are kept up to date.

    ``v`` are the columns' potentials, at which every matched arc is the cheapest of its row. First every free row takes its
    cheapest column, whose price falls to what the row would pay elsewhere and whose former row is free again, a few times
    over (Jonker, Volgenant, Computing 38, 1987); what is left is augmented by Dijkstra's algorithm. Returns how many rows could
    not be matched, since the list has no way for them: then the potentials are moved as if there had been one that costs
    ``dear`` more than the farthest column in reach, by which pricing finds the arcs that the list lacks. Or -1, if more than
    ``budget`` arcs would have been looked at: where very many are equally cheap, a path visits most columns.
    """
    m = len(v)
    for _ in range(2):
        waiting, left = free.copy(), 0
        k, displaced = 0, 4 * len(waiting) + 64
        while k < len(waiting):
            i = waiting[k]
            k += 1
            one, two, best, second = -1, -1, np.inf, np.inf
            for e in range(start[i], start[i + 1]):
                x = cost[e] - v[column[e]]
                if x < best:
                    second, two, best, one = best, one, x, column[e]
                elif x < second:
                    second, two = x, column[e]
            if one < 0:
                free[left] = i
                left += 1
                continue
            other, displaced = row_of[one], displaced - 1
            if best < second and second < np.inf:
                v[one] -= second - best
            elif other >= 0 and two >= 0:
                one, other = two, row_of[two]
            row_of[one], column_of[i] = i, one
            if other >= 0:
                column_of[other] = -1
                if best < second and displaced > 0:
                    k -= 1
                    waiting[k] = other
                else:
                    free[left] = other
                    left += 1
        free = free[:left].copy()
        if left == 0:
            break
    distance, settled, seen, origin = np.empty(m), np.zeros(m, np.int64), np.zeros(m, np.int64), np.empty(m, np.int64)
    order = np.empty(m, np.int64)
    key, heap = np.empty(len(column) + m + 1), np.empty(len(column) + m + 1, np.int64)
    failed = 0
    for turn in range(len(free)):
        mark, size, done, end, shortest = turn + 1, 0, 0, -1, 0.0
        i, base = free[turn], 0.0
        own = np.inf
        for e in range(start[i], start[i + 1]):
            own = min(own, cost[e] - v[column[e]])
        base = -own
        while True:
            budget -= start[i + 1] - start[i]
            for e in range(start[i], start[i + 1]):  # from row i, which is reached at a distance that base accounts for
                j = column[e]
                if settled[j] != mark:
                    x = cost[e] - v[j] + base
                    if seen[j] != mark or x < distance[j]:
                        seen[j], distance[j], origin[j] = mark, x, i
                        if x <= shortest and row_of[j] < 0:  # no other column can be nearer
                            end = j
                            break
                        size = _push(key, heap, size, x, j)
            if end >= 0:
                break
            j = -1
            while size > 0:
                x, j = key[0], heap[0]
                size = _pop(key, heap, size)
                if settled[j] != mark and x <= distance[j]:
                    break
                j = -1
            if j < 0:
                break
            if budget < 0:
                return -1
            settled[j], shortest = mark, distance[j]
            if row_of[j] < 0:
                end = j
                break
            order[done] = j
            done += 1
            i = row_of[j]
            matched = np.inf
            for e in range(start[i], start[i + 1]):
                if column[e] == j:
                    matched = cost[e] - v[j]
            base = shortest - matched
        if end < 0:
            failed += 1
            shortest += dear
        for k in range(done):
            j = order[k]
            v[j] += distance[j] - shortest
        if end < 0:
            continue
        while True:
            i = origin[end]
            row_of[end] = i
            end, column_of[i] = column_of[i], end
            if i == free[turn]:
                break
    return failed


@compiled
def _push(key, heap, size, x, j):
    k = size
    while k > 0:
        above = (k - 1) // 2
        if key[above] <= x:
            break
        key[k], heap[k] = key[above], heap[above]
        k = above
    key[k], heap[k] = x, j
    return size + 1


@compiled
def _pop(key, heap, size):
    size -= 1
    x, j, k = key[size], heap[size], 0
    while True:
        child = 2 * k + 1
        if child >= size:
            break
        if child + 1 < size and key[child + 1] < key[child]:
            child += 1
        if key[child] >= x:
            break
        key[k], heap[k] = key[child], heap[child]
        k = child
    key[k], heap[k] = x, j
    return size


@compiled
def plant(a, b, tail, head, price, order, dear, flow, parent, arc, size, after, before, pi):
    """A first tree of the network simplex: arcs in the given order take what both their ends still have.

    Nodes are the rows, the columns and a root; the first ``n + m`` arcs lead between each of them and the root at the price
    ``dear``, the others are the list's; ``size`` counts the nodes of every subtree, and ``after`` and ``before`` chain the nodes
    so that each is followed by its subtree. Every arc that takes something uses up one end, so that no cycle is closed; of a
    component at most one node has something left, and by this, or by any, it hangs at the root.
    """
    n, m = len(a), len(b)
    nodes = n + m
    left, component, hanging = np.empty(nodes), np.arange(nodes), np.full(nodes, -1)
    left[:n], left[n:] = a, b
    links = np.zeros(len(order), np.int64)
    used = 0
    for k in range(len(order)):
        e = order[k]
        i, j = tail[e], head[e]
        if left[i] > 0.0 and left[j] > 0.0:
            amount = min(left[i], left[j])
            flow[e] = amount
            left[i] -= amount
            left[j] -= amount
            links[used] = e
            used += 1
            one, two = i, j
            while component[one] != one:
                one = component[one]
            while component[two] != two:
                two = component[two]
            component[two] = one
    for u in range(nodes):
        root = u
        while component[root] != root:
            root = component[root]
        component[u] = root
        if hanging[root] < 0 or left[u] > 0.0:
            hanging[root] = u
    first, second, where = np.full(nodes, -1), np.full(2 * used, -1), np.empty(2 * used, np.int64)
    for k in range(used):  # the links at every node
        e = links[k]
        for end in range(2):
            u = tail[e] if end == 0 else head[e]
            where[2 * k + end], second[2 * k + end], first[u] = e, first[u], 2 * k + end
    parent[nodes], arc[nodes], pi[nodes] = -1, -1, 0.0
    stack, chain, chained = np.empty(nodes + 1, np.int64), np.empty(nodes + 1, np.int64), 1
    chain[0] = nodes
    for root in range(nodes):
        u = hanging[root]
        if component[root] != root or u < 0:
            continue
        leaves = u >= n and left[u] > 0.0  # the only arcs from the root: what columns lack
        tail[u], head[u] = (nodes, u) if leaves else (u, nodes)
        flow[u], price[u] = left[u], dear
        parent[u], arc[u], pi[u] = nodes, u, dear if leaves else -dear
        stack[0], waiting = u, 1
        while waiting > 0:
            waiting -= 1
            u = stack[waiting]
            chain[chained] = u
            chained += 1
            k = first[u]
            while k >= 0:
                e = where[k]
                w = head[e] if tail[e] == u else tail[e]
                if e != arc[u]:
                    parent[w], arc[w] = u, e
                    pi[w] = pi[u] + price[e] if tail[e] == u else pi[u] - price[e]
                    stack[waiting] = w
                    waiting += 1
                k = second[k]
    size[:] = 1
    for k in range(nodes, -1, -1):
        u = chain[k]
        after[u], before[u] = chain[(k + 1) % (nodes + 1)], chain[k - 1]
        if k > 0:
            size[parent[u]] += size[u]
    for u in range(nodes):  # artificial arcs out of the tree
        if arc[u] != u:
            tail[u], head[u] = u, nodes
            flow[u], price[u] = 0.0, dear


_USUAL = 12  # arcs a node for which a block is the square root of their number; of fewer ones it sees more nodes


@compiled
def simplex(tail, head, price, flow, parent, arc, size, after, before, pi, tolerance, max_steps):
    """Primal network simplex from a tree (:func:`plant`) until no arc of the list is cheaper than its potentials; its pivots.

    Differs from textbooks in that no arc has a capacity; blocks of arcs are searched in turn and the cheapest of a block
    enters; ties are broken so that every arc of the tree without flow leads to the root (Cunningham, Math. Prog. 11, 1976).
    """
    nodes = len(parent) - 1
    count = len(tail) - nodes
    block = min(count, max(64, int(math.sqrt(count) * max(1.0, _USUAL * nodes / (2.0 * count)))))
    at, steps, paid = 0, 0, np.empty(block)
    stem, met, place = np.empty(nodes, np.int32), np.empty(nodes, np.int32), np.empty(nodes, np.int32)
    while steps < max_steps:
        enter, least, looked = -1, -tolerance, 0
        while enter < 0 and looked < count:
            first = nodes + at
            length = min(block, count - at)
            for k in range(length):
                paid[k] = price[first + k] + pi[tail[first + k]] - pi[head[first + k]]
            for k in range(length):
                if paid[k] < least:
                    e = first + k
                    if arc[tail[e]] != e and arc[head[e]] != e:  # in the tree it is 0 but for rounding
                        least, enter = paid[k], e
            looked += length
            at = at + length if at + length < count else 0
        if enter < 0:
            break
        steps += 1
        s, t = tail[enter], head[enter]
        u, w = s, t
        while u != w:
            if size[u] < size[w]:
                u = parent[u]
            else:
                w = parent[w]
        join, amount, out, at_tail = u, np.inf, -1, True
        u = s
        while u != join:
            e = arc[u]
            if tail[e] == u and flow[e] < amount:
                amount, out = flow[e], u
            u = parent[u]
        u = t
        while u != join:
            e = arc[u]
            if tail[e] != u and flow[e] <= amount:
                amount, out, at_tail = flow[e], u, False
            u = parent[u]
        if out < 0:
            return -1
        flow[enter] += amount
        if amount > 0.0:
            u = s
            while u != join:
                e = arc[u]
                flow[e] += -amount if tail[e] == u else amount
                u = parent[u]
            u = t
            while u != join:
                e = arc[u]
                flow[e] += amount if tail[e] == u else -amount
                u = parent[u]
        flow[arc[out]] = 0.0
        shift = least if not at_tail else -least
        u, above, by = (s, t, enter) if at_tail else (t, s, enter)
        whole, stems, v = size[out], 0, u
        w = parent[out]
        while w != join:
            size[w] -= whole
            w = parent[w]
        w = above
        while w != join:
            size[w] += whole
            w = parent[w]
        while True:  # from the end of the arc that enters to that of the arc that leaves, whose roles change
            stem[stems] = v
            stems += 1
            if v == out:
                break
            v = parent[v]
        v, k = out, stems - 1
        for l in range(whole):
            met[l] = v
            pi[v] += shift
            if k >= 0 and v == stem[k]:
                place[k] = l
                k -= 1
            v = after[v]
        _chain(before[out], v, after, before)
        last, rest = above, after[above]
        below, start, end = 0, 0, 0  # of the part that is in its new place already
        for k in range(stems):
            v = stem[k]
            own, first = size[v], place[k]
            _chain(last, met[first], after, before)
            last = met[first + own - 1]
            if k > 0 and end == first + own:
                last = met[start - 1]
            elif k > 0:
                _chain(met[start - 1], met[end], after, before)
            start, end = first, first + own
            size[v], below = whole - below, own
            link = arc[v]
            parent[v], arc[v] = above, by
            above, by = v, link
        _chain(last, rest, after, before)
    return steps


@compiled
def _chain(u, w, after, before):
    after[u], before[w] = w, u


@compiled
def reprice(tail, price, parent, arc, after, pi, dear):
    """The potentials anew where an artificial arc costs ``dear``."""
    nodes = len(parent) - 1
    price[:nodes] = dear
    pi[nodes] = 0.0
    u = after[nodes]
    while u != nodes:  # each after its parent
        e = arc[u]
        pi[u] = pi[parent[u]] - price[e] if tail[e] == u else pi[parent[u]] + price[e]
        u = after[u]


@compiled
def settle_flows(a, b, tail, head, flow, parent, arc, size):
    """The flows of the tree anew from the weights alone, without what pivots have rounded."""
    n, nodes = len(a), len(parent) - 1
    excess = np.zeros(nodes + 1)
    excess[:n], excess[n:nodes] = a, -b
    for u in np.argsort(size[:nodes]):
        e = arc[u]
        flow[e] = excess[u] if tail[e] == u else -excess[u]
        excess[parent[u]] += excess[u]
