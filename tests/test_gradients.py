"""Gradients against differences of solved problems: what the formulas say must be what the solver does."""

import numpy as np
import pytest
import torch
from catalogue import CASES, PRECISE, answer, over, select, with_leaves

from iotsolve import FIXED, KL, TV, Envelope, Implicit, Problem, Sinkhorn, inverse_loss, solve
from iotsolve.testing import check_gradient, reference
from iotsolve.testing.laws import derivative, random_direction
from iotsolve.testing.references import gibbs_plan, objective

SMOOTH = {k: case for k, case in CASES.items() if not (case.mass and case.rows == case.columns == FIXED)}


def movable(problem):
    """The tensors that can move alone: not a mass that a fixed side ties to its weights."""
    tied = problem.rows.is_fixed or problem.columns.is_fixed
    return [name for name in problem.tensors() if not (name == "mass" and tied)]


# -- the value ---------------------------------------------------------------------------------------------------------


@over(SMOOTH)
def test_envelope_equals_differences_in_every_parameter(case):
    problem = with_leaves(case.problem(epsilon=1.0, forbidden=True, empty=True))
    names = movable(problem)
    check_gradient(problem, along=[*names[:3], tuple(names[3:])], solver=PRECISE)


@pytest.mark.parametrize("name", ["fixed-fixed", "kl-kl", "tv-between-mass"])
def test_the_law_of_gradients_catches_a_wrong_one(name):
    """The gradient of the dual at unfinished potentials is not that of the value."""
    problem = with_leaves(CASES[name].problem(epsilon=0.1))
    check_gradient(problem, along=["cost"])
    with pytest.raises(AssertionError, match=r"derivative along cost: stated = .*differences = "):
        check_gradient(problem, along=["cost"], solver=Sinkhorn(max_steps=1))


@over(SMOOTH)
def test_forbidden_arcs_have_gradient_zero_and_never_nan(case):
    problem = with_leaves(case.problem(forbidden=True, empty=True))
    leaves = {k: v.requires_grad_() for k, v in problem.tensors().items()}
    gradients = torch.autograd.grad(solve(problem).value, list(leaves.values()), materialize_grads=True)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][leaves["cost"].isinf()] == 0).all()


def one_sided(scalar, step):
    """Derivative at 0 from values at 0, h and 2 h: second order."""
    weights = (-3 / 2, 2.0, -1 / 2)
    return sum(w * scalar(k * step) for k, w in enumerate(weights)) / step


@over({k: case for k, case in SMOOTH.items() if case.rows != FIXED or not (case.mass or case.balanced)})
def test_the_derivative_at_an_empty_bin_is_one_sided(case):
    problem = with_leaves(case.problem(empty=True))
    problem.a.requires_grad_()
    (gradient,) = torch.autograd.grad(solve(problem, PRECISE).value, problem.a)

    def value(weight):
        a = problem.a.detach().clone()
        a[1] = weight
        return float(solve(problem.detach().with_tensors({"a": a}), PRECISE, throw=False).value)

    assert float(gradient[1]) == pytest.approx(one_sided(value, 1e-5), rel=1e-6, abs=1e-6)


def test_balanced_weights_may_only_move_together():
    case = CASES["fixed-fixed"]
    problem = with_leaves(case.problem())
    a, b = problem.a.clone().requires_grad_(), problem.b.clone().requires_grad_()
    to_a, to_b = torch.autograd.grad(solve(problem.with_tensors({"a": a, "b": b}), PRECISE).value, [a, b])
    generator = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        direction = random_direction(problem, name, generator)
        assert direction["a"].sum() == pytest.approx(float(direction["b"].sum()))
        found = derivative(lambda p: float(solve(p, PRECISE).value), problem, direction)
        assert float((to_a * direction["a"]).sum() + (to_b * direction["b"]).sum()) == pytest.approx(found, rel=1e-6)


