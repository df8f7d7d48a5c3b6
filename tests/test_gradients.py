"""Gradients against differences of solved problems: what the formulas say must be what the solver does."""

import importlib
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import CASES, PRECISE, SIDES, Case, answer, over, select, with_leaves

from iotsolve import (
    AT_MOST,
    FIXED,
    FREE,
    KL,
    L2,
    TV,
    Between,
    ChiSquared,
    Envelope,
    Implicit,
    Interior,
    Newton,
    Points,
    Problem,
    Sinkhorn,
    Unroll,
    inverse_loss,
    sinkhorn_divergence,
    solve,
)
from iotsolve.kernels import bilinear
from iotsolve.testing import check_gradient, reference
from iotsolve.testing.laws import derivative, random_direction
from iotsolve.testing.references import gibbs_plan, objective

SMOOTH = {k: case for k, case in CASES.items() if not (case.mass and case.rows == case.columns == FIXED)}


def movable(problem):
    """The tensors that can move alone: not a mass that a fixed side ties to its weights."""
    tied = problem.rows.is_fixed or problem.columns.is_fixed
    return [name for name in problem.tensors() if not (name == "mass" and tied)]


# -- every output, in every input, in every regime ---------------------------------------------------------------------

ALL_SIDES = SIDES | {"chi2": ChiSquared(0.8), "l2": L2(0.9)}
OUTPUTS = (
    *("value", "plan", "f", "g", "mass_multiplier"),
    *("row_marginal", "column_marginal", "mass", "transport_cost"),
)
INPUTS = ("cost", "a", "b", "epsilon", "mass", "rows", "columns")
GUIDE = Path(__file__).parents[1] / "docs" / "gradients.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
WRITE = "IOTSOLVE_WRITE_TABLE"


def regime(rows, columns, with_mass):
    """A pair of sides with totals and a mass that meet no kink."""
    one = FIXED in (rows, columns)
    totals = (1.0, 1.0) if rows == columns == FIXED else (1.3, 1.0) if columns == FIXED else (1.0, 1.3)
    return Case(rows, columns, (1.0 if one else 0.9) if with_mass else None, *totals)


