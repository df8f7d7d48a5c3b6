"""Misuse is a ValueError that tells value, rule, cause and fix; failure to converge is a Status; nothing is ever silent."""

import warnings

import numpy as np
import pytest
import torch
from catalogue import CASES, SIDES, UNORDERED, over

from iotsolve import (
    AT_MOST,
    FIXED,
    FREE,
    KL,
    TV,
    Between,
    Exact,
    Implicit,
    Potentials,
    Problem,
    Sinkhorn,
    SolveError,
    Status,
    certify,
    inverse_loss,
    solve,
)
from iotsolve.testing.references import gibbs_plan, numbers, violation

INF, NAN = float("inf"), float("nan")
COST = np.random.default_rng(0).random((5, 6))
A, B = np.full(5, 0.2), np.full(6, 1 / 6)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def problem(cost=COST, a=A, b=B, **options):
    return Problem(cost, a, b, **options)


def entropic(**options):
    return problem(epsilon=0.1, **options)


# Each row: what is done, and what the message must say of value, rule, cause and fix.
MISUSE = {
    "NaN cost": (
        lambda: problem(changed(COST, (1, 2), NAN)),
        r"cost\[1, 2\] is NaN \(1 NaN in all\).*finite, or \+inf.*0/0",
    ),
    "-inf cost": (lambda: problem(changed(COST, (1, 2), -INF)), r"cost\[1, 2\] is -inf.*no optimal plan.*negated"),
    "one-dimensional cost": (
        lambda: Problem(np.ones(3)),
        r"shape \(3,\).*\(\.\.\., n, m\).*Points\(x, y, metric\)",
    ),
    "empty cost": (lambda: Problem(np.ones((0, 3))), r"shape \(0, 3\).*n, m >= 1"),
    "cost of strings": (lambda: Problem([["a", "b"]]), r"cost has dtype <U1.*real numbers.*CSV"),
    "ragged cost": (lambda: Problem([[1, 2], [3]]), r"cost is no array.*rows must have equal lengths.*pad or drop"),
    "complex cost": (lambda: Problem(torch.ones(2, 2, dtype=torch.complex64)), r"cost is complex.*real.*real part"),
    "NaN weight": (lambda: problem(a=changed(A, 3, NAN)), r"a\[?3\]? = nan.*finite and non-negative.*sum of 0"),
    "negative weight": (
        lambda: problem(b=changed(B, 2, -0.5)),
        r"b\[?2\]? = -0\.5.*non-negative.*positive and negative parts",
    ),
    "infinite weight": (lambda: problem(a=changed(A, 0, INF)), r"a\[?0\]? = inf.*finite"),
    "zero total": (lambda: problem(a=np.zeros(5)), r"a has total 0.*no plan.*empty histogram"),
    "totals whose product overflows": (
        lambda: entropic(a=1e200 * A, b=1e200 * B),
        r"totals of 1e\+200 and 1e\+200, whose product overflows torch.float64: the entropy.*Rescale",
    ),
    "swapped weights": (lambda: problem(a=B, b=A), r"a has shape \(6,\).*5 rows.*\(\.\.\., 5\).*swapped.*transposed"),
    "scalar weights": (lambda: problem(b=1.0), r"b has shape \(\).*6 columns"),
    "batches apart": (
        lambda: Problem(np.zeros((2, 5, 6)), np.ones((3, 5)) / 5, epsilon=0.1),
        r"\(3,?.*\(2,?|\(2,?.*\(3,?",
    ),
    "unequal totals": (
        lambda: problem(a=2 * A),
        r"rows ask for at least 2 but the columns allow at most 1.*renormalised.*FREE",
    ),
    "unequal in a batch": (
        lambda: Problem(np.zeros((2, 5, 6)), np.stack([A, 2 * A]), B),
        r"at least 2 but the columns allow at most 1 in problem 1.*renormalised",
    ),
    "bounds apart": (
        lambda: entropic(rows=Between(2, 3), columns=AT_MOST),
        r"rows ask for at least 2 but the columns allow at most 1.*scale a and b",
    ),
    "too much mass": (
        lambda: entropic(rows=AT_MOST, columns=FREE, mass=1.5),
        r"mass = 1\.5 but the rows allow at most 1",
    ),
    "too little mass": (lambda: entropic(columns=FREE, mass=0.5), r"rows ask for at least 1 but mass = 0\.5"),
    "negative epsilon": (
        lambda: problem(epsilon=-0.1),
        r"epsilon = -0\.1.*one finite number >= 0.*units.*0 is exact transport",
    ),
    "NaN epsilon": (lambda: problem(epsilon=NAN), r"epsilon = nan.*finite"),
    "infinite epsilon": (lambda: problem(epsilon=INF), r"epsilon = inf.*finite"),
    "array epsilon": (lambda: problem(epsilon=np.array([0.1, 0.2])), r"epsilon = array.*one number"),
    "tensor epsilon": (
        lambda: problem(epsilon=torch.ones(2)),
        r"epsilon has shape \(2,\)|epsilon = tensor.*one finite number",
    ),
    "word epsilon": (lambda: problem(epsilon="0.1"), r"epsilon = '0\.1'.*one finite number >= 0"),
    "no epsilon": (lambda: problem(epsilon=None), r"epsilon = None.*one number"),
    "zero tensor epsilon": (
        lambda: problem(epsilon=torch.tensor(0.0)),
        r"tensor equal to 0.*pass the number 0.*gradient",
    ),
    "zero mass": (lambda: entropic(rows=FREE, columns=FREE, mass=0.0), r"mass = 0.*plan is zero.*mass to be moved"),
    "negative mass": (lambda: entropic(rows=FREE, columns=FREE, mass=-1.0), r"mass = -1\.0.*>= 0"),
    "NaN mass": (lambda: entropic(rows=FREE, columns=FREE, mass=NAN), r"mass = nan.*finite"),
    "marginal class": (lambda: entropic(rows=KL), r"rows = .*KL.*must be a marginal object.*KL\(rho\)"),
    "marginal word": (lambda: entropic(columns="fixed"), r"columns = 'fixed'.*FIXED, FREE, AT_MOST"),
    "crossed bounds": (lambda: Between(2.0, 1.0), r"lo=2\.0, hi=1\.0.*lo <= hi.*swap"),
    "negative bound": (lambda: Between(-0.5, 1.0), r"lo=-0\.5.*0 <= lo"),
    "empty bounds": (lambda: Between(0.0, 0.0), r"hi=0\.0.*hi > 0"),
    "NaN bound": (lambda: Between(NAN, 1.0), r"lo=nan"),
    "infinite lower bound": (lambda: Between(INF, INF), r"lo=inf.*lo finite"),
    "zero KL rho": (lambda: KL(0.0), r"KL\(rho=0\.0\).*positive and finite.*units of the cost.*FIXED.*FREE"),
    "negative TV rho": (lambda: TV(-1.0), r"TV\(rho=-1\.0\).*positive"),
    "infinite KL rho": (lambda: KL(INF), r"KL\(rho=inf\).*finite.*use FIXED"),
    "NaN TV rho": (lambda: TV(NAN), r"TV\(rho=nan\)"),
    "word rho": (lambda: KL("strong"), r"KL\('strong'\).*single numbers, or tensors without dimensions"),
    "rho of one dimension": (lambda: KL(torch.ones(1)), r"KL\(tensor.*tensors without dimensions"),
    "bound of one dimension": (lambda: Between(0.0, torch.ones(1)), r"Between\(tensor.*tensors without dimensions"),
    "array rho": (lambda: TV(np.ones(2)), r"TV\(array.*single numbers"),
    "unbounded": (
        lambda: problem(COST - 3, rows=FREE, columns=TV(0.5)),
        r"unbounded: arc \(\d, \d\) costs -.*charge 0\.5.*mass=",
    ),
    "zero plan": (
        lambda: problem(rows=AT_MOST, columns=FREE),
        r"no side asks for any mass.*optimal plan is zero.*mass=",
    ),
    "stranded row": (
        lambda: entropic(cost=changed(COST, 3, INF)),
        r"row 3 must carry mass.*forbidden \(cost inf\).*Allow an arc, set that weight to 0.*relax",
    ),
    "stranded column": (lambda: entropic(cost=changed(COST, (slice(None), 1), INF)), r"column 1 must carry mass"),
    "stranded by an empty bin": (
        lambda: problem([[0, INF], [0, 0]], [0.5, 0.5], [0.0, 1.0], epsilon=0.1),
        r"row 0 must carry mass but every arc to a bin with mass is forbidden",
    ),
    "no arc at all": (
        lambda: problem(np.full((5, 6), INF), rows=FREE, columns=FREE, epsilon=0.1),
        r"every arc between bins with mass is forbidden.*only plan is zero.*mask inverted",
    ),
    "too few arcs": (
        lambda: problem([[0, INF, INF], [0, INF, INF], [0, 0, 0]], np.full(3, 1 / 3), np.full(3, 1 / 3), epsilon=0.1),
        r"allowed arcs carry at most 0\.66666\d* but the rows demand 1.*Allow more arcs.*relax",
    ),
    "too few arcs in one problem of a batch": (
        lambda: Problem(
            np.where(np.arange(6).reshape(2, 3, 1, 1) == 4, [[0, INF, INF], [0, INF, INF], [0, 0, 0]], 0.0), epsilon=0.1
        ),
        r"allowed arcs of problem \[1, 1\] carry at most 0\.66666\d* but the rows demand 1",
    ),
    "too few arcs for the mass": (
        lambda: problem([[0, INF], [0, INF]], [1, 1], [1, 1], rows=AT_MOST, columns=AT_MOST, mass=1.5, epsilon=0.1),
        r"carry at most 1 but the mass demands? 1\.5",
    ),
    "Sinkhorn at epsilon zero": (
        lambda: solve(problem(), Sinkhorn()),
        r"Sinkhorn.*epsilon = 0.*Exact\(\).*Change.*leave the solver out",
    ),
    "Exact with entropy": (lambda: solve(entropic(), Exact()), r"Exact.*epsilon = 0\.1.*Sinkhorn\(\)"),
    "solver by name": (
        lambda: solve(entropic(), "sinkhorn"),
        r"solver = 'sinkhorn'.*of type Sinkhorn or Newton or Interior or Exact",
    ),
    "solver class": (
        lambda: solve(entropic(), Sinkhorn),
        r"solver = <class.*of type Sinkhorn or Newton or Interior or Exact.*without brackets",
    ),
    "gradient class": (
        lambda: solve(entropic(), gradient=Implicit),
        r"gradient = <class.*of type Envelope or Implicit.*without brackets",
    ),
    "negative tolerance": (lambda: Sinkhorn(tolerance=-1e-3), r"tolerance = -0\.001.*\[0, 1\).*1e-8"),
    "negative window": (lambda: Sinkhorn(mixing=-1), r"mixing = -1.*0 for none"),
    "no steps": (lambda: Sinkhorn(max_steps=0), r"max_steps = 0.*at least 1"),
    "annealing upwards": (lambda: Sinkhorn(annealing=1.5), r"annealing = 1\.5.*\(0, 1\).*None"),
    "warm start of another size": (
        lambda: solve(entropic(), init=solve(Problem(np.eye(3), epsilon=0.1))),
        r"init\.f has shape \(3,\): must be \(5,\).*another problem",
    ),
    "warm start of another batch": (
        lambda: solve(Problem(np.stack([COST] * 2), epsilon=0.5), init=solve(Problem(np.stack([COST] * 3), epsilon=0.5))),
        r"init\.f has shape \(3, 5\): must be \(2, 5\)",
    ),
    "certificate of no tolerance": (lambda: certify(entropic(), np.zeros(5), np.zeros(6), tolerance=-1), r"tolerance = -1"),
    "warm start with an array": (lambda: solve(entropic(), init=np.zeros(5)), r"init.*Solution or Potentials"),
    "plan of another shape": (lambda: entropic().primal(np.ones((6, 5)) / 30), r"plan.*\(6, 5\).*\(5, 6\)"),
    "plan that would broadcast": (lambda: entropic().primal(np.ones((1, 1))), r"plan.*\(1, 1\).*\(5, 6\)"),
    "potentials of another shape": (
        lambda: entropic().dual(np.zeros(6), np.zeros(5)),
        r"f.*\(6,\).*\(5,\)|f.*\(\.\.\., 5\)",
    ),
    "multiplier of no mass": (lambda: entropic().dual(np.zeros(5), np.zeros(6), 0.3), r"lam = 0.3.*without mass"),
    "certified multiplier of no mass": (
        lambda: certify(entropic(), np.zeros(5), np.zeros(6), -1.0),
        r"lam = -1.0.*without mass",
    ),
    "certified plan of another shape": (
        lambda: certify(problem(), np.zeros(5), np.zeros(6), plan=np.ones((6, 5))),
        r"plan.*\(6, 5\).*\(5, 6\)",
    ),
    "target of another shape": (lambda: inverse_loss(entropic(), np.ones((6, 5)) / 30), r"\(6, 5\).*\(5, 6\)"),
    "target off the marginals": (
        lambda: inverse_loss(entropic(), np.ones((5, 6))),
        r"target is not a plan of this problem.*KL\(rho\)",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_a_value_error_that_tells_value_rule_cause_and_fix(name):
    act, words = MISUSE[name]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        act()


@pytest.mark.parametrize("epsilon", [np.float32(0.1), np.array(0.1), torch.tensor(0.1, dtype=torch.float64)], ids=repr)
def test_any_single_number_is_an_epsilon(epsilon):
    assert float(solve(problem(epsilon=epsilon)).value) == pytest.approx(solve(entropic()).value, rel=1e-6)


# -- nothing is silent -------------------------------------------------------------------------------------------------


def test_nothing_is_renormalised():
    with pytest.raises(ValueError, match="at most"):
        problem(a=A * (1 + 1e-6))
    double = solve(Problem(COST, 3 * A, 3 * B, epsilon=0.1))
    np.testing.assert_allclose(double.plan.sum(1), 3 * A, rtol=1e-6)
    np.testing.assert_array_equal(double.problem.a.numpy(), 3 * A)


def test_totals_equal_up_to_rounding_are_accepted():
    a = np.random.default_rng(0).random(1000)
    for dtype in (np.float64, np.float32):
        x = (a / a.sum()).astype(dtype)
        assert Problem(np.zeros((1000, 1000), dtype), x, x[::-1].copy(), epsilon=1.0).shape == (1000, 1000)


@pytest.mark.parametrize("name", ["fixed", "between", "kl"])
def test_a_solver_that_fails_raises_with_everything_it_knows(name):
    unfinished = Problem(COST, A, B, epsilon=0.01, rows=SIDES[name])
    with pytest.raises(SolveError, match=r"(?s)max_steps was reached.*NOT certified.*throw=False") as caught:
        solve(unfinished, Sinkhorn(max_steps=3))
    error = caught.value
    assert error.status is Status.MAX_STEPS is error.solution.status
    assert not error.certificate.holds and error.certificate.dual <= error.certificate.primal
    assert error.solution.plan.shape == (5, 6)


def test_throw_false_returns_the_unfinished_solution():
    solution = solve(Problem(COST, A, B, epsilon=0.01), Sinkhorn(max_steps=3), throw=False)
    assert solution.status is Status.MAX_STEPS and not solution.converged and solution.steps == 3
    assert "MAX_STEPS" in repr(solution)


def test_the_first_failure_of_a_batch_is_raised():
    cost = np.stack([np.zeros((5, 6)), COST])
    with pytest.raises(SolveError) as caught:
        solve(Problem(cost, A, B, epsilon=0.005), Sinkhorn(max_steps=3))
    assert caught.value.status is Status.MAX_STEPS
    assert caught.value.solution.converged.tolist() == [True, False]


def test_status_messages_name_a_cause_and_a_fix():
    for status in Status:
        if status is not Status.CONVERGED:
            assert "(a)" in status.value and "(b)" in status.value


def test_nothing_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in CASES.values():
            assert solve(case.problem(empty=True, forbidden=True)).certificate.holds


# -- hard cases that have an answer ------------------------------------------------------------------------------------

UNTOTAL = {
    "upper triangle": ([[0, 0], [INF, 0]], [0.5, 0.5], [0.5, 0.5], [[0.5, 0], [0, 0.5]]),
    "uneven": ([[-0.2, INF], [-0.2, 0.1]], [0.7, 0.3], [0.7, 0.3], [[0.7, 0], [0, 0.3]]),
    "chain": (
        [[0, 0, 0], [INF, 0, 0], [INF, INF, 0]],
        [1, 1, 1],
        [1, 1, 1],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    ),
}


@pytest.mark.parametrize("name", UNTOTAL)
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 1.0])
def test_feasible_without_total_support_converges(name, epsilon):
    cost, a, b, plan = UNTOTAL[name]
    solution = solve(Problem(cost, a, b, epsilon=epsilon))
    np.testing.assert_allclose(solution.plan, plan, atol=1e-8)
    assert solution.certificate.holds
    transport = sum(np.array(cost)[i, j] * plan[i][j] for i, j in zip(*np.nonzero(plan), strict=True))
    assert solution.transport_cost == pytest.approx(transport, abs=1e-8)


