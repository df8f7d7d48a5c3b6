"""Newton's method by way of larger epsilons, each step's system made and factored: for few bins, and where nothing else arrives.

Differs from :mod:`iotsolve.newton` in that the columns' potentials alone are moved and the rows always answer, that no conjugate
gradients have to reach a system's slow directions, and that it begins at an epsilon of a tenth of the costs' range, a quarter of
which is the next. Some ten to forty steps do, whatever the costs and epsilon, where sweeps take tens to many thousands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from iotsolve.accelerated import TINY, doubles, is_bent, outcome
from iotsolve.costs import Dense
from iotsolve.marginals import number
from iotsolve.problem import Potentials, Problem
from iotsolve.solver import Outcome, spread
from iotsolve.validation import check_tolerance, default_tolerance

__all__ = ["Direct"]


@dataclass(frozen=True)
class Direct:
    """Newton's method on a stored kernel by way of larger epsilons, each step's system factored.

    For dense costs on a CPU and sides whose aprox is a line without a kink (``FIXED``, ``KL``), without ``mass``. A step costs as
    much as there are bins on the smaller side, in sweeps: much of many, little where sweeps crawl.

    Args:
        tolerance: relative marginal error at which to stop, as :class:`iotsolve.accelerated.Accelerated`'s.

    Raises:
        ValueError: on a tolerance out of range.
    """

    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)

    @staticmethod
    def fits(problem: Problem) -> bool:
        """Whether this is a problem for it."""
        n, m = problem.shape[-2:]
        dense = isinstance(problem.cost, Dense) and n * m <= _MOST and min(n, m) <= _NARROW and problem.cost.is_compiled
        lines = [side.clipped_line(problem.epsilon) for side in (problem.rows, problem.columns)]
        return dense and problem.mass is None and None not in lines and not any(is_bent(*line) for line in lines)

    def run(self, problem: Problem, start: Potentials | None = None) -> Outcome:
        """Solve every problem of a detached flat batch, from nothing, or in a few steps from what is near the solution."""
        from iotsolve.kernels import gibbs, scaling  # numba is imported where it runs
        from iotsolve.kernels.threads import each_piece

        tolerance = default_tolerance(problem.dtype) if self.tolerance is None else self.tolerance
        aim = tolerance / 4
        count, n, m = problem.shape
        matrix, sides = problem.cost.matrix, ((problem.rows, problem.a), (problem.columns, problem.b))
        if m > n:  # the system is the columns'
            matrix, sides = matrix.mT.contiguous(), sides[::-1]
        (rows, a), (columns, b) = ((side, doubles(weights)) for side, weights in sides)
        cost = matrix.numpy()
        if start is None:
            f, g, most = np.zeros(a.shape), np.zeros(b.shape), _STEPS
            rungs = np.ceil(np.log(np.maximum(_TOP * spread(problem), 1.0)) / math.log(_RATIO)).astype(int)
        else:
            f, g, most = *(x.numpy() / number(problem.epsilon) for x in (start.f, start.g)), _NEAR
            f, g = (np.where(np.isfinite(x), x, 0.0) for x in ((f, g) if m <= n else (g, f)))
            rungs = np.zeros(count, int)
        ends, steps, errors, lam = np.zeros(count, int), np.zeros(count, int), np.zeros(count), np.zeros(count)
        array, none = np.empty(cost.shape[1:] if n * m > TINY else 0), np.empty((0, 0))
        for rung in range(int(rungs.max()), -2, -1):  # the last time as close as it gets
            eps = number(problem.epsilon) * _RATIO ** max(rung, 0)
            rules = scaling.Rules(rows.clipped_line(eps), columns.clipped_line(eps), -1.0, -1.0, 0.0)
            scale, begun, taken = math.log2(math.e) / eps, rungs >= rung, np.zeros(count, int)
            enough = np.where(begun, _ROUGH if rung > 0 else aim if rung == 0 else _ROUNDING, math.inf)
            limits = enough, most if rung >= 0 else _CLOSING, 1.0, True
            if n * m <= TINY:
                given = cost, a, b, f, g, lam, rules, scale, none, limits, ends, taken, errors
                each_piece(count, cost.size * m, lambda _, *part, given=given: scaling.relax_each(*given, *part))
            else:
                kernels = [gibbs.Stored(array, matrix, scale) for matrix in cost]
                for k in begun.nonzero()[0]:
                    given = a[k], b[k], f[k], g[k], 0.0, rules, (enough[k], *limits[1:])
                    ends[k], taken[k], errors[k], _ = scaling.relax_alone(kernels[k], *given)
            steps += np.where(begun, taken, 0)
            for z in (f, g):
                z *= begun[:, None] * (_RATIO if rung > 0 else 1.0)  # in units of the next
        f, g = (f, g) if m <= n else (g, f)
        return outcome(problem, (f, g, lam), (ends, steps, errors), np.full(count, tolerance / 2), tolerance)


_MOST, _NARROW = 2**22, 2048  # entries of a kernel in float64, and columns, for which systems are made
_TOP, _RATIO = 0.1, 4.0  # what the largest epsilon reaches, in cost ranges, ratio of successive ones
_ROUGH, _STEPS, _NEAR = 0.1, 300, 10  # marginal error with which a larger epsilon is left, most steps at each, and from a start
_ROUNDING, _CLOSING = 1e-13, 3  # what no step betters, and how many try
