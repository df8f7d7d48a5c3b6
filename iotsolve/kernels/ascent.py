"""Newton's step on the dual in the columns' potentials, the rows always answering, by a system that is made and factored.

For sides whose answer is a line, ``s f``: ``FIXED`` has ``s = 1``, ``KL`` less. A matrix of the columns' size is factored in each
step, so that this is for some hundred columns, or where nothing else arrives; :mod:`iotsolve.newton` makes no such matrix.
"""

from __future__ import annotations

import math
from types import FunctionType

import numpy as np

from iotsolve.kernels.numeric import LOG2E, compiled, exp2_double, log_double

__all__ = ["ascend", "ascend_on_kernel", "pull", "shifted"]

_TINY = 1e-300  # column sums below which nothing is said to arrive
_DAMPING, _RIDGE = 0.01, 1e-12  # of the diagonal, added to it: times the marginal error, and at least


@compiled
def pull(sums, q, slope, change, along, into):
    """What the columns ask for less what they get, the dual's gradient, and its product with a direction.

    ``change`` is by how much the columns would move alone.
    """
    for j in range(len(q)):
        into[j] = 0.0
        if sums[j] > _TINY:
            log_mass = log_double(sums[j]) + q[j]
            into[j] = exp2_double((log_mass + change[j] / slope) * LOG2E) - exp2_double(log_mass * LOG2E)
    return _product(into, along)


@compiled
def ascend(kernel, v, u, y, slope_r, slope_c, sums, pulls, error, into):
    """The step, into ``into``, of ``(diag(C + A (1 / s_c - 1)) - P' diag(s_r / R) P) step = A - C``, damped (Levenberg and
    Marquardt), and what the dual's gradient promises of it.

    ``P = u K v`` has marginals ``R`` and ``C``; the columns ask for ``A = C + pulls``.
    """
    n, m = kernel.shape
    system, own, root = np.zeros((m, m)), np.empty(m), np.empty(n)
    _prepared(v, u, y, slope_r, slope_c, sums, pulls, root, own, into)
    _gram(kernel, v, root, system)
    _completed(system, own, slope_r == 1.0 and slope_c == 1.0, _DAMPING * error + _RIDGE)
    _solved(system, into, own)
    return _product(pulls, into)


@compiled
def shifted(start, length, step, into):
    """``start + length step``: expressions of arrays take seconds to compile."""
    for j in range(len(start)):
        into[j] = start[j] + length * step[j]


@compiled
def _product(x, y):
    total = 0.0
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@compiled
def _prepared(v, u, y, slope_r, slope_c, sums, pulls, root, own, right):
    """The root of ``s_r u^2 / R``, the columns' diagonal, and the right-hand side."""
    for i in range(len(u)):
        root[i] = math.sqrt(slope_r * u[i] / y[i]) if u[i] > 0.0 else 0.0
    for j in range(len(v)):
        own[j], right[j] = 1.0, pulls[j]
        if sums[j] > _TINY:
            mass = v[j] * sums[j]
            own[j] = mass + (mass + pulls[j]) * (1.0 / slope_c - 1.0)


@compiled
def _gram(kernel, v, root, system):
    """``P' diag(s_r / R) P``, its lower triangle."""
    n, m = kernel.shape
    part, last = np.zeros((4, m)), n - n % 4
    p0, p1, p2, p3 = part
    for i in range(0, last, 4):  # four at a time, so that a line of the system is read and written a quarter as often
        for r in range(4):
            row, own, w = kernel[i + r], part[r], root[i + r]
            for j in range(m):
                own[j] = w * row[j] * v[j]
        for j in range(m):
            line, s0, s1, s2, s3 = system[j], p0[j], p1[j], p2[j], p3[j]
            if s0 + s1 + s2 + s3 > 0.0:
                for k in range(j + 1):
                    line[k] += (s0 * p0[k] + s1 * p1[k]) + (s2 * p2[k] + s3 * p3[k])
    for i in range(last, n):
        row, w = kernel[i], root[i]
        for j in range(m):
            p0[j] = w * row[j] * v[j]
        for j in range(m):
            line, s0 = system[j], p0[j]
            for k in range(j + 1):
                line[k] += s0 * p0[k]


@compiled
def _completed(system, own, singular, damping):
    """The system, its lower triangle, in place of the rows' part."""
    m, total = len(own), 0.0
    for j in range(m):
        total += own[j]
    for j in range(m):
        line = system[j]
        scale = own[j] / total if singular else 0.0  # a constant changes nothing: of all solutions that without a mean
        for k in range(j + 1):
            line[k] = scale * own[k] - line[k]
        line[j] += own[j] * (1.0 + damping)


@compiled
def _solved(system, right, own):
    """The solution of a system of which the lower triangle is given, in place of the right-hand side: by Cholesky."""
    m = len(right)
    for j in range(m):
        line = system[j]
        for k in range(j):
            other, dot = system[k], line[k]
            for l in range(k):
                dot -= line[l] * other[l]
            line[k] = dot / other[k]
        dot, known = line[j], right[j]
        for l in range(j):
            dot -= line[l] * line[l]
            known -= line[l] * right[l]
        line[j] = math.sqrt(max(dot, _RIDGE * own[j]))
        right[j] = known / line[j]
    for j in range(m - 1, -1, -1):
        line = system[j]
        right[j] /= line[j]
        for l in range(j):
            right[l] -= line[l] * right[j]


def _blas_gram(kernel, v, root, system):
    from scipy.linalg.blas import dsyrk

    dsyrk(1.0, (kernel.array * root[:, None] * v).T, c=system.T, overwrite_c=1)  # whose upper triangle is ours


def _lapack_solved(system, right, own):
    from scipy.linalg.lapack import dpotrf, dpotrs

    factor, failed = dpotrf(system.T, overwrite_a=1)
    right[:] = right / own if failed else dpotrs(factor, right)[0]  # if nothing else, along the slope


ascend_on_kernel = FunctionType(
    ascend.py_func.__code__, {**globals(), "_gram": _blas_gram, "_solved": _lapack_solved}, "ascend"
)
"""The same, word for word, interpreted, of a stored :class:`iotsolve.kernels.gibbs.Kernel`; for more columns."""
