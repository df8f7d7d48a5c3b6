"""First order on a kernel in range: Sinkhorn's sweeps, accelerated, for dense costs and points on a CPU.

Differs from :mod:`iotsolve.sinkhorn` in that 1. the kernel ``exp(-C / epsilon)`` is stored, around potentials that keep it in
range, so that a sweep reads it once and computes no exponential; in float32 where the tolerance allows it. Of points it is
made without their costs; where it would be too large it is made again at every sweep, once for both sides; 2. Anderson's
mixing over a window of twenty steps replaces annealing; 3. a problem that gets nowhere is given up early, for a solver of
second order to take over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iotsolve.costs import Dense, Points
from iotsolve.distributed import Alone, Sharded
from iotsolve.kernels.backends import usable
from iotsolve.marginals import number
from iotsolve.plans import plan_of
from iotsolve.problem import Potentials, Problem, in_double, log_scaling
from iotsolve.sinkhorn import answered
from iotsolve.solver import Outcome, Status, dearness, judge, sobered, spread
from iotsolve.validation import check_steps, check_tolerance, default_tolerance

__all__ = ["TINY", "Accelerated", "doubles", "is_bent", "outcome", "relaxed_together"]


@dataclass(frozen=True)
class Accelerated:
    """Anderson-accelerated Sinkhorn on a stored kernel.

    For dense costs on a CPU and points whose cost is a scalar product at heart, and sides whose aprox is a clipped line:
    ``Between``, ``KL``, ``TV``, with or without ``mass``.

    Args:
        tolerance: relative marginal error at which to stop: the L1 distance of every marginal from what its potential asks
            for, over the mass moved.
        max_steps: sweeps over both sides.
        slow: what a new error may be of that of eight sweeps before, in ``(0, 1]``; by default .8, and 1 between sides with
            kinks, where the mixing pauses at every kink and whoever takes over needs longer.

    Raises:
        ValueError: on a tolerance or step count out of range.
    """

    tolerance: float | None = None
    max_steps: int = 400
    slow: float | None = None

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        check_steps(self.max_steps, default=400)

    @staticmethod
    def fits(problem: Problem) -> bool:
        """Whether this is a problem for it."""
        lines = [side.clipped_line(problem.epsilon) for side in (problem.rows, problem.columns)]
        return isinstance(problem.cost, Dense | Points | Sharded) and problem.cost.is_compiled and None not in lines

    def _threshold(self, problem: Problem) -> float:
        return default_tolerance(problem.dtype) if self.tolerance is None else self.tolerance

    @staticmethod
    def _patience(problem: Problem) -> float:
        lines = [side.clipped_line(problem.epsilon) for side in (problem.rows, problem.columns)]
        return 1.0 if problem.mass is not None or any(is_bent(*line) for line in lines) else 0.8

    def within_reach(self, problem: Problem) -> Accelerated:
        """This solver, to the tolerance that a quick kernel's precision allows: large kernels are kept in float32."""
        near = self._threshold(problem) >= _SINGLE or _stays_in_cache(problem)
        return self if near else replace(self, tolerance=_SINGLE)

    def patient(self, problem: Problem, most: int) -> Accelerated:
        """This solver, that gives up later, after so many sweeps, where these cost less than a step of second order."""
        n, m = problem.shape[-2:]
        return replace(self, max_steps=most, slow=1.0) if n * m <= TINY else self

    def run(self, problem: Problem, start: Potentials | None = None) -> Outcome:
        """Solve every problem of a detached flat batch."""
        from iotsolve.kernels import scaling  # numba is imported where it runs
        from iotsolve.kernels.threads import each_piece, pieces

        tolerance = self._threshold(problem)
        eps, cost = number(problem.epsilon), problem.cost
        count, n, m = len(problem.a), *problem.shape[-2:]
        tiny = n * m <= TINY
        wide = tiny or (tolerance < _SINGLE and _stays_in_cache(problem))
        clouds = not isinstance(cost, Dense)
        share = 4.0 * (dearness(problem) if tiny or clouds else np.ones(count))  # where no plan is at hand to be corrected
        aims = np.maximum(tolerance / share, 0.0 if wide else _SINGLE / 4)
        a, b = doubles(problem.a), doubles(problem.b)
        f, g, lam = (x / eps for x in _reference(problem, start))
        slow = self._patience(problem) if self.slow is None else self.slow
        rules, settings = _rules(problem, eps), (aims, self.max_steps, slow, False)
        kernel_type = np.float64 if wide else np.float32
        ends, steps, errors = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count)
        serial = not clouds and len(pieces(n, n * m)) == 1  # a pass is on one thread, and so may be the loop around it
        if serial or (not clouds and count > 1 and cost.matrix.stride(0)):
            shared = cost.matrix.numpy(), a, b, f, g, lam, rules, math.log2(math.e) / eps, np.empty((0, 0), kernel_type)
            each_piece(
                count,
                math.prod(problem.shape),
                lambda k, *part: scaling.relax_each(*shared, settings, ends, steps, errors, *part),
            )
        else:
            with _kernels(problem, kernel_type, float(aims.min()), tolerance) as kernel:
                for k in range(count):
                    for stage, least in kernel(k):
                        left = max(1, self.max_steps - steps[k])  # one at least, which judges in that precision
                        limits = max(aims[k], least), left, slow, False
                        given = a[k], b[k], f[k], g[k], lam[k], rules, limits
                        ends[k], taken, errors[k], lam[k] = scaling.relax_alone(stage, *given)
                        steps[k] += taken
        enough = np.minimum(tolerance / 2, 2 * aims) if clouds or tiny else np.full(count, tolerance / 2)
        return outcome(problem, (f, g, lam), (ends, steps, errors), enough, tolerance)