@over(UNORDERED)
@pytest.mark.parametrize("epsilon, shift", [(1e-300, 0.0), (1e-12, 0.0), (1e-12, -2.0), (1e-4, 1e9)])
def test_extreme_epsilon_is_an_answer_or_a_status(case, epsilon, shift):
    base, sides = numbers(case.problem()), {"rows": case.rows, "columns": case.columns, "mass": case.mass}
    problem = Problem(base.cost + shift, base.a, base.b, epsilon=epsilon, **sides)
    solution = solve(problem, Sinkhorn(max_steps=30), throw=False)
    if solution.converged:
        assert np.isfinite(solution.value) and np.isfinite(solution.plan).all()
        assert solution.certificate.holds
        plan = gibbs_plan(problem, solution.f, solution.g, solution.mass_multiplier)
        assert violation(problem, plan) <= 2e-8 * plan.sum()
    else:
        assert solution.status in (Status.NOT_FINITE, Status.MAX_STEPS, Status.STALLED)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", SIDES)
def test_epsilon_at_the_end_of_the_dtype_is_never_an_answer(dtype, name):
    solution = solve(Problem(COST.astype(dtype), epsilon=1e-30, rows=SIDES[name]), throw=False)
    assert solution.status in (Status.NOT_FINITE, Status.STALLED, Status.MAX_STEPS)
    assert not solution.certificate.holds


