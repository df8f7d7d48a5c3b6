"""The problems that drive the tests: every pair of marginals, with and without `mass`, small, uneven and not square."""

from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import pytest
import torch

from iotsolve import AT_MOST, FIXED, FREE, KL, TV, Between, Problem, Sinkhorn
from iotsolve.testing import reference

SIDES = {
    "fixed": FIXED,
    "free": FREE,
    "at_most": AT_MOST,
    "between": Between(0.6, 1.5),
    "kl": KL(0.7),
    "tv": TV(0.4),
}
PRECISE = Sinkhorn(tolerance=1e-13, max_steps=20_000, stationary=True)


@dataclass(frozen=True)
class Case:
    """A pair of marginals, with totals that both allow and that meet no kink."""

    rows: object
    columns: object
    mass: float | None
    total_a: float
    total_b: float

    @property
    def exact_too(self):
        """Whether `epsilon = 0` is a linear program with an answer other than zero."""
        no_kl = not any(isinstance(side, KL) for side in (self.rows, self.columns))
        asked = any(isinstance(side, TV) or side.bounds[0] > 0 for side in (self.rows, self.columns))
        return no_kl and (asked or self.mass is not None)

    @property
    def balanced(self):
        return self.rows == self.columns == FIXED

    def problem(self, *, epsilon=0.3, seed=0, shape=(5, 6), empty=False, forbidden=False):
        """NumPy, float64, costs in [0, 1]; `empty` takes the weight of two bins, `forbidden` three arcs."""
        rng = np.random.default_rng(seed)
        cost, a, b = rng.random(shape), rng.uniform(0.5, 1.5, shape[0]), rng.uniform(0.5, 1.5, shape[1])
        if empty:
            a[1] = b[2] = 0.0
        if forbidden:
            cost[0, 1] = cost[3, 0] = cost[4, 4] = np.inf
        a, b = a * self.total_a / a.sum(), b * self.total_b / b.sum()
        return Problem(cost, a, b, epsilon=epsilon, rows=self.rows, columns=self.columns, mass=self.mass)


def _totals(rows, columns):
    """A side of at most 1 opposite a fixed one has room to spare; two fixed sides have none."""
    if rows == columns == FIXED:
        return 1.0, 1.0
    return (1.3, 1.0) if columns == FIXED else (1.0, 1.3)


def _mass(rows, columns):
    return 1.0 if FIXED in (rows, columns) else 0.9


PLAIN = {f"{r}-{c}": Case(SIDES[r], SIDES[c], None, *_totals(SIDES[r], SIDES[c])) for r in SIDES for c in SIDES}
WITH_MASS = {f"{k}-mass": replace(case, mass=_mass(case.rows, case.columns)) for k, case in PLAIN.items()}
CASES = PLAIN | WITH_MASS
# one of two that are each other's mirror: for laws that ask nothing of the order, beside the law that it does not matter
PLACE = list(SIDES.values()).index
UNORDERED = {k: case for k, case in CASES.items() if PLACE(case.rows) <= PLACE(case.columns)}


@cache
def answer(case, **options):
    """`reference` of a case's problem: slow, and asked for again and again."""
    return reference(case.problem(**options))


def over(cases):
    """Parametrise `case` over a dictionary of them, by name."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


def select(**wanted):
    """The cases whose property has the wanted value, for example `select(exact_too=True)`."""
    return {k: case for k, case in CASES.items() if all(getattr(case, p) == v for p, v in wanted.items())}


def with_leaves(problem):
    """The same problem in torch, every number of it a float64 tensor that a gradient can flow to."""

    def leaf(x):
        return torch.as_tensor(x, dtype=torch.float64).detach().clone()

    def side(marginal):
        if marginal == FIXED:
            return FIXED
        given = {f.name: getattr(marginal, f.name) for f in fields(marginal)}
        return replace(marginal, **{k: leaf(v) for k, v in given.items() if 0 < v < np.inf})

    return Problem(
        leaf(problem.cost.dense()),
        leaf(problem.a),
        leaf(problem.b),
        epsilon=leaf(problem.epsilon) if problem.epsilon else 0.0,
        rows=side(problem.sides[0]),
        columns=side(problem.sides[1]),
        mass=None if problem.mass is None else leaf(problem.mass),
    )
