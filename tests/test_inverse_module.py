"""Costs made by torch modules: linear ones beside the estimator of coefficients, others beside unrolled solves, differences."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from iotsolve import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared, inverse, progress

MODES = {
    "fixed": (FIXED, FIXED),
    "free": (FIXED, FREE),
    "free rows": (FREE, FIXED),
    "both free": (FREE, FREE),
    "kl": (KL(0.7), KL(2.0)),
    "semi": (FIXED, KL(0.5)),
    "bounds": (FIXED, Between(0.5, 2.0)),
    "at most": (AT_MOST, AT_MOST),
    "chi": (ChiSquared(0.8), FIXED),
    "l2": (FIXED, L2(3.0)),
    "tv": (FIXED, TV(1.0)),
}


class Affinity(nn.Module):
    """``-x A y'``: what InverseOT(Bilinear) estimates."""

    def __init__(self, p, q, dtype=torch.float64):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(p, q, dtype=dtype))

    def forward(self, x, y):
        return -x @ self.matrix @ y.T


class Towers(nn.Module):
    """Squared distance between what one small network makes of each side."""

    def __init__(self, seed=0, width=16, inputs=2, outputs=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)
            self.tower = nn.Sequential(*layers).double()

    def forward(self, x, y):
        return ((self.tower(x)[:, None] - self.tower(y)) ** 2).sum(-1)


class Broken(nn.Module):
    """A parameter, and whatever is returned."""

    def __init__(self, cost):
        super().__init__()
        self.weight, self.cost = nn.Parameter(torch.ones(1, dtype=torch.float64)), cost

    def forward(self, x, y):
        return self.cost(self.weight, x, y)


def traits(n, p, seed):
    return np.random.default_rng(seed).standard_normal((n, p))


def weights(n, seed):
    w = np.random.default_rng(seed).random(n) + 0.5
    return w / w.sum()


def market(mode="fixed", n=14, m=11, seed=0, noise=0.3):
    """Traits, and a noisy plan of a planted affinity, within what the sides allow."""
    rows, columns = MODES[mode]
    x, y = traits(n, 2, seed), traits(m, 3, seed + 1)
    a, b = weights(n, seed + 2), weights(m, seed + 3)
    model = inverse.InverseOT(inverse.Bilinear(x, y), rows=rows, columns=columns)
    plan = model.plan(np.random.default_rng(seed).uniform(-0.6, 0.6, 6), a, b)
    plan = plan * np.exp(noise * traits(n, m, seed + 4))
    if rows is FIXED or columns is FIXED:
        own = plan.sum(1) if rows is FIXED else a, plan.sum(0) if columns is FIXED else b
        scale = plan.sum()
        a, b = (w * scale / w.sum() for w in own)
    else:
        plan = 0.7 * plan
    return x, y, inverse.Coupling(plan=plan, a=a, b=b)


def coefficients(fit):
    return fit.module.matrix.detach().numpy().ravel()


def small(kind="semi", n=8, m=7, seed=0):
    """A loss of two towers, not at its minimum, and the data as arrays."""
    x, y = traits(n, 2, seed), traits(m, 2, seed + 1)
    rows, columns = MODES[kind]
    plan = np.random.default_rng(seed).random((n, m)) / (n * m)
    a, b = plan.sum(1), plan.sum(0) if columns is FIXED else plan.sum() * weights(m, 3)
    model = inverse.Module(Towers(seed), x, y, epsilon=0.7, rows=rows, columns=columns, tolerance=1e-11)
    unit = a.sum()
    return model, inverse.Coupling(plan=plan, a=a, b=b), plan / unit, a / unit, b / unit


def gradient_of(loss, module):
    return torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(module.parameters()))])


