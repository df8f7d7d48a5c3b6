"""Laws for anybody's solver: a function of NumPy arrays, in or out of this library.

A solver is called as ``solver(cost, a, b, epsilon, rows, columns, mass)``: float64 arrays of shapes (n, m), (n,), (m,), a
float, two marginal objects, a float or None. It returns a plan, or an :class:`Answer` with whatever it knows.

Nothing here asks the library how a problem should be solved. The answers compared with are the general solver's; a
gradient is judged by convexity, that is by values of moved problems alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from iotsolve.certificate import certify
from iotsolve.marginals import FIXED, L2
from iotsolve.problem import Problem
from iotsolve.testing.causes import causes
from iotsolve.testing.laws import check_limits
from iotsolve.testing.references import (
    Numbers,
    Reference,
    best_potentials,
    dual_objective,
    envelope,
    numbers,
    objective,
    reference,
    repaired,
    rounding,
    violation,
)

__all__ = ["LAWS", "Answer", "Solver", "check_solver", "judge"]

Solver = Callable[..., Any]


@dataclass(frozen=True)
class Answer:
    """What a solver says. All of it is optional but the plan or the value; what is given is judged.

    Attributes:
        value: optimal objective with entropy and penalties.
        plan: shape ``(n, m)``.
        f: potentials of the rows, shape ``(n,)``, in the convention of the definitions; NaN at an empty bin says nothing.
        g: potentials of the columns, shape ``(m,)``.
        lam: multiplier of ``mass``.
        gradient: derivatives of the value by name, of ``cost``, ``a`` and ``b``; each of the shape of its datum. Finite, but
            ``inf`` at an empty bin whose weight could not be met.
        converged: False excuses an answer from the laws of accuracy; True is held against a wrong one.
    """

    value: Any = None
    plan: Any = None
    f: Any = None
    g: Any = None
    lam: Any = None
    gradient: Mapping[str, Any] | None = None
    converged: bool | None = None


def check_solver(problem: Problem, solver: Solver, *, tolerance: float = 1e-6) -> None:
    """Raise an AssertionError that names every law the solver breaks on this problem, with the numbers.

    Args:
        problem: without a batch.
        solver: called as ``solver(cost, a, b, epsilon, rows, columns, mass)``, all NumPy and floats but the two marginal
            objects. Returns a plan; or an :class:`Answer`, a dictionary with its names, or a tuple in its order. Raises
            NotImplementedError for what it does not solve, which breaks no law.
        tolerance: error allowed, relative to the mass moved and to the absolute terms of the objective.

    Example:
        >>> import ot
        >>> def emd(cost, a, b, epsilon, rows, columns, mass):
        ...     return ot.emd(a, b, cost)
        >>> check_solver(Problem([[0.0, 1.0], [2.0, 0.0]]), emd)
        Traceback (most recent call last):
        ...
        AssertionError: refusal: NaN in the cost was answered ...
    """
    broken = judge(problem, solver, tolerance=tolerance).broken
    if broken:
        raise AssertionError("\n".join(f"{law}: {found}" for law, found in broken.items()))


@dataclass(frozen=True)
class Judgement:
    """What became of one problem: whether it was taken on, whether the answer claims to be one, and the laws broken."""

    offered: bool
    converged: bool
    broken: dict[str, str]


def judge(
    problem: Problem, solver: Solver, *, laws: Mapping[str, Law] | None = None, tolerance: float = 1e-6
) -> Judgement:
    """Judge one problem by some laws, all by default. The first three are asked always: without them nothing makes sense."""
    case = Case(problem, solver, tolerance)
    try:
        case.answer  # noqa: B018
    except NotImplementedError:
        return Judgement(False, False, {})
    except _Wrong as wrong:
        return Judgement(True, False, {wrong.law: str(wrong)})
    except Exception as error:  # anything at all may come out of a stranger's code
        return Judgement(True, False, {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
    broken = {}
    for law, rule in (LAWS if laws is None else laws).items():
        if case.answer.converged is False and law not in _ALWAYS:
            continue
        found = next(iter(rule(case)), None)
        if found is not None:
            broken[law] = found
    return Judgement(True, case.answer.converged is not False, broken)


class _Wrong(Exception):
    def __init__(self, law: str, found: str) -> None:
        self.law = law
        super().__init__(found)


class Case:
    """A problem, what the solver says about it, and, when first asked for, what the general solver says."""

    def __init__(self, problem: Problem, solver: Solver, tolerance: float) -> None:
        self.problem, self.solver, self.tolerance = problem, solver, tolerance
        self.data = numbers(problem)

    @cached_property
    def answer(self) -> Answer:
        return ask(self.solver, self.data)

    @cached_property
    def truth(self) -> Reference | None:
        return _truth(self.problem)

    def causes(self, law: str) -> list[str]:
        """Common mistakes that explain why the answer breaks a law; none of what is no answer or has none to compare with."""
        try:
            answer = self.answer
        except Exception:
            return []
        return [] if self.truth is None else causes(self.problem, answer, law, self.truth)

    @property
    def moved(self) -> float:
        """Mass of the plan, or of the true one."""
        plan = self.answer.plan if self.answer.plan is not None else self.truth.plan if self.truth else np.zeros(1)
        return float(plan.sum())

    @property
    def room(self) -> float:
        """What a value within tolerance may be off by, were its plan's marginals off by the tolerance too."""
        data, truth = self.data, self.truth
        prices = sum(
            np.abs(x[(w > 0) & np.isfinite(x)]).max(initial=0.0) for x, w in ((truth.f, data.a), (truth.g, data.b))
        )
        dearly = (prices + abs(truth.lam)) * truth.plan.sum()
        return self.tolerance * (truth.scale + dearly) + rounding(self.problem)

    @property
    def feasible(self) -> bool:
        return self.off <= self.tolerance * self.moved

    @property
    def off(self) -> float:
        """Violation of the hard sides and ``mass``, beyond what the totals' own rounding makes unavoidable."""
        return max(0.0, violation(self.problem, self.answer.plan) - 1e-12 * (self.data.a.sum() + self.data.b.sum()))