@over(select(exact_too=True))
def test_exact_gradients_are_subgradients(case):
    """The value is concave in the costs and the prices, and jointly convex in the weights, the bounds and the mass."""
    problem = with_leaves(case.problem(epsilon=0.0))
    leaves = {k: v.requires_grad_() for k, v in problem.tensors().items()}
    value = solve(problem).value
    gradients = dict(
        zip(leaves, torch.autograd.grad(value, list(leaves.values()), materialize_grads=True), strict=True)
    )
    generator = torch.Generator().manual_seed(2)
    for name in movable(problem):
        direction = cost_noise(problem, generator) if name == "cost" else random_direction(problem, name, generator)
        sign = -1.0 if name == "cost" or name.endswith("rho") else 1.0
        for step in (-0.2, -0.05, 0.05, 0.2):
            linear = float(value.detach() + sum((gradients[k] * step * v).sum() for k, v in direction.items()))
            assert sign * (moved_value(problem, direction, step) - linear) >= -1e-9


def moved_value(problem, direction, step):
    """The value a step further by HiGHS, infinite where nothing is feasible."""
    named = problem.detach().tensors()
    moved = problem.detach().with_tensors({k: named[k] + step * v for k, v in direction.items()})
    try:
        return reference(moved).value
    except RuntimeError as error:
        assert "infeasible" in str(error)
        return np.inf


def cost_noise(problem, generator):
    return {"cost": torch.rand(problem.shape, generator=generator, dtype=torch.float64) - 0.5}


# -- the plan and the potentials ---------------------------------------------------------------------------------------


OUTPUTS = ("value", "plan", "transport_cost", "f", "g", "mass", "row_marginal", "column_marginal")


def functionals(solution, seed=4):
    """A random linear function of each output of a solution, away from the potentials of unreachable bins."""
    generator = torch.Generator().manual_seed(seed)
    for output in OUTPUTS:
        value = getattr(solution, output)
        weights = torch.rand(value.shape, generator=generator, dtype=value.dtype)
        yield (weights * torch.where(value.isfinite(), value, 0.0)).sum()


def differences(problem, direction):
    """Derivatives of the functionals of all outputs along a direction, from solved problems alone."""

    def scalars(moved):
        return np.array([float(x) for x in functionals(solve(moved, PRECISE, throw=False))])

    return derivative(scalars, problem.detach(), direction)