# -- against the estimator of coefficients -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_linear_module_finds_the_coefficients_of_the_estimator(mode):
    rows, columns = MODES[mode]
    x, y, data = market(mode)
    expected = inverse.InverseOT(inverse.Bilinear(x, y), rows=rows, columns=columns).fit(data)
    fit = inverse.Module(Affinity(2, 3), x, y, rows=rows, columns=columns, tolerance=1e-7).fit(data)
    assert expected.converged and fit.converged
    np.testing.assert_allclose(coefficients(fit), expected.coefficients, atol=1e-6)
    np.testing.assert_allclose(fit.cost, expected.cost, atol=1e-5)
    np.testing.assert_allclose(fit.plan, expected.plan, atol=1e-6)
    assert fit.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-6) and fit.loss >= 0


def test_counts_masks_and_the_unit_epsilon():
    rng = np.random.default_rng(0)
    x, y = traits(12, 2, 0), traits(9, 3, 1)
    mask = rng.random((12, 9)) < 0.8
    data = inverse.Coupling(rng.poisson(5.0, (12, 9)) * mask, mask=mask)
    expected = inverse.InverseOT(inverse.Bilinear(x, y), epsilon=0.2).fit(data)
    fit = inverse.Module(Affinity(2, 3), x, y, epsilon=0.2, tolerance=1e-8).fit(data)
    np.testing.assert_allclose(coefficients(fit), expected.coefficients, atol=1e-6)
    assert (fit.plan[~mask] == 0).all() and np.isinf(fit.cost[~mask]).all()
    n = data.counts.sum()
    assert fit.observations == n and fit.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-10)
    # of counts between their own totals the loss is a divergence, and the deviance 2 n times that
    assert fit.deviance == pytest.approx(2 * n * fit.loss / 0.2, rel=1e-6)
    f, g = fit.potentials
    share = data.counts / n
    again = np.outer(share.sum(1), share.sum(0)) * np.exp((f[:, None] + g - fit.cost) / 0.2)
    np.testing.assert_allclose(again, fit.plan, atol=1e-10)


def test_a_penalty_of_parameters_is_that_of_coefficients():
    x, y, data = market()
    expected = inverse.InverseOT(inverse.Bilinear(x, y), epsilon=0.5, penalty=inverse.Ridge(0.3)).fit(data)
    price = lambda module: 0.15 * (module.matrix**2).sum()  # noqa: E731
    fit = inverse.Module(Affinity(2, 3), x, y, epsilon=0.5, penalty=price, tolerance=1e-8).fit(data)
    np.testing.assert_allclose(coefficients(fit), expected.coefficients, atol=1e-6)
    assert fit.converged


# -- the gradient ------------------------------------------------------------------------------------------------------