def test_a_warm_start_of_nan_does_no_harm_or_says_so():
    broken = Potentials(torch.full((5,), NAN), torch.full((6,), NAN), torch.tensor(0.0))
    solution = solve(entropic(), init=broken, throw=False)
    assert solution.status is Status.NOT_FINITE or solution.value == pytest.approx(solve(entropic()).value)


def test_a_start_may_be_of_numpy():
    cold = solve(entropic())
    start = Potentials(np.asarray(cold.f), np.asarray(cold.g), 0.0)
    assert solve(entropic(), Sinkhorn(), init=start).steps == 0


@pytest.mark.parametrize("name", SIDES)
def test_no_start_makes_a_problem_fail(name):
    rng = np.random.default_rng(0)
    for k in range(12):
        n, m = rng.integers(2, 30, 2)
        epsilon = [0.01, 0.1, 1.0][k % 3]
        problem = Problem(rng.random((n, m)), epsilon=epsilon, rows=SIDES[name], columns=(FIXED, KL(1.0))[k % 2])
        far = 10.0 ** rng.uniform(-1, 5)
        start = Potentials(*(torch.as_tensor(far * rng.standard_normal(size)) for size in ((n,), (m,), ())))
        cold, warm = solve(problem), solve(problem, init=start)
        assert warm.certificate.holds and warm.value == pytest.approx(cold.value, rel=1e-6, abs=1e-9)


def test_free_sides_are_named_by_what_they_are():
    assert Between(1.0, 1.0) == FIXED and Between(0.0, INF) == FREE and Between(0.0, 1.0) == AT_MOST
