"""What must not matter, and what must come out in the limit: laws that need no solver to compare with."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from catalogue import CASES, PLAIN, UNORDERED, WITH_MASS, over, select, with_leaves
from hypothesis import given, settings
from hypothesis import strategies as st

from iotsolve import FIXED, FREE, KL, L2, TV, Between, ChiSquared, Potentials, Problem, Sinkhorn, solve
from iotsolve.testing import problems
from iotsolve.testing.references import numbers

TIGHT = Sinkhorn(tolerance=1e-12, stationary=True)


def rebuilt(problem, **changes):
    """The same problem with some of its NumPy data changed."""
    data = numbers(problem)
    given = {k: getattr(data, k) for k in ("cost", "a", "b", "epsilon", "rows", "columns", "mass")} | changes
    return Problem(given.pop("cost"), given.pop("a"), given.pop("b"), **given)


def assert_alike(one, other, *, factor=1.0, plan=lambda p: p, tolerance=1e-9):
    """Values and plans of two solutions, the other's value multiplied and its plan rearranged."""
    assert one.value == pytest.approx(factor * other.value, rel=tolerance, abs=tolerance * abs(factor))
    np.testing.assert_allclose(one.plan, plan(other.plan), rtol=0, atol=max(tolerance, 1e-9) * other.plan.sum())


# -- what must not matter ----------------------------------------------------------------------------------------------


def rearranged(problem):
    """Rows and columns swapped, then permuted: the problem, and what the same does to a plan."""
    data, rng = numbers(problem), np.random.default_rng(0)
    i, j = rng.permutation(6), rng.permutation(5)

    def move(matrix):
        return matrix.T[np.ix_(i, j)]

    other = rebuilt(problem, cost=move(data.cost), a=data.b[i], b=data.a[j], rows=data.columns, columns=data.rows)
    return other, move


@over(CASES)
def test_the_sides_may_be_swapped_and_bins_permuted(case):
    problem = case.problem(empty=True, forbidden=True)
    other, move = rearranged(problem)
    assert_alike(solve(other, TIGHT), solve(problem, TIGHT), plan=move)


@over(select(exact_too=True))
def test_the_sides_may_be_swapped_and_bins_permuted_at_epsilon_zero(case):
    problem = case.problem(epsilon=0.0)
    other, move = rearranged(problem)
    assert_alike(solve(other), solve(problem), plan=move)


def in_units(problem, factor):
    """Cost, epsilon and rho multiplied together."""

    def scaled(side):
        return type(side)(factor * side.rho) if isinstance(side, KL | TV) else side

    data = numbers(problem)
    sides = {"rows": scaled(data.rows), "columns": scaled(data.columns)}
    return rebuilt(problem, cost=factor * data.cost, epsilon=factor * data.epsilon, **sides)


@over(UNORDERED)
def test_the_unit_of_the_cost_does_not_matter(case):
    problem = case.problem()
    one = solve(problem, TIGHT)
    for factor in (1e-6, 1e6):
        other = solve(in_units(problem, factor), TIGHT)
        assert_alike(other, one, factor=factor)
        assert other.steps == one.steps


@over({k: case for k, case in CASES.items() if FIXED in (case.rows, case.columns)})
def test_a_potential_added_to_a_fixed_side_moves_the_value_only(case):
    problem = case.problem(forbidden=True)
    data, rng = numbers(problem), np.random.default_rng(1)
    u = rng.normal(size=5) if data.rows == FIXED else np.zeros(5)
    v = rng.normal(size=6) if data.columns == FIXED else np.zeros(6)
    one, two = solve(rebuilt(problem, cost=data.cost + u[:, None] + v[None, :]), TIGHT), solve(problem, TIGHT)
    assert one.value == pytest.approx(two.value + u @ data.a + v @ data.b, rel=1e-9)
    np.testing.assert_allclose(one.plan, two.plan, atol=1e-9)


