"""Sinkhorn's fixed point in the scalings of a stored kernel, accelerated: the vector steps between two passes over a matrix.

In units of epsilon, relative to potentials ``(f0, g0)`` that the kernel has absorbed: ``P = e^(p + lam) K e^q``. One pass makes
the rows exact for ``q``; what the columns then ask for is the fixed-point map, and the distance to it, weighted by the mass
that would move, is the marginal error. Anderson's mixing (type II, a window of a few differences, in the metric of the weights)
replaces the plain iteration.
"""

from __future__ import annotations

import math
from collections import namedtuple
from types import FunctionType

import numpy as np
from numba import njit

from iotsolve.kernels.ascent import ascend, ascend_on_kernel, pull, shifted
from iotsolve.kernels.dense import MATCH, RESPOND, build, stored_pass
from iotsolve.kernels.numeric import LOG2E, NORMAL, compiled, exp2_double, log_double
from iotsolve.kernels.passes import logs

__all__ = [
    "BROKEN",
    "CONVERGED",
    "FAR",
    "SLOW",
    "SPENT",
    "Rules",
    "mix",
    "propose",
    "relax",
    "relax_alone",
    "relax_each",
]

WINDOW = 20
_RIDGE = 1e-12  # of the Gram matrix, relative
_TINY = 1e-300  # column sums below which nothing is said to arrive
_OVERFLOWN = 8e307  # a mass that compiled exponentials may have ended at
_DEEP, _SHALLOW = -500.0, -60.0  # exponents, base 2, of a row's largest entry that float64 and float32 are not far from losing
_REACH, _WIDE_REACH = 30.0, 60.0  # scalings' logarithms from which on a kernel in float32 and one in float64 are to absorb them
_FARTHEST = 10.0  # from what a sweep answers: where mixing takes a logarithm at most
_GROWTH = 10.0  # of the residual at which what mixing remembers is of no use
_REBUILDS, _CHEAP_REBUILDS = 8, 1000  # kernels made anew; as often where one stays in the nearest cache
_OVERSHOT, _SHRINK, _SHORTEST = 0.5, 0.25, 1e-3  # of the slope at a step's start, at its end; of a step, at a time and in all
_CHECK = 8  # steps between looks at the progress

Rules = namedtuple("Rules", "rows columns soft_r soft_c mass")
"""What the problem asks, in units of epsilon: the sides' answers ``(slope, low, up, down, high)``; the rates at which the masses
they ask for decay, negative where these are no exponentials; the mass, 0 where there is none."""

CONVERGED, SLOW, SPENT, FAR, BROKEN = range(5)
"""How a relaxation ended: within tolerance; too slow to go on; out of steps; to be continued on a kernel that has absorbed the
scalings; not finite."""


@njit(inline="always")
def _answer(s, side):
    slope, low, up, down, high = side
    s = slope * s
    return max(min(high, s + up), max(low, s + down))


@compiled
def propose(columns, q, known, log_b, side, change):
    """What the columns would change ``q`` by, the mass that this would move, and the masses before and after.

    ``columns = u K``, so that the columns' marginal is ``e^q columns``; ``known`` is ``g0``; ``change`` is written.
    """
    moved, before, after = 0.0, 0.0, 0.0
    matches = side[0] == 1.0 and side[2] == 0.0 and side[3] == 0.0
    for j in range(len(q)):
        change[j] = 0.0
        if not columns[j] > _TINY:
            moved += math.inf if log_b[j] > -math.inf else 0.0
        else:
            mass = columns[j] * exp2_double(q[j] * LOG2E)
            log_c = log_double(columns[j])
            step = log_b[j] - log_c - q[j]
            if not matches:
                step = _answer(known[j] + log_b[j] - log_c, side) - known[j] - q[j]
            change[j] = step
            new = mass * exp2_double(step * LOG2E)
            before += mass
            after += new
            moved += abs(new - mass)
    return moved, before, after


@compiled
def logarithms(x):
    """Natural logarithms of weights, ``-inf`` of 0."""
    found, least = np.empty(len(x)), math.inf
    for i in range(len(x)):
        found[i] = log_double(x[i])
        least = min(least, x[i])
    if not least >= NORMAL:
        for i in range(len(x)):
            found[i] = found[i] if x[i] >= NORMAL else math.log(x[i])
    return found


@compiled
def respond(sums, base, side, lam, found):
    """The potentials that rows of these sums ask for, exactly at a kink where they are at one."""
    for i in range(len(sums)):
        found[i] = _answer(base[i] - math.log(sums[i]) - lam, side) if sums[i] > 0.0 else found[i]


