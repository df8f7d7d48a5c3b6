"""Laws that every problem, cost, marginal and solver of the library obeys: for our tests, and for those of extensions.

Each raises an AssertionError that shows the problem and the numbers, and nothing if the law holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iotsolve.exact import Exact
from iotsolve.marginals import FIXED, FREE
from iotsolve.problem import Problem
from iotsolve.sinkhorn import Sinkhorn
from iotsolve.solution import Solution
from iotsolve.solve import solve
from iotsolve.testing.references import (
    SOFT,
    Numbers,
    Reference,
    dual_objective,
    numbers,
    objective,
    reference,
    rounding,
    softmax_value,
    violation,
)

__all__ = ["check_certificate", "check_duality", "check_gradient", "check_limits", "derivative", "random_direction"]

_PRECISE = Sinkhorn(tolerance=1e-13, max_steps=20_000)
_STEP = 2e-4  # the derivative of a clamped side has kinks of its own: the fewer of them are crossed the better


def check_certificate(problem: Problem, solution: Solution, *, answer: Reference | None = None) -> None:
    """The certificate says what plain NumPy says of the same potentials, and "converged" implies that it holds.

    Args:
        problem: without a batch.
        solution: what a solver made of it, converged or not.
        answer: ``reference(problem)``, to be enclosed by the certificate's bounds.
    """
    claim, certificate = _Claims(problem), solution.certificate
    f, g, lam = (_numpy(x) for x in (solution.potentials.f, solution.potentials.g, solution.potentials.lam))
    plan, tolerance = _numpy(solution.plan), certificate.tolerance
    slack = 1e-9 * (abs(certificate.dual) + certificate.scale) + rounding(problem)
    off, dual = violation(problem, plan), dual_objective(problem, f, g, lam)
    said = certificate.row_violation + certificate.column_violation + certificate.mass_violation

    if problem.dtype == torch.float64:
        claim("violation", abs(said - off) <= 1e-11 * (plan.sum() + off), certificate=said, numpy=off)
        claim("dual objective", dual <= certificate.dual + slack, certificate=certificate.dual, numpy=dual)
    if math.isfinite(certificate.gap):
        gap = certificate.primal - certificate.dual
        claim("gap", certificate.gap >= 0 and abs(gap - certificate.gap) <= slack, stated=certificate.gap, bounds=gap)
    if answer is not None:
        room = slack + 1e-9 * answer.scale + rounding(problem)
        inside = certificate.dual - room <= answer.value <= certificate.primal + room
        claim("bounds", inside, certificate=certificate, optimal_value=answer.value)
    if solution.converged:
        claim("converged without a certificate", bool(certificate.holds), certificate=certificate)
        claim("violation", off <= 2 * tolerance * plan.sum(), numpy=off, mass=plan.sum(), tolerance=tolerance)
        value, stated, room = objective(problem, plan), float(solution.value), _room(problem, plan, solution)
        claim("value", abs(value - stated) <= room, of_plan=value, stated=stated, room=room)


def check_duality(problem: Problem, f: Any, g: Any, lam: Any = 0.0, *, answer: Reference | None = None) -> None:
    """Weak duality: whatever the potentials, ``problem.dual`` and a certificate's dual stay below the optimal value.

    Args:
        problem: without a batch.
        f: potentials of the rows, any numbers.
        g: potentials of the columns.
        lam: multiplier of ``mass``; 0 without it.
        answer: ``reference(problem)``, if the caller has it.
    """
    claim, answer = _Claims(problem), reference(problem) if answer is None else answer
    ours, theirs = float(problem.dual(f, g, lam)), dual_objective(problem, f, g, lam)
    slack = 1e-9 * (answer.scale + abs(answer.value))
    claim("weak duality", ours <= answer.value + slack, dual=ours, optimal_value=answer.value)
    if math.isfinite(theirs) or math.isfinite(ours):
        near = abs(ours - theirs) <= 1e-11 * (1 + abs(theirs)) + slack
        claim("dual objective", near, stated=ours, numpy=theirs)


def check_gradient(
    problem: Problem,
    *,
    along: Sequence[str | tuple[str, ...]] | None = None,
    seed: int = 0,
    tolerance: float = 1e-6,
    solver: Sinkhorn = _PRECISE,
) -> None:
    """The value's gradient along random directions, against central differences of solved problems.

    Args:
        problem: torch, float64, without a batch, ``epsilon > 0``; what is given as a tensor is tested.
        along: names of ``problem.tensors()``, one direction each; a tuple of names moves together. All by default.
        seed: of the directions.
        tolerance: relative to the sum of the absolute terms that meet in the derivative.
        solver: precise enough for differences.
    """
    claim, generator = _Claims(problem), torch.Generator().manual_seed(seed)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.tensors().items()}
    value = solve(problem.with_tensors(leaves), solver, throw=False).value
    gradients = dict(
        zip(leaves, torch.autograd.grad(value, list(leaves.values()), materialize_grads=True), strict=True)
    )
    for names in leaves if along is None else along:
        direction = random_direction(problem, names, generator)
        found = derivative(lambda p: float(solve(p, solver, throw=False).value), problem, direction)
        products = torch.cat([(gradients[k] * v).flatten() for k, v in direction.items()])
        stated, size = float(products.sum()), abs(found) + float(products.abs().sum())
        near = abs(stated - found) <= tolerance * size + rounding(problem) / _STEP
        claim(f"derivative along {names}", near, stated=stated, differences=found)


def check_limits(
    problem: Problem,
    *,
    solver: Sinkhorn | Exact | Callable[[Problem], float] | None = None,
    factors: Sequence[float] = (1.0, 8.0, 64.0, 512.0),
    tolerance: float = 1e-7,
) -> None:
    """Strong penalties, weak penalties and small epsilon: values lie between bounds that close at a known rate.

    Where the limit has the value ``V``, a plan ``P`` and potentials ``f``, ``g``, all by the general solver:

    - rho to infinity, meeting FIXED: ``dual_rho(f, g) <= value(rho) <= V``. The bounds close like
      ``sum a f^2 / (2 rho)`` for KL and chi-squared, L2 alike in its units, and for TV altogether once ``rho >= |f|``.
    - rho to 0, meeting FREE: ``V <= value(rho) <= V + D_rho(P 1 | a)``, closing in proportion to ``rho``.
    - epsilon to 0, meeting the linear program: ``V <= value(eps) <= V + eps KL(P | a x b)``, closing in proportion to
      ``eps``: the divergence is at most the plan's mass times the logarithm of the least weights' inverse product.

    On the way values never fall as the parameter grows and are concave in it. A problem whose sides are FREE, or FREE and
    tied to its weights, has its value in closed form, a soft-max.

    Args:
        problem: without a batch. A limit without an answer is passed over; for FIXED, weights of soft sides are first
            brought to a common total.
        solver: what is judged: a solver of the library, or a function from a problem to its value, NaN where it did not
            converge.
        factors: by which rho is multiplied and divided, and epsilon divided.
        tolerance: of a value, relative to the absolute terms that it is the sum of.
    """
    value = solver if callable(solver) else _value_by(solver)
    _check_softmax(problem, value, tolerance)
    for limit in _limits(numbers(problem)):
        _check_softmax(limit.problem, value, tolerance)
        try:
            answer = reference(limit.problem)
        except RuntimeError:  # the general solver is not sure of this one
            continue
        room = tolerance * (answer.scale + abs(answer.value)) + rounding(limit.problem)
        points = []
        for factor in factors:
            moved = limit.approach(factor)
            found = math.nan if moved is None else value(moved)
            if not math.isnan(found):
                low, high = limit.bounds(moved, answer)
                slack = room + rounding(moved)
                holds = low - slack <= found <= high + slack
                _Claims(moved)(limit.law, holds, lower=low, value=found, upper=high, limit=answer.value)
                points.append((limit.parameter(factor), found))
        _check_concave(_Claims(problem), limit.law, sorted(points), room)


@dataclass(frozen=True)
class _Limit:
    """A limit problem, the problems on the way to it, and what bounds their values."""

    law: str
    problem: Problem
    approach: Callable[[float], Problem | None]
    parameter: Callable[[float], float]
    bounds: Callable[[Problem, Reference], tuple[float, float]]


def _limits(data: Numbers) -> Iterator[_Limit]:
    soft = [isinstance(side, SOFT) for side in (data.rows, data.columns)]

    def sides(kind: Any) -> dict[str, Any]:
        return {name: kind(getattr(data, name)) for name, yes in zip(("rows", "columns"), soft, strict=True) if yes}

    def stronger(factor: float) -> dict[str, Any]:
        return sides(lambda side: replace(side, rho=float(side.rho) * factor))

    def below(moved: Problem, answer: Reference) -> tuple[float, float]:
        return dual_objective(moved, answer.f, answer.g, answer.lam), answer.value

    def above(moved: Problem, answer: Reference) -> tuple[float, float]:
        return answer.value, objective(moved, answer.plan)

    tied = _tied(data, soft)
    ways = [
        ("rho to infinity", tied, sides(lambda _: FIXED), stronger, float, below),
        ("rho to 0", data, sides(lambda _: FREE), lambda k: stronger(1 / k), lambda k: 1 / k, above),
        ("epsilon to 0", data, {"epsilon": 0.0}, lambda k: {"epsilon": data.epsilon / k}, lambda k: 1 / k, above),
    ]
    wanted = [any(soft), any(soft), data.epsilon > 0]
    for (law, start, end, change, parameter, bounds), there in zip(ways, wanted, strict=True):
        limit = _made(replace(start, **end)) if there else None
        if limit is not None:
            yield _Limit(law, limit, lambda k, s=start, c=change: _made(replace(s, **c(k))), parameter, bounds)


def _tied(data: Numbers, soft: Sequence[bool]) -> Numbers:
    """The data with the weights of soft sides brought to the total that the rest asks for."""
    hard = [w.sum() for w, yes in zip((data.a, data.b), soft, strict=True) if not yes]
    total = data.mass or (hard[0] if hard else data.a.sum())
    a, b = (w * (total / w.sum()) if yes else w for w, yes in zip((data.a, data.b), soft, strict=True))
    return replace(data, a=a, b=b)


def _made(data: Numbers) -> Problem | None:
    """The problem with these numbers, None if it has no answer."""
    sides = {"rows": data.rows, "columns": data.columns}
    try:
        return Problem(data.cost, data.a, data.b, epsilon=data.epsilon, mass=data.mass, **sides)
    except ValueError:
        return None


def _check_concave(claim: _Claims, law: str, points: list[tuple[float, float]], room: float) -> None:
    """A minimum over plans of functions affine in the parameter, none of them falling."""
    values = [value for _, value in points]
    claim(f"{law}: monotone", all(v <= w + room for v, w in pairwise(values)), points=points)
    for (x, u), (y, v), (z, w) in zip(points, points[1:], points[2:], strict=False):
        chord = u + (y - x) / (z - x) * (w - u)
        claim(f"{law}: concave", v >= chord - room, points=points)


def _check_softmax(problem: Problem, value: Callable[[Problem], float], tolerance: float) -> None:
    closed = softmax_value(problem)
    if closed is None:
        return
    found, room = value(problem), 1e12 * tolerance * rounding(problem)
    _Claims(problem)("soft-max", not abs(found - closed) > room, value=found, closed_form=closed)


def _value_by(solver: Any) -> Callable[[Problem], float]:
    def value(problem: Problem) -> float:
        solution = solve(problem, solver, throw=False)
        return float(solution.value) if solution.converged else math.nan

    return value


def random_direction(problem: Problem, names: str | tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """A direction in which the named tensors can move both ways: forbidden arcs and empty bins stay what they are.

    The cost moves by about epsilon, anything else in proportion to itself. Weights whose total is tied move with it:
    those of a balanced problem together, those of a fixed side beside ``mass`` at a constant total.
    """
    moved: dict[str, Tensor] = {}
    for name in (names,) if isinstance(names, str) else names:
        amount = 0.5 + torch.rand((), generator=generator, dtype=problem.dtype)
        for tensor, move in _move(problem, name, generator).items():
            moved[tensor] = moved.get(tensor, torch.zeros_like(move)) + amount * move
    return moved


def _move(problem: Problem, name: str, generator: torch.Generator) -> dict[str, Tensor]:
    tensor = problem.tensors()[name].detach()
    noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 0.3
    if name == "cost":
        return {name: torch.where(tensor.isfinite(), noise * float(problem.epsilon), 0.0)}
    if name not in ("a", "b"):
        return {name: tensor}
    move, other, weights = noise * tensor, "b" if name == "a" else "a", problem.b if name == "a" else problem.a
    if problem.mass is not None and (problem.rows if name == "a" else problem.columns).is_fixed:
        return {name: move - tensor * move.sum() / tensor.sum()}
    if problem.rows.is_fixed and problem.columns.is_fixed:
        return {name: move, other: weights.detach() * move.sum() / weights.detach().sum()}
    return {name: move}


def derivative(
    scalar: Callable[[Problem], float], problem: Problem, direction: Mapping[str, Tensor], *, step: float = _STEP
) -> float:
    """Directional derivative of a function of the problem by central differences of fourth order."""
    start = problem.tensors()

    def at(t: float) -> Any:
        return scalar(problem.with_tensors({k: start[k].detach() + t * v for k, v in direction.items()}))

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


def _room(problem: Problem, plan: np.ndarray, solution: Solution) -> float:
    """How far the objective of a plan within tolerance may be from the dual: by the gap, and the violation's price."""
    data, p = numbers(problem), solution.potentials
    prices = [
        abs(x[np.isfinite(x) & (w > 0)]).max(initial=0.0) for x, w in ((_numpy(p.f), data.a), (_numpy(p.g), data.b))
    ]
    return 4 * solution.certificate.tolerance * (solution.certificate.scale + plan.sum() * sum(prices)) + rounding(
        problem
    )


def _numpy(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu().double() if isinstance(x, Tensor) else x, dtype=np.float64)


class _Claims:
    """``claim(law, holds, **found)``: an AssertionError with the numbers found and the problem, ready to be pasted."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __call__(self, law: str, holds: bool, **found: Any) -> None:
        if holds:
            return
        data = numbers(self.problem)
        raise AssertionError(
            f"{law}: {', '.join(f'{name} = {number}' for name, number in found.items())}\n"
            f"rows = {data.rows}, columns = {data.columns}, mass = {data.mass}, epsilon = {data.epsilon!r}\n"
            f"cost = {data.cost.tolist()}\na = {data.a.tolist()}\nb = {data.b.tolist()}"
        )