def _truth(problem: Problem) -> Reference | None:
    try:
        return reference(problem)
    except RuntimeError:  # the general solver is not sure
        return None


def ask(solver: Solver, data: Numbers) -> Answer:
    """Call the solver with arrays of its own and read what it returns."""
    given = [data.cost.copy(), data.a.copy(), data.b.copy()]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        said = solver(*given, data.epsilon, data.rows, data.columns, data.mass)
    for name, mine, theirs in zip(("cost", "a", "b"), (data.cost, data.a, data.b), given, strict=True):
        if not np.array_equal(mine, theirs, equal_nan=True):
            raise _Wrong("inputs", f"the array passed as {name} was changed, from {mine.tolist()} to {theirs.tolist()}")
    return _read(said, data)


def _read(said: Any, data: Numbers) -> Answer:
    n, m = data.cost.shape
    if isinstance(said, Mapping):
        unknown = set(said) - {field.name for field in fields(Answer)}
        if unknown:
            raise _Wrong("form", f"a dictionary with {sorted(unknown)}, which are no names of an Answer")
        said = Answer(**said)
    elif isinstance(said, tuple):
        said = Answer(*said)
    elif not isinstance(said, Answer):
        said = Answer(plan=said)
    if said.plan is None and said.value is None:
        raise _Wrong("form", "neither a plan nor a value was returned")
    shapes = {"value": (), "plan": (n, m), "f": (n,), "g": (m,), "lam": ()}
    read = {name: _array(name, getattr(said, name), shape) for name, shape in shapes.items()}
    if said.converged is False:  # what it says it has not found, nobody looks at
        read |= {name: None for name, x in read.items() if x is not None and not np.isfinite(x).all()}
    for name in ("value", "plan", "lam"):
        if read[name] is not None and not np.isfinite(read[name]).all():
            raise _Wrong("finite", f"{name} = {read[name].tolist()}")
    for name, weights in (("f", data.a), ("g", data.b)):
        if read[name] is not None and np.isnan(read[name][weights > 0]).any():
            raise _Wrong("finite", f"{name} = {read[name].tolist()}")
    gradient = {}
    for name, x in (said.gradient or {}).items():
        if name not in ("cost", "a", "b"):
            raise _Wrong("form", f"a gradient in {name!r}: those in cost, a and b are judged")
        found = _array(f"gradient[{name!r}]", x, getattr(data, name).shape)
        without_end = (found == math.inf) & (getattr(data, name) == 0) & (name != "cost")  # empty: is the law's to judge
        if (np.isfinite(found) | without_end).all():
            gradient[name] = found
        elif said.converged is not False:
            raise _Wrong("finite", f"gradient[{name!r}] = {found.tolist()}")
    return replace(said, gradient=gradient, **read)


