"""Values and plans against solvers that share no code with ours: cvxpy (Clarabel, HiGHS) and scipy's HiGHS."""

import numpy as np
import pytest
import torch
from catalogue import CASES, answer, over, select
from hypothesis import given, settings
from scipy import sparse
from scipy.optimize import linprog

from iotsolve import AT_MOST, FIXED, FREE, KL, L2, Between, ChiSquared, Problem, solve
from iotsolve.testing import check_certificate, problems, reference
from iotsolve.testing.references import dual_objective, objective, repaired, rounding, terms, violation
from iotsolve.testing.verification import REGIMES


def assert_same(solution, found, *, value=1e-6, plan=1e-4):
    assert abs(solution.value - found.value) <= value * found.scale
    np.testing.assert_allclose(solution.plan, found.plan, rtol=0, atol=plan * found.plan.sum())


@over(CASES)
@pytest.mark.parametrize("epsilon", [0.3, 0.05])
def test_entropic_value_and_plan_agree_with_cvxpy(case, epsilon):
    assert_same(solve(case.problem(epsilon=epsilon)), answer(case, epsilon=epsilon))


@over(CASES)
def test_empty_bins_and_forbidden_arcs_agree_with_cvxpy(case):
    options = {"empty": True, "forbidden": True, "seed": 1}
    solution = solve(case.problem(**options))
    assert_same(solution, answer(case, **options))
    assert not solution.plan[1].any() and not solution.plan[:, 2].any() and solution.plan[0, 1] == 0


@over(select(exact_too=True))
def test_exact_value_and_plan_agree_with_highs(case):
    assert_same(solve(case.problem(epsilon=0.0)), answer(case, epsilon=0.0), value=1e-9, plan=1e-9)


@over(CASES)
def test_value_is_the_objective_of_the_plan(case):
    problem = case.problem()
    solution = solve(problem)
    parts = terms(problem, solution.plan)
    assert solution.value == pytest.approx(sum(parts.values()), rel=1e-7)
    assert problem.primal(solution.plan, tolerance=1e-6) == pytest.approx(sum(parts.values()), rel=1e-12)
    assert solution.transport_cost == pytest.approx(parts["transport"], rel=1e-12)
    assert solution.mass == pytest.approx(solution.plan.sum(), rel=1e-12)
    np.testing.assert_allclose(solution.row_marginal, solution.plan.sum(1), rtol=1e-12)
    np.testing.assert_allclose(solution.column_marginal, solution.plan.sum(0), rtol=1e-12)


@pytest.mark.parametrize("name", ["fixed-free", "at_most-kl-mass", "tv-between"])
def test_a_plan_that_is_not_allowed_costs_infinity(name):
    case = CASES[name]
    problem = case.problem(forbidden=True)
    plan = solve(problem).plan
    outside = plan.copy()
    outside[0, 1] = 1e-3
    assert problem.primal(outside) == np.inf
    assert problem.primal(-plan) == np.inf
    if case.rows.is_hard or case.mass is not None:
        assert problem.primal(3 * plan) == np.inf


# -- the linear program ------------------------------------------------------------------------------------------------


def highs(cost, a, b):
    """Balanced transport as the textbook writes it."""
    n, m = cost.shape
    rows = sparse.kron(sparse.identity(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.identity(m)).tocsr()[: m - 1]  # the last one follows from the others
    program = linprog(
        cost.ravel(),
        A_eq=sparse.vstack([rows, columns]).tocsr(),
        b_eq=np.r_[a, b[:-1]],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert program.status == 0
    return program.fun


def uniform(rng, n, m):
    return rng.normal(size=(n, n)), np.full(n, 1 / n), np.full(n, 1 / n)


def weighted(rng, n, m):
    return rng.random((n, m)), rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))


def integer(rng, n, m):
    return (
        rng.integers(-3, 4, (n, m)).astype(float),
        rng.multinomial(100, np.full(n, 1 / n)) * 1.0,
        100 * rng.dirichlet(np.ones(m)),
    )


def heavy_tailed(rng, n, m):
    return rng.standard_cauchy((n, m)), rng.dirichlet(np.full(n, 0.1)), rng.dirichlet(np.full(m, 0.1))


def points(rng, n, m):
    x, y = rng.normal(size=(n, 1, 2)), rng.normal(size=(1, m, 2))
    return ((x - y) ** 2).sum(-1), rng.uniform(0.5, 1, n), np.full(m, 1.0)


@pytest.mark.parametrize("kind", [uniform, weighted, integer, heavy_tailed, points])
@pytest.mark.parametrize("block", range(4))
def test_exact_value_agrees_with_highs_on_two_hundred_problems(kind, block):
    rng = np.random.default_rng([block, 7])
    for _ in range(10):
        cost, a, b = kind(rng, *rng.integers(1, [61, 81]))
        b = b * (a.sum() / b.sum())
        problem = Problem(cost, a, b)
        solution, value = solve(problem), highs(cost, a, b)
        certificate, scale = solution.certificate, (abs(cost) * solution.plan).sum()
        assert abs(solution.value - value) <= 1e-9 * scale
        assert abs(objective(problem, solution.plan) - value) <= 1e-9 * scale
        assert violation(problem, solution.plan) <= 1e-12 * a.sum()
        assert certificate.gap <= 1e-9 * certificate.scale
        excess = (solution.f[:, None] + solution.g[None, :] - cost)[np.ix_(a > 0, b > 0)]
        assert excess.max() <= 1e-12 * abs(cost).max()


