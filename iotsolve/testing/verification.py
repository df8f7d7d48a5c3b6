"""Verify a solver: draw problems regime by regime, judge its answers, show the smallest problem it gets wrong."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from iotsolve.marginals import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared, Marginal
from iotsolve.problem import Problem
from iotsolve.solve import solve
from iotsolve.testing.references import Numbers, numbers
from iotsolve.testing.solvers import LAWS, Answer, Case, Judgement, Solver, judge
from iotsolve.testing.strategies import problems

__all__ = ["REGIMES", "Failure", "RegimeReport", "Report", "iotsolve_solver", "verify"]

_WIDE = st.sampled_from([Between(0.5, 1.1), Between(0.9, 2.5), Between(0.5, float("inf"))])


def _both(side: Any, **restrictions: Any) -> st.SearchStrategy[Problem]:
    return problems(rows=side, columns=side, **restrictions)


def _of(kind: type[Marginal]) -> st.SearchStrategy[Marginal]:
    return st.builds(kind, st.integers(1, 200).map(lambda k: k / 20))


REGIMES: dict[str, st.SearchStrategy[Problem]] = {
    "exact": _both(FIXED, exact=True, mass=False),
    "exact-semi-relaxed": problems(rows=FIXED, columns=FREE, exact=True, mass=False),
    "exact-partial": _both(AT_MOST, exact=True, mass=True),
    "exact-tv": _both(_of(TV), exact=True, mass=False),
    "exact-mixed": problems(exact=True),
    "entropic": _both(FIXED, exact=False, mass=False),
    "small-epsilon": _both(FIXED, exact=False, mass=False, smallest_epsilon=0.002, largest_epsilon=0.01),
    "semi-relaxed": problems(rows=FIXED, columns=FREE, exact=False, mass=False),
    "partial": _both(AT_MOST, exact=False, mass=True),
    "bounds": _both(_WIDE, exact=False, mass=False),
    "kl": _both(_of(KL), exact=False, mass=False),
    "tv": _both(_of(TV), exact=False, mass=False),
    "chi-squared": _both(_of(ChiSquared), exact=False, mass=False),
    "l2": _both(_of(L2), exact=False, mass=False),
    "mixed": problems(exact=False),
}
"""The regimes by name; each is a strategy for problems."""


@dataclass(frozen=True)
class Failure:
    """The smallest problem found that breaks a law.

    Attributes:
        law: the first of the laws broken.
        found: what was found there, with the numbers.
        problem: the problem; ``str(failure)`` is a program that makes it.
        causes: of the laws broken in the regime, common mistakes that lead to just these numbers on the first problems that
            break them.
    """

    law: str
    found: str
    problem: Problem
    causes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        causes = [f"# {law}: the same numbers come of {'; or of '.join(found)}" for law, found in self.causes.items()]
        return "\n".join([f"# {self.law}: {self.found}", *causes, as_code(self.problem)])


@dataclass(frozen=True)
class RegimeReport:
    """What became of the problems of one regime.

    Attributes:
        name: of the regime.
        examples: problems drawn.
        offered: how many of them the solver took on.
        converged: how many of its answers did not say that they had not converged.
        broken: in how many problems each law was broken.
        failure: the smallest example of the first of them.
    """

    name: str
    examples: int
    offered: int
    converged: int
    broken: Mapping[str, int] = field(default_factory=dict)
    failure: Failure | None = None

    @property
    def passed(self) -> bool:
        """No law was broken, and unless nothing was offered some answer claims to be one."""
        return not self.broken and (self.converged > 0 or self.offered == 0)

    @property
    def verdict(self) -> str:
        if self.broken:
            return "FAILED: " + ", ".join(f"{law} {count}" for law, count in self.broken.items())
        if not self.offered:
            return "not offered"
        return "passed" if self.converged else "FAILED: nothing converged"


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found, regime by regime; ``report["kl"]`` is one of them, and printing it shows all."""

    regimes: tuple[RegimeReport, ...]

    @property
    def passed(self) -> bool:
        return all(regime.passed for regime in self.regimes)

    def __getitem__(self, name: str) -> RegimeReport:
        return next(regime for regime in self.regimes if regime.name == name)

    def __str__(self) -> str:
        width = max(len(regime.name) for regime in self.regimes)
        lines = [f"{x.name:{width}}  {x.converged:4} of {x.examples:4}  {x.verdict}" for x in self.regimes]
        failures = [f"\n{x.name}\n{x.failure}" for x in self.regimes if x.failure is not None]
        return "\n".join(lines + failures)