@compiled
def translation(a, f, b, g, soft_r, soft_c):
    """``t`` for which ``(f + t, g - t)`` is best: the total masses that exponential sides ask for meet."""
    top_r, top_c = 0.0, 0.0
    for i in range(len(a)):
        top_r = max(top_r, -soft_r * f[i]) if a[i] > 0.0 else top_r
    for j in range(len(b)):
        top_c = max(top_c, -soft_c * g[j]) if b[j] > 0.0 else top_c
    total_r, total_c = 0.0, 0.0
    for i in range(len(a)):
        total_r += a[i] * exp2_double(LOG2E * (-soft_r * f[i] - top_r)) if a[i] > 0.0 else 0.0
    for j in range(len(b)):
        total_c += b[j] * exp2_double(LOG2E * (-soft_c * g[j] - top_c)) if b[j] > 0.0 else 0.0
    return (top_r + math.log(total_r) - top_c - math.log(total_c)) / (soft_r + soft_c)


@compiled
def _length(step, weights):
    """The largest entry of a step where there is a weight."""
    longest = 0.0
    for j in range(len(step)):
        longest = max(longest, abs(step[j]) if weights[j] > 0.0 else 0.0)
    return longest


@compiled
def mix(x, r, weights, memory, gram, count, window):
    """The next iterate, written into ``x``, from the map's residual ``r`` there and the differences of earlier steps: no further
    than ``_FARTHEST`` from what the map itself answers.

    ``memory`` ``(2 + 2 window, m)`` holds the last ``x`` and ``r``, then the differences of both in a ring; ``gram`` their
    products; ``count`` is the number of steps mixed since the memory was empty.
    """
    m = len(x)
    last_x, last_r = memory[0], memory[1]
    known = min(count, window)
    if count > 0:
        k = (count - 1) % window
        dx, dr = memory[2 + k], memory[2 + window + k]
        for j in range(m):
            dx[j] = x[j] - last_x[j]
            dr[j] = r[j] - last_r[j]
        for l in range(known):
            other, total = memory[2 + window + l], 0.0
            for j in range(m):
                total += weights[j] * dr[j] * other[j]
            gram[k, l] = total
            gram[l, k] = total
    for j in range(m):
        last_x[j] = x[j]
        last_r[j] = r[j]
        x[j] += r[j]
    if known == 0:
        return
    right, factor = np.empty(window), np.empty((window, window))
    ridge = 0.0
    for l in range(known):
        ridge = max(ridge, gram[l, l])
    for l in range(known):
        dr, total = memory[2 + window + l], 0.0
        for j in range(m):
            total += weights[j] * dr[j] * r[j]
        right[l] = total
    for k in range(known):  # Cholesky, of a matrix that is at most WINDOW wide
        for l in range(k + 1):
            total = gram[k, l] + (_RIDGE * ridge if k == l else 0.0)
            for i in range(l):
                total -= factor[k, i] * factor[l, i]
            if k == l:
                if not total > 0.0:
                    return
                factor[k, k] = math.sqrt(total)
            else:
                factor[k, l] = total / factor[l, l]
    for k in range(known):
        for i in range(k):
            right[k] -= factor[k, i] * right[i]
        right[k] /= factor[k, k]
    for k in range(known - 1, -1, -1):
        for i in range(k + 1, known):
            right[k] -= factor[i, k] * right[i]
        right[k] /= factor[k, k]
    back = np.zeros(m)
    for l in range(known):
        dx, dr, share = memory[2 + l], memory[2 + window + l], right[l]
        for j in range(m):
            back[j] += share * (dx[j] + dr[j])
    longest = _length(back, weights)
    length = _FARTHEST / longest if longest > _FARTHEST else 1.0
    for j in range(m):
        x[j] -= length * back[j]


@compiled
def copied(x, into):
    """To the front of an array: a slice's assignment takes seconds to compile."""
    for j in range(len(x)):
        into[j] = x[j]


@compiled
def _scalings(q, v):
    """``v = e^q``, and whether some are so far from 1 that the kernel is to absorb them."""
    far, reach = 0.0, _REACH if v.itemsize == 4 else _WIDE_REACH
    for j in range(len(q)):
        v[j] = exp2_double(q[j] * LOG2E)
        far += 1.0 if abs(q[j]) > reach else 0.0  # a sum vectorises, a maximum does not
    return far > 0.0