@over(WITH_MASS)
def test_a_constant_added_to_the_cost_of_a_given_mass_moves_the_value_only(case):
    problem = case.problem()
    one, two = solve(rebuilt(problem, cost=numbers(problem).cost + 3.0), TIGHT), solve(problem, TIGHT)
    assert one.value == pytest.approx(two.value + 3.0 * case.mass, rel=1e-9)
    np.testing.assert_allclose(one.plan, two.plan, atol=1e-9)


@over(UNORDERED)
def test_masses_scale(case):
    """With all masses doubled, so is the plan, once the cost pays for what the product of the weights has gained."""
    problem = case.problem()
    data = numbers(problem)
    mass = None if data.mass is None else 2 * data.mass
    doubled = rebuilt(problem, cost=data.cost + data.epsilon * np.log(2), a=2 * data.a, b=2 * data.b, mass=mass)
    np.testing.assert_allclose(solve(doubled, TIGHT).plan, 2 * solve(problem, TIGHT).plan, atol=1e-9)


@pytest.mark.parametrize("ratios", [(2.0, 1.0), (0.5, 1.0), (1.0, 3.0), (4.0, 4.0)], ids=str)
@pytest.mark.parametrize("epsilon", [0.1, 0.0])
def test_a_ratio_that_is_no_choice_is_another_weight_beside_forbidden_arcs(ratios, epsilon):
    """Of arcs that can carry nothing, too, which are told by what the sides ask for and not by the weights."""
    triangle, by = np.array([[0.0, np.inf], [1.0, 0.0]]), np.array([0.3, 0.7])
    rows, columns = (Between(ratio, ratio) for ratio in ratios)
    found = solve(Problem(triangle, by / ratios[0], by / ratios[1], epsilon=epsilon, rows=rows, columns=columns))
    np.testing.assert_allclose(found.plan, np.diag(by), atol=1e-7)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        cost = np.where(rng.random((5, 4)) < 0.4, np.inf, rng.random((5, 4)))
        given = np.where(np.isfinite(cost), rng.integers(0, 3, (5, 4)), 0.0)
        a, b = given.sum(1), given.sum(0)
        one = solve(Problem(cost, a / ratios[0], b / ratios[1], epsilon=epsilon, rows=rows, columns=columns))
        two = solve(Problem(cost, a, b, epsilon=epsilon))
        assert one.transport_cost == pytest.approx(two.transport_cost, rel=1e-6, abs=1e-6)
        np.testing.assert_allclose(one.row_marginal, a, atol=1e-6)
        if epsilon:  # without it there may be many
            np.testing.assert_allclose(one.plan, two.plan, atol=1e-6 * a.sum())


@pytest.mark.parametrize("side", [FREE, Between(0.5, np.inf), KL(1e-9), TV(1e-9)], ids=str)
def test_a_side_without_an_upper_bound_takes_more_than_the_weights_beside_forbidden_arcs(side):
    """Each column has three times its weight, from where it costs least: no forbidden arc keeps a row from giving it."""
    cost = np.array([[0.1, np.inf, 0.9], [0.4, 0.3, 0.2]])
    a, b = np.array([0.2, 0.3]), np.array([0.1, 0.3, 0.1])
    found = solve(Problem(cost, a, b, rows=side, columns=Between(3.0, 3.0)))
    np.testing.assert_allclose(found.plan, [[0.3, 0.0, 0.0], [0.0, 0.9, 0.3]], atol=1e-7)
    turned = solve(Problem(cost.T, b, a, rows=Between(3.0, 3.0), columns=side))
    np.testing.assert_allclose(turned.plan, found.plan.T, atol=1e-7)
    assert solve(Problem(cost, a, b, epsilon=0.1, rows=side, columns=Between(3.0, 3.0))).certificate.holds


