"""``Module``: a cost that a torch module makes, learned by the loss that estimates coefficients.

The loss is convex in the cost and its derivative there is ``(Phat - P) / epsilon``: nothing is unrolled, and a module sees one
matrix of residuals. It is not convex in the module's parameters, unless the cost is linear in them.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iotsolve.gradient import Implicit
from iotsolve.inverse.data import Coupling, Table
from iotsolve.inverse.fit import log_likelihood, predicted
from iotsolve.inverse.market import check_totals
from iotsolve.marginals import FIXED, Marginal
from iotsolve.problem import Potentials, Problem
from iotsolve.progress import bar
from iotsolve.solution import Solution
from iotsolve.solve import solve

__all__ = ["Module", "ModuleFit", "TrainingWarning"]


class TrainingWarning(UserWarning):
    """A training that did not converge, or whose batches ask for something else than the whole; the message says which."""


@dataclass(frozen=True, eq=False)
class Module:
    """Learn the cost behind an observed coupling where the cost is made by a torch module.

    The loss is that of :class:`InverseOT`, per unit of epsilon: the Fenchel-Young loss of the forward problem
    (:func:`iotsolve.inverse_loss`). With batches it is still that loss in expectation where the columns are FREE, since every
    row is then a problem of its own. Between fixed sides ``batch`` rows are a market of their own, whose loss is smallest
    elsewhere: at the same cost if the module can be right and every cell is well observed, else not; for couples it is off by
    the order of ``1 / batch``. A :class:`TrainingWarning` says so. Where the columns are soft, a batch says nothing about
    their totals, and is refused.

    Args:
        module: called with ``(x, y)``, it returns the cost of every row with every column, shape ``(n, m)``, cost units, finite.
            It is left as it is; what is trained is a copy, in the precision of its parameters.
        x: what the module is told of the rows: an array, a tensor or a data frame, the first dimension ``n``. Numbers of types
            (``np.arange(n)``, whole) will do for a module that keeps its own tables.
        y: the same of the columns, the first dimension ``m``.
        epsilon: strength of the entropy. The data tell ``cost / epsilon`` and no more: leave it 1.
        rows: marginal object of the rows.
        columns: marginal object of the columns.
        optimizer: makes torch's optimizer from the parameters, such as ``partial(torch.optim.Adam, lr=1e-2)``; by default
            L-BFGS for the whole, Adam at 1e-2 for batches.
        penalty: a price of the parameters, a function from the module to a scalar tensor in the unit of the loss.
        batch: rows per step; None for all, which is exact for every side.
        epochs: steps of the optimizer (of which one of L-BFGS is up to 20 evaluations), or with batches passes over all rows,
            in which the learning rate falls to 0 along a cosine, so that the noise of the batches dies out.
        tolerance: largest entry of the gradient in the parameters at which the training has converged, of loss over epsilon;
            by default 1e-6, or 1e-3 for single precision or batches.
        seed: of the batches' order and of what is random in the module.

    Raises:
        ValueError: when fitted, on a module, data and sides that do not belong together, or a cost that is not finite.

    Example:
        >>> from iotsolve import inverse
        >>> class Metric(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        ...     def forward(self, x, y):
        ...         return ((x[:, None] - y) ** 2) @ self.weight
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.random((20, 2)), rng.random((30, 2))
        >>> truth = Metric()
        >>> truth.weight.data = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> plan = inverse.Module(truth, x, y).plan(np.ones(20), 20 / 30 * np.ones(30))
        >>> fit = inverse.Module(Metric(), x, y).fit(Coupling(plan=plan))
        >>> fit.converged, fit.module.weight.detach().numpy().round(4)
        (True, array([3., 1.]))
    """

    module: nn.Module
    x: Any
    y: Any
    _: KW_ONLY
    epsilon: float = 1.0
    rows: Marginal = FIXED
    columns: Marginal = FIXED
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None
    penalty: Callable[[nn.Module], Tensor] | None = None
    batch: int | None = None
    epochs: int = 100
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise ValueError(
                f"module = {self.module!r}: must be a torch.nn.Module, called with (x, y). Was its class passed without brackets?"
            )
        if isinstance(self.optimizer, torch.optim.Optimizer):
            raise ValueError(
                "optimizer is one that already holds parameters, but what is trained is a copy of the module. Pass what makes "
                "it: optimizer=functools.partial(torch.optim.Adam, lr=1e-2)."
            )
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon = {self.epsilon!r}: must be positive and finite.")
        for name, value in (("batch", self.batch), ("epochs", self.epochs)):
            if not (name == "batch" and value is None) and not (isinstance(value, int | np.integer) and value >= 1):
                raise ValueError(f"{name} = {value!r}: must be a whole number, at least 1.")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance = {self.tolerance!r}: must be positive and finite, such as 1e-6.")
        if self.batch is not None and not self.columns.is_free and not (self.rows.is_fixed and self.columns.is_fixed):
            raise ValueError(
                f"batch = {self.batch} with sides {self.rows}, {self.columns}: only columns=FREE make every row a problem of its "
                "own, so that batches of rows have the gradient of all in expectation; some rows say nothing about the totals of "
                "soft columns. Use batch=None, which is exact; if the rows are FREE, exchange rows and columns."
            )

    def plan(self, a: Any, b: Any) -> np.ndarray:
        """The optimal plan of the module as it is, between known weights in any unit; what :meth:`fit` takes back apart."""
        cost = _costs(self.module, *self._inputs(self.x, self.y))
        return predicted(self, cost, a, b, unit=float(np.sum(a)))

    def loss(self, data: Coupling | Any) -> Tensor:
        """The loss of the module as it is, over epsilon, for a training loop of one's own.

        Returns:
            A float64 scalar, non-negative, 0 exactly if the data are the optimal plan; twice differentiable in the parameters.

        Raises:
            ValueError: as :meth:`fit`.
        """
        return self._task(data).loss(self.module, None)[0]

    def fit(self, data: Coupling | Any) -> ModuleFit:
        """Train a copy of the module; on a terminal a bar shows how far it is, if it takes long.

        Args:
            data: a :class:`Coupling`, or a table of counts.

        Returns:
            A :class:`ModuleFit`. A :class:`TrainingWarning` says so if it did not converge.

        Raises:
            ValueError: on data that are none or violate a hard side, and on a cost of another shape or that is not finite.
        """
        task = self._task(data)
        module = copy.deepcopy(self.module).train()
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("the module has no parameter that requires a gradient: there is nothing to learn.")
        device = parameters[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(self.seed)
            losses = self._batched(task, module, parameters) if self.batch else self._whole(task, module, parameters)
        module.eval()
        solution, loss, size = task.judged(module, parameters)
        fit = ModuleFit(self, module, task.table, solution, loss, np.array(losses), size)
        for message in fit.warnings:
            warnings.warn(message, TrainingWarning, stacklevel=2)
        return fit

    def _whole(self, task: _Task, module: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
        optimizer = (_lbfgs if self.optimizer is None else self.optimizer)(parameters)
        losses: list[float] = []
        start: Potentials | None = None

        def evaluate() -> float:
            nonlocal start
            optimizer.zero_grad()
            loss, start = task.loss(module, start)
            loss.backward()
            return loss.item()

        with bar("training", self.epochs) as advance:
            for _ in range(self.epochs):
                known = [evaluate()]
                losses.append(known[0])
                size = _largest(parameters)
                if size <= self._limit / 2:  # the judge works by itself, and rounds differently
                    break
                before = [p.detach().clone() for p in parameters]
                optimizer.step(lambda: known.pop() if known else evaluate())  # noqa: B023
                if all(map(torch.equal, before, parameters)):
                    break  # rounding leaves no way down
                advance(f"loss {losses[-1]:.6g}, gradient {size:.1e}")
        return losses

    def _batched(self, task: _Task, module: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
        optimizer = (partial(torch.optim.Adam, lr=1e-2) if self.optimizer is None else self.optimizer)(parameters)
        rows = np.flatnonzero(task.table.a > 0)
        count = math.ceil(len(rows) / self.batch)
        steps = self.epochs * count
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
        rng, losses = np.random.default_rng(self.seed), []
        with bar("training", self.epochs) as advance:
            for _ in range(self.epochs):
                mean = 0.0
                for part in np.array_split(rng.permutation(rows), count):

                    def evaluate(part: np.ndarray = part) -> float:
                        optimizer.zero_grad()
                        loss = task.loss_of_rows(module, part) * (len(rows) / len(part))
                        loss.backward()
                        return loss.item()

                    mean += float(optimizer.step(evaluate)) / count
                    falling.step()
                losses.append(mean)
                advance(f"loss {mean:.6g}")
        return losses

    @cached_property
    def _limit(self) -> float:
        single = any(p.dtype != torch.float64 for p in self.module.parameters())
        return self.tolerance or (1e-3 if single or self.batch else 1e-6)

    def _task(self, data: Coupling | Any) -> _Task:
        if isinstance(data, list | tuple) and any(isinstance(x, Coupling) for x in data):
            raise ValueError(
                f"{len(data)} couplings: a Module is fitted to one. Add the losses of several, Module(...).loss(coupling), in a "
                "training loop of your own."
            )
        x, y = self._inputs(self.x, self.y)
        table = (data if isinstance(data, Coupling) else Coupling(data)).table(
            (len(x), len(y)), self.rows, self.columns
        )
        check_totals(table, self.rows, self.columns)
        task = _Task(self, table, x, y)
        _ = task.constant  # refuses totals that violate a hard side
        return task

    def _inputs(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        like = next(self.module.parameters(), torch.empty(0, dtype=torch.float64))
        return _input("x", x, like), _input("y", y, like)


_lbfgs = partial(
    torch.optim.LBFGS, history_size=20, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
)


@dataclass(frozen=True, eq=False)
class _Task:
    """A table beside what the module is told: the loss, of all or of some rows."""

    model: Module
    table: Table
    x: Tensor
    y: Tensor

    @cached_property
    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """The plan observed and both weights, where the module is."""
        table = self.table
        return tuple(torch.as_tensor(x, device=self.x.device) for x in (table.plan, table.a, table.b))

    @cached_property
    def allowed(self) -> Tensor | None:
        allowed = self.table.allowed
        return None if allowed is None else torch.as_tensor(allowed, device=self.x.device)

    def problem(self, cost: Tensor, a: Tensor, b: Tensor, allowed: Tensor | None) -> Problem:
        cost = cost if allowed is None else torch.where(allowed, cost, math.inf)
        model = self.model
        return Problem(cost, a, b, epsilon=model.epsilon, rows=model.rows, columns=model.columns)

    @cached_property
    def constant(self) -> float:
        """What the observed plan pays whatever the cost: entropy and penalties."""
        plan, a, b = self.data
        paid = float(self.problem(torch.zeros_like(plan), a, b, self.allowed).primal(plan))
        if not math.isfinite(paid):
            raise ValueError(
                f"the observed coupling is no plan between rows {self.model.rows} and columns {self.model.columns}: its totals "
                "violate a hard side, so that no cost explains it and the loss has no minimum. Leave out a= and b=, or relax the "
                "side with KL(rho)."
            )
        return paid

    def loss(self, module: nn.Module, start: Potentials | None) -> tuple[Tensor, Potentials]:
        """Over epsilon, of all rows, with the penalty; and potentials to start the next from."""
        plan, a, b = self.data
        cost = _cost(module, self.x, self.y)
        solution = self.solved(self.problem(cost, a, b, self.allowed), start)
        loss = self.constant + (cost * plan).sum() - solution.value
        return self._priced(loss, module), solution.found.detach()

    def loss_of_rows(self, module: nn.Module, rows: np.ndarray) -> Tensor:
        """Of some rows, up to a constant; of a market of their own if the columns are fixed."""
        plan, a, b = self.data
        index = torch.as_tensor(rows, device=a.device)
        plan, a, y = plan[index], a[index], self.y
        allowed = None if self.allowed is None else self.allowed[index]
        if self.model.columns.is_fixed:
            b = plan.sum(0)
            met = b > 0  # the others take no part
            plan, b, y = plan[:, met], b[met], y[met]
            allowed = None if allowed is None else allowed[:, met]
        cost = _cost(module, self.x[index], y)
        loss = (cost * plan).sum() - self.solved(self.problem(cost, a, b, allowed), None).value
        return self._priced(loss, module, len(rows) / np.count_nonzero(self.table.a))

    def judged(self, module: nn.Module, parameters: list[nn.Parameter]) -> tuple[Solution, float, float]:
        """The forward problem's solution, the loss and the largest entry of its gradient, at the memory of one batch."""
        plan, a, b = self.data
        cost = torch.as_tensor(_costs(module, self.x, self.y, self.model.batch), device=plan.device)
        solution = self.solved(self.problem(cost, a, b, self.allowed), None)
        loss = self.constant + float((cost * plan).sum() - solution.value)
        residual = (plan - solution.plan) / self.model.epsilon
        module.zero_grad()
        with torch.enable_grad():
            for rows in _slices(len(self.x), self.model.batch):
                (residual[rows] * _cost(module, self.x[rows], self.y)).sum().backward()
            if self.model.penalty is not None:
                self._priced(torch.zeros((), dtype=a.dtype, device=a.device), module).backward()
        size = _largest(parameters)
        module.zero_grad()
        return solution, loss, size

    def solved(self, problem: Problem, start: Potentials | None) -> Solution:
        tolerance = max(1e-13, 1e-2 * self.model._limit)
        solution = solve(problem, gradient=Implicit(), tolerance=tolerance, init=start, throw=False)
        if start is not None and not solution.converged:  # a long step of the module can make it a bad start
            return self.solved(problem, None)
        if not math.isfinite(solution.value.item()):
            raise ValueError(
                f"the forward problem of the module's cost has no finite value, ended as {solution.status.name}: the cost has "
                "run away from epsilon. Usually the learning rate is too large; or give the module inputs of unit size."
            )
        return solution

    def _priced(self, loss: Tensor, module: nn.Module, share: float = 1.0) -> Tensor:
        if self.model.penalty is not None:
            price = self.model.penalty(module)
            if not (isinstance(price, Tensor) and price.ndim == 0):
                raise ValueError(f"penalty(module) = {price!r}: must be a tensor without dimensions.")
            loss = loss + share * price
        return loss / self.model.epsilon


@dataclass(frozen=True, eq=False)
class ModuleFit:
    """A trained module and its plan; made by :meth:`Module.fit`.

    Attributes:
        model: what was fitted.
        module: the trained copy, in evaluation mode.
        table: the data, per unit of the rows' weights.
        solution: of the forward problem at the end, in tensors.
        loss: the Fenchel-Young loss at the end without penalty, cost units per unit of the rows' weights, at least 0.
        losses: over epsilon at the start of every epoch; with batches their mean in it, up to a constant.
        gradient_norm: largest entry of the gradient of the whole loss over epsilon and penalty in the parameters.
    """

    model: Module
    module: nn.Module
    table: Table
    solution: Solution
    loss: float
    losses: np.ndarray
    gradient_norm: float

    @property
    def converged(self) -> bool:
        """Whether the gradient of the whole loss is within tolerance, and the forward problem solved."""
        return self.gradient_norm <= self.model._limit and bool(self.solution.converged)

    @cached_property
    def plan(self) -> np.ndarray:
        """The fitted plan per unit of the rows' weights, shape ``(n, m)``."""
        return self.solution.plan.detach().cpu().numpy()

    @cached_property
    def cost(self) -> np.ndarray:
        """As the module made it, ``+inf`` where the mask forbids a match; between fixed sides, it is one of many that differ by
        effects of rows and columns."""
        return self.solution.problem.cost.dense().detach().cpu().numpy()

    @property
    def potentials(self) -> tuple[np.ndarray, np.ndarray]:
        """``(f, g)`` of :attr:`cost`, in the gauge of :class:`iotsolve.Problem`."""
        return tuple(x.detach().cpu().numpy() for x in (self.solution.f, self.solution.g))

    @property
    def observations(self) -> float | None:
        """How many there were; None where the data do not tell."""
        return self.table.observations

    @property
    def log_likelihood(self) -> float:
        """Of all observations, given their number; of one on average where it is not known. ``-inf`` if one was impossible."""
        return self.table.scale * log_likelihood(self.table.plan, self.plan)

    @property
    def deviance(self) -> float:
        """Twice what the log-likelihood lacks of that of a plan equal to the data."""
        return 2 * (self.table.scale * log_likelihood(self.table.plan, self.table.plan) - self.log_likelihood)

    def predict(self, a: Any, b: Any, x: Any = None, y: Any = None, mask: Any = None) -> np.ndarray:
        """The optimal plan between other weights, in the unit of the data, of other rows or columns if they are given.

        Args:
            a: weights of the rows, shape ``(n,)``.
            b: weights of the columns, shape ``(m,)``.
            x: what the module is told of other rows.
            y: the same of other columns.
            mask: cells that are possible, boolean, shape ``(n, m)``; by default those of the data, or all if others are given.
        """
        if mask is None and x is None and y is None:
            mask = self.table.allowed
        return predicted(self.model, self._cost_between(x, y), a, b, unit=self.table.unit, mask=mask)

    def score(self, held_out: Coupling | Any, x: Any = None, y: Any = None) -> float:
        """Mean log-likelihood of an observation of another coupling, between its own marginals; of other rows or columns if
        they are given."""
        cost, model = self._cost_between(x, y), self.model
        held_out = held_out if isinstance(held_out, Coupling) else Coupling(held_out)
        table = held_out.table(cost.shape, model.rows, model.columns)
        if table.allowed is not None:
            cost = np.where(table.allowed, cost, np.inf)
        problem = Problem(cost, table.a, table.b, epsilon=model.epsilon, rows=model.rows, columns=model.columns)
        plan = solve(problem, gradient=Implicit(), tolerance=1e-10).plan
        return log_likelihood(table.plan, plan) / float(table.plan.sum())

    def _cost_between(self, x: Any, y: Any) -> np.ndarray:
        given = self.model._inputs(self.model.x if x is None else x, self.model.y if y is None else y)
        return _costs(self.module, *given, self.model.batch)

    @property
    def warnings(self) -> list[str]:
        """What a user should know before believing the module."""
        said, model = [], self.model
        if model.batch is not None and model.columns.is_fixed:
            said.append(
                f"trained on batches of {model.batch} rows between fixed sides: each was a market of its own, whose loss is "
                "smallest elsewhere than that of all, off by the order of 1 / batch if few were observed of each cell. Go on "
                "from here on all rows: Module(fit.module, x, y).fit(data)."
            )
        if not self.converged:
            solved = "" if self.solution.converged else f", the forward problem ended as {self.solution.status.name}"
            said.append(
                f"not converged after {len(self.losses)} epochs: largest entry of the gradient {self.gradient_norm:.1e}, "
                f"tolerance {model._limit:.0e}{solved}. Go on with Module(fit.module, x, y), raise epochs, change the learning "
                "rate, or use double precision: module.double()."
            )
        return said

    def report(self) -> str:
        """What was learned, for reading."""
        n, m = self.plan.shape
        model, count = self.model, sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        observed = "an unknown number of" if self.observations is None else f"{self.observations:,.0f}"
        each = " per observation" if self.observations is None else ""
        lines = [
            f"Inverse optimal transport: {n} x {m}, {observed} observations, epsilon = {model.epsilon:g}",
            f"sides {model.rows}, {model.columns}; cost by {type(self.module).__name__} of {count:,} parameters",
            f"loss {self.loss:.6g}, log-likelihood {self.log_likelihood:.10g}, deviance {self.deviance:.6g}{each}",
            f"largest entry of the gradient {self.gradient_norm:.1e} after {len(self.losses)} epochs, "
            + ("converged" if self.converged else "not converged"),
        ]
        return "\n".join([*lines, *self.warnings])

    def __str__(self) -> str:
        return self.report()


# -- what goes into the module and what comes out ----------------------------------------------------------------------


def _input(name: str, given: Any, like: Tensor) -> Tensor:
    """A tensor where the module is; floating numbers in its precision, whole ones as they are."""
    if isinstance(given, Tensor):
        tensor = given.detach()
    else:
        array = np.array(given)
        try:
            array = array.astype(np.float64) if array.dtype.kind not in "biuf" else array
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: must be numbers. Are there strings or missing cells in it? Types that have names may be given as whole "
                f"numbers. ({error})"
            ) from error
        tensor = torch.as_tensor(array)
    if tensor.ndim == 0 or not len(tensor):
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}: the first dimension must be its rows, at least one.")
    if not tensor.is_floating_point():
        return tensor.to(like.device)
    if not bool(tensor.isfinite().all()):
        where = tuple((~tensor.isfinite()).nonzero()[0].tolist())
        raise ValueError(
            f"{name}{list(where)} = {float(tensor[where])}: must be finite. Is a value missing in the data?"
        )
    return tensor.to(like.device, like.dtype)