def _array(name: str, x: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if x is None:
        return None
    try:
        array = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError):
        raise _Wrong("form", f"{name} is {x!r}, not an array of real numbers") from None
    if array.shape != shape:
        raise _Wrong("form", f"{name} has shape {array.shape}, not {shape}")
    return array


# -- the laws: each yields what it found wrong -------------------------------------------------------------------------

Law = Callable[[Case], Iterator[str]]


def _refusal(case: Case) -> Iterator[str]:
    """Malformed data must be refused, or come back as NaN or unconverged: never be answered by a number."""
    for what, data in _malformed(case.data):
        try:
            answer = ask(case.solver, data)
        except Exception:
            continue
        if answer.converged is not False:
            number = answer.value if answer.value is not None else answer.plan.tolist()
            yield f"{what} was answered by {'the value' if answer.value is not None else 'the plan'} {number}"


def _malformed(data: Numbers) -> Iterator[tuple[str, Numbers]]:
    def changed(name: str, index: Any, x: float) -> Numbers:
        array = getattr(data, name).copy()
        array[index] = x
        return replace(data, **{name: array})

    full = int(np.argmax(data.a))
    yield "NaN in the cost", changed("cost", (full, int(np.argmax(data.b))), math.nan)
    yield "a NaN weight", changed("a", full, math.nan)
    yield "a negative weight", changed("b", int(np.argmax(data.b)), -float(data.b.max()))
    if data.rows == data.columns == FIXED and data.mass is None:
        yield f"a total of {data.a.sum():g} opposite one of {1.5 * data.b.sum():g}", replace(data, b=1.5 * data.b)
    highest = [float(side.bounds[1]) * w.sum() for side, w in ((data.rows, data.a), (data.columns, data.b))]
    if data.mass is not None and math.isfinite(min(highest)):
        yield f"mass = {1.5 * min(highest):g} where {min(highest):g} is allowed", replace(data, mass=1.5 * min(highest))


def _nonnegative(case: Case) -> Iterator[str]:
    """A plan has no negative entries, beyond rounding."""
    plan = case.answer.plan
    if plan is not None and plan.min() < -1e-12 * abs(plan).max():
        yield f"an entry of the plan is {plan.min()}"


def _support(case: Case) -> Iterator[str]:
    """Nothing moves over forbidden arcs, nor from or to bins of weight 0."""
    plan = case.answer.plan
    if plan is not None and (astray := float(np.abs(plan[~case.data.arcs]).sum())) > 0:
        yield f"{astray} of {plan.sum()} moves over forbidden arcs or at empty bins"


def _marginals(case: Case) -> Iterator[str]:
    """Hard sides are met: weights that are fixed, bounds."""
    if case.answer.plan is not None:
        off = case.off - _off_mass(case)
        if off > case.tolerance * max(case.moved, 1e-300):
            yield f"marginals are off by {off:.3g} in all, {off / case.moved if case.moved else math.inf:.3g} of the mass moved"


