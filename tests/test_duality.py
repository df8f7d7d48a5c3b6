"""Weak duality, the gap as a sum of non-negative terms, and certificates: for anybody's potentials, at every iterate."""

import sys
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from catalogue import CASES, answer, over
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import kl_div

from iotsolve import FIXED, FREE, KL, L2, TV, Between, ChiSquared, Points, Potentials, Problem, Sinkhorn, certify, solve
from iotsolve.certificate import _filled
from iotsolve.newton import DualSystem
from iotsolve.testing import check_certificate, check_duality, costs, marginals, problems, weights
from iotsolve.testing.references import _phi, dual_objective, gibbs_plan, numbers, objective, penalty, violation


def potentials_of(solution):
    return solution.f, solution.g, solution.mass_multiplier


# -- weak duality ------------------------------------------------------------------------------------------------------


@over(CASES)
def test_no_iterate_of_sinkhorn_is_above_the_optimum(case):
    problem, solution = case.problem(epsilon=0.1), None
    for _ in range(20):
        solution = solve(problem, Sinkhorn(max_steps=1), init=solution, throw=False)
        check_duality(problem, *potentials_of(solution), answer=answer(case, epsilon=0.1))


@over(CASES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
def test_no_certificate_of_an_iterate_misses_the_optimum(case, steps):
    problem = case.problem(epsilon=0.1)
    solution = solve(problem, Sinkhorn(max_steps=steps), throw=False)
    check_certificate(problem, solution, answer=answer(case, epsilon=0.1))


def multiplier(problem, number):
    return 0.0 if problem.mass is None else number


@over(CASES)
@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_no_random_potential_is_above_the_optimum(case, spread):
    problem, rng = case.problem(empty=True, forbidden=True), np.random.default_rng(3)
    found = answer(case, empty=True, forbidden=True)
    for _ in range(2):
        f, g = spread * rng.normal(size=5), spread * rng.normal(size=6)
        with np.errstate(over="ignore"):
            check_duality(problem, f, g, multiplier(problem, spread * rng.normal()), answer=found)
            assert certify(problem, f, g).dual <= found.value + 1e-9 * found.scale


@given(problem=problems(), seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 0.1, 1.0, 10.0]))
@settings(max_examples=50)
def test_weak_duality_holds_for_all_problems(problem, seed, spread):
    rng, data = np.random.default_rng(seed), numbers(problem)
    unit = spread * (data.epsilon or 1.0)
    potentials = (unit * rng.normal(size=x.shape) for x in (data.a, data.b))
    check_duality(problem, *potentials, multiplier(problem, unit * rng.normal()))


def test_a_multiplier_of_no_mass_would_be_above_the_optimum():
    problem = Problem(np.random.default_rng(0).random((4, 5)), epsilon=0.5)
    solution = solve(problem)
    assert dual_objective(problem, solution.f, solution.g, -0.1) > solution.value + 0.05  # and so is refused
    with pytest.raises(ValueError, match="without mass"):
        check_duality(problem, solution.f, solution.g, -0.1)


# -- the gap -----------------------------------------------------------------------------------------------------------


def fenchel_young(side, r, f, weights):
    """`D(r | a) + D*(-f) + <f, r>` from the definition of the penalty, not of its conjugate: by maximising over r."""
    grid = weights[:, None] * np.linspace(0.0, 8.0, 80_001)
    if isinstance(side, KL):
        price, paid = side.rho * kl_div(grid, weights[:, None]), side.rho * kl_div(r, weights)
    elif isinstance(side, TV):
        price, paid = side.rho * abs(grid - weights[:, None]), side.rho * abs(r - weights)
    else:
        lo, hi = side.bounds
        outside = (grid < (lo - 1e-12) * weights[:, None]) | (grid > (hi + 1e-12) * weights[:, None])
        price, paid = np.where(outside, np.inf, 0.0), 0.0
    conjugate = (-f[:, None] * grid - price).max(1)
    return float((paid + conjugate + f * r).sum())