def _cost(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The module's cost in double precision, if it is one."""
    cost = module(x, y)
    shape = (len(x), len(y))
    if not isinstance(cost, Tensor) or cost.shape != shape:
        got = f"a tensor of shape {tuple(cost.shape)}" if isinstance(cost, Tensor) else f"a {type(cost).__name__}"
        raise ValueError(
            f"the module returned {got} for {shape[0]} rows and {shape[1]} columns: it must be the cost of every row with every "
            f"column, shape {shape}. Is a dimension of 1 left over, or are rows paired with columns one by one?"
        )
    bad = ~cost.detach().isfinite()
    if bool(bad.any()):
        i, j = bad.nonzero()[0].tolist()
        raise ValueError(
            f"the module's cost[{i}, {j}] = {cost[i, j].item()}, and {int(bad.sum())} of {bad.numel()} are not finite: they must "
            "be. Usually the learning rate is too large, or a root, a logarithm or a quotient in the module meets 0. A match "
            "that is impossible belongs in Coupling(mask=)."
        )
    if torch.is_grad_enabled() and not cost.requires_grad:
        raise ValueError(
            "the module's cost does not depend on a parameter in a way that autograd can follow: was it detached, or made by "
            "NumPy?"
        )
    return cost.double()


def _costs(module: nn.Module, x: Tensor, y: Tensor, batch: int | None = None) -> np.ndarray:
    """The same without a history, some rows at a time."""
    with torch.no_grad():
        return torch.cat([_cost(module, x[rows], y) for rows in _slices(len(x), batch)]).cpu().numpy()


def _slices(count: int, batch: int | None) -> Iterator[slice]:
    step = count if batch is None else batch
    return (slice(first, first + step) for first in range(0, count, step))


def _largest(parameters: list[nn.Parameter]) -> float:
    """Largest entry of the gradient; 0 for parameters that the loss does not depend on."""
    sizes = [float(p.grad.abs().max()) for p in parameters if p.grad is not None and p.numel()]
    if not all(map(math.isfinite, sizes)):
        raise ValueError(
            "the gradient in the module's parameters is not finite, although its cost is. Usually a root or a norm in the module "
            "has its kink where two points agree: add a small number under the root, or square the distance. Otherwise the "
            "learning rate is too large."
        )
    return max(sizes, default=0.0)