def verify(
    solver: Solver | None = None,
    *,
    examples: int | None = None,
    regimes: Iterable[str] | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    shrink: int = 100,
    progress: Callable[[str, int], None] | None = None,
) -> Report:
    """Judge a solver by all laws on problems drawn from every regime.

    Args:
        solver: called as ``solver(cost, a, b, epsilon, rows, columns, mass)``, see :func:`check_solver`; by default this
            library.
        examples: problems drawn in each regime; by default what the Hypothesis profile in force says.
        regimes: names in ``REGIMES``, all by default.
        seed: of the draws. By default each call draws the same.
        tolerance: error allowed, relative to the mass moved and to the absolute terms of the objective.
        shrink: problems tried to find a smaller failing example; 0 shows the first.
        progress: called with the regime's name and the number of problems judged in it.

    Raises:
        ValueError: if a regime is unknown.

    Example:
        >>> import numpy as np
        >>> def halves(cost, a, b, epsilon, rows, columns, mass):
        ...     return np.outer(a, b) / a.sum()
        >>> report = verify(halves, examples=20, regimes=["exact"], shrink=0)
        >>> report.passed, "optimality" in report["exact"].broken
        (False, True)
    """
    names = list(REGIMES) if regimes is None else list(regimes)
    unknown = [name for name in names if name not in REGIMES]
    if unknown:
        raise ValueError(f"regime {unknown[0]!r} is unknown: the regimes are {', '.join(REGIMES)}.")
    count = settings().max_examples if examples is None else examples
    if count < 1:
        raise ValueError(f"examples = {count}: must be at least 1; a hundred say a good deal.")
    solver = iotsolve_solver if solver is None else solver
    say = progress or (lambda name, done: None)
    return Report(tuple(_regime(name, solver, count, seed or 0, tolerance, shrink, say) for name in names))


def iotsolve_solver(
    cost: Any, a: Any, b: Any, epsilon: float, rows: Marginal, columns: Marginal, mass: float | None
) -> Answer:
    """This library as a solver like anybody's: with everything it claims, as NumPy."""
    given = {"cost": cost, "a": a, "b": b}
    leaves = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in given.items()}
    problem = Problem(**leaves, epsilon=epsilon, rows=rows, columns=columns, mass=mass)
    solution = solve(problem, throw=False)
    gradients = torch.autograd.grad(solution.value, list(leaves.values()), materialize_grads=True)
    plan, f, g, lam, value = (
        x.detach().numpy() for x in (solution.plan, solution.f, solution.g, solution.mass_multiplier, solution.value)
    )
    by_name = {name: x.numpy() for name, x in zip(leaves, gradients, strict=True)}
    return Answer(value, plan, f, g, lam, by_name, bool(solution.converged))


def _regime(
    name: str,
    solver: Solver,
    examples: int,
    seed: int,
    tolerance: float,
    shrink: int,
    progress: Callable[[str, int], None],
) -> RegimeReport:
    judged: list[tuple[Problem, Judgement]] = []

    def look(problem: Problem) -> None:
        judged.append((problem, judge(problem, solver, tolerance=tolerance)))
        progress(name, len(judged))

    _draw(REGIMES[name], look, examples, seed)
    broken = Counter(law for _, judgement in judged for law in judgement.broken)
    ranked = {law: broken[law] for law in sorted(broken, key=_rank)}
    failure = None
    if ranked:
        law = next(iter(ranked))
        problem, judgement = next((p, j) for p, j in judged if law in j.broken)
        problem = _smallest(REGIMES[name], solver, law, examples, seed, tolerance, shrink) or problem
        found = judge(problem, solver, tolerance=tolerance).broken.get(law, judgement.broken[law])
        causes = {law: _causes([p for p, j in judged if law in j.broken][:_FEW], solver, law, tolerance) for law in ranked}
        failure = Failure(law, found, problem, {law: found for law, found in causes.items() if found})
    offered, converged = (sum(getattr(j, of) for _, j in judged) for of in ("offered", "converged"))
    return RegimeReport(name, len(judged), offered, converged, ranked, failure)