def _off_mass(case: Case) -> float:
    return 0.0 if case.data.mass is None else abs(case.answer.plan.sum() - case.data.mass)


def _mass(case: Case) -> Iterator[str]:
    """The plan moves ``mass``, where it is given."""
    if case.answer.plan is not None and _off_mass(case) > case.tolerance * (case.data.mass or 0.0):
        yield f"{case.answer.plan.sum()} is moved, mass = {case.data.mass}"


def _converged(case: Case) -> Iterator[str]:
    """What says that it has converged has marginals within tolerance, and its potentials a certificate that holds."""
    answer = case.answer
    if answer.converged is not True:
        return
    if answer.plan is not None and not case.feasible:
        share = case.off / max(case.moved, 1e-300)
        yield f"said to have converged; marginals and mass are off by {case.off:.3g}, {share:.3g} of the mass moved"
    certificate = _certificate(case)
    if certificate is not None and not certificate.holds:
        yield f"said to have converged; certificate of its potentials at tolerance {case.tolerance:g}: {certificate}"


def _certificate(case: Case) -> Any:
    answer, exact = case.answer, case.data.epsilon == 0
    if answer.f is None or answer.g is None or (exact and answer.plan is None):
        return None
    f, g = (np.where(np.isnan(x), 0.0, x) for x in (answer.f, answer.g))  # NaN: an empty bin of which nothing is said
    lam = 0.0 if answer.lam is None else float(answer.lam)
    return certify(case.problem, f, g, lam, plan=answer.plan if exact else None, tolerance=case.tolerance)


def _optimality(case: Case) -> Iterator[str]:
    """The plan's objective, by the definition, is the least there is."""
    if case.answer.plan is None or not case.feasible or case.truth is None:
        return
    plan = np.where(case.data.arcs, np.maximum(case.answer.plan, 0.0), 0.0)
    reached = objective(case.problem, plan)
    if reached > case.truth.value + case.room:
        yield f"the plan costs {reached}, the optimal value is {case.truth.value}"


def _value(case: Case) -> Iterator[str]:
    """The value is the whole objective at the optimum: transport, entropy with its mass terms, penalties."""
    value, truth = case.answer.value, case.truth
    if value is not None and truth is not None and abs(value - truth.value) > case.room:
        yield f"the value is said to be {float(value)}, the optimal value is {truth.value}"


def _potentials(case: Case) -> Iterator[str]:
    """The dual objective of the potentials, made feasible, is the optimal value."""
    answer, truth = case.answer, case.truth
    if answer.f is None or answer.g is None or truth is None:
        return
    f, g, lam = repaired(case.problem, answer.f, answer.g, 0.0 if answer.lam is None else answer.lam)
    dual = dual_objective(case.problem, f, g, lam)
    if not abs(dual - truth.value) <= case.room:
        yield f"the dual objective of the potentials is {dual}, the optimal value is {truth.value}"


def _empty_bins(case: Case) -> Iterator[str]:
    """Potentials of empty bins are the limit as the weight vanishes: the dual does not see them, gradients do."""
    answer, data = case.answer, case.data
    if answer.f is None or answer.g is None or case.truth is None:
        return
    lam = 0.0 if answer.lam is None else float(answer.lam)
    known = (np.where(data.a > 0, answer.f, -math.inf), np.where(data.b > 0, answer.g, -math.inf))
    best = best_potentials(case.problem, *known, lam)
    unit = case.tolerance * (abs(data.cost[data.arcs]).max() + data.epsilon + abs(lam) + _largest(*known))
    sides = zip("fg", (data.rows, data.columns), (answer.f, answer.g), best, (data.a, data.b), strict=True)
    for name, side, said, should, weights in sides:
        without = _jumps(data, side) & (should < 0)
        for i in np.flatnonzero((weights == 0) & ~np.isnan(said) & ~without):
            if said[i] != should[i] and not abs(said[i] - should[i]) <= 1e3 * unit:
                yield f"{name}[{i}] = {said[i]} at a bin of weight 0, whose limit is {should[i]}"