@over({k: case for k, case in CASES.items() if FREE not in (case.rows, case.columns)})
def test_the_gap_is_a_sum_of_terms_that_are_not_negative(case):
    problem = case.problem()
    rng, plan = np.random.default_rng(5), answer(case).plan
    f, g, lam = 0.3 * rng.uniform(-1, 1, 5), 0.3 * rng.uniform(-1, 1, 6), 0.1 if case.mass else 0.0
    first = 0.3 * float(kl_div(plan, gibbs_plan(problem, f, g, lam)).sum())
    rows = fenchel_young(case.rows, plan.sum(1), f, problem.a.numpy())
    columns = fenchel_young(case.columns, plan.sum(0), g, problem.b.numpy())
    gap = objective(problem, plan) - dual_objective(problem, f, g, lam)
    assert gap == pytest.approx(first + rows + columns, abs=1e-6)
    assert min(first, rows, columns) >= -1e-6
    stated = problem.duality_gap(
        torch.as_tensor(plan), Potentials(*(torch.as_tensor(x, dtype=torch.float64) for x in (f, g, lam)))
    )
    assert float(stated) == pytest.approx(gap, abs=1e-6)


@over(CASES)
def test_the_certified_gap_is_primal_less_dual(case):
    problem = case.problem(epsilon=0.1, empty=True)
    certificate = solve(problem, Sinkhorn(max_steps=3), throw=False).certificate
    assert certificate.gap >= 0
    assert certificate.primal - certificate.dual == pytest.approx(certificate.gap, abs=1e-12 * certificate.scale)
    found = answer(case, epsilon=0.1, empty=True)
    assert certificate.dual <= found.value + 1e-9 * found.scale
    assert certificate.primal >= found.value - 1e-9 * found.scale


# -- certificates ------------------------------------------------------------------------------------------------------


@given(problem=problems())
@settings(max_examples=300)
def test_converged_implies_that_the_certificate_holds(problem):
    check_certificate(problem, solve(problem, throw=False))


@given(
    cost=costs(4, 3), a=weights(4), b=weights(3), rows=marginals(), columns=st.sampled_from([FREE, KL(0.5), TV(2.0)])
)
def test_converged_implies_that_the_certificate_holds_at_weights_of_any_total(cost, a, b, rows, columns):
    problem = Problem(cost, a, b, epsilon=0.5, rows=rows, columns=columns)
    check_certificate(problem, solve(problem, throw=False))


@given(problem=problems(exact=False, smallest_epsilon=0.1), tolerance=st.sampled_from([1e-2, 1e-4, 1e-10]))
def test_the_certificate_holds_at_the_tolerance_asked_for(problem, tolerance):
    solution = solve(problem, Sinkhorn(tolerance=tolerance), throw=False)
    assert solution.certificate.tolerance == tolerance
    check_certificate(problem, solution)


@over(CASES)
@pytest.mark.parametrize("steps", [1, 1000])
def test_violations_equal_a_recomputation_in_numpy(case, steps):
    problem = case.problem(epsilon=0.1, empty=True, forbidden=True)
    solution = solve(problem, Sinkhorn(max_steps=steps), throw=False)
    plan = gibbs_plan(problem, *potentials_of(solution))
    certificate = solution.certificate
    said = certificate.row_violation + certificate.column_violation + certificate.mass_violation
    assert said == pytest.approx(violation(problem, plan), abs=1e-13)
    assert certificate.mass == pytest.approx(plan.sum(), rel=1e-12)
    assert certificate.relative_violation == pytest.approx(said / plan.sum(), abs=1e-13)


GARBAGE = {
    "nan": (np.full(5, np.nan), np.zeros(6)),
    "huge": (np.full(5, 1e6), np.zeros(6)),
    "tiny": (np.full(5, -1e6), np.zeros(6)),
    "minus infinity": (np.full(5, -np.inf), np.zeros(6)),
    "zero": (np.zeros(5), np.zeros(6)),
}


@over(CASES)
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_certified_only_if_it_is_the_answer(case, name):
    problem = case.problem()
    certificate, value = certify(problem, *GARBAGE[name]), answer(case).value
    assert not certificate.dual > value + 1e-9
    assert not certificate.primal < value - 1e-9
    if (
        certificate.holds
    ):  # once projected into the dual's domain, potentials of a free side are zero, whatever they were
        assert name not in ("nan", "huge")
        assert certificate.primal == pytest.approx(value, abs=1e-8)
    else:
        assert "NOT certified" in str(certificate)