def implicit(problem):
    """The same derivatives as gradients: a dictionary over the tensors for each output."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in problem.tensors().items()}
    solution = solve(problem.with_tensors(leaves), PRECISE, gradient=Implicit(), throw=False)
    for scalar in functionals(solution):
        found = torch.autograd.grad(scalar, list(leaves.values()), materialize_grads=True, retain_graph=True)
        yield dict(zip(leaves, found, strict=True))


@over(SMOOTH)
def test_implicit_equals_differences_in_every_parameter(case):
    problem = with_leaves(case.problem(epsilon=0.5))
    gradients, generator = list(implicit(problem)), torch.Generator().manual_seed(0)
    for names in ("cost", tuple(movable(problem)[1:])):
        direction = random_direction(problem, names, generator)
        for output, expected, gradient in zip(OUTPUTS, differences(problem, direction), gradients, strict=True):
            products = torch.cat([(gradient[k] * v).flatten() for k, v in direction.items()])
            size = abs(expected) + float(products.abs().sum()) + 1e-3
            assert abs(float(products.sum()) - expected) <= 1e-6 * size, f"{output} along {names}"


@over(SMOOTH)
def test_implicit_equals_differences_beside_forbidden_arcs_and_empty_bins(case):
    problem = with_leaves(case.problem(epsilon=1.0, forbidden=True, empty=True))
    cost, direction = problem.cost.dense(), random_direction(problem, "cost", torch.Generator().manual_seed(0))
    for output, expected, gradient in zip(OUTPUTS, differences(problem, direction), implicit(problem), strict=True):
        assert all(g.isfinite().all() for g in gradient.values()), output
        assert (gradient["cost"][cost.isinf()] == 0).all(), output
        if output not in ("f", "g"):  # an empty bin's potential is held, not moved
            found = float((gradient["cost"] * direction["cost"]).sum())
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), output


@pytest.mark.parametrize("name", ["fixed-fixed", "kl-tv", "between-at_most-mass"])
def test_implicit_differentiates_the_value_like_envelope(name):
    problem = with_leaves(CASES[name].problem())
    cost = problem.cost.dense().requires_grad_()
    (implicit,) = torch.autograd.grad(solve(problem, PRECISE, gradient=Implicit()).value, cost)
    (envelope,) = torch.autograd.grad(solve(problem, PRECISE, gradient=Envelope()).value, cost)
    torch.testing.assert_close(implicit, envelope, rtol=1e-6, atol=1e-9)


def shared_batch(name, size):
    """A batch that shares weights, epsilon and marginals: the leaves, the problem, and the same problems one by one."""
    case, first = CASES[name], with_leaves(CASES[name].problem(empty=True))
    leaves = {k: v.requires_grad_() for k, v in first.tensors().items()}
    cost = torch.stack([with_leaves(case.problem(seed=seed)).cost.dense() for seed in range(size)])
    leaves["cost"] = cost.requires_grad_()

    def problem(matrix):
        sides = {"rows": first.rows, "columns": first.columns, "mass": first.mass}
        return Problem(matrix, leaves["a"], leaves["b"], epsilon=leaves["epsilon"], **sides)

    return leaves, problem(cost), [problem(matrix) for matrix in cost]


@pytest.mark.parametrize("name", ["fixed-fixed", "kl-kl", "tv-between-mass", "at_most-fixed", "free-tv"])
@pytest.mark.parametrize("gradient", [Envelope(), Implicit()], ids=["envelope", "implicit"])
def test_a_batch_is_differentiated_like_its_problems(name, gradient):
    leaves, batch, singles = shared_batch(name, 3)
    output = "value" if isinstance(gradient, Envelope) else "transport_cost"
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def found(problem):
        return getattr(solve(problem, PRECISE, gradient=gradient, throw=False), output)

    total = (upstream * found(batch)).sum()
    loop = sum(u * found(single) for u, single in zip(upstream, singles, strict=True))
    together, apart = (torch.autograd.grad(x, list(leaves.values()), materialize_grads=True) for x in (total, loop))
    for key, one, other in zip(leaves, together, apart, strict=True):
        assert one.shape == leaves[key].shape
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [Envelope(), Implicit()], ids=["envelope", "implicit"])
def test_gradients_come_in_the_dtype_of_the_input(dtype, gradient):
    double = with_leaves(CASES["kl-tv"].problem())
    exact = double.cost.dense().requires_grad_()
    low = exact.detach().to(dtype).requires_grad_()
    for cost in (exact, low):
        problem = Problem(cost, double.a.detach(), double.b.detach(), epsilon=0.3, rows=KL(0.7), columns=TV(0.4))
        solve(problem, gradient=gradient).value.backward()
    assert low.grad.dtype == dtype
    torch.testing.assert_close(low.grad.double(), exact.grad, rtol=0.1, atol=1e-2)


@pytest.mark.parametrize(
    "output", ["plan", "f", "g", "mass_multiplier", "row_marginal", "column_marginal", "mass", "transport_cost"]
)
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_envelope_refuses_everything_but_the_value(output, epsilon):
    problem = with_leaves(CASES["between-tv-mass"].problem(epsilon=epsilon))
    problem.cost.dense().requires_grad_()
    with pytest.raises(RuntimeError, match=r"differentiates solution\.value only.*Implicit\(\).*detach"):
        getattr(solve(problem), output).sum().backward()


def test_nothing_is_refused_where_no_gradient_was_asked_for():
    problem = with_leaves(CASES["kl-kl"].problem())
    assert not solve(problem).plan.requires_grad
    problem.cost.dense().requires_grad_()
    with torch.no_grad():
        assert not solve(problem).plan.requires_grad


# -- laws of the gradient ----------------------------------------------------------------------------------------------


@over(SMOOTH)
def test_halving_cost_epsilon_and_rho_halves_the_value_and_keeps_the_gradient(case):
    def scaled(factor):
        problem = with_leaves(case.problem())
        named = {k: factor * v for k, v in problem.tensors().items() if k in ("cost", "epsilon") or k.endswith("rho")}
        problem = problem.with_tensors(named)
        cost = problem.cost.dense().requires_grad_()
        value = solve(problem).value
        return float(value.detach()), torch.autograd.grad(value, cost)[0]

    whole, half = scaled(1.0), scaled(0.5)
    assert half[0] == pytest.approx(whole[0] / 2, rel=1e-8)
    torch.testing.assert_close(half[1], whole[1], rtol=1e-6, atol=1e-9)


@over(SMOOTH)
def test_the_gradient_in_the_cost_is_the_plan(case):
    problem = with_leaves(case.problem())
    cost = problem.cost.dense().requires_grad_()
    solution = solve(problem, PRECISE, throw=False)
    (gradient,) = torch.autograd.grad(solution.value, cost)
    p = solution.potentials
    np.testing.assert_allclose(gradient, gibbs_plan(problem, p.f, p.g, p.lam), rtol=1e-10)


# -- the inverse problem -----------------------------------------------------------------------------------------------

INVERSE = {k: case for k, case in CASES.items() if case.mass is None or case.rows != FIXED}


def some_plan(case, seed=9):
    """A feasible plan that is not the answer: the answer to another cost."""
    other = case.problem().with_tensors({"cost": case.problem(seed=seed).cost.dense()})
    return solve(other, PRECISE, throw=False).plan


@over(INVERSE)
def test_inverse_loss_is_primal_less_value_with_gradient_target_less_plan(case):
    problem, target = with_leaves(case.problem()), some_plan(case)
    cost = problem.cost.dense().requires_grad_()
    loss, p = inverse_loss(problem, target, PRECISE), solve(problem, PRECISE, throw=False).potentials
    assert float(loss.detach()) == pytest.approx(objective(problem, target) - answer(case).value, abs=1e-8)
    assert float(loss.detach()) > 0
    (gradient,) = torch.autograd.grad(loss, cost)
    np.testing.assert_allclose(gradient, target - gibbs_plan(problem, p.f, p.g, p.lam), atol=1e-9)


@over(INVERSE)
def test_inverse_loss_is_zero_at_the_optimum(case):
    problem = case.problem()
    solution = solve(problem, PRECISE, throw=False)
    assert 0 <= inverse_loss(problem, solution.plan, PRECISE) + 1e-12 <= 1e-11


@pytest.mark.parametrize("name", ["fixed-fixed", "fixed-free", "free-free-mass"])
def test_inverse_loss_of_hard_sides_is_a_divergence_from_the_plan(name):
    problem = CASES[name].problem()
    target = some_plan(CASES[name])
    solution = solve(problem, PRECISE)
    plan = gibbs_plan(problem, solution.f, solution.g, solution.mass_multiplier)
    expected = 0.3 * (target * (np.log(target) - np.log(plan))).sum()
    assert inverse_loss(problem, target, PRECISE) == pytest.approx(float(expected), rel=1e-8)


def test_inverse_loss_of_an_impossible_target_is_refused():
    problem = CASES["fixed-fixed"].problem()
    with pytest.raises(ValueError, match=r"target is not a plan of this problem.*KL\(rho\)"):
        inverse_loss(problem, np.ones((5, 6)))


def test_inverse_loss_takes_a_sparse_target():
    problem = CASES["kl-free"].problem()
    target = np.zeros((5, 6))
    target[[0, 1, 2, 4], [3, 2, 5, 0]] = 0.25
    dense, sparse = inverse_loss(problem, target), inverse_loss(problem, torch.as_tensor(target).to_sparse())
    assert float(dense) == pytest.approx(float(sparse), rel=1e-12)
    assert float(dense) == pytest.approx(objective(problem, target) - reference(problem).value, rel=1e-8)
