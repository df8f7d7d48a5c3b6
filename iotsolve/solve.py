"""The front door: pick a solver, run it, hand over the solution."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from iotsolve.accelerated import TINY, Accelerated, relaxed_together
from iotsolve.certificate import Certificate
from iotsolve.costs import Dense, Points, quiet
from iotsolve.direct import Direct
from iotsolve.distributed import Ranks, Sharded, ranks_of
from iotsolve.exact import Exact, is_line
from iotsolve.gradient import Envelope, Gradient, Implicit, Unroll
from iotsolve.interior import Interior
from iotsolve.kernels.once import check_reverse
from iotsolve.kernels.uncompiled import uncompiled
from iotsolve.marginals import number
from iotsolve.newton import Newton
from iotsolve.plans import is_quick, out_of_batch, plan_of
from iotsolve.problem import Potentials, Problem, in_double, in_matrix, log_scaling, saturated, weighed_in_double
from iotsolve.sinkhorn import Sinkhorn
from iotsolve.solution import Solution, SolveError
from iotsolve.solver import Outcome, Status, iterate, judge, sobered, spread
from iotsolve.support import carrying_arcs, separation
from iotsolve.validation import check_tolerance, default_tolerance
from iotsolve.watch import Watch

__all__ = ["attainable", "run", "solve"]

Solver = Sinkhorn | Newton | Interior | Exact


@uncompiled
def solve(
    problem: Problem,
    solver: Solver | None = None,
    *,
    tolerance: float | None = None,
    gradient: Gradient | None = None,
    init: Solution | Potentials | None = None,
    throw: bool = True,
) -> Solution:
    """Solve an optimal-transport problem.

    Args:
        problem: what to solve; a batch is solved problem by problem, each with its own status and step count.
        solver: ``Sinkhorn(...)`` or ``Newton(...)`` for ``epsilon > 0``, ``Exact()`` for ``epsilon = 0``, ``Interior()`` for
            both; chosen by itself if not given.
        tolerance: relative error to solve to at ``epsilon > 0`` if no solver is given; by default 1e-8 in float64 and 1e-5 in
            float32. A solver has its own.
        gradient: how torch outputs are differentiated: ``Envelope()`` (default: the value, exactly), ``Implicit()`` or
            ``Unroll(steps)``.
        init: a solution or potentials of a similar problem to start from (``epsilon > 0``); from nothing if the solver chosen by
            itself does not find back from it.
        throw: raise if a problem does not converge (default); False returns the solution with its status.

    Returns:
        A :class:`Solution`; NumPy in, NumPy out, torch in, torch out.

    Raises:
        SolveError: if ``throw`` and some problem did not converge; carries status, solution and certificate.
        ValueError: if the solver does not fit the problem.
        RuntimeError: inside the transforms of ``torch.func``, or if data carry derivatives of forward mode.

    Example:
        >>> solution = solve(Problem(np.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1))
        >>> solution.status.name, bool(solution.certificate.holds)
        ('CONVERGED', True)
    """
    ranks = ranks_of(getattr(problem, "cost", None))
    with ranks.together():
        check_tolerance(tolerance)
        if solver is None and isinstance(problem, Problem):
            solver = Exact() if problem.is_exact else _Automatic(tolerance)
            tolerance = None
        _check_arguments(problem, solver, gradient, init, tolerance)
        check_reverse(problem.tensors())
    if isinstance(ranks, Ranks):
        ranks.agree(
            f"the ranks do not solve alike, here by {solver} with gradient = {gradient}: give all the same solver and gradient.",
            {"solver and gradient": zlib.crc32(f"{solver} {gradient} {init is None}".encode())},
        )
    if isinstance(gradient, Implicit | Unroll) and not isinstance(solver, Exact):
        solver = replace(solver, stationary=True)
    problem = problem.current()
    watch = problem.watch or Watch.over(problem.tensors(), as_numpy=problem.as_numpy)
    given, attained = problem, attainable(problem)
    problem = attained.remembering()
    with torch.no_grad():
        working = problem.working()
        if not problem.is_exact and (working.cost.device.type == "cpu" or _is_held(working, solver.tolerance)):
            working = weighed_in_double(working)
        start = None if init is None else _start(working, init)
        pinned = saturated(working)
        flat = pinned.flat()
        outcome = run(flat, solver, start)
    tolerance = None if isinstance(solver, Exact) else solver.tolerance

    def solution_of(outcome: Outcome) -> Solution:
        batch, plan = problem.batch_shape, outcome.plan
        shapes = ((*batch, -1), (*batch, -1), batch)
        found = (outcome.potentials.f, outcome.potentials.g, outcome.potentials.lam)
        p = Potentials(*(x.reshape(shape) for x, shape in zip(found, shapes, strict=True)))
        if pinned is not working:
            p = _released(working, pinned, p)
        if attained is not given:
            p = _separated(given, problem, p)
        p = working.gauge(p)
        p = p.to(problem.working_dtype) if p.f.dtype != problem.working_dtype and _is_brief(flat, p, solver) else p
        status, steps = _shaped(outcome.status, batch, object), _shaped(outcome.steps, batch, np.int64)
        if plan is not None:
            plan = out_of_batch(plan) if plan.is_sparse else plan.reshape(problem.shape)
        excess, kept = outcome.excess, attained is given and pinned is working and working.dtype == p.f.dtype
        excess = excess.reshape(p.f.shape) if kept and excess is not None and excess.dtype == p.f.dtype else None
        return Solution(problem, p, status, steps, gradient or Envelope(), plan, tolerance, watch, excess)

    solution, missed, may_miss = solution_of(outcome), False, _may_miss(flat, solver)
    finer = default_tolerance(problem.dtype) if tolerance is None else tolerance
    for _ in range(_SHARPENED if may_miss else 0):
        if not (misses := _missing(solution)).any():
            break
        missed, finer = True, finer / _SHARPER
        status = [Status.STALLED if miss else word for miss, word in zip(misses.tolist(), outcome.status, strict=True)]
        sharper = replace(solver, tolerance=finer)
        with torch.no_grad():
            outcome = _continued(
                # from nothing if somebody's start may have led there
                flat, replace(outcome, status=status),
                lambda left, p, sharper=sharper: run(left, sharper, p if start is None else None),
            )
        solution = solution_of(outcome)
    doubtful = not solution.all_converged and not (isinstance(solver, Exact) or solver.stationary)
    unjudged = _is_stiff(problem, tolerance) or _is_blunt(problem, solution.found, tolerance)
    unjudged = unjudged or (flat.cost.device.type != "cpu" and not problem.is_exact and _is_coarse(flat, tolerance))
    sorted_ = problem.is_exact and is_line(flat) and not callable(flat.cost.metric)  # whose order is the answer
    if (problem.is_exact and not sorted_) or unjudged or doubtful or missed:
        # nobody else has judged what the solvers claim
        solution = _told(solution, _judged(solution.status, solution.certificate))
    if (beyond := _beyond(solution)).any():
        solution = _told(solution, np.where(beyond, Status.NOT_FINITE, solution.status)[()])
    if not problem.is_checked and bool((contradictory := problem.contradicts_itself()).any()):
        solution = _told(solution, np.where(contradictory.cpu().numpy(), Status.INFEASIBLE, solution.status)[()])
    if throw and not solution.all_converged:
        raise SolveError(next(s for s in np.ravel(solution.status) if s is not Status.CONVERGED), solution)
    return solution


def run(
    problem: Problem, solver: Solver | None, start: Potentials | None = None, *, tolerance: float | None = None
) -> Outcome:
    """The solver's bare result for a detached flat batch: what a training step uses, without anything around it.

    Without a solver the automatic one, to a relative marginal error.
    """
    solver = _Automatic(tolerance, stationary=True) if solver is None else solver
    if not isinstance(solver, Exact) and solver.tolerance is None:
        solver = replace(solver, tolerance=default_tolerance(problem.dtype))  # which what they read may not have
    with quiet(problem.cost):
        chosen = isinstance(solver, _Automatic) or problem.cost.device.type != "cpu"
        if chosen and not problem.is_exact and _is_held(problem, solver.tolerance):
            return _sharply(problem, solver, start)
        if isinstance(problem.cost, Points) and not (problem.cost.is_bilinear or problem.is_exact):
            problem = in_matrix(problem)  # of metrics whose blocks take longer to make than to read
        return _ran(problem, solver, start)


def _ran(problem: Problem, solver: Solver, start: Potentials | None) -> Outcome:
    if isinstance(solver, Sinkhorn):
        return iterate(problem, solver, start)
    return solver.run(problem, start) if isinstance(solver, _Automatic | Newton) else solver.run(problem)


def _sharply(problem: Problem, solver: Solver, start: Potentials | None) -> Outcome:
    """The outcome in the problem's precision of the same problem in float64, as a matrix."""
    exact, begun = in_matrix(problem.to(torch.float64)), None if start is None else start.to(torch.float64)
    found = _ran(exact, solver, begun)
    return sobered(problem, replace(found, potentials=found.potentials.to(problem.a.dtype)), solver.tolerance)