def unrolled(cost, a, b, epsilon, rho, sweeps=400):
    """Sinkhorn's alternation by hand, rows fixed, columns fixed (``rho = None``) or at ``rho KL``; the plan and its objective."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(sweeps):
        f = -epsilon * torch.logsumexp((g - cost) / epsilon + b.log(), 1)
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon + a.log()[:, None], 0)
        g = g if rho is None else g * rho / (rho + epsilon)
    f = -epsilon * torch.logsumexp((g - cost) / epsilon + b.log(), 1)
    plan = a[:, None] * b * torch.exp((f[:, None] + g - cost) / epsilon)
    return plan, objective(plan, cost, a, b, epsilon, rho)


def objective(plan, cost, a, b, epsilon, rho):
    def divergence(p, q):
        return (p * (p / q).log() - p + q).sum()

    value = (plan * cost).sum() + epsilon * divergence(plan, a[:, None] * b)
    return value if rho is None else value + rho * divergence(plan.sum(0), b)


@pytest.mark.parametrize("kind, rho", [("fixed", None), ("semi", 0.5)])
def test_loss_and_gradient_are_those_through_an_unrolled_solve(kind, rho):
    model, data, plan, a, b = small(kind)
    plan, a, b = (torch.as_tensor(x) for x in (plan, a, b))
    cost = model.module(torch.as_tensor(model.x), torch.as_tensor(model.y))
    value = unrolled(cost, a, b, 0.7, rho)[1]
    expected = (objective(plan, cost, a, b, 0.7, rho) - value) / 0.7
    loss = model.loss(data)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(
        gradient_of(loss, model.module), gradient_of(expected, model.module), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["fixed", "free", "semi"])
def test_first_and_second_derivatives_are_differences(kind):
    model, data, *_ = small(kind)
    parameters = list(model.module.parameters())
    direction = [torch.as_tensor(np.random.default_rng(k).standard_normal(p.shape)) for k, p in enumerate(parameters)]

    def moved(step):
        other = Towers(0)
        with torch.no_grad():
            for p, q, d in zip(other.parameters(), parameters, direction, strict=True):
                p.copy_(q + step * d)
        loss = inverse.Module(other, model.x, model.y, epsilon=0.7, rows=model.rows, columns=model.columns,
                              tolerance=1e-11).loss(data)  # fmt: skip
        return loss.detach(), gradient_of(loss, other)

    slope = torch.autograd.grad(model.loss(data), parameters, create_graph=True)
    along = sum((s * d).sum() for s, d in zip(slope, direction, strict=True))
    curve = torch.cat([x.ravel() for x in torch.autograd.grad(along, parameters)])

    def difference(step):
        (above, up), (below, down) = moved(step), moved(-step)
        return torch.cat([(above - below)[None], up - down]) / (2 * step)

    expected = (4 * difference(1e-4) - difference(2e-4)) / 3  # Richardson: free of the second order
    torch.testing.assert_close(along.detach(), expected[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(curve, expected[1:], rtol=1e-6, atol=1e-8)


# -- what only a module can say ----------------------------------------------------------------------------------------


def test_two_towers_explain_held_out_matches_better_than_an_affinity():
    truth = Towers(seed=5, width=8)
    with torch.no_grad():
        for p in truth.parameters():
            p.mul_(2.5)
    rng = np.random.default_rng(0)
    x, y, new_x, new_y = (traits(size, 2, seed) for seed, size in enumerate((60, 50, 40, 45)))

    def drawn(x, y, total):
        plan = inverse.Module(truth, x, y).plan(np.ones(len(x)) / len(x), np.ones(len(y)) / len(y))
        return inverse.Coupling(rng.multinomial(total, plan.ravel() / plan.sum()).reshape(plan.shape))

    data, held_out = drawn(x, y, 30_000), drawn(new_x, new_y, 30_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inverse.TrainingWarning)
        fit = inverse.Module(Towers(seed=1), x, y, epochs=8).fit(data)
        best = inverse.Module(truth, new_x, new_y, epochs=1, optimizer=partial(torch.optim.SGD, lr=0.0)).fit(held_out)
    bilinear = inverse.InverseOT(inverse.Bilinear(x, y)).fit(data)
    scores = (fit.score(held_out, new_x, new_y), bilinear.score(held_out, inverse.Bilinear(new_x, new_y)))
    ceiling = best.log_likelihood / 30_000
    assert ceiling >= scores[0] > scores[1] and ceiling - scores[0] < 0.2 * (ceiling - scores[1])


def test_types_that_are_numbers_reach_the_module_as_numbers():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(4, 2, dtype=torch.float64)
            self.columns = nn.Embedding(3, 2, dtype=torch.float64)

        def forward(self, x, y):
            return self.rows(x) @ self.columns(y).T

    counts = np.random.default_rng(0).poisson(20.0, (4, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        table = Table()
    fit = inverse.Module(table, np.arange(4), np.arange(3)).fit(counts)
    # two dimensions are all that a 4 x 3 table has beside its totals
    np.testing.assert_allclose(fit.plan, counts / counts.sum(), atol=1e-5)


# -- batches -----------------------------------------------------------------------------------------------------------


QUICK = partial(torch.optim.Adam, lr=0.05)


def choices(n=60, m=8, seed=0):
    rng = np.random.default_rng(seed)
    x, y = traits(n, 2, seed), traits(m, 3, seed + 1)
    return x, y, inverse.Coupling(pairs=(np.arange(n), rng.integers(0, m, n)), b=n * weights(m, seed + 2))


@pytest.mark.parametrize("rows", [FIXED, KL(0.7)])
def test_batches_of_rows_that_choose_freely_sum_to_the_whole(rows):
    x, y, data = choices()
    model = inverse.Module(Affinity(2, 3), x, y, rows=rows, columns=FREE, epsilon=0.4)
    torch.nn.init.normal_(model.module.matrix, generator=torch.Generator().manual_seed(0))
    task = model._task(data)
    parts = np.array_split(np.random.default_rng(0).permutation(60), 7)
    found = sum(gradient_of(task.loss_of_rows(model.module, part), model.module) for part in parts)
    torch.testing.assert_close(found, gradient_of(model.loss(data), model.module), rtol=1e-9, atol=1e-12)


def test_a_conditional_logit_in_batches_reaches_the_optimum_of_the_whole():
    x, y, data = choices()
    expected = inverse.InverseOT(inverse.Bilinear(x, y), columns=FREE).fit(data)
    fit = inverse.Module(Affinity(2, 3), x, y, columns=FREE, batch=16, epochs=200, optimizer=QUICK).fit(data)
    assert fit.converged and fit.gradient_norm < 1e-3 and len(fit.losses) == 200
    np.testing.assert_allclose(coefficients(fit), expected.coefficients, atol=2e-3)
    on = inverse.Module(fit.module, x, y, columns=FREE, tolerance=1e-7).fit(data)
    np.testing.assert_allclose(coefficients(on), expected.coefficients, atol=1e-6)


def test_a_seed_decides_all_and_nothing_else_is_touched():
    x, y, data = choices()
    model = inverse.Module(Affinity(2, 3), x, y, columns=FREE, batch=16, epochs=3, tolerance=10.0)
    state = torch.random.get_rng_state()
    first, second = (coefficients(model.fit(data)) for _ in range(2))
    assert (first == second).all() and torch.equal(state, torch.random.get_rng_state())
    other = inverse.Module(model.module, x, y, columns=FREE, batch=16, epochs=3, tolerance=10.0, seed=1)
    assert (coefficients(other.fit(data)) != first).any() and (model.module.matrix == 0).all()


def test_batches_between_fixed_sides_say_what_they_are():
    x, y, data = market(noise=0.0)
    whole = inverse.Module(Affinity(2, 3), x, y).fit(data)
    with pytest.warns(inverse.TrainingWarning, match="a market of its own"):
        fit = inverse.Module(Affinity(2, 3), x, y, batch=5, epochs=150, optimizer=QUICK).fit(data)
    # of a plan that the module can explain, every part is explained by the same
    np.testing.assert_allclose(coefficients(fit), coefficients(whole), atol=1e-3)


def test_couples_in_small_batches_are_off_and_the_fit_knows_it():
    x = traits(100, 1, 0)
    y = x + traits(100, 1, 1)
    expected = inverse.affinity(x, y).coefficients[0]
    with pytest.warns(inverse.TrainingWarning) as caught:
        fit = inverse.Module(Affinity(1, 1), x, y, batch=4, epochs=15, optimizer=QUICK).fit(
            inverse.Coupling(matched=True)
        )
    assert coefficients(fit)[0] > 1.3 * expected and not fit.converged
    assert ["market of its own" in str(w.message) for w in caught] == [True, False]
    assert "not converged" in fit.report()


@pytest.mark.parametrize("columns", [KL(1.0), Between(0.5, 2.0), TV(1.0)])
def test_batches_between_soft_columns_are_refused(columns):
    with pytest.raises(ValueError, match="columns=FREE"):
        inverse.Module(Affinity(2, 3), *market()[:2], columns=columns, batch=4)


# -- other data, other precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fixed", "semi", "kl"])
def test_predictions_and_scores_are_those_of_the_estimator(mode):
    rows, columns = MODES[mode]
    x, y, data = market(mode)
    expected = inverse.InverseOT(inverse.Bilinear(x, y), rows=rows, columns=columns).fit(data)
    fit = inverse.Module(Affinity(2, 3), x, y, rows=rows, columns=columns, tolerance=1e-8).fit(data)
    new_x, new_y = traits(6, 2, 20), traits(5, 3, 21)
    a, b = 3 * weights(6, 22), 3 * weights(5, 23)
    new = inverse.Bilinear(new_x, new_y)
    np.testing.assert_allclose(fit.predict(a, b, new_x, new_y), expected.predict(a, b, new), atol=1e-6)
    mask = np.ones((6, 5), bool)
    mask[0, 0] = False
    held_out = inverse.Coupling(np.random.default_rng(0).poisson(9.0, (6, 5)) * mask, mask=mask)
    assert fit.score(held_out, new_x, new_y) == pytest.approx(expected.score(held_out, new), abs=1e-6)


def test_single_precision_and_other_optimizers():
    x, y, data = market()
    expected = inverse.InverseOT(inverse.Bilinear(x, y)).fit(data).coefficients
    single = inverse.Module(Affinity(2, 3, torch.float32), x, y).fit(data)
    assert single.converged and single.module.matrix.dtype == torch.float32
    np.testing.assert_allclose(coefficients(single), expected, atol=1e-3)
    adam = inverse.Module(
        Affinity(2, 3), x, y, optimizer=partial(torch.optim.Adam, lr=0.05), epochs=1000, tolerance=1e-5
    ).fit(data)
    assert adam.converged and 20 < len(adam.losses) < 1000 and adam.losses[-1] < adam.losses[0]
    np.testing.assert_allclose(coefficients(adam), expected, atol=1e-4)


def test_a_training_that_did_not_converge_says_so():
    x, y, data = market()
    with pytest.warns(inverse.TrainingWarning, match="not converged after 2 epochs"):
        fit = inverse.Module(Affinity(2, 3), x, y, optimizer=partial(torch.optim.SGD, lr=0.01), epochs=2).fit(data)
    assert not fit.converged and fit.gradient_norm > 1e-6


def test_training_goes_on_from_where_it_was():
    x, y, data = market()
    fit = inverse.Module(Affinity(2, 3), x, y).fit(data)
    again = inverse.Module(fit.module, x, y).fit(data)
    assert len(again.losses) == 1 and not fit.module.training
    np.testing.assert_allclose(coefficients(again), coefficients(fit), atol=1e-9)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cost, message",
    [
        (lambda w, x, y: (w * x[:, :1] - y[:, 0]).sqrt(), r"cost\[\d+, \d+\] = nan.*not finite"),
        (lambda w, x, y: w / (0 * x[:, :1] * y[:, 0]), "not finite"),
        (lambda w, x, y: (w * x[:, :1] * y[:, 0])[..., None], "a dimension of 1 left over"),
        (lambda w, x, y: w * y[:, :1] * x[:, 0], "every row with every column"),
        (lambda w, x, y: (w * x[:, :1] * y[:, 0]).detach(), "autograd"),
        (lambda w, x, y: x.numpy()[:, :1] * y.numpy()[:, 0], "a ndarray"),
    ],
)
def test_a_module_that_makes_no_cost_is_refused(cost, message):
    x, y, data = market()
    with pytest.raises(ValueError, match=message):
        inverse.Module(Broken(cost), x, y).fit(data)


def test_a_training_that_runs_away_is_stopped_by_the_first_cost_that_is_not_finite():
    x, y, data = market()
    between = Broken(lambda w, x, y: (w * (3 - w)).sqrt() * (x[:, :1] * y[:, 0]))
    with pytest.raises(ValueError, match=r"not finite.*learning rate"):
        inverse.Module(between, x, y, optimizer=partial(torch.optim.SGD, lr=1e3)).fit(data)


def test_a_step_too_long_does_not_spoil_the_forward_problem():
    """A start that the module has left far behind is thrown away: what is learned then is not converged, and finite."""
    x, y, data = market()
    square = Broken(lambda w, x, y: (w**2 - 0.5).sqrt() * (x[:, :1] * y[:, 0]))
    with pytest.warns(inverse.TrainingWarning, match="not converged after 5 epochs"):
        fit = inverse.Module(square, x, y, optimizer=partial(torch.optim.SGD, lr=1e3), epochs=5).fit(data)
    assert abs(fit.cost).max() > 1e3 and fit.solution.converged and np.isfinite(fit.losses).all()


@pytest.mark.parametrize("batch", [None, 5])
def test_a_gradient_that_is_not_finite_is_refused_though_the_cost_is(batch):
    x, y, data = market()
    # a root at 0, whose derivative there is none
    kink = Broken(lambda w, x, y: ((w - 1) ** 2).sqrt() + w * x[:, :1] * y[:, 0])
    with pytest.raises(ValueError, match="not finite"):
        inverse.Module(kink, x, y, batch=batch).fit(data)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"module": Affinity}, "without brackets"),
        ({"epsilon": 0.0}, "epsilon = 0.0"),
        ({"batch": 0}, "batch = 0"),
        ({"epochs": 1.5}, "epochs = 1.5"),
        ({"tolerance": -1.0}, "tolerance = -1.0"),
        ({"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)])}, "already holds parameters"),
        ({"module": nn.Identity()}, "no parameter"),
        ({"x": np.full((14, 2), np.nan)}, r"x\[0, 0\] = nan"),
        ({"x": 3.0}, "x of shape"),
        ({"x": [["old", "rich"]] * 14}, "x: must be numbers"),
        ({"penalty": lambda module: 0.1}, "without dimensions"),
        ({"penalty": lambda module: module.matrix}, "without dimensions"),
    ],
)
def test_misuse_is_refused(change, message):
    x, y, data = market()
    arguments = {"module": Affinity(2, 3), "x": x, "y": y} | change
    with pytest.raises(ValueError, match=message):
        inverse.Module(**arguments).fit(data)


def test_data_that_no_cost_can_explain_are_refused():
    x, y, data = market()
    model = inverse.Module(Affinity(2, 3), x, y)
    with pytest.raises(ValueError, match="violate a hard side"):
        model.fit(inverse.Coupling(plan=data.plan, a=data.a[::-1]))
    with pytest.raises(ValueError, match="a has total"):
        model.fit(inverse.Coupling(plan=data.plan, a=2 * data.a))
    with pytest.raises(ValueError, match="violate a hard side"):
        inverse.Module(model.module, x, y, rows=AT_MOST, columns=FREE).fit(
            inverse.Coupling(plan=data.plan, a=data.a / 2)
        )
    with pytest.raises(ValueError, match="fitted to one"):
        model.fit([data, data])


# -- bars --------------------------------------------------------------------------------------------------------------


def test_a_bar_is_shown_on_a_terminal_once_it_takes_long(monkeypatch, capsys):
    x, y, data = market()
    counts = np.random.default_rng(0).poisson(9.0, (14, 11))
    model = inverse.InverseOT(inverse.Bilinear(x, y), penalty=inverse.L1(1.0))

    def said():
        inverse.path(model, counts, count=3, folds=2)
        inverse.Module(Affinity(2, 3), x, y).fit(data)
        return capsys.readouterr().err

    assert said() == ""  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich 13
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich 14
    monkeypatch.setattr(progress, "_PATIENCE", 1e9)
    assert said() == ""  # done at once
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    shown = said()
    assert "path" in shown and "9/9" in shown and "training" in shown


def test_what_was_not_possible_is_not_predicted():
    x, y, data = market()
    counts = np.array(data.plan)
    mask = np.ones(counts.shape, bool)
    mask[0, 0] = mask[2, 1] = False
    fit = inverse.Module(Affinity(2, 3), x, y).fit(inverse.Coupling(plan=counts * mask, mask=mask))
    a, b = ((counts * mask).sum(k) for k in (1, 0))
    predicted = fit.predict(a, b)
    assert (predicted[~mask] == 0).all() and (fit.predict(a, b, mask=mask | True) > 0).all()
    np.testing.assert_allclose(predicted, fit.plan * a.sum(), rtol=1e-5)
    assert (fit.predict(a, b, x=x) > 0).all()