# -- whatever Hypothesis thinks of -------------------------------------------------------------------------------------


@given(problem=problems())
def test_the_certificate_encloses_the_answer(problem):
    check_certificate(problem, solve(problem, throw=False), answer=reference(problem))


@given(problem=problems(exact=True))
def test_linear_programs_are_solved_to_nine_digits(problem):
    if any(isinstance(side, KL | ChiSquared | L2) for side in problem.sides):
        return
    solution, found = solve(problem), reference(problem)
    assert abs(solution.value - found.value) <= 1e-9 * found.scale + rounding(problem)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_agrees_with_cvxpy(regime):
    """Solved and certified, values as near as the general solver's digits, potentials feasible and as good.

    `HYPOTHESIS_PROFILE=nightly` draws 2,000 problems of each.
    """

    @settings(max_examples=settings().max_examples // 2)
    @given(problem=REGIMES[regime])
    def agrees(problem):
        solution = solve(problem)
        assert solution.certificate.holds
        room = 1e-6 * solution.certificate.scale + rounding(problem)
        attained = solution.problem  # without arcs that no plan can use, at which the dual has no maximiser
        assert dual_objective(attained, solution.f, solution.g, solution.mass_multiplier) >= solution.value - room
        try:
            found = reference(problem)
        except RuntimeError:  # the general solver has no answer
            return
        # where a penalty magnifies what its plan is off by, the bounds that its own answer gives are wider
        lower = dual_objective(problem, *repaired(problem, found.f, found.g, found.lam))
        upper = max(found.value, objective(problem, found.plan))
        assert min(lower, found.value) - room <= solution.value <= upper + room

    agrees()


@over(CASES)
def test_every_pair_of_marginals_can_be_drawn(case):
    mass = case.mass is not None

    @given(problem=problems(rows=case.rows, columns=case.columns, mass=mass, largest_scale=1))
    @settings(max_examples=10)
    def look(problem):
        assert (problem.rows, problem.columns) == (case.rows, case.columns) and (problem.mass is not None) == mass

    look()


@given(
    problem=problems(
        exact=False, mass=False, rows=KL(2.0), columns=FREE, shape=(3, 4), forbidden=False, largest_scale=1
    )
)
def test_what_is_drawn_can_be_restricted(problem):
    assert problem.epsilon > 0 and problem.mass is None and problem.shape == (3, 4)
    assert problem.rows == KL(2.0) and problem.columns == FREE and problem.cost.dense().isfinite().all()


AWKWARD = {
    "an empty bin": lambda p: bool((p.a == 0).any()),
    "a forbidden arc": lambda p: bool(p.cost.dense().isinf().any()),
    "equal costs": lambda p: p.shape != (1, 1) and float(p.cost.range()) == 0,
    "a negative cost": lambda p: bool((p.cost.dense() < 0).any()),
    "repeated rows": lambda p: p.shape[0] > 1 and bool((p.cost.dense()[0] == p.cost.dense()[1]).all()),
    "a huge unit": lambda p: float(p.cost.range()) > 1e5,
    "a tiny unit": lambda p: 0 < float(p.cost.range()) < 1e-5,
    "a small epsilon": lambda p: 0 < p.epsilon < 0.05 * float(p.cost.range()),
    "no entropy": lambda p: p.is_exact,
    "a mass": lambda p: p.mass is not None,
    "the largest size": lambda p: p.shape == (8, 8),
    "two soft sides": lambda p: not p.rows.is_hard and not p.columns.is_hard,
}


def test_what_is_drawn_is_awkward():
    seen = set()

    @given(problem=problems())
    @settings(max_examples=600)
    def look(problem):
        seen.update(name for name, shows in AWKWARD.items() if shows(problem))

    look()
    assert seen == set(AWKWARD)


@pytest.mark.parametrize(
    "sides", [(FIXED, AT_MOST), (AT_MOST, FIXED), (FIXED, Between(0.3, 1.0)), (AT_MOST, Between(1.0, np.inf))], ids=str
)
@pytest.mark.parametrize("size", [(6, 5), (30, 30)], ids=str)
def test_capacities_that_sum_to_the_demand_but_for_rounding_are_no_contradiction(sides, size):
    """In float32 either total is the larger, by a rounding that a linear program would not forgive."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cost, a, b = rng.random(size), rng.random(size[0]), rng.random(size[1])
        given = [torch.tensor(x, dtype=torch.float32) for x in (cost, a / a.sum(), b / b.sum())]
        found = solve(Problem(*given, rows=sides[0], columns=sides[1]))
        equal = np.vstack([np.kron(np.eye(size[0]), np.ones(size[1])), np.kron(np.ones(size[0]), np.eye(size[1]))])
        due = linprog(cost.ravel(), A_eq=equal, b_eq=np.r_[a / a.sum(), b / b.sum()], method="highs").fun
        assert found.certificate.holds and float(found.value) == pytest.approx(due, rel=1e-5)