def _check_arguments(problem: Problem, solver: Any, gradient: Any, init: Any, tolerance: Any) -> None:
    for name, value, kinds in (
        ("problem", problem, (Problem,)),
        ("solver", solver, (Sinkhorn, Newton, Interior, Exact, _Automatic)),
        ("gradient", gradient, (Envelope, Implicit, Unroll, type(None))),
        ("init", init, (Solution, Potentials, type(None))),
    ):
        if not isinstance(value, kinds):
            known = " or ".join(kind.__name__ for kind in kinds if kind not in (type(None), _Automatic))
            raise ValueError(
                f"{name} = {value!r}: must be an object of type {known}. Was the class passed without brackets?"
            )
    if isinstance(gradient, Implicit | Unroll) and problem.is_exact:
        raise ValueError(
            f"gradient = {gradient} with epsilon = 0: the plan of a linear program is piecewise constant and has no useful "
            "derivative. Use epsilon > 0, or Envelope() for the value."
        )
    if init is not None and isinstance(solver, Interior | Exact):
        raise ValueError(
            f"init with solver = {solver}: it has no use for a start. Leave init out, or at epsilon > 0 the solver."
        )
    if isinstance(solver, Interior) and isinstance(problem.cost, Sharded):
        raise ValueError(
            f"solver = {solver} with a sharded cost: it factors a matrix, and its rows are on many ranks. Take Newton(), or "
            "leave the solver out."
        )
    if tolerance is not None:
        raise ValueError(
            f"tolerance = {tolerance!r} beside solver = {solver}: a solver has its own. Pass it there, or leave the solver out."
        )
    if isinstance(solver, Sinkhorn | Newton if problem.is_exact else Exact):
        raise ValueError(
            f"solver = {solver} with epsilon = {number(problem.epsilon):g}: Exact() solves epsilon = 0, "
            "Sinkhorn() and Newton() epsilon > 0, Interior() both. Change the one or the other, or leave the solver out."
        )