def is_bent(slope: float, low: float, up: float, down: float, high: float) -> bool:
    """Whether an aprox of these numbers has a kink."""
    return up != down and not (low == down == -math.inf and high == math.inf)


def outcome(
    problem: Problem,
    found: tuple[np.ndarray, np.ndarray, np.ndarray],
    told: tuple[np.ndarray, np.ndarray, np.ndarray],
    enough: np.ndarray,
    tolerance: float,
) -> Outcome:
    """What potentials in units of epsilon, and how their search ended, after how many steps and with what error, come to."""
    from iotsolve.kernels import scaling

    eps = number(problem.epsilon)
    f, g, lam = (torch.from_numpy(eps * x).to(problem.a.dtype) for x in found)
    if isinstance(problem.cost, Sharded):
        f, g, lam = (problem.cost.ranks.first(x) for x in (f, g, lam))
    p = answered(problem, Potentials(f, g, lam))
    ends, steps, errors = (x.tolist() for x in told)
    given_up = scaling.BROKEN, scaling.SLOW
    status = [
        Status.CONVERGED if error <= most else Status.STALLED if end in given_up else Status.MAX_STEPS
        for end, error, most in zip(ends, errors, enough.tolist(), strict=True)
    ]
    if any(0 < side.recession < math.inf for side in (problem.rows, problem.columns)):
        status = _priced(problem, p, status, tolerance)
    return sobered(problem, Outcome(p, status, steps), tolerance)


def relaxed_together(problem: Problem, tolerance: float | None) -> tuple[Potentials, list[int]] | None:
    """Potentials of small problems on a GPU, which one launch has relaxed as far as it pays, and the sweeps of each.

    None if these are no such problems. Nobody has judged the potentials.
    """
    if not isinstance(problem.cost, Dense) or problem.mass is not None:
        return None
    n, m = problem.shape[-2:]
    held = 2 ** math.ceil(math.log2(n)) * 2 ** math.ceil(math.log2(m))
    lines = [side.clipped_line(problem.epsilon) for side in (problem.rows, problem.columns)]
    if held > _SMALL.get(problem.dtype, 0) or None in lines or not usable(problem.cost.matrix, _agree):
        return None
    from iotsolve.kernels import batched

    eps = number(problem.epsilon)
    soft = [None if side.softness is None else eps * number(side.softness) for side in (problem.rows, problem.columns)]
    translates = None not in soft and any(soft)
    aim = (default_tolerance(problem.dtype) if tolerance is None else tolerance) / 4
    given = problem.cost.matrix, problem.a, problem.b
    f, g, steps = batched.relaxed(*given, eps, *lines, tuple(soft) if translates else None, aim, _TOGETHER)
    return answered(problem, Potentials(f, g, torch.zeros_like(f[:, 0]))), steps.tolist()


def _agree(_: Any, device: torch.device) -> bool:
    """Whether the kernel solves a problem whose solution is known."""
    from iotsolve.kernels import batched

    cost = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]]], dtype=torch.float64, device=device)
    a, b = (torch.tensor([x], dtype=torch.float64, device=device) for x in ([0.5, 0.5], [0.25, 0.5, 0.25]))
    line = (1.0, -math.inf, 0.0, 0.0, math.inf)
    f, g, _ = batched.relaxed(cost, a, b, 0.5, line, line, None, 1e-12, 500)
    plan = a[..., None] * b[:, None] * ((f[..., None] + g[:, None] - cost) / 0.5).exp()
    return bool((plan.sum(2) - a).abs().max() < 1e-9) and bool((plan.sum(1) - b).abs().max() < 1e-9)


_SMALL = {torch.float32: 2**14, torch.float64: 2**12}  # entries of a problem that a program holds
_TOGETHER = 10_000  # sweeps of the slowest, which all others wait for; it leaves where it gets nowhere
_SINGLE = 1e-6  # tolerance that a kernel in float32 can be solved to
TINY = 2**14  # entries of a kernel that the nearest cache holds
_CACHED = 2**19  # entries of a kernel in float64
_REACH = 60.0  # cost ranges in epsilons that exponentials in float32 span


def _stays_in_cache(problem: Problem) -> bool:
    """Whether a kernel in float64 costs little more to read than one in float32."""
    n, m = problem.shape[-2:]
    return n * m <= _CACHED


