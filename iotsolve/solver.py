"""The one iterative loop: init, step, stop. A method is data; a batch stops problem by problem.

A method supplies ``init(problem, start) -> state``, ``step(problem, state, epsilon) -> state`` and ``schedule(problem)``;
a state supplies ``potentials``, ``marginals``, ``select`` and ``where``. The loop judges the state by quantities the step has
computed anyway, and never by the size of the step: a small step says nothing about the distance to the solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from iotsolve.costs import Dense, Points
from iotsolve.kernels.replay import Replayed
from iotsolve.marginals import Scalar, number
from iotsolve.problem import Potentials, Problem

__all__ = ["Outcome", "Status", "dearness", "iterate", "judge", "sobered", "spread"]


class Status(Enum):
    """How a solve ended. The members are the messages."""

    CONVERGED = "converged: the marginal errors and the duality gap are within tolerance."
    MAX_STEPS = (
        "not converged: max_steps was reached first. First-order steps slow down as epsilon falls below about .02 of the cost "
        "range. (a) raise max_steps, (b) raise epsilon or the tolerance, (c) use epsilon=0 for the exact plan."
    )
    STALLED = (
        "not converged: the error no longer falls. (a) the precision of the dtype is exhausted: pass float64; "
        "(b) the tolerance is below what rounding allows: raise it; (c) no plan satisfies the marginals exactly."
    )
    NOT_FINITE = (
        "not converged: exponents left the range of the dtype. (a) epsilon is tiny against the costs: raise it, rescale the "
        "costs, or use epsilon=0; (b) pass float64; (c) forbidden arcs leave a bin with too little mass."
    )
    INFEASIBLE = (
        "infeasible: no plan satisfies the marginals on the allowed arcs. (a) too many arcs are forbidden (cost inf); "
        "(b) the totals of a and b, or mass, contradict each other; relax a side with FREE, AT_MOST, KL(rho) or TV(rho)."
    )


class State(Protocol):
    potentials: Potentials

    def marginals(self, problem: Problem) -> tuple[Tensor | None, Tensor | None]: ...

    def answer(self, problem: Problem) -> Potentials: ...

    def excess(self, problem: Problem) -> Tensor | None: ...

    def select(self, index: Tensor) -> State: ...

    def where(self, mine: Tensor, other: State) -> State: ...


class Method(Protocol):
    max_steps: int
    stationary: bool

    def threshold(self, problem: Problem) -> float: ...

    def schedule(self, problem: Problem, start: Potentials | None) -> tuple[list[Scalar], np.ndarray]: ...

    def init(self, problem: Problem, start: Potentials | None) -> Any: ...

    def step(self, problem: Problem, state: Any, epsilon: Scalar) -> Any: ...

    def hasten(self, problem: Problem, state: Any) -> Any: ...

    def relent(self, state: Any, those: Tensor) -> Any | None: ...

    def settle(self, problem: Problem, state: Any) -> Any: ...


@dataclass(frozen=True)
class Outcome:
    """What a solver returns for a flat batch: potentials, a status and a step count per problem, at epsilon = 0 also the plan.

    ``excess`` is ``f + lam - s`` of the rows, where a solver has their soft-minima ``s`` at these potentials: ``epsilon`` times
    the logarithm of marginal over weight, in any gauge.
    """

    potentials: Potentials
    status: list[Status]
    steps: list[int]
    plan: Tensor | None = None
    excess: Tensor | None = None


def judge(
    problem: Problem, p: Potentials, r: Tensor | None, c: Tensor | None, *, stationary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Error, dual objective and its scale, from potentials and marginals alone; each of shape ``(B,)``, on the host.

    The error is the larger of the relative violation (hard sides, mass) and the relative gap (all sides). A gap is of second
    order in the plan's error; ``stationary`` adds the first-order distance of every marginal from what its potential asks for.
    ``r`` or ``c`` is None for a free side, which is satisfied by any marginal.
    """
    return tuple(torch.as_tensor(x, device="cpu") for x in _judged(problem, p, r, c, stationary=stationary))