def _is_brief(problem: Problem, p: Potentials, solver: Solver) -> bool:
    """Whether potentials of a flat problem may be rounded to its cost's precision: a small part of the tolerance, and of what a
    certificate fills in for it.
    """
    if problem.is_exact:
        return True
    tolerance = default_tolerance(problem.dtype) if solver.tolerance is None else solver.tolerance
    size = sum(float(torch.where(x.isfinite(), x, 0.0).abs().amax()) for x in (p.f, p.g, p.lam))
    rounding, room = size * torch.finfo(problem.dtype).eps / 2, _UNSEEN * tolerance * number(problem.epsilon)
    return rounding <= room and rounding * float(spread(problem).max()) / _CHEAP <= room


_UNSEEN, _CHEAP = 0.125, 16.0  # of the tolerance; range of costs in epsilons from which on what is filled in is dear


def _is_stiff(problem: Problem, tolerance: float | None) -> bool:
    """Whether the rounding of exponents, at a side's price of mass, may exceed the tolerance unseen by the stopping rule."""
    if problem.is_exact:
        return False
    tolerance = default_tolerance(problem.dtype) if tolerance is None else tolerance
    prices = [side.recession for side in (problem.rows, problem.columns) if math.isfinite(side.recession)]
    return max(prices, default=0.0) * torch.finfo(problem.working_dtype).eps > tolerance * number(problem.epsilon)