_FEW = 3  # problems that a cause has to explain: where one bin meets one bin, most mistakes are the same


def _causes(found: list[Problem], solver: Solver, law: str, tolerance: float) -> tuple[str, ...]:
    """What explains a law's breach on all of these problems."""
    explained = [Case(problem, solver, tolerance).causes(law) for problem in found]
    return tuple(cause for cause in explained[0] if all(cause in others for others in explained))


def _rank(law: str) -> int:
    """The place of a law in the report; first what makes an answer none at all."""
    return list(LAWS).index(law) if law in LAWS else -1


class _Broken(Exception):
    """This problem breaks the law: Hypothesis looks for a smaller one."""


class _Enough(BaseException):
    """Of shrinking: no Exception, so that Hypothesis lets it through."""


def _smallest(
    strategy: st.SearchStrategy[Problem],
    solver: Solver,
    law: str,
    examples: int,
    seed: int,
    tolerance: float,
    shrink: int,
) -> Problem | None:
    """Draw the same problems again and let Hypothesis make the first that breaks the law smaller, for so many tries."""
    known: dict[str, bool] = {}
    smallest, tried = None, 0
    only = {law: LAWS[law]} if law in LAWS else {}

    def look(problem: Problem) -> None:
        nonlocal smallest, tried
        key = as_code(problem)
        if key not in known:
            tried += smallest is not None
            if tried > shrink:
                raise _Enough
            known[key] = law in judge(problem, solver, laws=only, tolerance=tolerance).broken
        if known[key]:
            smallest = problem
            raise _Broken

    with contextlib.suppress(_Broken, _Enough):
        _draw(strategy, look, examples, seed)
    return smallest


def _draw(strategy: st.SearchStrategy[Problem], look: Callable[[Problem], None], examples: int, seed: int) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def run(problem: Problem) -> None:
        look(problem)

    run()


def as_code(problem: Problem) -> str:
    """A program of a few lines that makes the problem.

    Example:
        >>> print(as_code(Problem([[0.0, 1.0]], epsilon=0.5, rows=FIXED, columns=KL(2.0))))
        from numpy import array, inf
        from iotsolve import FIXED, KL, Problem
        problem = Problem(
            cost=array([[0.0, 1.0]]),
            a=array([1.0]),
            b=array([0.5, 0.5]),
            epsilon=0.5,
            rows=FIXED,
            columns=KL(2.0),
        )
    """
    data = numbers(problem)
    sides = {"rows": _named(data.rows), "columns": _named(data.columns)}
    used = sorted({text.split("(")[0] for text in sides.values()} | {"Problem"}, key=lambda x: (x != x.upper(), x))
    arrays = {name: f"array({np.asarray(getattr(data, name)).tolist()})" for name in ("cost", "a", "b")}
    given = arrays | {"epsilon": repr(data.epsilon)} | sides | _mass(data)
    lines = [f"    {name}={text}," for name, text in given.items()]
    start = ["from numpy import array, inf", f"from iotsolve import {', '.join(used)}", "problem = Problem("]
    return "\n".join([*start, *lines, ")"])


def _mass(data: Numbers) -> dict[str, str]:
    return {} if data.mass is None else {"mass": repr(data.mass)}


def _named(side: Marginal) -> str:
    names = {FIXED: "FIXED", FREE: "FREE", AT_MOST: "AT_MOST"}
    if side in names:
        return names[side]
    numbers = (side.lo, side.hi) if isinstance(side, Between) else (side.rho,)
    return f"{type(side).__name__}({', '.join(repr(float(x)) for x in numbers)})"
