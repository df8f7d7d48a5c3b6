"""What is remembered of a problem between passes is never that of other numbers: arrays changed in place, inference mode."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

from contrastive import ClipLoss, DCLLoss, InfoNCELoss, NTXentLoss, SinkhornNCELoss, SupConLoss
from iotsolve import KL, L2, Points, Problem, Sinkhorn, solve
from iotsolve.kernels.directions import remembered

SOLVERS = [None, Sinkhorn(annealing=None)]


def draw(*shape):
    return np.random.default_rng(0).random(shape)


def as_given(kind, x):
    return x if kind == "numpy" else torch.from_numpy(x)


@pytest.mark.parametrize("solver", SOLVERS, ids=["automatic", "sinkhorn"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "dot"])
def test_points_changed_in_place_are_solved_anew(metric, kind, solver):
    x, y = draw(30, 4), draw(20, 4) + 0.1
    problem = Problem(Points(as_given(kind, x), as_given(kind, y), metric), epsilon=0.5)
    before = float(solve(problem, solver).value)
    x[:, 0] *= 3.0
    y[:, 1] += 1.0
    again = solve(problem, solver)
    anew = solve(Problem(Points(as_given(kind, x.copy()), as_given(kind, y.copy()), metric), epsilon=0.5), solver)
    assert float(again.value) == pytest.approx(float(anew.value), rel=1e-9)
    assert again.certificate.holds and abs(float(anew.value) - before) > 1e-2


@pytest.mark.parametrize("solver", SOLVERS, ids=["automatic", "sinkhorn"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("sides", [{}, {"rows": KL(0.5)}], ids=["fixed", "kl"])
def test_weights_changed_in_place_are_solved_anew(sides, batch, kind, solver):
    cost, a = draw(*batch, 6, 5), draw(*batch, 6) + 0.1
    a /= a.sum(-1, keepdims=True)
    problem = Problem(as_given(kind, cost), as_given(kind, a), epsilon=0.3, **sides)
    before = np.asarray(solve(problem, solver).value)
    a[...] = np.roll(a, 1, -1)
    again = solve(problem, solver)
    anew = solve(Problem(as_given(kind, cost), as_given(kind, a.copy()), epsilon=0.3, **sides), solver)
    np.testing.assert_allclose(again.value, anew.value, rtol=1e-9)
    assert np.all(again.certificate.holds) and np.abs(np.asarray(anew.value) - before).max() > 1e-4


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("sides", [{}, {"rows": KL(0.5)}], ids=["fixed", "kl"])
@pytest.mark.parametrize("epsilon", [0.0, 0.002, 0.3])
def test_costs_changed_in_place_are_solved_anew(epsilon, sides, kind):
    cost = draw(20, 15)
    problem = Problem(as_given(kind, cost), epsilon=epsilon, **sides)
    before = float(solve(problem).value)
    cost *= 7.0  # far beyond the largest that anybody has seen
    cost -= 1.0
    again, anew = solve(problem), solve(Problem(as_given(kind, cost.copy()), epsilon=epsilon, **sides))
    assert float(again.value) == pytest.approx(float(anew.value), rel=1e-9) and abs(float(anew.value) - before) > 0.01
    for name in ("dual", "primal"):
        assert getattr(again.certificate, name) == pytest.approx(getattr(anew.certificate, name), rel=1e-6, abs=1e-12)
    assert again.certificate.holds and problem.dual(again.f, again.g) == pytest.approx(float(anew.value), rel=1e-6)


READ = {
    "value": lambda solution, v: solution.value,
    "plan": lambda solution, v: solution.plan,
    "apply": lambda solution, v: solution.apply(v),
    "mass": lambda solution, v: solution.mass,
    "transport cost": lambda solution, v: solution.transport_cost,
    "gradient": lambda solution, v: solution.gradient(),
    "certificate": lambda solution, v: solution.certificate,
}
CHANGES = {
    "all": lambda x: x.__imul__(2.0),
    "one row": lambda x: x[3].__iadd__(1.0),
    "one column": lambda x: x[:, -2].__imul__(0.5),
    "some": lambda x: x.__setitem__(x > 0.7, 0.0),
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["numpy", "torch", "large"])
def test_outputs_are_never_those_of_other_data(kind, change, read):
    n = 400 if kind == "large" else 30
    cost = draw(n, n)
    given = torch.from_numpy(cost) if kind == "torch" else cost
    v = np.ones(n) if kind != "torch" else torch.ones(n, dtype=torch.float64)
    solution = solve(Problem(given, epsilon=0.5))
    f = np.array(solution.f)
    CHANGES[change](given)
    with pytest.raises(ValueError, match="cost was changed in place"):
        READ[read](solution, v)
    np.testing.assert_array_equal(solution.f, f)  # which is known
    assert "changed" in repr(solution)


@pytest.mark.parametrize("order", ["C", "F", "strided", "float32"])
def test_one_entry_of_many_is_noticed(order):
    whole = draw(500, 1000)
    cost = {"C": whole, "F": np.asfortranarray(whole), "strided": whole[:, ::2], "float32": whole.astype(np.float32)}[order]
    for i, j in np.random.default_rng(0).integers(0, cost.shape, (10, 2)):
        solution = solve(Problem(cost, epsilon=0.5), Sinkhorn(tolerance=1e-3))
        cost[i, j] = np.nextafter(cost[i, j], np.float32(np.inf))
        with pytest.raises(ValueError, match="cost was changed in place"):
            _ = solution.value


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_entries_that_change_places_are_noticed(order):
    whole = draw(300, 400)
    cost = {"C": whole, "F": np.asfortranarray(whole), "strided": whole[:, ::2]}[order]
    rng = np.random.default_rng(0)
    for k in range(30):
        (i, j), (p, q) = rng.integers(0, cost.shape, (2, 2))
        p, q = (i if k % 3 == 0 else p), (j if k % 3 == 1 else q)
        if (i, j) == (p, q):
            continue
        solution = solve(Problem(cost, epsilon=0.5), Sinkhorn(tolerance=1e-2))
        cost[i, j], cost[p, q] = cost[p, q], cost[i, j]
        with pytest.raises(ValueError, match="cost was changed in place"):
            _ = solution.value


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("n", [5, 200])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_what_is_no_problem_any_more_is_refused(kind, n, epsilon):
    """Between construction and the solve: NaN would be an answer that is NaN, or one without the arc."""
    cost, a = as_given(kind, draw(n, n)), as_given(kind, np.full(n, 1 / n))
    problem, weighed = Problem(cost, epsilon=epsilon), Problem(as_given(kind, draw(n, n)), a, epsilon=epsilon)
    cost[0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"cost\[0, 1\] is NaN"):
        solve(problem)
    a[0] = 3.0
    with pytest.raises(ValueError, match="no plan can have both totals"):
        solve(weighed)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("which", ["x", "y", "a"])
def test_points_and_weights_are_watched_too(which, kind):
    given = {"x": draw(30, 4), "y": draw(20, 4), "a": np.full(30, 1 / 30)}
    kept = {name: as_given(kind, x) for name, x in given.items()}
    solution = solve(Problem(Points(kept["x"], kept["y"]), kept["a"], epsilon=0.5))
    value = float(solution.value)
    kept[which] *= 2.0
    assert float(solution.value) == value  # computed before
    with pytest.raises(ValueError, match=f"{which} was changed in place"):
        _ = solution.transport_cost
    with pytest.raises(ValueError, match=f"{which} was changed in place"):
        _ = copy.copy(solution).plan
    assert float(copy.deepcopy(solve(Problem(Points(kept["x"], kept["y"]), epsilon=0.5))).value) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_among_arrays_is_watched_as_tensors_are(dtype):
    epsilon, rho = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (0.5, 2.0))
    solution = solve(Problem(draw(6, 5), epsilon=epsilon, rows=KL(rho)))
    expected = solve(Problem(draw(6, 5), epsilon=0.5, rows=KL(2.0))).value
    assert float(solution.value) == pytest.approx(float(expected), rel=1e-6)
    with torch.no_grad():
        rho.mul_(2.0)
    with pytest.raises(ValueError, match="rho was changed in place"):
        _ = solution.plan


VECTORS = ("value", "f", "g", "mass", "row_marginal", "column_marginal", "transport_cost", "mass_multiplier")


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
@pytest.mark.parametrize("points", [False, True], ids=["costs", "points"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
def test_what_is_done_to_an_output_is_done_to_no_other(batch, points, epsilon, kind):
    if points:
        cost = Points(as_given(kind, draw(*batch, 12, 3)), as_given(kind, draw(*batch, 9, 3) + 0.1))
    else:
        cost = as_given(kind, draw(*batch, 12, 9))

    def all_of(solution):
        found = {name: np.array(getattr(solution, name)) for name in VECTORS} | {"plan": np.array(solution.plan)}
        return found | {"dual": np.array(solution.certificate.dual), "primal": np.array(solution.certificate.primal)}

    known, solution = all_of(solve(Problem(cost, epsilon=epsilon))), solve(Problem(cost, epsilon=epsilon))
    for name in VECTORS:
        output = getattr(solution, name)
        if isinstance(output, np.ndarray | torch.Tensor):
            output *= 3.0
    if kind == "numpy":
        with pytest.raises(ValueError, match="read-only"):
            solution.plan[...] = 0.0
        solution.plan.copy()[...] = 0.0
    else:
        solution.plan.mul_(3.0)
    if not batch:
        sparse = solution.sparse_plan
        (sparse.data if kind == "numpy" else sparse.values())[...] = 0.0
    for name, x in all_of(solution).items():
        np.testing.assert_allclose(x, known[name], rtol=1e-12, atol=1e-13, err_msg=name)


def test_a_step_of_an_optimiser_is_a_change():
    x = torch.nn.Parameter(torch.from_numpy(draw(10, 3)))
    solution = solve(Problem(Points(x, torch.from_numpy(draw(8, 3))), epsilon=0.5))
    optimiser = torch.optim.SGD([x], lr=0.1)
    solution.value.backward()
    optimiser.step()
    with pytest.raises(ValueError, match="x was changed in place"):
        _ = solution.plan


@pytest.mark.parametrize("n", [40, 2100], ids=["few", "many"])
def test_points_are_solved_in_inference_mode(n):
    """Whose tensors do not tell whether they were changed; many are read by threads of our own."""
    x = torch.from_numpy(draw(n, 3)).float()
    expected = solve(Problem(Points(x, x + 0.1), epsilon=0.5), Sinkhorn(tolerance=1e-5))
    with torch.inference_mode():
        z = x.clone()
        found = solve(Problem(Points(z, z + 0.1), epsilon=0.5), Sinkhorn(tolerance=1e-5))
        assert float(found.value) == pytest.approx(float(expected.value), rel=1e-6)
        assert found.certificate.holds


@pytest.mark.parametrize("kind", [NTXentLoss, DCLLoss, SupConLoss, SinkhornNCELoss])
@pytest.mark.parametrize("n", [13, 14])
def test_what_follows_from_sizes_serves_training_after_evaluation(n, kind):
    """Also where it was first asked for in inference mode, whose tensors no derivative may need."""
    z0, z1 = (torch.from_numpy(draw(n, 4) - shift).float().requires_grad_() for shift in (0.5, 0.4))
    loss = kind(0.2, watch=(lambda _: None) if n == 14 else None)
    given = {"labels": torch.arange(n) // 2} if kind is SupConLoss else {}
    with torch.inference_mode():
        found = loss(z0, z1, **given)
    again = loss(z0, z1, **given)
    again.backward()
    assert float(found) == pytest.approx(float(again.detach()), rel=1e-6)
    assert z0.grad.isfinite().all() and z0.grad.any()


def test_sizes_have_tables_of_their_own():
    made = []

    @remembered
    def table(n, *, dtype, device):
        made.append(n)
        return torch.arange(n, dtype=dtype, device=device)

    class Own(torch.Tensor):
        pass

    like = torch.zeros(1)
    assert table(3, like=like) is table(3, like=like) and made == [3]
    assert table(3, like=like.double()).dtype == torch.float64 and len(table(4, like=like)) == 4 and made == [3, 3, 4]
    table(3, like=like.as_subclass(Own))  # a tensor that is none, as where only shapes are asked for
    assert made == [3, 3, 4, 3]


@pytest.mark.parametrize("kind", [NTXentLoss, SinkhornNCELoss, partial(SinkhornNCELoss, negatives="all")])
def test_a_target_of_pairs_is_made_once_and_is_nobodys_to_change(kind):
    z0, z1 = (torch.from_numpy(draw(12, 4) - shift).requires_grad_() for shift in (0.5, 0.4))
    loss = kind(0.2, watch=lambda _: None)
    (one,), (other,), (third,) = (loss.read(*given)[1] for given in ((z0, z1), (z1, z0), (z0[:11], z1[:11])))
    assert one.matches is other.matches is not third.matches
    before = float(loss(z0, z1).detach())
    problem, target = loss.problem(z0, z1)
    target.values().mul_(2.0)
    target.indices().zero_()
    if problem.cost.barred is not None:
        problem.cost.barred.zero_()
    assert float(loss(z0, z1).detach()) == before


@pytest.mark.parametrize("kind", [InfoNCELoss, ClipLoss, NTXentLoss, SinkhornNCELoss])
def test_losses_are_evaluated_in_inference_mode(kind):
    z0, z1 = (torch.from_numpy(draw(12, 4) - shift).float() for shift in (0.5, 0.4))
    with torch.inference_mode():
        found = kind(0.2)(z0.clone(), z1.clone())
    assert float(found) == pytest.approx(float(kind(0.2)(z0, z1)), rel=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=["automatic", "sinkhorn"])
@pytest.mark.parametrize("rows", [KL(0.5), L2(0.5)], ids=["kl", "l2"])
def test_a_penalty_is_of_the_weights_as_they_are_in_inference_mode_too(rows, solver):
    with torch.inference_mode():
        cost, a = torch.from_numpy(draw(6, 5)), torch.tensor([0.05, 0.1, 0.1, 0.2, 0.25, 0.3], dtype=torch.float64)
        problem = Problem(cost, a, epsilon=0.1, rows=rows)
        before = float(solve(problem, solver).value)
        a.copy_(a.flip(-1).clone())
        again, anew = solve(problem, solver), solve(Problem(cost, a.clone(), epsilon=0.1, rows=rows), solver)
        assert float(again.value) == pytest.approx(float(anew.value), rel=1e-9)
        assert again.certificate.holds and abs(float(anew.value) - before) > 1e-3
