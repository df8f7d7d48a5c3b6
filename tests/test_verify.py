"""The verification kit: references with potentials, limits, and the laws that find the bugs planted here."""

from dataclasses import replace

import numpy as np
import pytest
from catalogue import CASES, Case, answer, over
from hypothesis import given, settings

from iotsolve import FIXED, FREE, KL, L2, TV, Between, ChiSquared, Problem, Sinkhorn, certify, solve
from iotsolve.testing import (
    Answer,
    check_limits,
    marginals,
    points,
    problems,
    reference,
    verify,
)
from iotsolve.testing.references import (
    best_potentials,
    dual_objective,
    gibbs_plan,
    numbers,
    objective,
    repaired,
    rounding,
    softmax_value,
)
from iotsolve.testing.solvers import judge
from iotsolve.testing.verification import iotsolve_solver

FEW = max(settings().max_examples // 6, 1)  # every problem is solved a dozen times and twice by cvxpy

# -- what can be drawn -------------------------------------------------------------------------------------------------


def test_clouds_of_points_repeat_and_have_one_to_three_dimensions():
    seen = set()

    @given(clouds=points())
    def look(clouds):
        x, y = clouds
        both = np.concatenate(clouds)
        seen.add(f"{x.shape[1]} dimensions")
        seen.add("repeated" if len(np.unique(both, axis=0)) < len(both) else "distinct")
        assert x.shape[1] == y.shape[1] and abs(both).max() <= 1.0

    look()
    assert seen == {"1 dimensions", "2 dimensions", "3 dimensions", "repeated", "distinct"}


def test_every_marginal_is_drawn():
    seen = set()

    @given(side=marginals())
    def look(side):
        seen.add(type(side))

    look()
    assert seen == {Between, KL, TV, ChiSquared, L2}


# -- references --------------------------------------------------------------------------------------------------------


@given(problem=problems())
@settings(max_examples=4 * FEW)
def test_the_dual_at_the_potentials_of_the_reference_is_its_value(problem):
    found = reference(problem)
    dual = dual_objective(problem, found.f, found.g, found.lam)
    digits = 1e3 * rounding(problem)  # nine of what the value is the difference of, which may be 0
    assert abs(dual - found.value) <= 1e-6 * found.scale + digits


QUADRATIC = {
    "chi-squared": Case(ChiSquared(0.7), ChiSquared(0.7), None, 1.0, 1.3),
    "l2-kl": Case(L2(0.9), KL(0.7), None, 1.0, 1.3),
    "l2-tv-mass": Case(L2(0.9), TV(0.4), 0.9, 1.0, 1.3),
    "fixed-chi-squared": Case(FIXED, ChiSquared(0.7), None, 1.0, 1.3),
}


@over(CASES | QUADRATIC)
def test_potentials_of_the_reference_are_those_of_the_library(case):
    """Empty bins and forbidden arcs included, in the same gauge: two derivations of one convention."""
    problem = case.problem(empty=True, forbidden=True)
    found = answer(case, empty=True, forbidden=True)
    solution = solve(problem, Sinkhorn(tolerance=1e-13, max_steps=20_000, stationary=True), throw=False)
    for mine, theirs in ((solution.f, found.f), (solution.g, found.g), (solution.mass_multiplier, found.lam)):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    np.testing.assert_allclose(gibbs_plan(problem, found.f, found.g, found.lam), found.plan, atol=1e-6)
    np.testing.assert_allclose(objective(problem, found.plan), found.value, rtol=1e-7)


@pytest.mark.parametrize("name", ["fixed-fixed", "kl-tv", "between-at_most-mass"])
def test_the_best_potential_is_found_by_trying(name):
    """Moving one potential either way lowers the dual: bisection and the definition agree."""
    case = CASES[name]
    problem, found = case.problem(), answer(case)
    rng = np.random.default_rng(0)
    g = found.g + 0.1 * rng.normal(size=6)
    best, _ = best_potentials(problem, found.f, g, found.lam)
    top = dual_objective(problem, best, g, found.lam)
    for i in range(5):
        for step in (-1e-3, 1e-3):
            moved = best + step * (np.arange(5) == i)
            assert dual_objective(problem, moved, g, found.lam) < top


# -- limits ------------------------------------------------------------------------------------------------------------

SOFT = {k: case for k, case in CASES.items() if "kl" in k or "tv" in k} | QUADRATIC


@over({k: SOFT[k] for k in ("kl-kl", "tv-free", "kl-fixed-mass", "fixed-tv", *QUADRATIC)})
def test_limits_hold(case):
    check_limits(case.problem())


@given(problem=problems())
@settings(max_examples=FEW)
def test_limits_hold_for_whatever_is_drawn(problem):
    check_limits(problem, factors=(1.0, 20.0))


def off_by(size):
    """A solver whose values are wrong by a part of themselves."""
    return lambda problem: solve(problem).value * (1 + size)


@pytest.mark.parametrize("name", ["kl-kl", "tv-free", "fixed-fixed"])
@pytest.mark.parametrize("size", [1e-4, -1e-4])
def test_limits_catch_a_wrong_value(name, size):
    with pytest.raises(AssertionError, match=r"(rho to|epsilon to|soft-max)"):
        check_limits(CASES[name].problem(), solver=off_by(size), factors=(1.0, 1e3, 1e6))


def test_limits_catch_a_slope_that_rises():
    with pytest.raises(AssertionError, match=r"rho to (0|infinity)"):
        check_limits(CASES["kl-kl"].problem(), solver=lambda p: 0.1 * numbers(p).rows.rho ** 2)


def test_the_soft_max_is_the_value_of_free_sides():
    for name in ("free-free", "free-free-mass", "fixed-free", "free-fixed"):
        case = CASES[name]
        assert softmax_value(case.problem()) == pytest.approx(answer(case).value, rel=1e-8)
    assert softmax_value(CASES["kl-free"].problem()) is None


INF = float("inf")

# -- bugs to be found --------------------------------------------------------------------------------------------------


def over_iotsolve(change):
    """A solver that answers like this library but for what ``change(answer, data...)`` does to the answer."""

    def solver(*data):
        return change(iotsolve_solver(*data), *data)

    return solver


def before_iotsolve(change):
    """A solver that hands other data to this library: ``change(data...)``."""
    return lambda *data: iotsolve_solver(*change(*data))


@over_iotsolve
def without_mass_terms(said, cost, a, b, epsilon, rows, columns, mass):
    return replace(said, value=said.value - epsilon * (a.sum() * b.sum() - said.plan.sum()))


@over_iotsolve
def without_the_reference_in_the_gradient(said, cost, a, b, epsilon, rows, columns, mass):
    density = np.divide(said.plan.sum(1), a, out=np.zeros_like(a), where=a > 0)
    term = np.where(a > 0, epsilon * (b.sum() - density), 0.0)
    return replace(said, gradient=said.gradient | {"a": said.gradient["a"] - term})


@over_iotsolve
def zero_at_empty_bins(said, cost, a, b, epsilon, rows, columns, mass):
    return replace(said, f=np.where(a > 0, said.f, 0.0), g=np.where(b > 0, said.g, 0.0))


@over_iotsolve
def infeasible_at_empty_bins(said, cost, a, b, epsilon, rows, columns, mass):
    return replace(said, f=np.where(a > 0, said.f, said.f + abs(cost[np.isfinite(cost)]).max() + 1.0))


@before_iotsolve
def infinity_is_ten_thousand(cost, a, b, epsilon, rows, columns, mass):
    large = KL(1e4 * (abs(cost[np.isfinite(cost)]).max() or 1.0))
    return cost, a, b, epsilon, large if rows == FIXED else rows, large if columns == FIXED else columns, mass


def smoothed(cost, a, b, epsilon, rows, columns, mass):
    """Total variation made smooth by a little entropy."""
    little = 0.01 * (np.ptp(cost[np.isfinite(cost)]) or 1.0)
    return iotsolve_solver(cost, a, b, little, rows, columns, mass).plan


def kernel_in_floats(cost, a, b, epsilon, rows, columns, mass):
    """The textbook's scaling, whose kernel underflows; divisions by zero are made zero."""
    if not (
        np.isfinite(a).all() and np.isfinite(b).all() and a.min() >= 0 and b.min() >= 0 and not np.isnan(cost).any()
    ):
        raise ValueError("weights")
    if abs(a.sum() - b.sum()) > 1e-9 * a.sum():
        raise ValueError("totals")
    kernel, u, v = np.exp(-cost / epsilon), np.ones_like(a), np.ones_like(b)
    for _ in range(100):
        u = np.nan_to_num(a / (kernel @ v), posinf=0.0)
        v = np.nan_to_num(b / (kernel.T @ u), posinf=0.0)
    return {"plan": u[:, None] * kernel * v, "converged": None if (kernel > 0).all() else True}


def takes_what_pays(cost, a, b, epsilon, rows, columns, mass):
    """Partial transport that forgets how much may be moved as soon as more of it pays."""
    said = iotsolve_solver(cost, a, b, epsilon, rows, columns, mass)
    if not (said.plan > 0)[cost < 0].any():
        return said
    return replace(
        iotsolve_solver(cost, a, b, epsilon, rows, columns, None), value=None, lam=None, f=None, gradient=None
    )


def unit_lost(cost, a, b, epsilon, rows, columns, mass):
    """Solves for a cost of range 1, and hands out that problem's value."""
    unit = np.ptp(cost[np.isfinite(cost)]) or 1.0
    sides = (replace(side, rho=side.rho / unit) for side in (rows, columns))
    said = iotsolve_solver(cost / unit, a, b, epsilon / unit, *sides, mass)
    return Answer(value=said.value, plan=said.plan, converged=said.converged)


@before_iotsolve
def forgiving(cost, a, b, epsilon, rows, columns, mass):
    a, b = (np.abs(np.nan_to_num(x, nan=0.1)) for x in (a, b))
    if rows == columns == FIXED:
        b = b * (a.sum() / b.sum())
    return np.nan_to_num(cost, nan=0.0, posinf=np.inf), a, b, epsilon, rows, columns, mass


def sure_of_itself(cost, a, b, epsilon, rows, columns, mass):
    problem = Problem(cost, a, b, epsilon=epsilon, rows=rows, columns=columns, mass=mass)
    solution = solve(problem, Sinkhorn(max_steps=1, annealing=None), throw=False)
    return {"plan": solution.plan, "f": solution.f, "g": solution.g, "converged": True}


def forbidden_is_dear(cost, a, b, epsilon, rows, columns, mass):
    dear = 2.0 * (1.0 + abs(cost[np.isfinite(cost)]).max())
    return iotsolve_solver(np.where(np.isinf(cost), dear, cost), a, b, epsilon, rows, columns, mass).plan


def in_place(cost, a, b, epsilon, rows, columns, mass):
    said = iotsolve_solver(cost, a, b, epsilon, rows, columns, mass)
    cost -= cost[np.isfinite(cost)].min()
    return said


def transposed(*data):
    return iotsolve_solver(*data).plan.T


def other_entropy(cost, a, b, epsilon, rows, columns, mass):
    """Entropy relative to 1 and not to the product of the weights: Shannon's."""
    with np.errstate(divide="ignore"):
        shannon = np.where(np.outer(a, b) > 0, cost + epsilon * np.log(np.outer(a, b)), np.inf)
    return iotsolve_solver(shannon, a, b, epsilon, rows, columns, mass).plan


@before_iotsolve
def half_the_strength(cost, a, b, epsilon, rows, columns, mass):
    """Half the squared distance is not the squared distance."""
    return cost, a, b, epsilon, replace(rows, rho=2 * rows.rho), replace(columns, rho=2 * columns.rho), mass


def quiet_zero(cost, a, b, epsilon, rows, columns, mass):
    try:
        return iotsolve_solver(cost, a, b, epsilon, rows, columns, mass)
    except ValueError:
        return np.zeros_like(cost)


def crashes_on_rectangles(cost, a, b, epsilon, rows, columns, mass):
    return iotsolve_solver(cost, a + 0 * b, b, epsilon, rows, columns, mass)


def parts(**of):
    """A solver that computes its answer from this library's: ``part(answer, data...)`` by names."""
    return lambda *data: {name: part(iotsolve_solver(*data), *data) for name, part in of.items()}


def value_of(said, *data):
    return said.value


def plan_of(said, *data):
    return said.plan


def entropy(plan, relative_to):
    used = plan > 0
    return (plan[used] * np.log(plan[used] / relative_to[used])).sum() - plan.sum() + relative_to.sum()


def shannon_value(said, cost, a, b, epsilon, *_):
    ours, shannon = entropy(said.plan, np.outer(a, b)), entropy(said.plan, np.ones_like(cost)) - cost.size
    return said.value + epsilon * (shannon - ours)


def uniform_value(said, cost, a, b, epsilon, *_):
    uniform = np.full_like(cost, a.sum() * b.sum() / cost.size)
    return said.value + epsilon * (entropy(said.plan, uniform) - entropy(said.plan, np.outer(a, b)))


def without_a_factor(said, cost, a, b, epsilon, *_):
    return said.value + (1 - epsilon) * entropy(said.plan, np.outer(a, b))


def transport_alone(said, cost, *_):
    return (said.plan * np.where(np.isfinite(cost), cost, 0.0)).sum()


def backwards(said, cost, a, b, epsilon, rows, columns, mass):
    """KL of the weights relative to the marginal."""
    r, c = said.plan.sum(1), said.plan.sum(0)
    if not (r[a > 0].all() and c[b > 0].all()):
        raise NotImplementedError
    return said.value + rows.rho * (entropy(a, r) - entropy(r, a)) + columns.rho * (entropy(b, c) - entropy(c, b))


def normalised(cost, a, b, *rest):
    return iotsolve_solver(cost, a / a.sum(), b / b.sum(), *rest).plan


def in_epsilons(name):
    return lambda said, cost, a, b, epsilon, *_: getattr(said, name) / epsilon


def of_a_bare_kernel(name):
    """The logarithm of Sinkhorn's scalings, where the kernel has no weights."""

    def potential(said, cost, a, b, epsilon, *_):
        with np.errstate(divide="ignore"):
            return getattr(said, name) + epsilon * np.log(a if name == "f" else b)

    return potential


def moved_by_epsilon(said, cost, a, b, epsilon, *_):
    return said.f + epsilon


def slope(name, change):
    """A gradient in one datum: ``change(answer, data...)``."""
    return lambda said, *data: {name: change(said, *data)}


def reached(potential):
    return np.where(np.isfinite(potential), potential, 0.0)


def gives_up(*data):
    return replace(iotsolve_solver(*data), converged=False)


CAUSES = {
    "the transport cost alone, without entropy and penalties": ("kl", parts(value=transport_alone, plan=plan_of)),
    "entropy relative to 1, sum P (log P - 1)": ("entropic", parts(value=shannon_value)),
    "entropy relative to a uniform plan": ("entropic", parts(value=uniform_value)),
    "entropy without the factor epsilon": ("entropic", parts(value=without_a_factor)),
    "entropy without its mass terms, - sum P + sum a sum b": ("kl", without_mass_terms),
    "KL of the weights relative to the marginal": ("kl", parts(value=backwards)),
    "weights divided by their totals": ("kl", normalised),
    "the plan divided by its total": ("kl", parts(plan=lambda said, *_: said.plan / said.plan.sum())),
    "mass not asked for": ("partial", lambda *data: iotsolve_solver(*data[:-1], None).plan),
    "rho times 2": ("l2", half_the_strength),
    "epsilon times 0.5": ("entropic", lambda c, a, b, eps, *rest: iotsolve_solver(c, a, b, eps / 2, *rest).plan),
    "entropy relative to 1, Shannon's": ("kl", other_entropy),
    "the objects of rows and columns exchanged": (
        "semi-relaxed",
        lambda c, a, b, eps, rows, columns, mass: iotsolve_solver(c, a, b, eps, columns, rows, mass).plan,
    ),
    "potentials in units of epsilon": ("entropic", parts(value=value_of, f=in_epsilons("f"), g=in_epsilons("g"))),
    "potentials of a plan without weights, exp((f + g - C) / epsilon)": (
        "entropic",
        parts(value=value_of, f=of_a_bare_kernel("f"), g=of_a_bare_kernel("g")),
    ),
    "potentials off by a constant": ("kl", parts(value=value_of, f=moved_by_epsilon, g=lambda said, *_: said.g)),
    "lam left out": ("partial", parts(value=value_of, f=lambda said, *_: said.f, g=lambda said, *_: said.g)),
    "the gradient times 0.5": (
        "kl",
        parts(value=value_of, gradient=slope("cost", lambda said, *_: said.gradient["cost"] / 2)),
    ),
    "the conjugate alone, without the derivative of the reference a x b": ("kl", without_the_reference_in_the_gradient),
    "the potential alone": ("kl", parts(value=value_of, gradient=slope("a", lambda said, *_: reached(said.f)))),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_of_a_common_mistake_is_named(cause):
    regime, solver = CAUSES[cause]
    report = verify(solver, regimes=[regime], examples=5, shrink=0)
    assert cause in [found for causes in report[regime].failure.causes.values() for found in causes], report
    assert cause in str(report)


def test_no_formula_is_blamed_for_the_value_of_a_plan_that_is_wrong():
    def dearer(cost, a, b, epsilon, rows, columns, mass):
        plan = half_the_strength(cost, a, b, epsilon, rows, columns, mass).plan
        return {"plan": plan, "value": objective(Problem(cost, a, b, epsilon=epsilon, rows=rows, columns=columns), plan)}

    report = verify(dearer, regimes=["tv"], examples=5, shrink=0)
    assert {found for causes in report["tv"].failure.causes.values() for found in causes} == {"rho times 2"}, report


def test_a_slope_without_end_is_right_where_no_weight_can_be_met_and_only_there():
    """An empty bin on a hard side that no arc leads to: the value is infinite as soon as it has weight."""

    def endless(cost, a, b, epsilon, rows, columns, mass):
        said = iotsolve_solver(cost, a, b, epsilon, rows, columns, mass)
        return replace(said, gradient={"a": np.where(a > 0, said.gradient["a"], np.inf)})

    out_of_reach = Problem([[INF], [-2.0]], [0.0, 0.5], [1.25], epsilon=0.02, columns=FREE)
    assert not judge(out_of_reach, endless).broken
    within_reach = Problem([[1.0], [-2.0]], [0.0, 0.5], [1.25], epsilon=0.02, columns=FREE)
    assert list(judge(within_reach, endless).broken) == ["gradient in a"]


BUGS = {
    "mass terms dropped": (without_mass_terms, "kl", "value"),
    "reference's term missing from the gradient": (without_the_reference_in_the_gradient, "kl", "gradient in a"),
    "potentials of empty bins not tight": (zero_at_empty_bins, "entropic", "empty bins"),
    "potentials of empty bins infeasible": (infeasible_at_empty_bins, "exact", "empty bins"),
    "semi-relaxed by a huge number": (infinity_is_ten_thousand, "semi-relaxed", "marginals"),
    "total variation smoothed": (smoothed, "exact-tv", "optimality"),
    "kernel underflows": (kernel_in_floats, "small-epsilon", "marginals"),
    "partial moves too much": (takes_what_pays, "exact-partial", "mass"),
    "unit of the cost lost": (unit_lost, "kl", "units"),
    "malformed data forgiven": (forgiving, "entropic", "refusal"),
    "converged before it has": (sure_of_itself, "entropic", "converged"),
    "forbidden arcs merely dear": (forbidden_is_dear, "kl", "support"),
    "cost changed in place": (in_place, "kl", "inputs"),
    "plan transposed": (transposed, "kl", "form"),
    "another entropy": (other_entropy, "kl", "optimality"),
    "another factor in the penalty": (half_the_strength, "l2", "value"),
    "a quiet zero": (quiet_zero, "kl", "refusal"),
    "rectangles crash": (crashes_on_rectangles, "exact", "error"),
}


@pytest.mark.parametrize("solver, regime, law", BUGS.values(), ids=BUGS.keys())
def test_every_planted_bug_is_found_and_named(solver, regime, law):
    report = verify(solver, regimes=[regime], examples=2 * FEW, shrink=0)
    assert not report.passed
    assert law in report[regime].broken, report


def test_the_solver_that_was_wrapped_passes():
    report = verify(examples=max(FEW // 2, 1))
    assert report.passed, report
    assert all(x.verdict == "passed" and x.converged == x.offered == x.examples for x in report.regimes)


@pytest.mark.parametrize("converged", [True, None, False])
def test_what_a_solver_says_it_has_not_found_is_not_looked_at(converged):
    """A gradient as little as a plan; of a solver that says nothing of the kind both are."""
    problem = Problem(np.eye(3), epsilon=0.5)

    def said(*data, **wrong):
        return replace(iotsolve_solver(*data), converged=converged, **wrong)

    for wrong in ({"gradient": {"cost": np.full((3, 3), np.inf)}}, {"plan": np.full((3, 3), np.nan)}):
        broken = judge(problem, lambda *data, wrong=wrong: said(*data, **wrong)).broken
        assert ("finite" in broken) == (converged is not False), broken


def test_a_rounding_at_the_edge_of_the_domain_is_no_fault_of_a_solver():
    """Feasible to the last digit, with a potential exactly at its lowest: lowering it by a rounding must not leave the domain."""
    problem = Problem(
        [[2e-06, 2e-06]], [0.5747126436781609], [0.25510204081632654, 0.13], rows=TV(7.05e-06), columns=TV(4.6e-06)
    )
    f, g = [6.6e-06], [-4.6e-06, -4.6e-06]
    assert np.isfinite(dual_objective(problem, *repaired(problem, f, g)))
    assert dual_objective(problem, *repaired(problem, [6.7e-06], g)) > -np.inf  # lowered on the side that has room
    assert dual_objective(problem, f, [-4.7e-06, -4.6e-06]) == -np.inf


ONCE_BROKEN = {
    "rounding of a step where all costs are 0": Problem([[0.0, 0.0]], [0.55], [0.5, 0.05]),
    "an empty bin at which the value jumps": Problem(
        [[-1.0, -1.0, -2.0]], [0.55], [1.25, 0.125, 0.0], columns=L2(0.99999)
    ),
    "an arc that no plan can use, beside empty bins": Problem(
        [[-2.0, -2.0, INF], [-2.0, -2.0, -2.0], [-2.0, -2.0, -2.0]],
        [0.5, 0.0, 0.05],
        [0.5, 0.0, 0.05],
        epsilon=0.02,
    ),
    "strong penalties where all costs are 0": Problem([[0.0]], [1.25], [1.25], rows=TV(1e6), columns=KL(2e6)),
    "a slope where the value is 0": Problem(
        [[0.0], [0.0]], [1.25, 0.35], [1.6], rows=TV(1.0), columns=KL(4.796302302117649)
    ),
    "a slope that overflows": Problem([[-1e6, -2e6], [-1e6, -1e6]], [0.5, 0.0], [1.25, 0.0], epsilon=2e4, columns=FREE),
}


@pytest.mark.parametrize("problem", ONCE_BROKEN.values(), ids=ONCE_BROKEN)
def test_what_other_seeds_once_broke_breaks_no_law(problem):
    found = judge(problem, iotsolve_solver)
    assert found.converged and not found.broken


def test_arcs_that_no_plan_can_use_are_out_of_the_way_of_a_certificate_of_the_problem_as_given():
    """A chain of components, each of which must be far below the next."""
    cost = np.where(np.tril(np.ones((5, 5))), np.random.default_rng(0).random((5, 5)), INF)
    problem = Problem(cost, epsilon=0.05)
    solution = solve(problem)
    assert certify(problem, solution.f, solution.g).holds
    assert abs(problem.plan(solution.potentials).numpy() - np.eye(5) / 5).sum() <= 1e-12