def _priced(problem: Problem, p: Potentials, status: list[Status], tolerance: float) -> list[Status]:
    """The status where a marginal's error has a price of its own, by which a small one may cost much."""
    double, p = in_double(problem, costs=False), p.to(torch.float64)
    error, dual, _ = judge(double, p, *plan_of(double, p, lazy=True).marginals(), stationary=False)
    dear = ~((error <= tolerance / 2) & dual.isfinite())
    return [
        Status.STALLED if x is Status.CONVERGED and bad else x for x, bad in zip(status, dear.tolist(), strict=True)
    ]


@contextmanager
def _kernels(
    problem: Problem, kernel_type: type, aim: float, tolerance: float
) -> Iterator[Callable[[int], list[tuple[Any, float]]]]:
    """The kernels of a batch, one after the other in the same place, or where it would be too large in none, each with an error
    below which it is no use.

    Exponents of points in float32 are made in float64 where they are so large that their rounding would be seen; where that has
    to be done at every sweep, float32 begins.
    """
    from iotsolve.kernels import gibbs, workspace

    cost, eps, shape = problem.cost, number(problem.epsilon), tuple(problem.shape[-2:])
    if isinstance(cost, Dense):
        with workspace.borrow(shape, kernel_type) as array:
            yield lambda k: [(gibbs.Stored(array, cost.matrix[k].numpy(), math.log2(math.e) / eps), 0.0)]
        return

    def form(dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = {name: x.to(dtype) for name, x in cost.tensors().items()}
        return (cost if dtype == cost.dtype else cost.with_tensors(given)).bilinear_form(eps)

    def joined(kernel: gibbs.Kernel) -> gibbs.Kernel:
        is_alone = isinstance(cost, Points) or isinstance(cost.ranks, Alone)
        return kernel if is_alone else gibbs.OverRanks(kernel, shape[0], cost.own, cost.ranks)

    rounding, is_double = 2.0**-24 * float(spread(problem)[0]), cost.dtype == torch.float64
    most, own = (shape[0],) * 2 if isinstance(cost, Points) else (cost.most, cost.local.shape[-2])
    if most * shape[1] * np.dtype(kernel_type).itemsize <= workspace.STORED:  # on every rank, or on none
        exponents = form(torch.float64 if is_double or 2 * rounding > aim else torch.float32)
        with workspace.borrow((own, shape[1]), kernel_type) as array:
            yield lambda k: [(joined(gibbs.OfPoints(array, exponents, cost.barred)), 0.0)]
        return
    stages, lasting = [], is_double and kernel_type == np.float64
    if not lasting:
        lasting = not is_double and rounding > tolerance
        stages.append((joined(gibbs.Streamed(form(torch.float32), cost.barred)), rounding if lasting else 0.0))
    if lasting:
        stages.append((joined(gibbs.Streamed(form(torch.float64), cost.barred)), 0.0))
    yield lambda k: stages


def doubles(x: Tensor) -> np.ndarray:
    """Numbers as compiled loops read them."""
    return np.ascontiguousarray(x.numpy(), dtype=np.float64)


def _rules(problem: Problem, eps: float) -> Any:
    from iotsolve.kernels.scaling import Rules

    lines = [side.clipped_line(eps) for side in (problem.rows, problem.columns)]
    soft = [-1.0 if side.softness is None else eps * number(side.softness) for side in (problem.rows, problem.columns)]
    return Rules(*lines, *soft, 0.0 if problem.mass is None else number(problem.mass))


def _reference(problem: Problem, start: Potentials | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Potentials around which the kernel stays in range: the start's; none; or at a small epsilon those of the costs alone, or
    of points those of one sweep, which reads them as often. Those of a free side are 0, at its empty bins too.
    """
    held = problem.rows.is_free, problem.columns.is_free
    if start is not None:
        found = start.f.numpy(), start.g.numpy()
    elif not (far := spread(problem) > _REACH).any():
        found = np.zeros(problem.a.shape), np.zeros(problem.b.shape)
    elif isinstance(problem.cost, Dense):
        found = tuple(z * far[:, None] for z in _lowest(problem))
    else:
        eps = number(problem.epsilon)
        f = torch.zeros_like(problem.a) if held[0] else problem.cost.softmin(problem.b.log(), eps, axis=-1)
        g = problem.cost.softmin(log_scaling(problem.a, torch.where(f.isfinite(), f, 0.0), eps), eps, axis=-2)
        found = f.numpy(), g.numpy()
    f, g = (np.where(np.isfinite(z), z, 0.0) * (not free) for z, free in zip(found, held, strict=True))
    lam = np.zeros(len(f)) if start is None else np.array(start.lam.numpy())
    return tuple(np.asarray(z, dtype=np.float64) for z in (f, g, lam))


def _lowest(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """``f = min_j C_ij`` and ``g = min_i C_ij - f_i`` over bins that have a weight; where rows are free ``f = 0``."""
    from iotsolve.kernels import passes

    cost, filled = problem.cost.matrix.numpy(), [x.numpy() > 0 for x in (problem.a, problem.b)]
    f, g = (np.zeros(x.shape) for x in filled)
    if problem.rows.is_free:
        return f, np.where(filled[0][..., None], cost, math.inf).min(-2)
    passes.lowest(cost, *filled, f, g)
    return f, g