def _is_blunt(problem: Problem, p: Potentials, tolerance: float | None) -> bool:
    """Whether a closed form's potentials, of this size and in the dtype they are kept in, may lack digits of the tolerance.

    It is right but for rounding, which no stopping rule has looked at.
    """
    if problem.is_exact or not (problem.rows.is_free or problem.columns.is_free):
        return False
    tolerance = default_tolerance(problem.dtype) if tolerance is None else tolerance
    size = sum(float(torch.where(x.isfinite(), x, 0.0).abs().amax()) for x in (p.f.detach(), p.g.detach()))
    return 2 * size * torch.finfo(p.f.dtype).eps > tolerance * number(problem.epsilon)


def _may_miss(problem: Problem, solver: Solver | None) -> bool:
    """Whether a flat problem's certificate, which is a few passes, may ask for more than the solver's rule: at a tiny epsilon."""
    cost = problem.cost
    if problem.is_exact:
        return False
    if cost.device.type != "cpu":
        quick = _is_held(problem, solver.tolerance)
    else:
        quick = cost.is_compiled if isinstance(cost, Dense) else math.prod(cost.shape) <= _FEW
    if not quick or isinstance(solver, Interior) or not (spread(problem) > _TINY_EPSILON).any():
        return False
    if problem.is_full:
        return True
    carrying = cost.between(problem.a > 0, problem.b > 0).range()  # what stands at empty bins makes nothing dear
    return bool((carrying > _TINY_EPSILON * number(problem.epsilon)).any())


def _told(solution: Solution, status: Any) -> Solution:
    """The solution with another status, and the certificate it has if somebody has asked for it."""
    known = {name: x for name, x in solution.__dict__.items() if name == "certificate"}
    solution = replace(solution, status=status)
    solution.__dict__.update(known)
    return solution


def _beyond(solution: Solution) -> np.ndarray:
    """Of which problems that somebody has looked at the dtype that came in cannot hold the mass or the value."""
    known, largest = solution.__dict__.get("certificate"), torch.finfo(solution.problem.dtype).max
    if known is None or solution.problem.dtype == torch.float64:
        return np.zeros(1, bool)
    return np.asarray((np.abs(known.dual) > largest) | (known.mass > largest)) & np.isfinite(known.dual)


def _missing(solution: Solution) -> np.ndarray:
    """Which problems of a batch have converged beside a certificate that does not hold."""
    converged = np.frompyfunc(lambda word: word is Status.CONVERGED, 1, 1)(solution.status)
    return np.ravel(np.asarray(converged, bool) & ~np.asarray(solution.certificate.holds, bool))


_FEW = 2**22  # arcs of points whose certificate takes less than a solve at a tiny epsilon
_TINY_EPSILON = 80.0  # ranges of the costs in epsilons
_SHARPER, _SHARPENED = 20.0, 3  # by how much to sharpen the tolerance, and how often


def _judged(status: Any, certificate: Certificate) -> Any:
    """The status, in which CONVERGED needs a certificate, and a certificate outweighs steps that ran out."""

    def one(word: Status, holds: bool, finite: bool) -> Status:
        if holds and word in (Status.MAX_STEPS, Status.STALLED):
            return Status.CONVERGED
        if holds or word is not Status.CONVERGED:
            return word
        return Status.STALLED if finite else Status.NOT_FINITE

    return np.frompyfunc(one, 3, 1)(status, certificate.holds, np.isfinite(certificate.dual))