@np.errstate(all="ignore")  # infinite is infinite
def _judged(
    problem: Problem, p: Potentials, r: Tensor | None, c: Tensor | None, *, stationary: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`judge`, told at once: a device is waited for once, and is not asked to compute with single numbers."""
    (sides, scale), violations, gaps, moved = problem.dual_sides_and_scale(p), [], [], None
    for side, weights, marginal, potential in ((problem.rows, problem.a, r, p.f), (problem.columns, problem.b, c, p.g)):
        if marginal is None:
            continue
        moved = marginal
        if marginal is weights:  # of a fixed side that has just been given its soft-minima
            continue
        off = side.residual(marginal, potential, weights) if stationary else side.violation(marginal, weights)
        violations.append((off if problem.is_full else torch.where(weights > 0, off, 0.0)).sum(-1))
        if not side.is_fixed:  # which pays nothing at the marginal it allows
            terms = side.fenchel_young(side.allowed(marginal, weights), potential, weights)
            gaps.append((terms if problem.is_full else torch.where(weights > 0, terms, 0.0)).sum(-1))
    empty = [problem.magnitude(0.0)] if gaps else []
    (sides, scale), offs, gaps, empty, moved = _told(
        [sides, scale], violations, gaps, empty, [] if moved is weights else [moved.sum(-1)]
    )
    amounts, epsilon = problem.amounts, number(problem.epsilon)
    moved = moved[0] if len(moved) else amounts[-1]
    violation = offs.sum(0) + (0.0 if problem.mass is None else abs(moved - number(problem.mass)))
    violation = np.maximum(violation - 2 * problem.mismatched, 0.0)
    entropy = epsilon * (moved - amounts.prod(0))
    scale = scale + abs(entropy)
    error = np.where(violation > 0, violation / moved, 0.0)
    if len(gaps):
        gap, rounding = gaps.sum(0), 2 * torch.finfo(p.f.dtype).eps
        resolved = gap > rounding * (scale + empty[0] + epsilon * moved)  # a smaller one is rounding
        error = np.maximum(error, np.where(resolved, gap / scale, 0.0))
    return error, sides - entropy, scale


def _told(*parts: list[Tensor]) -> list[np.ndarray]:
    """Numbers of every problem, in float64, by one wait for the device."""
    told = torch.stack([x for part in parts for x in part]).detach().cpu().double().numpy()
    return np.split(told, np.cumsum([len(part) for part in parts])[:-1])


def iterate(problem: Problem, method: Method, start: Potentials | None = None) -> Outcome:
    """Run ``method`` on a flat batch until every problem has converged, stalled or used up its steps.

    Finished problems leave the work set, so that a hard one does not make the easy ones pay. The loop stops at half the
    tolerance, which leaves the certificate room for the rounding of its own arithmetic. A problem has stalled when for many
    checks neither its error has fallen nor its dual risen: with bounds the error may rest while the potentials still travel. A
    method that was hastened goes on without haste first, for as many checks again.
    """
    problem, size = problem.swept(), problem.batch_shape[0]
    (ladder, wait), tolerance = method.schedule(problem, start), method.threshold(problem)
    state = method.init(problem, start)
    active, final = np.arange(size), None
    status, steps = [Status.MAX_STEPS] * size, [method.max_steps] * size
    best, highest, patience, relented = np.full(size, np.inf), np.full(size, -np.inf), np.zeros(size), np.zeros(size, bool)
    device, precision = problem.cost.device, torch.finfo(problem.a.dtype).eps
    on_device = device.type == "cuda"
    entries = math.prod(problem.shape[-2:])
    dear, cheap = entries >= (_DEAR_ON_DEVICE if on_device else _DEAR), on_device and entries < _CHEAP_ON_DEVICE
    replayed, least = None, float(wait.min())  # the fewest annealing steps that somebody has left out
    begun = 0  # when the problems at work became those they are: what a step of theirs remembers it finds out in its first

    for k in count(1 if start is None else 0):  # a start that is good enough takes no step
        annealing, late, own = k <= len(ladder), k - len(ladder), k - wait
        if k:
            waited = late >= _WORTH_RECORDING and late % 8 == 2 and k > begun + 1
            if replayed is None and on_device and not dear and waited:
                replayed = _recorded(problem, method, state)
            if replayed is not None:
                state = replayed(state)
            else:
                fresh = method.step(problem, state, ladder[k - 1] if annealing else problem.epsilon)
                joined = own > 0
                state = fresh if not annealing or joined.all() else fresh.where(torch.from_numpy(joined).to(device), state)
        due = _due(late, cheap)
        if (annealing and k) or not (dear or due or k - least >= method.max_steps):
            continue
        spent = own >= method.max_steps
        error, dual, scale = _judged(problem, state.potentials, *state.marginals(problem), stationary=method.stationary)
        with np.errstate(invalid="ignore"):  # infinite less infinite
            progress = (error < 0.999 * best) | (dual > highest + 8 * precision * scale)
        patience = np.where(progress, 0.0, patience + due)
        best, highest = np.minimum(best, error), np.maximum(highest, dual)
        broken = ~(np.isfinite(dual) & np.isfinite(scale))
        near, stuck = error <= tolerance / 2, patience >= _PATIENCE
        done = near | broken | stuck | spent
        if stuck.any() and (calmer := method.relent(state, torch.from_numpy(stuck).to(device))) is not None:
            state, first = calmer, stuck & ~relented
            best, highest = np.where(first, np.inf, best), np.where(first, -np.inf, highest)
            patience, relented, stuck = np.where(first, 0.0, patience), relented | stuck, stuck & ~first
            done = near | broken | stuck | spent
        if done.any():  # potentials that nobody takes for an answer are not looked at
            usable, rounding = _soundness(problem, state.potentials)
            broken, blunt = broken | ~usable, rounding > tolerance
            ended = done | broken
            for j in np.flatnonzero(ended):
                verdict = Status.STALLED if near[j] or stuck[j] else Status.MAX_STEPS
                verdict = Status.CONVERGED if near[j] and not blunt[j] else verdict
                status[active[j]], steps[active[j]] = Status.NOT_FINITE if broken[j] else verdict, int(own[j])
            answer, left = state.answer(problem), np.flatnonzero(~ended)
            if k and not len(left) and len(ended) == size:  # nothing of others was kept, and nothing is the caller's own
                return Outcome(answer, status, steps, excess=state.excess(problem))
            final = Potentials(*map(torch.empty_like, (answer.f, answer.g, answer.lam))) if final is None else final
            _store(final, answer, torch.from_numpy(active).to(device))
            if not len(left):
                return Outcome(final, status, steps)
            chosen = torch.from_numpy(left).to(device)
            problem, state, replayed, begun = problem.select(chosen), state.select(chosen), None, k
            given = active, wait, best, highest, patience, relented
            active, wait, best, highest, patience, relented = (x[left] for x in given)
            least = float(wait.min())
        if k and (late & (late - 1) == 0 or late % 64 == 0):
            state = method.settle(problem, state)
        if k and late == _WORTH_HASTENING:
            state = method.hasten(problem, state)
    raise AssertionError("unreachable: every problem runs out of steps")


def sobered(problem: Problem, outcome: Outcome, tolerance: float) -> Outcome:
    """The outcome, in which nothing has converged whose potentials cannot say so: not finite, or with too few digits."""
    p, status = outcome.potentials, list(outcome.status)
    size = _largest(p.f, p.g, p.lam)
    if size * torch.finfo(p.f.dtype).eps / 2 <= tolerance * number(problem.epsilon):  # of all of them
        return outcome
    usable, rounding = _soundness(problem, p)
    usable, blunt = usable.tolist(), (rounding > tolerance).tolist()
    for k, word in enumerate(status):
        if word is Status.CONVERGED and not (usable[k] and not blunt[k]):
            status[k] = Status.STALLED if usable[k] else Status.NOT_FINITE
    return replace(outcome, status=status)


def spread(problem: Problem) -> np.ndarray:
    """The range of every problem's costs and of 0, in epsilons; of points a bound."""
    cost = problem.cost
    if isinstance(cost, Dense) and len(cost.matrix) == 1:
        low, high = cost.surveyed().ends
        if high == math.inf:  # of a forbidden arc
            high = float(cost.matrix.where(cost.matrix < math.inf, -math.inf).amax())
        size = max((x for x in (abs(low), high, high - low) if math.isfinite(x)), default=0.0)
        return np.array([size / number(problem.epsilon)])
    if isinstance(cost, Dense):
        low, high = cost.matrix.amin((-2, -1)), cost.matrix.amax((-2, -1))
        if bool((high == math.inf).any()):
            high = cost.matrix.where(cost.matrix < math.inf, -math.inf).amax((-2, -1))
        low, high = (x.double().cpu().numpy() for x in (low, high))
        sizes = abs(low), high, high - low
    else:
        sizes = tuple(np.array([float(x)]) for x in (cost.range().amax(), cost.ceiling))
    return np.max([np.where(np.isfinite(x), x, 0.0) for x in sizes], 0) / number(problem.epsilon)


def dearness(problem: Problem) -> np.ndarray:
    """How many times as exact as its tolerance every solution has to be, for the repair of its plan to cost no more: one at a
    usual epsilon, five at small ones, where what a certificate fills in is priced by the largest cost.
    """
    return np.clip(spread(problem) / 16, 1.0, 5.0)


def _largest(*vectors: Tensor) -> float:
    """The sum of ``max |x|``, which torch would wake its threads for, and a device has to be waited for."""
    if vectors[0].device.type == "cpu":
        return float(sum(np.abs(x.numpy()).max() for x in vectors))
    return float(torch.stack([torch.linalg.vector_norm(x.flatten(), math.inf) for x in vectors]).sum())


_PATIENCE = 30  # checks without progress
_DEAR = 2**24  # entries from which on a step takes so long that every one is followed by a check
_DEAR_ON_DEVICE = 2**33
_CHEAP_ON_DEVICE = 2**28  # below, a check takes as long as some steps: a device waits for the questions
_WORTH_HASTENING = 8  # steps, with which most are done
_WORTH_RECORDING = 10  # the eighth has been looked at, the ninth was taken by the problems that are left, and more is to be done


def _recorded(problem: Problem, method: Method, state: Any) -> Callable[[Any], Any]:
    """The method's step as one launch; as it is where other ranks have a part in it, or it has to wait for the device."""

    def step(given: Any) -> Any:
        return method.step(problem, given, problem.epsilon)

    if not isinstance(problem.cost, Dense | Points):
        return step
    try:
        return Replayed(step, state)
    except RuntimeError:  # what else may be wrong the step itself will say
        return step


def _due(k: int, cheap: bool) -> bool:
    return k == 4 or k % 8 == 0 or (not cheap and k in (1, 2))  # 0 too


@np.errstate(all="ignore")
def _soundness(problem: Problem, p: Potentials) -> tuple[np.ndarray, np.ndarray]:
    """Whether potentials are: no NaN, no -inf, and no +inf where a hard side must place mass. And the relative error of a plan's
    entries from the rounding of potentials alone: digits lost in ``(f + g - C) / eps``, half the worst case, which entries of
    either sign do not reach together. An empty bin has no entries.
    """
    half = torch.finfo(p.f.dtype).eps / 2
    if problem.is_plain:
        size = abs(_told([*(torch.linalg.vector_norm(x, torch.inf, dim=-1) for x in (p.f, p.g)), p.lam])[0]).sum(0)
        return np.isfinite(size), size * half / number(problem.epsilon)
    usable, size = p.lam.isfinite(), p.lam.abs()
    for side, weights, x in ((problem.rows, problem.a, p.f), (problem.columns, problem.b, p.g)):
        bad = x.isnan() | (x == -torch.inf)
        if side.is_hard and number(side.bounds[0]) > 0:
            bad = bad | (x.isinf() & (weights > 0))
        usable = usable & ~bad.any(-1)
        size = size + torch.where((weights > 0) & x.isfinite(), x, 0.0).abs().amax(-1)
    usable, size = _told([usable.to(size.dtype), size])[0]
    return usable > 0, half * size / number(problem.epsilon)


def _store(final: Potentials, p: Potentials, index: Tensor) -> None:
    final.f[index], final.g[index], final.lam[index] = p.f, p.g, p.lam