def regimes():
    """Every pair of sides, without `mass` on and above the diagonal and with it on and below; every other one has holes.

    Transposed problems are compared elsewhere.
    """
    for i, (r, rows) in enumerate(ALL_SIDES.items()):
        for j, (c, columns) in enumerate(ALL_SIDES.items()):
            for with_mass in [False] * (i <= j) + [True] * (i >= j and not rows == columns == FIXED):
                yield r, c, with_leaves(regime(rows, columns, with_mass).problem(**(HOLES if (i + j // 2) % 2 else {})))


HOLES = {"epsilon": 1.0, "empty": True, "forbidden": True}


def as_leaves(problem):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in problem.tensors().items()}
    return leaves, problem.with_tensors(leaves)


QUICK = Interior(tolerance=1e-13, stationary=True)


def outputs(problem, gradient, *, create_graph=False):
    """The leaves, and every output by name: those of a solution, and the gradient of the value in each leaf."""
    leaves, live = as_leaves(problem)
    solution = solve(live, QUICK, gradient=gradient, throw=False)
    found = {name: getattr(solution, name) for name in OUTPUTS}
    found = {name: torch.where(x.isfinite(), x, 0.0) for name, x in found.items()}  # an unreachable bin's potential
    slopes = torch.autograd.grad(
        solution.value, list(leaves.values()), create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return leaves, found | {f"d/d {name}": x for name, x in zip(leaves, slopes, strict=True)}


def pull(leaves, output, weights):
    """Derivatives of a weighted sum of an output, by leaf."""
    if not output.requires_grad:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    found = torch.autograd.grad(
        (weights * output).sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def random_weights(shape, generator):
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def directions(problem, generator):
    """A random direction of each kind of input; all parameters of a side move together."""
    kinds = {}
    for name in movable(problem):
        kinds.setdefault(name.partition(".")[0], []).append(name)
    return {kind: random_direction(problem, tuple(names), generator) for kind, names in kinds.items()}


def difference(of, problem, along, step):
    """Central difference of second order: two solves, and a step too short to meet a kink."""
    start = problem.tensors()

    def at(t):
        return of(problem.with_tensors({k: start[k] + t * v for k, v in along.items()}))

    return (at(step) - at(-step)) / (2 * step)


def errors(problem, gradient, *, step=1e-5):
    """Relative error by (output, input) of the derivatives of random sums of every output along random directions.

    Relative to the absolute terms that meet in the derivative, on either side; where these nearly vanish, to the size at which
    differences of solutions precise to 2e-14, with data of order one, resolve the limit.
    """
    generator = torch.Generator().manual_seed(3)
    leaves, stated = outputs(problem, gradient, create_graph=True)
    sizes, moves = [x.numel() for x in stated.values()], directions(problem, generator)

    def flat(moved):
        _, found = outputs(moved, gradient)
        return torch.cat([x.detach().flatten() for x in found.values()])

    changes = {
        kind: dict(zip(stated, difference(flat, problem, along, step).split(sizes), strict=True))
        for kind, along in moves.items()
    }
    for name, output in stated.items():
        weights = random_weights(output.shape, generator)
        gradients = pull(leaves, output, weights)
        assert all(x.isfinite().all() for x in gradients.values()), name
        for kind, along in moves.items():
            products = torch.cat([(gradients[k] * v).flatten() for k, v in along.items()])
            terms = weights.flatten() * changes[kind][name]
            size = float(products.abs().sum() + terms.abs().sum())
            resolved = 2e-14 * float((weights * (1 + output.detach().abs())).sum()) / step
            off = abs(float(products.sum() - terms.sum()))
            yield (name.partition(".")[0], kind), off / (size + resolved / limit(name))


def limit(output):
    return 1e-5 if output.startswith("d/d") else 1e-6


def worst_errors():
    """The largest error by output and input, and by pair of sides; each within its limit."""
    by_pair, by_output = {}, {}
    for r, c, problem in regimes():
        for (output, kind), error in errors(problem, Implicit()):
            assert error <= limit(output), f"{r}-{c}, mass = {problem.mass}: {output} in {kind} is off by {error:.1e}"
            by_output[output, kind] = max(error, by_output.get((output, kind), 0.0))
            by_pair[r, c] = max(error, by_pair.get((r, c), 0.0))
    return by_output, by_pair


def table(rows, columns, cells):
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in rows:
        numbers = (f"{cells[row, column]:.0e}" if (row, column) in cells else "" for column in columns)
        lines.append(f"| {row} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def without_digits(text):
    return re.sub(r"\d+e[+-]\d+", "0", text)


@pytest.mark.slow
def test_every_output_in_every_input_and_regime_as_the_guide_says():
    by_output, by_pair = worst_errors()
    rows = (*OUTPUTS, *(f"d/d {kind}" for kind in INPUTS))
    tables = table(rows, INPUTS, by_output) + "\n\n" + table(ALL_SIDES, ALL_SIDES, by_pair)
    text = GUIDE.read_text(encoding="utf-8")
    before, between, after = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", text)
    if os.environ.get(WRITE):
        GUIDE.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
        return
    assert without_digits(between.strip()) == without_digits(tables), (
        f"the table in {GUIDE.name} has other rows than this test: run {WRITE}=1 pytest {Path(__file__).name} -k guide"
    )


def test_the_table_catches_a_gradient_with_a_part_missing():
    """Frozen potentials give the value's gradient, and not its second derivative."""

    class Frozen(Implicit):
        def potentials(self, problem, p):
            return p

    problem = with_leaves(CASES["kl-kl"].problem(epsilon=0.5))
    found = dict(errors(problem, Frozen()))
    assert found["value", "cost"] <= 1e-6 and found["plan", "cost"] > 1e-2 and found["f", "cost"] > 1e-2


# -- the value ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fixed-fixed", "kl-kl"])
def test_the_law_of_gradients_catches_a_wrong_one(name):
    """The gradient of the dual at unfinished potentials is not that of the value."""
    problem = with_leaves(CASES[name].problem(epsilon=0.1))
    check_gradient(problem, along=["cost"])
    with pytest.raises(AssertionError, match=r"derivative along cost: stated = .*differences = "):
        check_gradient(problem, along=["cost"], solver=Sinkhorn(max_steps=1))


@pytest.mark.parametrize("gradient", [Implicit(), Unroll(20)], ids=["implicit", "unroll"])
@over({k: regime(ALL_SIDES[k], ALL_SIDES[k], k == "at_most") for k in ALL_SIDES})
def test_forbidden_arcs_have_derivative_zero_and_never_nan(case, gradient):
    """Single ones, and where the sides allow it a whole row of them, in every output and the value's second derivatives."""
    problem = with_leaves(case.problem(forbidden=True, empty=True))
    if not number_asked(case.rows):
        cost = problem.cost.dense().clone()
        cost[3] = torch.inf
        problem = problem.with_tensors({"cost": cost})
    leaves, found = outputs(problem, gradient, create_graph=True)
    for name, output in found.items():
        gradients = pull(leaves, output, torch.ones_like(output))
        assert all(g.isfinite().all() for g in gradients.values()), name
        assert (gradients["cost"][leaves["cost"].isinf()] == 0).all(), name


def number_asked(side):
    """The least that a side asks of every bin, per unit of weight."""
    return float(side.bounds[0])


def test_the_price_of_an_unreachable_bin_is_differentiated():
    """A row without an arc pays for being empty: `rho` per unit of weight for KL, half of it for chi-squared."""
    cost = torch.tensor([[torch.inf, torch.inf], [0.0, 1.0]], dtype=torch.float64)
    for side, price in ((KL, 1.0), (TV, 1.0), (ChiSquared, 0.5)):
        rho = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        reached = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        whole = solve(Problem(cost, [0.3, 0.7], epsilon=0.3, rows=side(rho), columns=KL(0.5)), PRECISE).value
        rest = solve(Problem(cost[1:], [0.7], epsilon=0.3, rows=side(reached), columns=KL(0.5)), PRECISE).value
        (found,), (without,) = torch.autograd.grad(whole, rho), torch.autograd.grad(rest, reached)
        assert float(found) == pytest.approx(float(without) + 0.3 * price, rel=1e-7)


def one_sided(of, step):
    """Derivative at 0 from values at 0, h, 2 h and 3 h: third order."""
    return sum(w * of(k * step) for k, w in enumerate((-11 / 6, 3.0, -3 / 2, 1 / 3))) / step


EMPTIED = {
    "kl-free": regime(KL(0.7), SIDES["free"], False),
    "free-l2": regime(SIDES["free"], L2(0.9), True),
    "at_most-fixed": regime(SIDES["at_most"], FIXED, False),
    "tv-kl": regime(TV(0.4), KL(0.7), True),
    "between-tv": regime(Between(0.6, 1.5), TV(0.4), False),
    "chi2-between": regime(ChiSquared(0.8), Between(0.6, 1.5), False),
    "l2-l2": regime(L2(0.9), L2(0.5), True),
}


@over(EMPTIED)
def test_the_derivative_at_an_empty_bin_is_one_sided(case):
    """In every output and in the gradient; the opposite side has an empty bin of its own."""
    problem = with_leaves(case.problem(**HOLES))

    def flat(weight):
        a = problem.a.clone()
        a[1] = weight
        _, found = outputs(problem.with_tensors({"a": a}), Implicit())
        return torch.cat([x.detach().flatten() for x in found.values()])

    leaves, stated = outputs(problem, Implicit(), create_graph=True)
    generator, expected = torch.Generator().manual_seed(5), one_sided(flat, 1e-4)
    for (name, output), change in zip(
        stated.items(), expected.split([x.numel() for x in stated.values()]), strict=True
    ):
        weights = random_weights(output.shape, generator)
        found, terms = float(pull(leaves, output, weights)["a"][1]), weights.flatten() * change
        assert abs(found - float(terms.sum())) <= 1e-6 * float(terms.abs().sum() + 0.01 * weights.sum()), name


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


@over(dict(list(select(exact_too=True).items())[::2]))
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
@pytest.mark.parametrize("gradient", [Envelope(), Implicit(), Unroll(40)], ids=["envelope", "implicit", "unroll"])
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


def test_potentials_together_have_the_derivatives_of_each():
    """Once they had none, so that a loss with them in it lacked a part and nobody said so."""
    problem = with_leaves(regime(KL(0.7), ChiSquared(0.8), True).problem())
    leaf = problem.cost.dense().requires_grad_()
    solution = solve(problem, gradient=Implicit())
    together = solution.potentials
    for one, other in ((together.f, solution.f), (together.g, solution.g), (together.lam, solution.mass_multiplier)):
        found, expected = (torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (one, other))
        assert expected.abs().max() > 0 and torch.equal(found, expected)
    with pytest.raises(RuntimeError, match=r"differentiates solution\.value only"):
        (solve(problem).potentials.f.sum() + leaf.sum()).backward()


def test_nothing_is_refused_where_no_gradient_was_asked_for():
    problem = with_leaves(CASES["kl-kl"].problem())
    assert not solve(problem).plan.requires_grad
    problem.cost.dense().requires_grad_()
    with torch.no_grad():
        assert not solve(problem).plan.requires_grad


# -- unrolled sweeps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["matrix", "points"])
def test_forward_mode_is_refused_in_words(cost):
    """Where a part of the derivative would be followed (<C, dP> left out of that of <C, P>) or none, unsaid."""
    x, y = (torch.rand(n, 2, dtype=torch.float64) for n in (5, 6))
    with torch.autograd.forward_ad.dual_level():
        z = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        problem = Problem(Points(z, y) if cost == "points" else (z[:, None] - y).square().sum(-1), epsilon=0.3)
        for choice in (Envelope(), Implicit()):
            with pytest.raises(RuntimeError, match=r"(cost|x) is followed by derivatives in forward mode.*torch.autograd.grad"):
                solve(problem, gradient=choice)
        rho = torch.autograd.forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        with pytest.raises(RuntimeError, match="rho is followed by derivatives in forward mode"):
            solve(Problem(x.square(), epsilon=0.3, rows=KL(rho)))
        solved = solve(Problem((x[:, None] - y).square().sum(-1), epsilon=0.3), gradient=Implicit())  # of data that are not
        assert solved.apply(y).shape == (5, 2)


@pytest.mark.parametrize("output", ["value", "f", "row_marginal", "apply", "slope"])
@pytest.mark.parametrize("cost", ["matrix", "points"])
def test_many_derivatives_at_once_are_refused_in_words(cost, output):
    x, y = torch.rand(5, 2, dtype=torch.float64, requires_grad=True), torch.rand(6, 2, dtype=torch.float64)
    problem = Problem(Points(x, y) if cost == "points" else (x[:, None] - y).square().sum(-1), epsilon=0.3, rows=KL(0.5))
    solution = solve(problem, gradient=Implicit())
    if output == "slope":
        (found,) = torch.autograd.grad(solution.value, x, create_graph=True)
    else:
        found = solution.apply(y) if output == "apply" else getattr(solution, output)
    found = found.reshape(-1)
    with pytest.raises(RuntimeError, match=r"is_grads_batched=True.*one torch.autograd.grad a row"):
        torch.autograd.grad(found, x, torch.eye(len(found), dtype=torch.float64), is_grads_batched=True)


def test_compiled_with_a_break_at_every_solve_and_output():
    """Dynamo had read the library's code into 71 graphs, for a minute."""

    def step(x, y):
        solution = solve(Problem(Points(2.0 * x, y), epsilon=0.3), gradient=Implicit())
        paid = solution.value + solution.plan.square().sum() + solution.f.square().sum() + solution.transport_cost
        return 3.0 * paid + solution.apply(y).square().sum() + sinkhorn_divergence(x, y, epsilon=0.3)

    x, y = (torch.rand(n, 2, dtype=torch.float64, requires_grad=True) for n in (5, 6))
    testing = importlib.import_module("torch._dynamo.testing")
    torch._dynamo.reset()
    seen = testing.CompileCounter()
    value, expected = torch.compile(step, backend=seen)(x, y), step(x, y)
    torch.testing.assert_close(value, expected)
    for found, known in zip(*(torch.autograd.grad(v, (x, y)) for v in (value, expected)), strict=True):
        torch.testing.assert_close(found, known)
    assert 1 <= seen.frame_count <= 8  # one between two of seven


READ = (*OUTPUTS, "certificate", "__repr__")


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cost", ["matrix", "points", "distances"])
def test_what_was_looked_at_without_gradients_has_them_afterwards(cost, off):
    """A log, a debugger: a loss that is read once before it is used must not lose its gradient, unsaid."""
    x, y = (torch.rand(n, 2, dtype=torch.float64) for n in (5, 6))

    def solved():
        z = x.clone().requires_grad_()
        made = {"matrix": (z[:, None] - y).square().sum(-1), "points": Points(z, y), "distances": Points(z, y, "euclidean")}
        return z, solve(Problem(made[cost], epsilon=0.3, rows=KL(0.5)), gradient=Implicit())

    def slopes(z, solution):
        found = {name: getattr(solution, name) for name in OUTPUTS if name != "mass_multiplier"} | {"apply": solution.apply(y)}
        return {name: torch.autograd.grad(x.square().sum(), z, retain_graph=True)[0] for name, x in found.items()}

    expected, (z, solution) = slopes(*solved()), solved()
    with off():
        for name in READ:
            _ = repr(solution) if name == "__repr__" else getattr(solution, name)
        _ = solution.apply(y)
    for name, slope in slopes(z, solution).items():
        torch.testing.assert_close(slope, expected[name], msg=name)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_problem_is_the_same_wherever_it_was_made(batch):
    """torch's views of what it follows require a gradient under no_grad too, and lead nowhere."""
    cost = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    a = torch.full((*batch, 4), 0.25, dtype=torch.float64)

    def slope():
        return torch.autograd.grad(solution.value.sum(), cost)[0]

    solution = solve(Problem(2.0 * cost, a, epsilon=0.3))
    expected, doubled = slope(), 2.0 * cost
    with torch.no_grad():
        solution = solve(Problem(doubled, a, epsilon=0.3))
    torch.testing.assert_close(slope(), expected)


CHAINED = {
    f"{r}-{c}{'-mass' if with_mass else ''}": regime(ALL_SIDES[r], ALL_SIDES[c], with_mass)
    for r, c, with_mass in [
        *[("fixed", "fixed", False), ("fixed", "at_most", False), ("kl", "fixed", True), ("free", "l2", False)],
        *[("between", "tv", True), ("chi2", "kl", False), ("tv", "l2", False), ("free", "free", True)],
    ]
}


def along_directions(problem, gradient):
    """Derivatives of random sums of every output along the directions that exist."""
    generator = torch.Generator().manual_seed(7)
    moves = directions(problem, generator)
    leaves, found = outputs(problem, gradient)
    for name in OUTPUTS:
        gradients = pull(leaves, found[name], random_weights(found[name].shape, generator))
        for along in moves.values():
            yield float(sum((gradients[k] * v).sum() for k, v in along.items()))


@over(CHAINED)
def test_unrolled_sweeps_converge_to_the_implicit_derivative(case):
    problem = with_leaves(case.problem(epsilon=0.5, empty=True, forbidden=True))
    exact = np.array(list(along_directions(problem, Implicit())))
    off = [np.abs(np.array(list(along_directions(problem, Unroll(k)))) - exact).max() for k in (1, 8, 60)]
    assert off[2] <= 1e-7 * np.abs(exact).max() and off[1] <= max(off[0], 1e-9)
    if case.columns == SIDES["free"] and not case.mass:
        assert off[0] <= 1e-9  # one update is the solution


def test_too_few_sweeps_are_not_enough():
    problem = with_leaves(CASES["fixed-fixed"].problem(epsilon=0.1))
    exact, few = (np.array(list(along_directions(problem, choice))) for choice in (Implicit(), Unroll(1)))
    assert np.abs(few - exact).max() > 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_unroll_wants_a_number_of_sweeps(steps):
    with pytest.raises(ValueError, match=r"Unroll\(steps=.*whole number of sweeps, at least 1.*Implicit\(\)"):
        Unroll(steps)


def test_unroll_needs_entropy():
    problem = with_leaves(CASES["fixed-fixed"].problem(epsilon=0.0))
    with pytest.raises(ValueError, match=r"gradient = Unroll\(steps=3\) with epsilon = 0"):
        solve(problem, gradient=Unroll(3))


# -- the second derivative ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fixed-fixed", "tv-between-mass", "kl-free"])
def test_a_gradient_with_a_history_is_the_same_gradient(name):
    problem = with_leaves(CASES[name].problem(empty=True, forbidden=True))
    leaves, live = as_leaves(problem)
    value = solve(live, PRECISE).value
    for square in (False, True):
        scalar = value**2 if square else value
        options = {"retain_graph": True, "materialize_grads": True}
        plain = torch.autograd.grad(scalar, list(leaves.values()), **options)
        lasting = torch.autograd.grad(scalar, list(leaves.values()), create_graph=True, materialize_grads=True)
        for one, other in zip(plain, lasting, strict=True):
            assert not one.requires_grad
            torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-14)


def hessian_product(scalar, x):
    (slope,) = torch.autograd.grad(scalar, x, create_graph=True)
    return torch.autograd.grad((slope * torch.linspace(0, 1, slope.numel()).to(slope).reshape(slope.shape)).sum(), x)[0]


def test_the_second_derivative_of_a_function_of_values_in_a_batch():
    """The chain rule through upstream gradients, problem by problem."""
    case = CASES["kl-tv"]
    cost = torch.stack([with_leaves(case.problem(seed=seed)).cost.dense() for seed in range(2)])

    def values(matrix):
        return solve(Problem(matrix, epsilon=0.3, rows=case.rows, columns=case.columns), PRECISE).value

    together, apart = cost.clone().requires_grad_(), cost.clone().requires_grad_()
    batch = hessian_product((values(together) ** 3).sum(), together)
    loop = hessian_product(sum(values(one) ** 3 for one in apart), apart)
    torch.testing.assert_close(batch, loop, rtol=1e-9, atol=1e-12)


def test_second_derivatives_come_in_the_dtype_of_the_input():
    exact = with_leaves(CASES["kl-tv"].problem()).cost.dense().requires_grad_()
    low = exact.detach().float().requires_grad_()
    one, other = (hessian_product(solve(Problem(x, epsilon=0.3, columns=KL(0.5))).value, x) for x in (exact, low))
    assert other.dtype == torch.float32
    torch.testing.assert_close(other.double(), one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("output", ["value", "plan", "f", "transport_cost"])
@pytest.mark.parametrize("gradient", [Implicit(), Unroll(5)], ids=["implicit", "unroll"])
def test_one_derivative_too_many_is_refused(output, gradient):
    cost = with_leaves(CASES["kl-kl"].problem()).cost.dense().requires_grad_()
    scalar = (getattr(solve(Problem(cost, epsilon=0.5), gradient=gradient), output) ** 2).sum()
    for _ in range(2 if output == "value" else 1):
        scalar = (torch.autograd.grad(scalar, cost, create_graph=True)[0] ** 2).sum()
    with pytest.raises(RuntimeError, match=r"once more than the library can.*twice.*create_graph"):
        torch.autograd.grad(scalar, cost)


def test_a_second_derivative_without_entropy_is_refused():
    cost = with_leaves(CASES["fixed-fixed"].problem()).cost.dense().requires_grad_()
    (slope,) = torch.autograd.grad(solve(Problem(cost)).value, cost, create_graph=True)
    with pytest.raises(RuntimeError, match=r"epsilon = 0 was differentiated again.*epsilon > 0"):
        torch.autograd.grad((slope**2).sum(), cost)


def test_the_envelope_keeps_no_matrix_but_the_cost():
    kept = []

    def pack(x):
        kept.append(x)
        return x

    cost = torch.rand(30, 40, dtype=torch.float64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = solve(Problem(cost, epsilon=0.1, rows=KL(1.0))).value
    assert [x.untyped_storage().data_ptr() == cost.untyped_storage().data_ptr() for x in kept if x.numel() >= 1200]
    made = value.grad_fn.next_functions[0][0]  # of which the caller has a copy
    assert all(x is None or not torch.is_tensor(x) or x.numel() < 1200 for x in vars(made).values())
    assert all(x.numel() < 1200 or x.untyped_storage().data_ptr() == cost.untyped_storage().data_ptr() for x in kept)


# -- kinks -------------------------------------------------------------------------------------------------------------


def test_a_bin_exactly_at_the_clamp_is_held():
    """The derivative in rho is the one-sided one towards a smaller rho, where the bin stays clamped."""
    problem = with_leaves(regime(TV(10.0), FIXED, False).problem())
    kink = solve(problem.detach().with_tensors({"rows.rho": torch.tensor(9.0).double()}), PRECISE).f.max()
    rho = kink.detach().clone().requires_grad_()

    def of(value):
        solution = solve(problem.with_tensors({"rows.rho": value}), QUICK, gradient=Implicit(), throw=False)
        return solution.value, solution.transport_cost

    found = [torch.autograd.grad(x, rho, retain_graph=True)[0] for x in of(rho)]
    values = [torch.stack(of(rho.detach() - 1e-5 * k)) for k in range(4)]
    expected = -sum(w * v for w, v in zip((-11 / 6, 3.0, -3 / 2, 1 / 3), values, strict=True)) / 1e-5
    torch.testing.assert_close(torch.stack(found), expected.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shift", [-1e-13, 0.0, 1e-13])
def test_a_bin_that_a_penalty_all_but_empties_moves_no_other(shift):
    """Where the marginal is too small for the potential to differ from rho, and rounding leaves it at rho or beyond."""
    generator = torch.Generator().manual_seed(5)
    cost = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    cost[2] += 10.0
    weights = torch.rand(6, 4, generator=generator, dtype=torch.float64)

    def of(rho, choice):
        problem = Problem(cost, epsilon=0.2, rows=ChiSquared(rho))
        solution = solve(problem, gradient=choice, tolerance=1e-12)
        assert solution.row_marginal[2].detach() < 1e-17
        p = solution.potentials.detach()
        p.f[2] = (rho.detach() + shift) if torch.is_tensor(rho) else p.f[2]
        return (weights * replace(solution, found=p).plan).sum()

    rho = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found, unrolled = (float(torch.autograd.grad(of(rho, choice), rho)[0]) for choice in (Implicit(), Unroll(200)))
    difference = float(of(0.7 + 1e-4, None) - of(0.7 - 1e-4, None)) / 2e-4
    assert abs(difference) > 1e-3
    assert found == pytest.approx(unrolled, rel=1e-9) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("gradient", [Envelope(), Implicit()], ids=["envelope", "implicit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_derivative_in_rho_is_what_is_paid_per_unit_of_it(dtype, gradient):
    """Of TV that is ``sum |r - a|``, whatever digit a solver that counts in epsilons leaves a potential beside its clamp."""
    generator = torch.Generator().manual_seed(8)
    cost, tolerance = 3 * torch.rand(20, 12, generator=generator), 1e-9 if dtype == torch.float64 else 1e-6
    for k in range(15):
        rho = (0.31 + 0.017 * k + 0 * cost[0, 0]).to(dtype).requires_grad_()
        problem = Problem(cost.to(dtype), epsilon=0.07, rows=TV(rho), columns=KL(2.0))
        solution = solve(problem, gradient=gradient, tolerance=tolerance)
        paid = float((solution.row_marginal.detach() - problem.a).abs().sum())
        assert paid > 0.01
        assert float(torch.autograd.grad(solution.value, rho)[0]) == pytest.approx(paid, rel=100 * tolerance)


@pytest.mark.parametrize("mass", [None, 0.8])
@pytest.mark.parametrize("other", [KL(2.0), L2(2.0), ChiSquared(0.3)], ids=["kl", "l2", "chi-squared"])
def test_the_derivative_in_rho_is_what_is_paid_without_entropy(other, mass):
    """Interior points leave the other side's potentials a digit beside the answer, and so those that answer them."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        cost, a, b = rng.random((7, 8)), rng.random(7) + 0.1, rng.random(8) + 0.1
        a, b = a / a.sum(), b / b.sum()
        for sides in ({"rows": TV(0.2), "columns": other}, {"rows": other, "columns": TV(0.2)}):
            solution = solve(Problem(cost, a, b, mass=mass, **sides))
            slopes = solution.gradient()
            for side, marginal, weights in (("rows", solution.row_marginal, a), ("columns", solution.column_marginal, b)):
                if isinstance(sides[side], TV):
                    assert getattr(slopes, side)["rho"] == pytest.approx(abs(marginal - weights).sum(), abs=1e-9)


def test_plans_derivatives_are_those_of_differences_where_penalties_clamp():
    """By the automatic solver, in every tensor; the clamped bins move with rho."""
    generator = torch.Generator().manual_seed(9)
    cost, a = 3 * torch.rand(9, 7, generator=generator).double(), torch.rand(9, generator=generator).double() + 0.2
    weights = torch.rand(9, 7, generator=generator).double()
    leaves = {"cost": cost, "a": a, "rho": torch.tensor(0.43).double(), "epsilon": torch.tensor(0.09).double()}

    def of(given, **choice):
        problem = Problem(given["cost"], given["a"], epsilon=given["epsilon"], rows=TV(given["rho"]), columns=KL(2.0))
        return (weights * solve(problem, tolerance=1e-12, **choice).plan).sum()

    live = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    slopes = torch.autograd.grad(of(live, gradient=Implicit()), list(live.values()))
    for (name, x), slope in zip(leaves.items(), slopes, strict=True):
        along = 1e-4 * x * torch.rand(x.shape, generator=generator).double()
        there, back = (float(of(leaves | {name: x + sign * along})) for sign in (1, -1))
        assert float((slope * along).sum()) == pytest.approx((there - back) / 2, rel=1e-5), name


@over({f"{r}-{c}": regime(ALL_SIDES[r], ALL_SIDES[c], r == "tv") for r in ALL_SIDES for c in ("fixed", "tv", "l2")})
def test_gradients_with_entropy_are_subgradients(case):
    """The value is jointly concave in cost, epsilon and prices, and convex in each side's weights, bounds and the mass."""
    problem = with_leaves(case.problem(empty=True, forbidden=True))
    leaves, found = outputs(problem, Implicit())
    slopes, value = {k: found[f"d/d {k}"] for k in leaves}, float(found["value"].detach())
    generator, names = torch.Generator().manual_seed(8), movable(problem)
    prices = tuple(k for k in names if k in ("cost", "epsilon") or k.endswith("rho"))
    convex = [k for k in names if k not in prices and not (k in "ab" and case.balanced)]
    for group, sign in [(prices, -1.0), *((k, 1.0) for k in convex)]:
        along = random_direction(problem, group, generator)
        for step in (-0.2, 0.2):
            moved = problem.with_tensors({k: problem.tensors()[k] + step * v for k, v in along.items()})
            there = float(solve(moved, QUICK, throw=False).value)
            linear = value + step * float(sum((slopes[k] * v).sum() for k, v in along.items()))
            assert sign * (there - linear) >= -1e-10, (group, step)


# -- without torch -----------------------------------------------------------------------------------------------------


@over({"kl-between": regime(KL(0.7), SIDES["between"], True), "at_most-l2": regime(SIDES["at_most"], L2(0.9), False)})
@pytest.mark.parametrize("of", OUTPUTS)
def test_gradients_of_a_numpy_problem_are_those_of_torch(case, of):
    plain = case.problem()
    solution, generator = solve(plain, QUICK), torch.Generator().manual_seed(9)
    weights = random_weights(np.shape(getattr(solution, of)), generator)
    found = solution.gradient(of, weights.numpy())
    leaves, expected = outputs(with_leaves(plain), Implicit())
    expected = pull(leaves, expected[of], weights)
    stated = {"cost": found.cost, "a": found.a, "b": found.b, "epsilon": found.epsilon, "mass": found.mass}
    stated |= {f"rows.{k}": v for k, v in found.rows.items()} | {f"columns.{k}": v for k, v in found.columns.items()}
    assert {k for k, v in stated.items() if v is not None} == set(expected)
    for name, x in expected.items():
        assert isinstance(stated[name], np.ndarray if x.dim() else float)
        np.testing.assert_allclose(stated[name], x, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_torch_solution_is_the_same():
    problem = CASES["kl-tv"].problem()
    one, other = (solve(x, QUICK).gradient("mass") for x in (problem, with_leaves(problem)))
    np.testing.assert_allclose(one.cost, other.cost, rtol=1e-10)
    assert one.columns["rho"] == pytest.approx(other.columns["rho"], rel=1e-10)
    with torch.no_grad():
        assert solve(problem, QUICK).gradient("mass").epsilon == pytest.approx(one.epsilon, rel=1e-10)


def test_gradients_of_a_batch_are_each_problems_own():
    cost = np.random.default_rng(0).random((3, 4, 5))
    batch = solve(Problem(cost, epsilon=0.3, rows=KL(1.0))).gradient()
    singles = [solve(Problem(matrix, epsilon=0.3, rows=KL(1.0))).gradient() for matrix in cost]
    np.testing.assert_allclose(batch.cost, [one.cost for one in singles], rtol=1e-5)
    assert batch.epsilon == pytest.approx(sum(one.epsilon for one in singles), rel=1e-5)


def test_the_gradient_without_entropy_is_that_of_the_value():
    solution = solve(CASES["fixed-tv"].problem(epsilon=0.0))
    found = solution.gradient()
    np.testing.assert_array_equal(found.cost, solution.plan)
    assert found.epsilon is None and found.rows == {}
    assert found.columns["rho"] == pytest.approx(
        float(abs(solution.column_marginal - solution.problem.b.numpy()).sum())
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cost",), r"of = 'cost': no output of that name.*value.*transport_cost"),
        (("plan",), r"weights = None: plan has shape \(5, 6\)"),
        (("plan", np.ones((6, 5))), r"shape \(6, 5\): must be \(5, 6\).*transposed"),
        (("f", np.full(5, np.nan)), r"finite"),
        (("f", "much"), r"weights = 'much'.*real numbers"),
    ],
)
def test_a_gradient_of_what_is_not_there_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve(CASES["kl-kl"].problem()).gradient(*arguments)


def test_a_plan_without_entropy_has_no_gradient():
    with pytest.raises(ValueError, match=r"of = 'plan' with epsilon = 0.*epsilon > 0"):
        solve(CASES["fixed-fixed"].problem(epsilon=0.0)).gradient("plan", np.ones((5, 6)))


# -- laws of the gradient ----------------------------------------------------------------------------------------------


def in_other_units(problem, factor):
    named = {k: factor * v for k, v in problem.tensors().items() if has_cost_units(k)}
    return problem.with_tensors(named)


def has_cost_units(name):
    return name in ("cost", "epsilon", "value", "f", "g", "mass_multiplier", "transport_cost") or name.endswith("rho")


@over({f"{r}-{c}": regime(ALL_SIDES[r], ALL_SIDES[c], len(r) > len(c)) for r in ALL_SIDES for c in ("kl", "tv", "l2")})
def test_halving_cost_epsilon_and_rho_halves_what_has_the_units_of_a_cost(case):
    """So the value's gradient in the cost stays, its Hessian there doubles, and so on for every output and input."""

    def derivatives(factor):
        leaves, found = outputs(in_other_units(with_leaves(case.problem()), factor), Implicit(), create_graph=True)
        generator = torch.Generator().manual_seed(6)
        for name, output in found.items():
            of = name.removeprefix("d/d ")
            power = has_cost_units(of) if of == name else 1 - has_cost_units(of)
            yield name, factor**-power * output.detach()
            for leaf, x in pull(leaves, output, random_weights(output.shape, generator)).items():
                yield f"{name} in {leaf}", factor ** (has_cost_units(leaf) - power) * x

    for (name, whole), (_, half) in zip(derivatives(1.0), derivatives(0.5), strict=True):
        torch.testing.assert_close(whole, half, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@over(SMOOTH)
def test_the_gradient_in_the_cost_is_the_plan(case):
    problem = with_leaves(case.problem())
    cost = problem.cost.dense().requires_grad_()
    solution = solve(problem, QUICK, throw=False)
    (gradient,) = torch.autograd.grad(solution.value, cost)
    p = solution.potentials.detach()
    np.testing.assert_allclose(gradient, gibbs_plan(problem, p.f, p.g, p.lam), rtol=1e-10)


# -- the inverse problem -----------------------------------------------------------------------------------------------

INVERSE = {k: case for k, case in CASES.items() if case.mass is None or case.rows != FIXED}


def some_plan(case, seed=9):
    """A feasible plan that is not the answer: the answer to another cost."""
    other = case.problem().with_tensors({"cost": case.problem(seed=seed).cost.dense()})
    return solve(other, QUICK, throw=False).plan


@over(INVERSE)
def test_inverse_loss_is_primal_less_value_with_gradient_target_less_plan(case):
    problem, target = with_leaves(case.problem()), some_plan(case)
    cost = problem.cost.dense().requires_grad_()
    loss, p = inverse_loss(problem, target, QUICK), solve(problem, QUICK, throw=False).potentials.detach()
    assert float(loss.detach()) == pytest.approx(objective(problem, target) - answer(case).value, abs=1e-8)
    assert float(loss.detach()) > 0
    (gradient,) = torch.autograd.grad(loss, cost)
    np.testing.assert_allclose(gradient, target - gibbs_plan(problem, p.f, p.g, p.lam), atol=1e-9)


@over(INVERSE)
def test_inverse_loss_is_zero_at_the_optimum(case):
    problem = case.problem()
    solution = solve(problem, QUICK, throw=False)
    assert 0 <= inverse_loss(problem, solution.plan, QUICK) + 1e-12 <= 1e-11


@pytest.mark.parametrize("name", ["fixed-fixed", "fixed-free", "free-free-mass"])
def test_inverse_loss_of_hard_sides_is_a_divergence_from_the_plan(name):
    problem = CASES[name].problem()
    target = some_plan(CASES[name])
    solution = solve(problem, QUICK)
    plan = gibbs_plan(problem, solution.f, solution.g, solution.mass_multiplier)
    expected = 0.3 * (target * (np.log(target) - np.log(plan))).sum()
    assert inverse_loss(problem, target, QUICK) == pytest.approx(float(expected), rel=1e-8)


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


# -- empty bins that the costs would prefer ----------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [Envelope(), Implicit()], ids=["envelope", "implicit"])
def test_what_overflows_at_an_empty_bin_is_zero_times_its_weight(gradient):
    """``exp`` of the slack there is infinite: the plan is 0 all the same, and the derivative in the weight a large number."""

    def leaf(x):
        return torch.tensor(x, dtype=torch.float64, requires_grad=True)

    cost, a, b = leaf([[-1.0, -2.0]]), leaf([0.5]), leaf([1.25, 0.0])
    solution = solve(Problem(cost, a, b, epsilon=0.02 / 64, columns=FREE), gradient=gradient)
    torch.testing.assert_close(solution.plan.detach(), torch.tensor([[0.5, 0.0]], dtype=torch.float64))
    found = torch.autograd.grad(solution.value, (cost, a, b))
    assert all(x.isfinite().all() for x in found) and found[2][1] < -1e300
    torch.testing.assert_close(found[0], solution.plan.detach())


@pytest.mark.parametrize("held", [False, True], ids=["points", "matrix"])
def test_an_empty_bin_that_all_would_go_to_changes_nothing(held):
    """Derivatives pass through a weight in its place that must not count, where ``exp`` of the slack is 1e400 too."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.rand(k, 3, generator=generator, dtype=torch.float64) for k in (7, 5))
    b = torch.tensor([0.3, 0.2, 0.0, 0.4, 0.1], dtype=torch.float64)
    y[[0, 1, 3, 4]] += 0.5
    y[2], epsilon = x[4], 5e-4

    def solved(choice, points):
        cost = Points(x, points, "sqeuclidean")
        problem = Problem(cost.dense() if held else cost, b=b, epsilon=epsilon, rows=KL(3.0), columns=FREE)
        return solve(problem, gradient=choice)

    live = y.clone().requires_grad_()
    plain, solution = solved(Envelope(), y), solved(Implicit(), live)
    for name in ("row_marginal", "column_marginal", "mass", "transport_cost", "f"):
        torch.testing.assert_close(getattr(solution, name).detach(), getattr(plain, name), rtol=1e-9, atol=1e-12)
    assert solution.column_marginal[2] == 0.0
    found = torch.autograd.grad(solution.transport_cost + (solution.row_marginal**2).sum(), live)[0]
    without = [0, 1, 3, 4]
    rest = y[without].clone().requires_grad_()
    problem = Problem(Points(x, rest, "sqeuclidean"), b=b[without], epsilon=epsilon, rows=KL(3.0), columns=FREE)
    fewer = solve(problem, gradient=Implicit())
    expected = torch.autograd.grad(fewer.transport_cost + (fewer.row_marginal**2).sum(), rest)[0]
    torch.testing.assert_close(found[without], expected, rtol=1e-8, atol=1e-10)
    assert (found[2] == 0).all()


@pytest.mark.parametrize("gradient", [Implicit(), Unroll(20)], ids=["implicit", "unroll"])
def test_an_empty_bin_does_not_follow_what_it_alone_could_reach(gradient):
    """Column 0 is within reach of the empty row 0 alone: with KL its potential is infinite, and the row follows column 1."""
    arc, rho = leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 5.0)]
    cost = torch.stack([torch.stack([torch.full_like(arc, 0.3), arc]), torch.tensor([math.inf, 0.2], dtype=torch.float64)])
    a, b = (torch.tensor(x, dtype=torch.float64) for x in ([0.0, 1.0], [0.4, 0.6]))
    solution = solve(Problem(cost, a, b, epsilon=0.4, rows=TV(rho), columns=KL(0.1)), gradient=gradient)
    assert solution.g[0] == math.inf
    torch.testing.assert_close(solution.f[0], arc - solution.g[1] - 0.4 * math.log(0.6))
    found = torch.autograd.grad(solution.f[0], leaves, materialize_grads=True)
    np.testing.assert_allclose([float(x) for x in found], [1.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("mass", [None, 1.0])
@pytest.mark.parametrize("gradient", [Envelope(), Implicit(), Unroll(5)], ids=["envelope", "implicit", "unroll"])
def test_the_gauge_of_potentials_leaves_out_what_nothing_can_reach(mass, gradient):
    """An empty column that the empty row alone reaches: more weight has no plan there, and no slope of -1.8e308 or NaN."""
    cost = torch.tensor([[1.0, math.inf, 0.4], [-0.6, 0.5, math.inf]], dtype=torch.float64)
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([1.0, 0.0], [1.0, 0.0, 0.0]))
    solution = solve(Problem(cost, a, b, epsilon=0.1, mass=mass), gradient=gradient)
    assert solution.g[1] == math.inf and solution.g.isfinite().sum() == 2
    if isinstance(gradient, Envelope):
        return
    slope = torch.autograd.grad(solution.g[0] + 2.0 * solution.g[2] - 3.0 * solution.f[1], b)[0]
    assert slope.abs().max() < 100.0  # of weights that may only move together


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.4746003, 0.7])
def test_a_price_that_is_rounded_to_single_precision_is_still_the_price(weight):
    """A row that nothing can reach has the potential ``rho a``, a digit beside it in float64, and follows both."""
    rho, a = (torch.tensor(x, requires_grad=True) for x in (1.5288758, [weight, 1.0]))
    cost = torch.tensor([[math.inf], [0.3]])
    price = solve(Problem(cost, a, rows=L2(rho), columns=AT_MOST, epsilon=0.9), gradient=Implicit()).f[0]
    to_rho, to_a = torch.autograd.grad(price, (rho, a))
    assert float(price.detach()) == pytest.approx(1.5288758 * weight, rel=1e-6)
    np.testing.assert_allclose([float(to_rho), *to_a.tolist()], [weight, 1.5288758, 0.0], rtol=1e-6)


@pytest.mark.parametrize("side", [ChiSquared, L2, TV])
@pytest.mark.parametrize("gradient", [Implicit(), Unroll(2)], ids=["implicit", "unroll"])
def test_an_empty_bin_follows_bins_that_carry_nothing_themselves(side, gradient):
    """Row 0 reaches the empty column 0 alone: its potential is the price of emptiness, and the column's a function of that."""
    rho, weight, arc, eps = leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.4, 0.3, 0.2)]
    forbidden, other = torch.tensor(math.inf, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    cost = torch.stack([torch.stack([arc, forbidden]), torch.stack([forbidden, other])])
    a, b = torch.stack([weight, other]), torch.tensor([0.0, 1.0], dtype=torch.float64)
    solution = solve(Problem(cost, a, b, epsilon=eps, rows=side(rho), columns=KL(0.5)), gradient=gradient)
    empty = rho * weight if side is L2 else rho
    known = 0.5 / (0.5 + eps) * (arc - empty - eps * weight.log())
    torch.testing.assert_close(solution.g[0], known, rtol=1e-12, atol=1e-12)
    for found, right in zip(*(torch.autograd.grad(x, leaves) for x in (solution.g[0], known)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_no_penalty_asks_for_a_potential_beyond_its_own():
    """At chi-squared a larger one than rho asks for nothing more, and hides what the bin's derivative is."""
    generator = torch.Generator().manual_seed(3)
    cost = torch.rand(1, 10, generator=generator, dtype=torch.float64)
    for solver in (None, Interior(), Sinkhorn()):
        solution = solve(Problem(cost, epsilon=2e-3, rows=KL(0.02), columns=ChiSquared(0.2)), solver, throw=False)
        assert float(solution.g.max()) <= 0.2 + 1e-12 and float(solution.column_marginal.min()) < 1e-9


@pytest.mark.parametrize("gradient", [Envelope(), Implicit()], ids=["envelope", "implicit"])
def test_a_slope_at_an_empty_bin_beyond_float32_is_its_largest_number(gradient):
    cost, b = torch.tensor([[2.0, 1.0]], requires_grad=True), torch.tensor([1.0, 0.0], requires_grad=True)
    solution = solve(Problem(cost, b=b, epsilon=4e-3, columns=L2(1.0)), gradient=gradient)
    assert solution.potentials.f.dtype == torch.float64
    slopes = torch.autograd.grad(solution.value, (cost, b))
    assert all(x.isfinite().all() for x in slopes) and abs(slopes[1][1]) > 1e38


def test_a_weak_penalty_at_an_empty_bin_has_a_value_and_a_large_slope():
    b = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    solution = solve(Problem(torch.tensor([[0.0, -100.0]]).double(), torch.ones(1).double(), b, columns=KL(1e-3)))
    assert solution.value == 0.0
    slope = torch.autograd.grad(solution.value, b)[0]
    assert slope[0] == 0.0 and -math.inf < slope[1] < -1e300


@pytest.mark.parametrize("epsilon", [0.02, 0.012, 0.008, 0.005, 0.003])
def test_two_empty_bins_do_not_count_for_each_other_however_near(epsilon):
    """Their potentials are what the others say, for every choice of a derivative, and whatever ``exp`` of their slack is."""
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    a, b = (torch.tensor([1.0, 0.0], dtype=torch.float64) for _ in range(2))
    solution = solve(Problem(cost, a, b, epsilon=epsilon), gradient=Implicit())
    torch.testing.assert_close(solution.f.detach(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(solution.g.detach(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    found = torch.autograd.grad(solution.f[1], cost)[0]
    torch.testing.assert_close(found, torch.tensor([[-0.5, 0.0], [1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("sides", [{}, {"rows": KL(1.0)}, {"rows": KL(1.0), "columns": KL(2.0), "mass": 0.7}], ids=str)
@pytest.mark.parametrize("metric", ["sqeuclidean", "sphere", "dot", "cosine"])
def test_the_value_of_points_is_differentiated_without_another_soft_minimum(metric, sides, monkeypatch):
    """The solver knows those at its potentials; of a cosine, whose points have lengths beside, there is one more pass."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.rand(k, 3, generator=draw, dtype=torch.float64) + 0.1 for k in (12, 9))
    passes, log_sums = [], bilinear._log_sums
    monkeypatch.setattr(bilinear, "_log_sums", lambda *given: passes.append(given) or log_sums(*given))
    for which in ((x,), (y,), (x, y)):
        leaves = {id(z): z.clone().requires_grad_() for z in which}
        cost = Points(*(leaves.get(id(z), z) for z in (x, y)), metric)
        solution = solve(Problem(cost, epsilon=0.3, **sides), Sinkhorn(tolerance=1e-11))
        passes.clear()
        value = solution.value
        found = torch.autograd.grad(3.0 * value, list(leaves.values()))
        assert len(passes) == (metric == "cosine")
        held = solve(Problem(cost.dense(), epsilon=0.3, **sides), Sinkhorn(tolerance=1e-11)).value
        assert float(value.detach()) == pytest.approx(float(held.detach()), rel=1e-9)
        for slope, expected in zip(found, torch.autograd.grad(3.0 * held, list(leaves.values())), strict=True):
            torch.testing.assert_close(slope, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", [None, Sinkhorn(), Newton()], ids=["automatic", "sinkhorn", "newton"])
@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("price", [0.3, 0.7, 0.9, 1.1])
def test_a_parameter_may_have_more_digits_than_the_costs(price, side, solver):
    """At the kink of its side the value is neither infinite nor constant, whichever way its rounding would go."""
    cost = torch.tensor([[0.0, 5.0, 5.0], [5.0, 9.0, 5.0]])
    cost = cost if side == "columns" else cost.T.contiguous()
    found = []
    for dtype in (torch.float32, torch.float64):
        rho = torch.tensor(price, dtype=torch.float64, requires_grad=True)
        value = solve(Problem(cost.to(dtype), epsilon=0.1, **{side: TV(rho)}), solver).value
        found.append((float(value), float(torch.autograd.grad(value, rho)[0])))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