@dataclass(frozen=True)
class _Automatic:
    """First order while it is quick; what it leaves goes to second order, or to an interior point where that fits."""

    tolerance: float | None = None
    stationary: bool = False

    def run(self, problem: Problem, start: Potentials | None) -> Outcome:
        """Solve every problem of a detached flat batch; a start that is good enough is the answer."""
        if start is None:
            return self._search(problem, None)
        judged = self._judged(problem, start, [0] * problem.batch_shape[0])
        if math.prod(problem.shape[-2:]) <= TINY:
            judged = self._factored(problem, judged, is_near=True)
        done = _continued(problem, judged, self._search)
        # a start that leads nowhere is no reason to fail
        return _continued(problem, done, lambda left, _: self._search(left, None), (*_UNFINISHED, Status.NOT_FINITE))

    def _judged(self, problem: Problem, start: Potentials, steps: list[int]) -> Outcome:
        """Which problems somebody's potentials solve."""
        double = in_double(problem, costs=False)
        p = start.to(torch.float64)
        error, dual, _ = judge(double, p, *plan_of(double, p, lazy=True).marginals(), stationary=self.stationary)
        good, yes, no = (error <= self.tolerance / 2) & dual.isfinite(), Status.CONVERGED, Status.MAX_STEPS
        status = [yes if x else no for x in good.tolist()]
        return sobered(problem, Outcome(start, status, steps), self.tolerance)

    def _search(self, problem: Problem, start: Potentials | None, *, together: bool = True) -> Outcome:
        if together and start is None and (found := relaxed_together(problem, self.tolerance)) is not None:
            return _continued(
                problem, self._judged(problem, *found), lambda left, _: self._search(left, None, together=False)
            )
        if not (fits := Accelerated.fits(problem)):
            problem = in_matrix(problem)
            fits = Accelerated.fits(problem)
        count, n, m = problem.shape
        if fits:
            few = n * m <= TINY and Direct.fits(problem)
            asked = Accelerated(self.tolerance).patient(problem, 10 + 2 * min(n, m) + _BOOKKEEPING // count if few else 1000)
            quick = asked.within_reach(problem)
            stiff = few and start is None and count * n * m >= _MANY and (spread(problem) > _STIFF).any()
            done = self._begun(problem, quick) if stiff else quick.run(problem, start)
            if quick == asked and all(word is Status.CONVERGED for word in done.status):
                return done
        options = {"tolerance": self.tolerance, "stationary": self.stationary}
        first, newton, interior = Sinkhorn(**options), Newton(**options), Interior(**options)
        if fits:
            if (is_factored := n * m <= _QUICKLY_FACTORED):
                done = self._factored(problem, done)
            done = _continued(problem, done, lambda left, _: quick.run(left, _annealed(left)))
            if quick != asked:  # there is more to do for all
                done = replace(done, status=[_MORE.get(word, word) for word in done.status])
            problem = in_matrix(problem)
            done = _continued(problem, done, newton.run)
            if not is_factored:
                done = self._factored(problem, done)
        elif isinstance(problem.cost, Dense) and problem.cost.is_compiled:
            if count >= _SEVERAL and n * m <= _FEW_ENTRIES:  # a sweep of many takes little longer than one of one
                done = _continued(problem, iterate(problem, replace(first, max_steps=_QUICK), start), newton.run)
            else:
                done = newton.run(problem, _annealed(problem) if start is None else start)
        else:
            second, small = is_quick(problem.cost), n * m <= _FITS
            played = isinstance(problem.cost, Dense) and problem.dtype == torch.float64 and n * m > _FEW_ENTRIES
            sweeps = _PLAYED if played else _QUICK if second or small else _PATIENT
            done = _climbed(problem, replace(first, max_steps=sweeps), start)
            if second or played or (isinstance(problem.cost, Points | Sharded) and not small):
                done = _continued(problem, done, newton.run)
        if n * m <= _FITS and not isinstance(problem.cost, Sharded):
            done = _continued(problem, done, lambda left, _: interior.run(left))
        sweeps = max(_LAST, 10_000 * _FITS // max(n * m, _FITS))
        last = replace(first, max_steps=sweeps)
        return _continued(problem, done, lambda left, p: iterate(left, last, p), (*_UNFINISHED, Status.NOT_FINITE))

    def _begun(self, problem: Problem, quick: Accelerated) -> Outcome:
        """Sweeps as far as they are quick, then a few steps by systems that are factored, which leave a certificate nothing to
        correct.
        """
        done = replace(quick, tolerance=max(_NEARLY, quick.tolerance)).run(problem)
        done = replace(done, status=[_MORE.get(word, word) for word in done.status])
        return self._factored(problem, done, is_near=True)

    def _factored(self, problem: Problem, done: Outcome, *, is_near: bool = False) -> Outcome:
        """The outcome with what has not converged solved by systems that are factored, if that does it and is not too dear: from
        nothing, or from potentials that may be near.
        """

        def anew(left: Problem, p: Potentials) -> Outcome:
            found = Direct(self.tolerance).run(left, p if is_near else None)
            good = torch.tensor([word is Status.CONVERGED for word in found.status], device=p.f.device)
            sides = ((found.potentials.f, p.f), (found.potentials.g, p.g))
            f, g = (torch.where(good[:, None], new, old) for new, old in sides)
            return replace(found, potentials=Potentials(f, g, p.lam))

        return _continued(problem, done, anew) if Direct.fits(problem) else done


def _climbed(problem: Problem, solver: Sinkhorn, start: Potentials | None) -> Outcome:
    """Sweeps in a precision that is cheaper as far as they are good for, then in the problem's own."""
    least = _WORTH_CLIMBING if problem.dtype == torch.float64 else _WORTH_CLIMBING_ON_DEVICE
    climbs = start is None and isinstance(problem.cost, Points | Sharded) and math.prod(problem.shape) >= least
    rough = problem.cost.rough() if climbs else None
    if rough is None:
        return iterate(problem, solver, start)
    cost, unit = rough
    reach = float(problem.cost.range().amax()) / number(problem.epsilon)  # largest exponent, whose rounding the sums see
    enough = max(_LOOSE, _ROUNDINGS * unit * reach)
    if enough > _WORTHLESS or solver.threshold(problem) >= enough:
        return iterate(problem, solver, start)
    below = problem.to(cost.dtype).with_cost(cost)
    first = _climbed(below, replace(solver, tolerance=enough, stationary=False), None)
    p = Potentials(*(x.to(problem.a.dtype) for x in (first.potentials.f, first.potentials.g, first.potentials.lam)))
    if not all(bool(x.isfinite().all()) for x in (p.f, p.g, p.lam)):
        return iterate(problem, solver, start)
    taken = max(first.steps)
    done = iterate(problem, replace(solver, max_steps=max(1, solver.max_steps - taken)), p)
    return replace(done, steps=[x + taken for x in done.steps])


_WORTH_CLIMBING = 2**18  # entries
_WORTH_CLIMBING_ON_DEVICE = 2**29  # where a sweep of fewer takes less time than to ask for it
_LOOSE, _ROUNDINGS, _WORTHLESS = 1e-5, 4.0, 0.1  # relative errors of marginals at which a cheaper precision stops


def _is_held(problem: Problem, tolerance: float | None) -> bool:
    """Whether a problem is solved in float64, and points as a matrix: of few arcs, where their own digits end and which costs no
    time; on a device also of more whose exponents float32 has not the digits for. Its batches of matrices have a kernel of their
    own.
    """
    cost, entries = problem.cost, math.prod(problem.shape)
    if not isinstance(cost, Points) and cost.dtype != torch.float32:
        return False
    if cost.device.type == "cpu":
        return entries <= _HELD
    if isinstance(cost, Sharded) or entries > math.prod(problem.shape[-2:]):
        return False
    if entries <= _HELD_ON_DEVICE or entries > _HELD_IF_FINE:
        return entries <= _HELD_ON_DEVICE
    return cost.dtype == torch.float64 or _is_coarse(problem, tolerance)


def _is_coarse(problem: Problem, tolerance: float | None) -> bool:
    """Whether the rounding of exponents in float32 may exceed the tolerance."""
    tolerance = default_tolerance(problem.dtype) if tolerance is None else tolerance
    coarse = problem.cost.dtype != torch.float64
    return coarse and float(spread(problem).max()) * torch.finfo(torch.float32).eps / 2 > tolerance


_HELD, _HELD_ON_DEVICE, _HELD_IF_FINE = 2**18, 2**20, 2**24  # arcs
_MORE = {Status.CONVERGED: Status.MAX_STEPS}
_STIFF, _NEARLY = 250.0, 1e-3  # range of costs in epsilons, and error of marginals, from which on Newton's steps are quicker
_BOOKKEEPING, _MANY = 200, 2**11  # sweeps of few bins, and arcs in all, from which on calling another solver costs less


def _annealed(problem: Problem) -> Potentials:
    """Loose potentials at the problem's epsilon, by way of as many larger ones as the range of each problem's costs asks for."""
    target = number(problem.epsilon)
    top = _TOP * problem.cost.between(problem.a > 0, problem.b > 0).range().double()
    rungs = ((top / target).log() / math.log(_RATIO)).ceil().clamp(min=0)
    p = Potentials(torch.zeros_like(problem.a), torch.zeros_like(problem.b), torch.zeros_like(problem.a[:, 0]))
    for k in range(int(rungs.max()), -1, -1):
        rung = problem.with_epsilon(target * _RATIO**k)
        rough = Accelerated(_ROUGH, max_steps=32, slow=1.0) if Accelerated.fits(rung) else Newton(_ROUGH, max_steps=8)
        for chosen, begun in ((rungs == k, False), (rungs > k, True)):
            index = chosen.nonzero()[:, 0]
            if not len(index):
                continue
            whole = len(index) == len(rungs)
            given = p if whole else Potentials(p.f[index], p.g[index], p.lam[index])
            found = rough.run(rung if whole else rung.select(index), given if begun else None).potentials
            sound = found.f.isfinite().all(-1) & found.g.isfinite().all(-1) & found.lam.isfinite()
            p.f[index[sound]], p.g[index[sound]], p.lam[index[sound]] = found.f[sound], found.g[sound], found.lam[sound]
    return p


_TOP, _RATIO, _ROUGH = 0.1, 6.0, 0.03  # what the largest epsilon reaches, in cost ranges, ratio of successive ones, tolerance
_LAST = 200  # sweeps when nothing else has helped
_FITS = 10**6  # arcs
_QUICKLY_FACTORED = 2**17  # arcs up to which steps of systems that are factored cost less than those that are not
_QUICK = 96  # sweeps, annealing included: about the price of an interior point
_PLAYED = 500  # sweeps that a device plays without being asked
_FEW_ENTRIES = 2**14  # with which interior points are quick even there
_SEVERAL = 8  # problems that are swept together before each is taken alone
_PATIENT = 10_000  # sweeps where a step of second order costs as much as a hundred


_UNFINISHED = Status.MAX_STEPS, Status.STALLED


def _continued(
    problem: Problem,
    done: Outcome,
    go_on: Callable[[Problem, Potentials], Outcome],
    unfinished: tuple[Status, ...] = _UNFINISHED,
) -> Outcome:
    """The outcome with what has not converged taken further; what leads out of the finite is said, and not taken."""
    if done.status.count(Status.CONVERGED) == len(done.status):  # of a thousand problems told at once
        return done
    left = [i for i, status in enumerate(done.status) if status in unfinished]
    if not left:
        return done
    index, p = torch.as_tensor(left, device=problem.cost.device), done.potentials
    whole = len(left) == len(done.status)  # no copy of the costs
    given = p if whole else Potentials(p.f[index], p.g[index], p.lam[index])
    more = go_on(problem if whole else problem.select(index), given)
    status, steps = list(done.status), list(done.steps)
    for i, word, taken in zip(left, more.status, more.steps, strict=True):
        status[i] = word if word is Status.CONVERGED or status[i] is not Status.NOT_FINITE else status[i]
        steps[i] += taken
    finite = [k for k, word in enumerate(more.status) if word is not Status.NOT_FINITE]
    found, old = (more.potentials.f, more.potentials.g, more.potentials.lam), (p.f, p.g, p.lam)
    if not whole or len(finite) < len(left):
        found = (x.index_copy(0, index[finite], y[finite]) for x, y in zip(old, found, strict=True))
    return Outcome(Potentials(*found), status, steps)


def _start(problem: Problem, init: Solution | Potentials) -> Potentials:
    p = init.found if isinstance(init, Solution) else init
    n, m = problem.shape[-2:]
    f, g, lam = (
        problem.enter(f"init.{name}", getattr(p, name), *size).detach().to(problem.a)
        for name, size in (("f", (n,)), ("g", (m,)), ("lam", ()))
    )
    p, flat, shape = Potentials(f, g, lam), problem.flat(), problem.batch_shape
    f, g = p.f.expand(*shape, n).reshape(flat.a.shape), p.g.expand(*shape, m).reshape(flat.b.shape)
    lam = p.lam.expand(shape).reshape(-1).clone()
    return Potentials(f.clone(), g.clone(), lam if problem.mass is not None else torch.zeros_like(lam))  # of no constraint


def attainable(problem: Problem) -> Problem:
    """Forbid the arcs that are 0 in every balanced plan: with them the dual has no maximiser and scaling never arrives.

    No plan and no value is lost by it, and the gradient in the cost of such an arc is 0.
    """
    if problem.is_exact or not (problem.rows.is_fixed and problem.columns.is_fixed) or problem.cost.all_finite():
        return problem
    if problem.__dict__.get("is_attained"):  # by its owner, who has asked before
        return problem
    matrix = problem.cost.dense()
    n, m = problem.shape[-2:]
    filled = ((problem.a > 0).unsqueeze(-1) & (problem.b > 0).unsqueeze(-2)).reshape(-1, n, m)
    allowed = (matrix.detach().isfinite().reshape(-1, n, m) & filled).cpu().numpy()
    a, b = (  # what each side asks for, which is not its weights where both ends are another number than 1
        number(side.bounds[0]) * weights.detach().double().cpu().numpy().reshape(len(allowed), -1)
        for side, weights in ((problem.rows, problem.a), (problem.columns, problem.b))
    )
    kept = np.stack([carrying_arcs(*arcs) for arcs in zip(allowed, a, b, strict=True)])
    keep = (torch.as_tensor(kept, device=matrix.device) | ~filled).reshape(matrix.shape)
    if bool((keep | ~matrix.isfinite()).all()):
        return problem
    return problem.with_tensors({"cost": torch.where(keep, matrix, torch.inf)})


def _released(problem: Problem, pinned: Problem, p: Potentials) -> Potentials:
    """The pinned problem's potentials in the gauge that bounds allow: nowhere above 0 at an upper, nor below it at a lower."""
    at_least, at_most = [], []
    for side, held, w, x, sign in (
        (problem.rows, pinned.rows, problem.a, p.f, 1.0),
        (problem.columns, pinned.columns, problem.b, p.g, -1.0),
    ):
        if held is side:
            continue
        if number(held.hi) == number(side.hi):
            (at_least if sign > 0 else at_most).append(sign * torch.where(w > 0, x, -math.inf).amax(-1))
        else:
            (at_most if sign > 0 else at_least).append(sign * torch.where(w > 0, x, math.inf).amin(-1))
    t = (torch.stack(at_least).amax(0) if at_least else torch.stack(at_most).amin(0)).unsqueeze(-1)
    return Potentials(p.f - t, p.g + t, p.lam)


def _separated(given: Problem, problem: Problem, p: Potentials) -> Potentials:
    """The same plan by potentials at which the arcs that :func:`attainable` forbade carry nothing in the problem as given.

    The dual's supremum is at infinity there; this is as near as rounding can tell.
    """
    n, m = given.shape[-2:]
    before, after = (x.cost.dense().detach().double().reshape(-1, n, m).cpu().numpy() for x in (given, problem))
    f, g = p.f.double().reshape(-1, n).cpu().numpy(), p.g.double().reshape(-1, m).cpu().numpy()
    filled = ((given.a > 0).unsqueeze(-1) & (given.b > 0).unsqueeze(-2)).reshape(-1, n, m).cpu().numpy()
    negligible = number(given.epsilon) * -2.0 * math.log(torch.finfo(given.working_dtype).eps)
    moved = []
    for old, new, u, v, full in zip(before, after, f, g, filled, strict=True):
        kept, dropped = full & np.isfinite(new), full & np.isfinite(old) & ~np.isfinite(new)
        excess = np.where(dropped, u[:, None] + v[None, :] - np.where(dropped, old, 0.0) + negligible, 0.0)
        moved.append(separation(kept, dropped, excess))
    u, v = (torch.as_tensor(np.stack(x), device=p.f.device).to(p.f.dtype) for x in zip(*moved, strict=True))
    f, g = p.f + u.reshape(p.f.shape), p.g + v.reshape(p.g.shape)
    working, eps = given.working(), number(given.epsilon)
    idle_f = working.cost.softmin(log_scaling(working.b, g, eps), eps, axis=-1)
    idle_g = working.cost.softmin(log_scaling(working.a, f, eps), eps, axis=-2)
    return Potentials(torch.where(given.a > 0, f, idle_f), torch.where(given.b > 0, g, idle_g), p.lam)


def _shaped(values: list[Any], batch: tuple[int, ...], dtype: Any) -> Any:
    array = np.empty(len(values), dtype=dtype)
    array[:] = values
    return values[0] if not batch else array.reshape(batch)
