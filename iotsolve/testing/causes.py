"""What a wrong answer is the right answer to: common mistakes, each as the number that it leads to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import kl_div, xlogy

from iotsolve.marginals import KL
from iotsolve.problem import Problem
from iotsolve.testing.references import (
    SOFT,
    Numbers,
    Reference,
    envelope,
    numbers,
    objective,
    penalty,
    reference,
    terms,
)

__all__ = ["causes"]

_NEAR = 1e-5  # relative: an answer may be as far from what its mistake leads to as solvers are from their limits


def causes(problem: Problem, answer: Any, law: str, truth: Reference) -> list[str]:
    """The mistakes, out of a list of common ones, that explain what an answer has wrong by a law.

    Args:
        problem: without a batch.
        answer: an :class:`~iotsolve.testing.Answer` whose parts are arrays or None.
        law: one that it breaks.
        truth: ``reference(problem)``.
    """
    data = numbers(problem)
    if law in ("converged", "marginals", "mass", "optimality", "value"):
        found = _of_plan_and_value(problem, data, answer, truth)
    elif law == "potentials":
        found = _of_potentials(data, answer, truth)
    elif law.startswith("gradient in "):
        found = _of_gradients(problem, data, answer, law.split()[-1], truth)
    else:
        return []
    return list(dict.fromkeys(found))


def _of_plan_and_value(problem: Problem, data: Numbers, answer: Any, truth: Reference) -> Iterator[str]:
    plan, value = answer.plan, answer.value
    if plan is not None:
        yield from (name for name, wrong in _plans(truth.plan) if _near(plan, wrong))
    if value is not None:
        at, room = truth.plan if plan is None else plan, _NEAR * truth.scale
        if abs(value - objective(problem, at)) > room:  # else the plan is to blame
            yield from (name for name, wrong in _values(problem, data, at) if abs(value - wrong) <= room)
    for name, other in _others(data):
        planned = plan is not None and _near(plan, other.plan) and not _near(plan, truth.plan)
        if planned or (value is not None and abs(value - other.value) <= _NEAR * truth.scale):
            yield name


def _plans(plan: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "the plan transposed", plan.T
    yield "the plan divided by its total", plan / plan.sum()


def _others(data: Numbers) -> Iterator[tuple[str, Reference]]:
    """Other problems, whose answer this may be."""
    for name, changes in _changes(data):
        changed = replace(data, **changes)
        sides = {"rows": changed.rows, "columns": changed.columns}
        with contextlib.suppress(ValueError, RuntimeError):  # it has no answer, or none that is sure
            yield name, reference(
                Problem(changed.cost, changed.a, changed.b, epsilon=changed.epsilon, mass=changed.mass, **sides)
            )


def _changes(data: Numbers) -> Iterator[tuple[str, dict[str, Any]]]:
    soft = {name: side for name, side in (("rows", data.rows), ("columns", data.columns)) if isinstance(side, SOFT)}
    total = data.a.sum() * data.b.sum()
    if data.rows != data.columns:
        yield "the objects of rows and columns exchanged", dict(rows=data.columns, columns=data.rows)
    if data.mass is not None:
        yield "mass not asked for", dict(mass=None)
    if abs(data.a.sum() - 1) + abs(data.b.sum() - 1) > 1e-3:
        share = {} if data.mass is None else {"mass": data.mass / max(data.a.sum(), data.b.sum())}
        yield "weights divided by their totals", dict(a=data.a / data.a.sum(), b=data.b / data.b.sum(), **share)
    for factor in (0.5, 2.0):
        if soft:
            strengths = {name: replace(side, rho=factor * side.rho) for name, side in soft.items()}
            yield f"rho times {factor:g}", strengths
        if data.epsilon:
            yield f"epsilon times {factor:g}", dict(epsilon=factor * data.epsilon)
    if data.epsilon:
        logs = np.log(np.where(data.arcs, data.product, 1.0))
        yield "entropy relative to 1, Shannon's", dict(cost=data.cost + data.epsilon * logs)
        uniform = logs - math.log(total / data.cost.size)
        yield "entropy relative to a uniform plan", dict(cost=data.cost + data.epsilon * uniform)
        yield "epsilon = 0", dict(epsilon=0.0)


def _values(problem: Problem, data: Numbers, plan: np.ndarray) -> Iterator[tuple[str, float]]:
    """Other objectives, at the right plan."""
    parts, epsilon, moved = terms(problem, plan), data.epsilon, float(plan.sum())
    transport, entropy, rows, columns = (parts[name] for name in ("transport", "entropy", "rows", "columns"))
    value, total = sum(parts.values()), float(data.a.sum() * data.b.sum())
    yield "the transport cost alone, without entropy and penalties", transport
    yield "the objective without its entropy", value - entropy
    yield "the objective with its sign changed", -value
    if epsilon:
        logs, rest = float(xlogy(plan, plan).sum()), value - entropy
        yield "entropy without its mass terms, - sum P + sum a sum b", value + epsilon * (moved - total)
        yield "entropy without the term sum a sum b", value - epsilon * total
        yield "entropy relative to 1, sum P (log P - 1)", rest + epsilon * (logs - moved)
        yield "entropy relative to 1, sum P log P", rest + epsilon * logs
        uniform = np.full_like(plan, total / plan.size)
        yield "entropy relative to a uniform plan", rest + epsilon * float(kl_div(plan, uniform).sum())
        yield "entropy without the factor epsilon", rest + entropy / epsilon
        yield "entropy with its sign changed", rest - entropy
    if rows or columns:
        yield "the objective without its penalties", value - rows - columns
        yield "the objective without the rows' penalty", value - rows
        yield "the objective without the columns' penalty", value - columns
        yield "penalties times 0.5", value - (rows + columns) / 2
        yield "penalties times 2", value + rows + columns
        for side, name in ((data.rows, "rows"), (data.columns, "columns")):
            if isinstance(side, SOFT):
                yield f"the penalty of {name} without the factor rho", value + parts[name] * (1 / side.rho - 1)
        sides = (data.rows, plan.sum(1), data.a, rows), (data.columns, plan.sum(0), data.b, columns)
        swapped = sum(penalty(side, w, r) - paid for side, r, w, paid in sides if isinstance(side, KL))
        if math.isfinite(swapped):
            yield "KL of the weights relative to the marginal", value + swapped


def _of_potentials(data: Numbers, answer: Any, truth: Reference) -> Iterator[str]:
    lam = 0.0 if answer.lam is None else float(answer.lam)
    there = np.ix_(data.a > 0, data.b > 0)
    known = data.arcs[there]

    def sums(f: Any, g: Any, lam: float) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (f[:, None] + g[None, :] + lam)[there][known]

    with np.errstate(invalid="ignore", divide="ignore"):
        said, right = sums(answer.f, answer.g, lam), sums(truth.f, truth.g, truth.lam)
        size = float(abs(right[np.isfinite(right)]).max(initial=0.0)) + data.epsilon
        ways = [
            ("a constant moved between f, g and lam, which only FIXED sides allow", right),
            ("potentials with their sign changed", -right),
        ]
        if truth.lam:
            ways.append(("lam left out", right - truth.lam))
        if data.epsilon:
            logs = sums(np.log(data.a), np.log(data.b), 0.0)
            ways += [
                ("potentials in units of epsilon", right / data.epsilon),
                ("potentials of a plan without weights, exp((f + g - C) / epsilon)", right + data.epsilon * logs),
            ]
    for name, wrong in ways:
        if _near(said, wrong, size if "units" not in name else size / data.epsilon):
            yield name
    with np.errstate(invalid="ignore"):
        off = (said - right)[np.isfinite(said) & np.isfinite(right)]
    if off.size and abs(off).max() > _NEAR * size and np.ptp(off) <= _NEAR * size:
        yield "potentials off by a constant"


def _of_gradients(problem: Problem, data: Numbers, answer: Any, name: str, truth: Reference) -> Iterator[str]:
    said, right = answer.gradient[name], envelope(problem, truth)
    mine = right[name]
    yield from (f"the gradient times {k:g}" for k in (2.0, 0.5, -1.0) if _near(said, k * mine))
    if name == "cost":
        yield from (cause for cause, wrong in _plans(mine) if _near(said, wrong))
        if data.epsilon and _near(said, mine / data.epsilon):
            yield "the plan divided by epsilon"
        return
    potential, weights, others = (truth.f, data.a, data.b) if name == "a" else (truth.g, data.b, data.a)
    side = data.rows if name == "a" else data.columns
    full = (weights > 0) & np.isfinite(potential)
    marginal = truth.plan.sum(1 if name == "a" else 0)
    ratio = np.divide(marginal, weights, out=np.zeros_like(weights), where=weights > 0)
    reference_moves = data.epsilon * (others.sum() - ratio)
    ways = {
        "the potential alone": potential,
        "the conjugate alone, without the derivative of the reference a x b": mine - reference_moves,
        "the potential where its conjugate belongs": potential + reference_moves,
        "the derivative of the reference without the marginal": mine + data.epsilon * ratio,
        "the other side's gradient": right["b" if name == "a" else "a"],
    }
    if isinstance(side, KL):
        ways["the conjugate of KL without the factor rho"] = -np.expm1(-potential / side.rho) + reference_moves
    yield from (cause for cause, wrong in ways.items() if wrong.shape == said.shape and _near(said[full], wrong[full]))


def _near(x: np.ndarray, y: np.ndarray, size: float | None = None) -> bool:
    """Whether arrays agree to a few digits; NaN does not, but infinities of one sign do."""
    if x.shape != y.shape or np.isnan(x).any() or np.isnan(y).any() or not (np.isinf(x) == np.isinf(y)).all():
        return False
    finite = np.isfinite(x)
    size = float(abs(y[finite]).max(initial=0.0)) if size is None else size
    return bool((abs(x - y)[finite] <= _NEAR * size).all())