@pytest.mark.parametrize("seed", range(3))
def test_pot_potentials_are_certified(seed):
    problem = CASES["fixed-fixed"].problem(epsilon=0.1, seed=seed)
    data = numbers(problem)
    _, log = ot.sinkhorn(data.a, data.b, data.cost, 0.1, stopThr=1e-14, numItermax=10_000, log=True)
    f, g = 0.1 * np.log(log["u"] / data.a), 0.1 * np.log(log["v"] / data.b)
    good, bad = certify(problem, f, g), certify(problem, f + 0.01 * data.a, g)
    assert good.holds and not bad.holds
    assert good.dual == pytest.approx(solve(problem).value, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_pot_unbalanced_potentials_are_certified(seed):
    problem = CASES["kl-kl"].problem(epsilon=0.1, seed=seed)
    data = numbers(problem)
    _, log = ot.sinkhorn_unbalanced(
        data.a, data.b, data.cost, 0.1, 0.7, reg_type="kl", stopThr=1e-14, numItermax=10_000, log=True
    )
    assert certify(problem, 0.1 * log["logu"], 0.1 * log["logv"]).holds


@pytest.mark.parametrize("seed", range(3))
def test_pot_exact_potentials_are_certified_with_their_plan(seed):
    problem = CASES["fixed-fixed"].problem(epsilon=0.0, seed=seed)
    data = numbers(problem)
    plan, log = ot.emd(data.a, data.b, data.cost, log=True)
    assert certify(problem, log["u"], log["v"], plan=plan).holds
    assert not certify(problem, log["u"] - 0.01, log["v"], plan=plan).holds
    assert not certify(problem, log["u"], log["v"]).holds


@over(CASES)
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_float32_converged_means_within_tolerance_in_float64(case, epsilon):
    double, found = case.problem(epsilon=epsilon), answer(case, epsilon=epsilon)
    arrays = (x.float() for x in (double.cost.dense(), double.a, double.b))
    single = Problem(*arrays, epsilon=epsilon, rows=case.rows, columns=case.columns, mass=case.mass)
    solution = solve(single, Sinkhorn(max_steps=2000), throw=False)
    assert solution.converged or epsilon < 0.1
    if not solution.converged:
        return
    assert solution.plan.dtype == torch.float32
    p = solution.potentials
    plan = gibbs_plan(single, *(x.double().numpy() for x in (p.f, p.g, p.lam)))
    assert violation(single, plan) <= 1e-5 * plan.sum()
    assert abs(float(solution.value) - found.value) <= 1e-5 * found.scale
    check_certificate(single, solution)


def test_the_certificate_of_a_batch_is_that_of_its_problems():
    singles = [CASES["between-tv"].problem(seed=seed, epsilon=0.1) for seed in range(3)]
    cost, a, b = (np.stack(x) for x in zip(*((p.cost.dense(), p.a, p.b) for p in singles), strict=True))
    together = solve(Problem(cost, a, b, epsilon=0.1, rows=singles[0].rows, columns=singles[0].columns)).certificate
    for i, single in enumerate(singles):
        alone = solve(single).certificate
        for field in ("primal", "dual", "scale", "mass", "row_violation"):
            assert getattr(together, field)[i] == pytest.approx(getattr(alone, field), abs=1e-12)
    assert together.holds.all()


def test_of_a_batch_only_what_needs_it_is_corrected(monkeypatch):
    """Between fixed sides, at a small epsilon: the plan of potentials that are nearly right, among some that are."""
    rng, sizes = np.random.default_rng(0), []
    problem = Problem(rng.random((3, 9, 7)), epsilon=2e-3)
    found = solve(problem, tolerance=1e-10)
    f = found.f.copy()
    f[1] += 1e-11 * rng.normal(size=9)
    corrections = DualSystem.corrections

    def counted(self, *given, **options):
        sizes.append(len(self.row_diagonal))
        return corrections(self, *given, **options)

    monkeypatch.setattr(DualSystem, "corrections", counted)
    together = certify(problem, f, found.g)
    assert sizes == [1] and together.holds.all()
    for k in range(3):
        alone = certify(Problem(problem.cost.dense()[k].numpy(), epsilon=2e-3), f[k], found.g[k])
        for field in ("primal", "dual", "gap", "scale", "mass", "row_violation"):
            assert getattr(together, field)[k] == pytest.approx(getattr(alone, field), rel=1e-9, abs=1e-15)


def test_a_neighbour_who_needs_more_does_not_change_the_gap():
    """One is nearly solved, the other's potentials are far off: the first is rounded as it is alone, once."""
    case, noise = CASES["fixed-at_most-mass"], np.random.default_rng(0)
    problem = case.problem(epsilon=0.1)
    solution = solve(problem)
    f = np.stack([solution.f + size * noise.normal(size=len(solution.f)) for size in (1e-5, 0.3)])
    g, lam = np.stack([solution.g] * 2), np.full(2, solution.mass_multiplier)
    cost, a, b = (np.stack([x] * 2) for x in (problem.cost.dense(), problem.a, problem.b))
    sides = {"rows": case.rows, "columns": case.columns, "mass": problem.mass}
    both = certify(Problem(cost, a, b, epsilon=problem.epsilon, **sides), f, g, lam, tolerance=1e-3)
    alone = certify(problem, f[0], g[0], lam[0], tolerance=1e-3)
    assert alone.gap > 0 and both.gap[0] == pytest.approx(alone.gap, rel=1e-6, abs=0)


@over({k: CASES[k] for k in ("fixed-between", "between-between", "at_most-at_most-mass", "kl-fixed-mass", "tv-between-mass")})
def test_a_small_linear_change_of_a_plan_is_priced_from_above_and_closely(case, monkeypatch):
    """From products with vectors; what it bounds is summed entry by entry where that is not allowed."""
    problem, noise = case.problem(epsilon=0.2), np.random.default_rng(1)
    solution = solve(problem, tolerance=1e-12)
    f = solution.f + 1e-4 * noise.normal(size=len(solution.f))
    given = f, solution.g, solution.mass_multiplier
    bound = certify(problem, *given, tolerance=1e-3)
    monkeypatch.setattr(sys.modules["iotsolve.certificate"], "_SMALL_CHANGE", 0.0)
    exact = certify(problem, *given, tolerance=1e-3)
    assert 0 < exact.gap <= bound.gap * (1 + 1e-9) <= 1.01 * exact.gap
    assert bound.primal >= exact.dual and exact.holds and bound.holds


SIDES = [FIXED, Between(2.0, 2.0), FREE, Between(0.5, 2.0), KL(0.7), TV(0.7), ChiSquared(0.7), L2(0.7)]


@pytest.mark.parametrize("side", SIDES, ids=repr)
def test_the_terms_of_the_gap_are_those_of_their_definition(side):
    """``D(r | a) - a phi(f) + f r``, bin by bin; potentials beyond what the side asks for among them."""
    rng = np.random.default_rng(0)
    a, f, (lo, hi) = rng.uniform(0.5, 2.0, 60), rng.uniform(-2.0, 3.0, 60), side.bounds
    f = np.maximum(f, side.floor)
    r = a * np.clip(rng.uniform(0.0, 3.0, 60), lo, hi) * (1.0 if lo > 0 else rng.random(60) > 0.2)
    paid = np.array([penalty(side, r[[i]], a[[i]]) for i in range(60)])
    here = [torch.from_numpy(x) for x in (r, f, a)]
    found = side.at(here[2]).fenchel_young(*here).numpy()
    np.testing.assert_allclose(found, paid - a * _phi(side, f, a) + f * r, rtol=1e-9, atol=1e-12)
    assert found.min() >= 0


def test_the_residual_of_total_variation_is_the_distance_from_what_a_potential_asks_for():
    r, a = torch.tensor([0.4, 1.0, 1.7]), torch.ones(3)
    asked = {-0.7: (1.0, np.inf), 0.2: (1.0, 1.0), 0.7: (0.0, 1.0)}
    for f, (low, high) in asked.items():
        off = np.abs(r.numpy() - np.clip(r.numpy(), low, high))
        np.testing.assert_allclose(TV(0.7).residual(r, torch.full((3,), f), a), off, atol=1e-6)


def filled_up(plan, a, b):
    """Rows, then columns scaled down to at most the weights, and what is lacking then as one rank-one piece."""
    plan = plan * np.minimum(1.0, a / plan.sum(1))[:, None]
    plan = plan * np.minimum(1.0, b / plan.sum(0))
    lacking, missing = a - plan.sum(1), b - plan.sum(0)
    return plan + np.outer(lacking, missing) / lacking.sum() if lacking.sum() > 0 else plan


@pytest.mark.parametrize("corrected", [False, True])
def test_what_filling_in_costs_is_bounded_from_above(corrected):
    """The bound knows vectors alone; here the plan that it speaks of is made and its divergence summed."""
    rng = np.random.default_rng(corrected)
    for _ in range(300):
        n, m = rng.integers(2, 9, 2)
        plan, size = 1e-9 + rng.dirichlet(np.full(n * m, rng.choice([0.3, 1.0, 5.0]))).reshape(n, m), 10 ** rng.uniform(-5, -2)
        u, v = size * rng.uniform(-1, 1, n), size * rng.uniform(-1, 1, m)
        x = (u[:, None] + v) * corrected
        after = plan * (1 + x)
        off = 0.0 if corrected and rng.random() < 0.5 else 0.1 * size
        a = after.sum(1) * (1 + off * rng.uniform(-1, 1, n))
        b = after.sum(0) * (1 + off * rng.uniform(-1, 1, m))
        b *= a.sum() / b.sum()
        price = kl_div(filled_up(after, a, b), plan).sum()
        known = (np.array([(plan * x**2).sum()]), abs(u).max() + abs(v).max()) if corrected else ()
        dearest = np.array([-np.log(plan / np.outer(a, b)).min()])
        with np.errstate(all="ignore"):
            bound = _filled(a[None], b[None], after.sum(1)[None], after.sum(0)[None], dearest, *known)[0]
        assert price <= bound
        assert bound <= 1.5 * price or off  # to which nothing is added where nothing is lacking


@pytest.mark.parametrize("share", [1.0, 0.5, 3.0])
def test_the_gap_between_fixed_sides_is_the_divergence_of_the_plan_that_meets_them(share):
    """Which scaling the plan of the potentials finds: from above, and closely, since of second order in what is off."""
    rng = np.random.default_rng(1)
    cost, a, b, epsilon = rng.random((6, 6)) / 2 + 1 - np.eye(6), rng.dirichlet(np.ones(6)), np.full(6, 1 / 6), 0.1
    meets = np.outer(a, b) * np.exp(-cost / epsilon)
    for _ in range(3000):
        meets *= (share * a / meets.sum(1))[:, None]
        meets *= share * b / meets.sum(0)
    logs = np.log(meets / np.outer(a, b)) + cost / epsilon
    off = 1e-6 * rng.normal(size=6)  # on both sides alike: what two rows owe to one another is half of it
    f, g = epsilon * (logs[:, 0] + off), epsilon * (logs[0] - logs[0, 0] + off)
    problem = Problem(cost, a, b, epsilon=epsilon, rows=Between(share, share), columns=Between(share, share))
    due = epsilon * kl_div(meets, gibbs_plan(problem, f, g)).sum()
    gap = certify(problem, f, g, tolerance=1e-15).gap
    assert due <= gap <= 1.2 * due


# -- the laws can fail -------------------------------------------------------------------------------------------------


def test_the_law_of_duality_catches_a_dual_above_the_optimum():
    case = CASES["kl-tv"]
    solution, found = solve(case.problem()), answer(case)
    check_duality(case.problem(), *potentials_of(solution), answer=found)
    with pytest.raises(AssertionError, match=r"(?s)weak duality: dual = .*rows = KL.*cost = \[\["):
        check_duality(case.problem(), *potentials_of(solution), answer=replace(found, value=found.value - 1e-6))


@pytest.mark.parametrize("name", ["fixed-fixed", "kl-kl", "at_most-between-mass"])
def test_the_law_of_certificates_catches_a_wrong_claim(name):
    case = CASES[name]
    solution, found = solve(case.problem()), answer(case)
    moved = replace(solution.potentials, f=solution.potentials.f + 0.01 * torch.arange(5))
    with pytest.raises(AssertionError, match="converged without a certificate"):
        check_certificate(case.problem(), replace(solution, found=moved))
    with pytest.raises(AssertionError, match=r"bounds: .*optimal_value"):
        check_certificate(case.problem(), solution, answer=replace(found, value=found.value + 1e-4))


@pytest.mark.parametrize("sides", [(FIXED, FIXED), (FIXED, KL(0.5))], ids=str)
def test_the_certificates_of_a_batch_of_two_dimensions_are_those_of_its_problems(sides):
    """With an empty bin, among costs for compiled passes, where plain transport is judged in vectors."""
    rng = np.random.default_rng(0)
    cost, a = rng.random((2, 3, 60, 50)), rng.random((2, 3, 60))
    a[..., 3] = 0.0
    a /= a.sum(-1, keepdims=True)
    solution = solve(Problem(cost, a, epsilon=0.1, rows=sides[0], columns=sides[1]))
    whole = solution.certificate
    assert whole.holds.shape == (2, 3) and whole.holds.all()
    for i, j in np.ndindex(2, 3):
        single = Problem(cost[i, j], a[i, j], epsilon=0.1, rows=sides[0], columns=sides[1])
        own = certify(single, solution.f[i, j], solution.g[i, j])
        assert whole.dual[i, j] == pytest.approx(own.dual, rel=1e-12)
        assert whole.gap[i, j] == pytest.approx(own.gap, rel=1e-3, abs=1e-14)


@pytest.mark.parametrize("solver", [None, Sinkhorn], ids=["automatic", "sweeps"])
@pytest.mark.parametrize("epsilon", [0.003, 0.001])
@pytest.mark.parametrize("n", [12, 150])  # whose kernel is in the nearest cache, and is not
def test_what_has_converged_at_a_tiny_epsilon_is_certified_at_loose_tolerances_too(n, epsilon, solver):
    """Where what is lacking is filled in at the price of the largest cost, the solver's own rule may not be enough."""
    rng, found = np.random.default_rng(0), []
    for cost in (rng.random((n, n)), np.square(rng.random((n, 1, 2)) - rng.random((1, n, 2))).sum(-1)):
        for dtype, tolerance in ((float, 1e-3), (np.float32, 1e-3), (float, 1e-5), (float, 1e-8)):
            asked = {"tolerance": tolerance} if solver is None else {"solver": solver(tolerance=tolerance, max_steps=500)}
            solution = solve(Problem(cost.astype(dtype), epsilon=epsilon), throw=False, **asked)
            assert solution.certificate.holds or not solution.converged, (tolerance, solution.certificate)
            found.append(solution.converged)
    assert np.mean(found) >= (0.75 if solver is None else 0.25)


def test_what_has_converged_of_points_is_certified_at_a_tiny_epsilon_and_a_loose_tolerance():
    """Where sweeps stop at a plan that no rounding makes feasible."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        problem = Problem(Points(rng.random((60, 2)), rng.random((63, 2))), epsilon=0.001, rows=Between(0.5, 2.0))
        solution = solve(problem, Sinkhorn(tolerance=1e-3, max_steps=400), throw=False)
        assert solution.converged and solution.certificate.holds, solution.certificate


@pytest.mark.parametrize("names", ["at_most-fixed-mass", "fixed-fixed-mass", "between-fixed"])
@pytest.mark.parametrize("n", [10, 800])  # corrected by a plan's copy that is in float64 anyway, and by one made for it
def test_bounds_are_met_by_one_correction(names, n, monkeypatch):
    """Of a plan that is nearly feasible, to the last digits, without scaling it again and again."""
    case, rounds = CASES[names], []
    rng = np.random.default_rng(n)
    cost, a, b = rng.random((n, n + 1)), rng.random(n) + 0.1, rng.random(n + 1) + 0.1
    mass = None if case.mass is None else (1.0 if "fixed" in names else 0.6)
    problem = Problem(cost, a / a.sum(), b / b.sum(), epsilon=0.05, rows=case.rows, columns=case.columns, mass=mass)
    solution = solve(problem)
    module = sys.modules["iotsolve.certificate"]
    scaled = module._scale_onto
    monkeypatch.setattr(module, "_scale_onto", lambda *given, **named: rounds.append(1) or scaled(*given, **named))
    monkeypatch.setattr(module, "_PROJECTIONS", 2)
    found = certify(problem, solution.f, solution.g, solution.mass_multiplier)
    assert found.holds and len(rounds) <= 1
    assert found.gap <= 1e-9 * found.scale