@compiled
def _sweep(kernel, v, rule, w, base, known, side, lam, y, u, columns):
    columns[:] = 0.0
    stored_pass(kernel, v, rule, w, base, known, side, lam, y, u, columns, 0, kernel.shape[0])


@compiled
def relax(kernel, a, b, f0, g0, rules, lam, q, f, tolerance, max_steps, slow, second):
    """Iterate from ``q`` until the marginal error is within tolerance, relative to the mass moved, or hopeless.

    Every few steps the error must have fallen below ``slow`` times what it was. Returns ``(end, steps, error, lam)``, with the
    best ``f`` and the ``q`` that answers it in place. ``second``: by Newton's steps, of sides that answer by lines.
    """
    n, m = kernel.shape
    mass, exponential = rules.mass, rules.soft_r >= 0.0 and rules.soft_c >= 0.0 and rules.soft_r + rules.soft_c > 0.0
    v, u, y, sums = np.empty(m, kernel.dtype), np.empty(n), np.empty(n), np.empty(m)
    base, log_b, x, r, weights = logarithms(a) + f0, logarithms(b), np.zeros(m + 1), np.zeros(m + 1), np.zeros(m + 1)
    window = min(WINDOW, max(4, (b > 0.0).sum() // 2))  # what mixing costs must not exceed a pass over the kernel
    memory, gram, best_y = np.zeros((2 + 2 * window, m + 1)), np.zeros((window, window)), np.zeros(n)
    slope, _, up, down, _ = rules.rows
    rule = MATCH if slope == 1.0 and up == 0.0 and down == 0.0 and mass == 0.0 else RESPOND
    copied(q, x)
    copied(b, weights)
    x[m], weights[m] = lam, mass
    at, change = x[:m], r[:m]  # without the multiplier
    best, checked, best_lam, asked_lam, steps, end = math.inf, math.inf, lam, lam, 0, -1
    least, emptied = math.inf, 0
    pulls, leap, origin, promised, length = np.zeros(m), np.zeros(m), np.zeros(m), 0.0, 1.0
    while end < 0:
        lam = x[m]
        far = _scalings(at, v)
        _sweep(kernel, v, rule, a, base, f0, rules.rows, lam, y, u, sums)
        moved, before, after = propose(sums, at, g0, log_b, rules.columns, change)
        steps += 1
        error = moved / before if before > 0.0 else math.inf
        if mass > 0.0:
            error += abs(before - mass) / mass
            r[m] = math.log(mass / after) if 0.0 < after < math.inf else 0.0
        if error < best:
            best, best_lam, asked_lam = error, lam + r[m], lam
            copied(at + change, q)
            copied(y, best_y)
        if not (error < math.inf and before < _OVERFLOWN):
            end = BROKEN
        elif error <= tolerance:
            end = CONVERGED
        elif far or steps >= max_steps:
            end = FAR if far else SPENT
        elif steps % _CHECK == 1:
            end = SLOW if best > slow * checked else end
            checked = best
        if end >= 0:
            break
        if second:
            along = pull(sums, at, rules.columns[0], change, leap, pulls)
            if along < -_OVERSHOT * promised and length > _SHORTEST:
                length *= max(_SHRINK, promised / (promised - along))
            else:
                promised = ascend(kernel, v, u, y, slope, rules.columns[0], sums, pulls, error, leap)
                longest = _length(leap, b)
                length = _FARTHEST / longest if longest > _FARTHEST else 1.0
                copied(at, origin)
            shifted(origin, length, leap, at)
            continue
        if mass > 0.0:
            if rules.soft_r > 0.0:
                r[m] -= _demand(a, np.log(u) + f0 - lam, rules.soft_r, mass)
            if rules.soft_c > 0.0:
                t = _demand(b, g0 + at + change, rules.soft_c, mass)
                change += t
                r[m] -= t
        elif exponential:
            change -= translation(a, np.log(u) + f0, b, g0 + at + change, rules.soft_r, rules.soft_c)
        size = (weights * r * r).sum()
        emptied = steps - 1 if size > _GROWTH * _GROWTH * least else emptied
        least = size if emptied == steps - 1 else min(least, size)
        mix(x, r, weights, memory, gram, steps - 1 - emptied, window)
    if best < math.inf:
        respond(best_y, base, rules.rows, asked_lam, f)
    return end, steps, best, best_lam


@compiled
def _demand(weights, potential, soft, mass):
    """By how much a potential of an exponential side must rise for it to ask for ``mass``."""
    return translation(weights, potential, np.full(1, mass), np.zeros(1), soft, 0.0)


@compiled
def raise_rows(cost, log_a, beta, scale, itemsize, alpha, f):
    """Reference potentials, for rows all of whose entries would vanish, at which their largest is not small: the potential of a
    soft side says what it pays for next to no mass, which a row of zeros cannot tell.
    """
    deep = _DEEP if itemsize == 8 else _SHALLOW
    for i in range(len(f)):
        if alpha[i] > -math.inf:
            top = -math.inf
            for j in range(len(beta)):
                top = max(top, beta[j] - scale * np.float64(cost[i, j]))
            if -math.inf < top < deep - alpha[i]:
                f[i] = -top / LOG2E
                alpha[i] = log_a[i] * LOG2E - top


@compiled
def relax_each(cost, a, b, f, g, lam, rules, scale, wide, settings, ends, steps, errors, first, last):
    """:func:`relax` for some problems of a batch, each on a kernel of its own that stays in the cache.

    ``f (B, n)``, ``g (B, m)`` and ``lam (B,)`` are in units of epsilon: the start on entry, the answer on return; ``wide`` is an
    empty array of the kernel's dtype; ``settings`` are the tolerance of each, ``max_steps``, ``slow`` and ``second``.
    """
    n, m = cost.shape[1:]
    tolerances, max_steps, slow, second = settings
    kernel = np.empty((n, m), wide.dtype)
    alpha, beta, q, found = np.empty(n), np.empty(m), np.empty(m), np.empty(n)
    for k in range(first, last):
        log_a, log_b = logarithms(a[k]), logarithms(b[k])
        for _ in range(_CHEAP_REBUILDS):
            for i in range(n):
                alpha[i], found[i] = (log_a[i] + f[k, i]) * LOG2E, f[k, i]
            for j in range(m):
                beta[j], q[j] = (log_b[j] + g[k, j]) * LOG2E, 0.0
            if rules.rows[0] != 1.0 or rules.rows[2] != rules.rows[3]:  # a row that asks for all of its weight cannot vanish
                raise_rows(cost[k], log_a, beta, scale, wide.itemsize, alpha, f[k])
            build(cost[k], alpha, beta, scale, kernel, 0, n)
            start = kernel, a[k], b[k], f[k], g[k], rules, lam[k]
            limits = tolerances[k], max_steps - steps[k], slow, second
            ends[k], taken, errors[k], lam[k] = relax(*start, q, found, *limits)
            steps[k] += taken
            for i in range(n):
                f[k, i] = found[i] if a[k, i] > 0.0 else f[k, i]
            for j in range(m):
                g[k, j] += q[j]
            if ends[k] != FAR or steps[k] >= max_steps:
                break


def _kernels_own_sweep(kernel, *given):
    kernel.sweep(*given)


_relax_on_kernel = FunctionType(
    relax.py_func.__code__, {**globals(), "_sweep": _kernels_own_sweep, "ascend": ascend_on_kernel}, "relax"
)
"""The loop of :func:`relax`, word for word, interpreted, with the kernel's own sweep, on all threads: for large problems."""


def relax_alone(kernel, a, b, f, g, lam, rules, settings):
    """:func:`relax` for one large problem; changes ``f`` and ``g`` in place, returns ``(end, steps, error, lam)``.

    ``kernel`` is one of :mod:`iotsolve.kernels.gibbs`.
    """
    q, found, total = np.zeros(len(b)), f.copy(), 0
    tolerance, max_steps, slow, second = settings
    with np.errstate(divide="ignore"):
        for _ in range(_CHEAP_REBUILDS if second else _REBUILDS):  # to a step of second order any is cheap
            beta, deep = logs(b, g), _DEEP if kernel.dtype == np.float64 else _SHALLOW
            may_vanish = rules.rows[0] != 1.0 or rules.rows[2] != rules.rows[3]
            reference = kernel.raised(logs(a, f), beta, f, deep) if may_vanish else f
            kernel.absorb(logs(a, reference), beta)
            q[:] = 0.0
            limits = tolerance, max_steps - total, slow, second
            end, steps, error, lam = _relax_on_kernel(kernel, a, b, reference, g, rules, lam, q, found, *limits)
            total += steps
            f[:] = np.where(a > 0.0, found, f)
            g += q
            if end != FAR or total >= max_steps:
                break
    return end, total, error, lam