@pytest.mark.parametrize("number", [np.array, np.float32, Fraction, Decimal, torch.tensor, bool], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("side", [KL, TV, ChiSquared, L2, Between], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("epsilon", [0.1, 0.0])
def test_the_kind_of_a_number_does_not_matter(number, side, epsilon):
    problem, value = CASES["kl-kl"].problem(epsilon=epsilon), 1.0 if number is bool else 0.5
    one, two = (side(*[x] * (1 + (side is Between))) for x in (value, number(value)))
    assert_alike(*(solve(rebuilt(problem, rows=x, columns=FREE)) for x in (two, one)), tolerance=1e-7)


@over(UNORDERED)
def test_a_bin_may_be_split(case):
    problem = case.problem()
    data = numbers(problem)
    cost, a = np.vstack([data.cost, data.cost[2:3]]), np.r_[data.a, 0.3 * data.a[2]]
    a[2] *= 0.7
    split, whole = solve(rebuilt(problem, cost=cost, a=a), TIGHT), solve(problem, TIGHT)
    assert split.value == pytest.approx(whole.value, rel=1e-9)
    np.testing.assert_allclose(split.plan[2] + split.plan[5], whole.plan[2], atol=1e-9)
    np.testing.assert_allclose(split.plan[5] / 0.3, split.plan[2] / 0.7, atol=1e-9)


@given(problem=problems(exact=False, smallest_epsilon=0.2), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_swapped_problems_have_the_same_value(problem, seed):
    data = numbers(problem)
    swapped = rebuilt(problem, cost=data.cost.T, a=data.b, b=data.a, rows=data.columns, columns=data.rows)
    one, two = solve(problem, throw=False), solve(swapped, throw=False)
    if one.converged and two.converged:
        room = 1e-7 * max(one.certificate.scale, two.certificate.scale)
        assert abs(one.value - two.value) <= room + sum(x.certificate.gap + x.certificate.rounding for x in (one, two))


# -- batches -----------------------------------------------------------------------------------------------------------


def stacked(singles):
    arrays = zip(*((numbers(p).cost, numbers(p).a, numbers(p).b) for p in singles), strict=True)
    first = singles[0]
    cost, a, b = (np.stack(x) for x in arrays)
    return Problem(cost, a, b, epsilon=first.epsilon, rows=first.rows, columns=first.columns, mass=first.mass)


def assert_batch_is_loop(singles):
    together = solve(stacked(singles), throw=False)
    for i, single in enumerate(singles):
        alone = solve(single, throw=False)
        assert together.status[i] is alone.status
        assert together.steps[i] == alone.steps
        assert together.value[i] == pytest.approx(alone.value, rel=1e-12)
        np.testing.assert_allclose(together.plan[i], alone.plan, atol=1e-12)


@over(UNORDERED)
def test_a_batch_equals_a_loop(case):
    assert_batch_is_loop([case.problem(epsilon=0.2, seed=seed, empty=seed == 1) for seed in range(3)])


@over(select(exact_too=True))
def test_a_batch_equals_a_loop_at_epsilon_zero(case):
    assert_batch_is_loop([case.problem(epsilon=0.0, seed=seed, empty=seed == 1) for seed in range(3)])


@over({k: PLAIN[k] for k in ("fixed-fixed", "kl-kl", "at_most-tv")})
def test_a_ragged_batch_is_padded_with_zero_weights(case):
    singles = [case.problem(seed=seed, shape=shape) for seed, shape in enumerate([(5, 6), (3, 6), (4, 2)])]
    padded = []
    for single in singles:
        data = numbers(single)
        cost, a, b = np.zeros((5, 6)), np.zeros(5), np.zeros(6)
        n, m = data.cost.shape
        cost[:n, :m], a[:n], b[:m] = data.cost, data.a, data.b
        padded.append(rebuilt(single, cost=cost, a=a, b=b))
    together = solve(stacked(padded), TIGHT)
    for i, single in enumerate(singles):
        alone, (n, m) = solve(single, TIGHT), single.shape
        assert together.value[i] == pytest.approx(alone.value, rel=1e-9)
        np.testing.assert_allclose(together.plan[i, :n, :m], alone.plan, atol=1e-9)
        assert not together.plan[i, n:].any() and not together.plan[i, :, m:].any()


def test_weights_are_shared_over_a_batch_and_batches_may_have_many_dimensions():
    rng = np.random.default_rng(0)
    cost, a, b = rng.random((2, 3, 4, 5)), rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(5), size=(3,))
    solution = solve(Problem(cost, a, b, epsilon=0.3))
    assert solution.value.shape == solution.status.shape == solution.steps.shape == (2, 3)
    assert solution.plan.shape == (2, 3, 4, 5) and solution.f.shape == (2, 3, 4) and solution.g.shape == (2, 3, 5)
    for i, j in np.ndindex(2, 3):
        assert solution.value[i, j] == pytest.approx(solve(Problem(cost[i, j], a, b[j], epsilon=0.3)).value, rel=1e-12)


def test_one_hard_problem_does_not_make_the_easy_ones_pay():
    rng = np.random.default_rng(0)
    cost = rng.random((3, 20, 20)) * np.array([0.1, 1.0, 30.0])[:, None, None]
    solution = solve(Problem(cost, epsilon=0.1), Sinkhorn(max_steps=300, annealing=None), throw=False)
    assert [s.name for s in solution.status] == ["CONVERGED", "CONVERGED", "MAX_STEPS"]
    assert solution.steps[0] < solution.steps[1] < solution.steps[2] == 300


# -- NumPy, torch, dtypes ----------------------------------------------------------------------------------------------


@over(UNORDERED)
def test_numpy_equals_torch(case):
    problem = case.problem()
    ours, theirs = solve(problem), solve(with_leaves(problem))
    for name in (
        "value",
        "plan",
        "f",
        "g",
        "mass_multiplier",
        "row_marginal",
        "column_marginal",
        "mass",
        "transport_cost",
    ):
        from_numpy, from_torch = getattr(ours, name), getattr(theirs, name)
        assert isinstance(from_numpy, np.ndarray | np.floating) and isinstance(from_torch, torch.Tensor)
        np.testing.assert_allclose(from_numpy, from_torch.numpy(), rtol=1e-12, atol=1e-14)


TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("name", ["fixed-fixed", "fixed-free", "between-tv-mass"])
def test_dtype_in_is_dtype_out(dtype, epsilon, name):
    case = CASES[name]
    double = case.problem(epsilon=epsilon)
    cost, a, b = (torch.tensor(x, dtype=dtype) for x in (numbers(double).cost, numbers(double).a, numbers(double).b))
    solution = solve(Problem(cost, a, b, epsilon=epsilon, rows=case.rows, columns=case.columns, mass=case.mass))
    outputs = (solution.value, solution.plan, solution.f, solution.g, solution.mass, solution.transport_cost)
    assert all(x.dtype == dtype and x.device == cost.device for x in outputs)
    assert float(solution.value) == pytest.approx(solve(double).value, rel=TOLERANCES[dtype], abs=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpy_keeps_its_dtype(dtype):
    solution = solve(Problem(np.eye(3, dtype=dtype), epsilon=0.5))
    assert solution.value.dtype == solution.plan.dtype == dtype


def test_integers_and_lists_are_doubles():
    assert solve(Problem([[0, 1], [1, 0]], [1, 1], [1, 1], epsilon=0.5)).value.dtype == np.float64


def test_inputs_are_not_copied_and_not_written_to():
    cost = np.random.default_rng(0).random((4, 4))
    before = cost.copy()
    problem = Problem(cost, epsilon=0.1)
    assert np.shares_memory(problem.cost.dense().numpy(), cost)
    solve(problem)
    cost.flags.writeable = False
    solve(Problem(cost))
    np.testing.assert_array_equal(cost, before)


# -- limits ------------------------------------------------------------------------------------------------------------


def balanced(rng):
    return rng.random((5, 6)), rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(6))


def softmax_plan(cost, a, b, epsilon):
    """Row softmax: what is left of the problem when the columns ask for nothing."""
    kernel = b * np.exp(-cost / epsilon)
    return a[:, None] * kernel / kernel.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_strong_penalty_meets_the_balanced_problem(seed):
    cost, a, b = balanced(np.random.default_rng(seed))
    hard = solve(Problem(cost, a, b, epsilon=0.1), TIGHT)
    for side, room in ((KL(1e6), 1e-5), (TV(1e3), 1e-8), (Between(1 - 1e-9, 1 + 1e-9), 1e-7)):
        soft = solve(Problem(cost, a, b, epsilon=0.1, rows=side, columns=side), TIGHT, throw=False)
        np.testing.assert_allclose(soft.plan, hard.plan, atol=room)
        assert soft.value == pytest.approx(hard.value, abs=room)


@pytest.mark.parametrize("seed", range(5))
def test_a_weak_penalty_and_a_free_side_meet_the_softmax(seed):
    cost, a, b = balanced(np.random.default_rng(seed))
    expected = softmax_plan(cost, a, b, 0.1)
    np.testing.assert_allclose(solve(Problem(cost, a, b, epsilon=0.1, columns=FREE)).plan, expected, atol=1e-12)
    np.testing.assert_allclose(solve(Problem(cost.T, b, a, epsilon=0.1, rows=FREE)).plan, expected.T, atol=1e-12)
    np.testing.assert_allclose(
        solve(Problem(cost, a, b, epsilon=0.1, columns=KL(1e-7)), TIGHT).plan, expected, atol=1e-5
    )


@pytest.mark.parametrize("seed", range(5))
def test_two_free_sides_with_mass_meet_the_global_softmax(seed):
    cost, a, b = balanced(np.random.default_rng(seed))
    kernel = np.outer(a, b) * np.exp(-cost / 0.1)
    solution = solve(Problem(cost, a, b, epsilon=0.1, rows=FREE, columns=FREE, mass=0.7))
    np.testing.assert_allclose(solution.plan, 0.7 * kernel / kernel.sum(), atol=1e-12)


@over(select(exact_too=True, mass=None))
def test_a_small_epsilon_meets_the_linear_program(case):
    exact = solve(case.problem(epsilon=0.0))
    gaps = [abs(solve(case.problem(epsilon=e), throw=False).value - exact.value) for e in (0.1, 0.03, 0.01)]
    assert gaps[2] < gaps[1] < gaps[0] and gaps[2] <= 0.01 * np.log(30)


def test_a_one_by_one_problem_has_the_answer_by_hand():
    solution = solve(Problem([[2.0]], [3.0], [3.0], epsilon=0.5))
    assert solution.plan == pytest.approx(np.array([[3.0]]))
    assert solution.value == pytest.approx(6.0 + 0.5 * (3 * np.log(3 / 9) - 3 + 9))
    assert solve(Problem([[2.0]], [3.0], [3.0])).value == pytest.approx(6.0)


# -- warm starts -------------------------------------------------------------------------------------------------------


@over(UNORDERED)
def test_a_warm_start_takes_fewer_steps(case):
    problem = case.problem(epsilon=0.1)
    data = numbers(problem)
    nearby = rebuilt(problem, cost=data.cost + 1e-5 * np.random.default_rng(0).random((5, 6)))
    cold, first = solve(nearby, Sinkhorn(mixing=0)), solve(problem, Sinkhorn())
    warm = solve(nearby, Sinkhorn(), init=first)
    assert warm.steps <= max(1, cold.steps - 1) and warm.steps <= solve(nearby, Sinkhorn()).steps
    assert warm.value == pytest.approx(cold.value, rel=1e-6)
    again = solve(problem, init=Potentials(*(torch.as_tensor(x) for x in (first.f, first.g, first.mass_multiplier))))
    assert again.steps <= 2