_DIGITS = 2e-7  # relative error of a value of the general solver, where it has least of them


def _jumps(data: Numbers, side: Any) -> bool:
    """Whether the value jumps as an empty bin gets weight: without entropy L2 then lets in whatever pays, at no small price."""
    return not data.epsilon and isinstance(side, L2)


def _largest(*arrays: np.ndarray) -> float:
    return max(float(abs(x[np.isfinite(x)]).max(initial=0.0)) for x in arrays)


def _units(case: Case) -> Iterator[str]:
    """Halving cost, epsilon and the strengths of penalties halves the value and keeps the plan."""
    truth, half = case.truth, _scaled(case.data, 0.5)
    if truth is None:
        return
    try:
        other = ask(case.solver, half)
    except Exception as error:
        yield f"in halved units: {type(error).__name__}: {' '.join(str(error).split())}"
        return
    if other.converged is False:
        return
    mine, theirs = (_stated(x, data) for x, data in ((case.answer, case.data), (other, half)))
    if abs(mine - 2 * theirs) > 4 * case.room:
        yield f"halving cost, epsilon and rho takes the value from {mine} to {theirs}"
    if not case.data.epsilon:
        return
    for name, factor in (("cost", 1.0), ("a", 0.5), ("b", 0.5)):
        whole, halved = (x.gradient.get(name) for x in (case.answer, other))
        if whole is not None and halved is not None:
            there = np.isfinite(whole) & np.isfinite(halved)
            size = max(_largest(whole, halved), 1e-300)
            if np.abs(halved[there] - factor * whole[there]).max(initial=0.0) > 1e3 * case.tolerance * size:
                yield f"in halved units the gradient in {name} goes from {whole.tolist()} to {halved.tolist()}"


def _scaled(data: Numbers, factor: float) -> Numbers:
    sides = {
        name: replace(side, rho=float(side.rho) * factor)
        for name, side in (("rows", data.rows), ("columns", data.columns))
        if hasattr(side, "rho")
    }
    return replace(data, cost=factor * data.cost, epsilon=factor * data.epsilon, **sides)


def _stated(answer: Answer, data: Numbers) -> float:
    if answer.value is not None:
        return float(answer.value)
    problem = _made(data)
    return objective(problem, np.where(data.arcs, np.maximum(answer.plan, 0.0), 0.0))


def _made(data: Numbers) -> Problem:
    sides = {"rows": data.rows, "columns": data.columns}
    return Problem(data.cost, data.a, data.b, epsilon=data.epsilon, mass=data.mass, **sides)


def _gradient(name: str) -> Law:
    def law(case: Case) -> Iterator[str]:
        stated, truth = case.answer.gradient.get(name), case.truth
        if stated is None or truth is None:
            return
        expected = envelope(case.problem, truth)[name]
        for i in np.argwhere(np.isinf(stated) & np.isfinite(expected)).ravel():
            yield f"the slope at the empty bin {i} is said to be {stated[i]}, and is {expected[i]}"
            return
        known = np.isfinite(stated) & np.isfinite(expected)
        for direction in _directions(case.data, name, np.subtract(stated, expected, out=np.zeros_like(stated), where=known)):
            yield from _beyond_the_tangent(case, name, stated, expected, direction)

    law.__doc__ = f"""The derivative of the value in {name}: no tangent may cross the value, which is {
        "concave in the cost" if name == "cost" else f"convex in {name}"
    }."""
    return law


def _directions(data: Numbers, name: str, error: np.ndarray) -> Iterator[np.ndarray]:
    """Where a stated gradient differs most from the formula, in moves that leave a problem with an answer."""
    if name == "cost":
        direction = np.where(data.arcs, error, 0.0)
        unit = data.epsilon or abs(data.cost[data.arcs]).max() or 1.0
    else:
        weights, side = (data.a, data.rows) if name == "a" else (data.b, data.columns)
        tied = _is_tied(data, side)
        direction = weights * (error - (weights @ error / weights.sum() if tied else 0.0))
        unit = float(weights.max())
        for i in np.flatnonzero((weights == 0) & (not tied) & (not _jumps(data, side))):
            if error[i] > 0:
                yield np.eye(len(weights))[i] * unit
    if direction.any():
        yield direction * (unit / abs(direction).max())


def _is_tied(data: Numbers, side: Any) -> bool:
    """Whether the total of a side's weights is held by the other side's, or by ``mass``."""
    return side.is_fixed and (data.mass is not None or (data.rows.is_fixed and data.columns.is_fixed))


def _beyond_the_tangent(
    case: Case, name: str, stated: np.ndarray, expected: np.ndarray, direction: np.ndarray
) -> Iterator[str]:
    truth, sign = case.truth, -1.0 if name == "cost" else 1.0
    there = direction != 0
    slope, error = (float(x[there] @ direction[there]) for x in (stated, stated - expected))
    if abs(error) <= 10 * case.tolerance * truth.scale:
        return
    empties = name != "cost" and not (direction * getattr(case.data, name)).any()
    for step in (0.3, 0.03, 0.003) if empties else (0.3, -0.3, 0.03, -0.03, 0.003, -0.003):
        data = replace(case.data, **{name: getattr(case.data, name) + step * direction})
        try:
            moved = reference(_made(data))
        except (ValueError, RuntimeError):
            continue
        value = moved.value
        sums = 1e-14 * abs(step) * (abs(stated) + abs(expected))[there] @ abs(direction)[there]
        room = 1e-2 * case.tolerance * truth.scale + rounding(case.problem) + float(sums) + _DIGITS * moved.scale
        if sign * (value - truth.value - step * slope) < -room:
            yield (
                f"the slope of the value along {np.round(direction, 6).tolist()} is said to be {slope}; a step of {step} "
                f"takes the value from {truth.value} to {value}, which is {'above' if sign < 0 else 'below'} the tangent"
            )
            return


def _limits(case: Case) -> Iterator[str]:
    """Strong and weak penalties and small epsilon approach their limits at the known rates."""

    def value(problem: Problem) -> float:
        data = numbers(problem)
        try:
            answer = ask(case.solver, data)
        except NotImplementedError:
            return math.nan
        if answer.converged is False:
            return math.nan
        return _stated(answer, data)

    try:
        check_limits(case.problem, solver=value, factors=(64.0,), tolerance=10 * case.tolerance)
    except AssertionError as error:
        yield " ".join(str(error).split())
    except Exception as error:
        yield f"on the way to a limit: {type(error).__name__}: {' '.join(str(error).split())}"


def _bounds(case: Case) -> Iterator[str]:
    """The library's certificate of the potentials encloses the optimal value."""
    certificate, truth = _certificate(case), case.truth
    if certificate is None or truth is None:
        return
    own = objective(case.problem, truth.plan) - dual_objective(case.problem, truth.f, truth.g, truth.lam)
    room = 1e-2 * case.tolerance * (truth.scale + certificate.scale) + abs(own) + rounding(case.problem)
    if not certificate.dual - room <= truth.value <= certificate.primal + room:
        yield f"{certificate}; the optimal value is {truth.value}"


LAWS: dict[str, Law] = {
    "non-negative": _nonnegative,
    "support": _support,
    "converged": _converged,
    "marginals": _marginals,
    "mass": _mass,
    "optimality": _optimality,
    "value": _value,
    "potentials": _potentials,
    "empty bins": _empty_bins,
    "gradient in the cost": _gradient("cost"),
    "gradient in a": _gradient("a"),
    "gradient in b": _gradient("b"),
    "units": _units,
    "limits": _limits,
    "certificate": _bounds,
    "refusal": _refusal,
}
_ALWAYS = ("refusal", "certificate")
