"""What a solve returns: everything but the potentials computed when first looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iotsolve.certificate import Certificate, certify
from iotsolve.costs import Dense, Points, calm
from iotsolve.gradient import (
    Envelope,
    Gradient,
    Gradients,
    Implicit,
    as_leaves,
    can_stream,
    gradients,
    streamed_marginals,
)
from iotsolve.plans import Plan, in_batch, plan_of
from iotsolve.problem import Potentials, Problem
from iotsolve.solver import Status

__all__ = ["Solution", "SolveError"]


class SolveError(RuntimeError):
    """A solve that did not converge, with everything known about it.

    Attributes:
        status: the :class:`Status` (of the first failed problem in a batch).
        solution: the unconverged :class:`Solution`, with its certificate.
    """

    def __init__(self, status: Status, solution: Solution) -> None:
        self.status, self.solution = status, solution
        super().__init__(
            f"{status.value}\n{solution.certificate}\nPass throw=False to get this solution with its status instead."
        )

    @property
    def certificate(self) -> Certificate:
        return self.solution.certificate


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of :func:`iotsolve.solve`. Everything but the potentials is computed when first looked at.

    NumPy came in, NumPy goes out; a torch cost gives tensors on its device and in its dtype, and what may be differentiated
    is decided by ``differentiation``, the choice made at the solve.
    """

    problem: Problem
    potentials: Potentials
    status: Any
    steps: Any
    differentiation: Gradient
    exact_plan: Tensor | None = None
    tolerance: float | None = None

    @property
    def converged(self) -> Any:
        """Whether each problem ended in ``Status.CONVERGED``."""
        if isinstance(self.status, Status):
            return self.status is Status.CONVERGED
        return np.equal(self.status, Status.CONVERGED).astype(bool)

    @property
    def all_converged(self) -> bool:
        """Whether every problem did."""
        return self.status is Status.CONVERGED if isinstance(self.status, Status) else bool(self.converged.all())

    @cached_property
    def value(self) -> Any:
        """Optimal objective, entropy and penalties included, shape ``(...)``."""
        return self.problem.leave(self.differentiation.value(self.problem, self.potentials, self.exact_plan))

    @cached_property
    def _live(self) -> Potentials:
        return self.differentiation.potentials(self.problem, self.potentials)

    @property
    def f(self) -> Any:
        """Potentials of the rows, shape ``(..., n)``, cost units."""
        return self.problem.leave(self._live.f)

    @property
    def g(self) -> Any:
        """Potentials of the columns, shape ``(..., m)``, cost units."""
        return self.problem.leave(self._live.g)

    @property
    def mass_multiplier(self) -> Any:
        """Multiplier ``lam`` of ``mass``, shape ``(...)``; 0 without it."""
        return self.problem.leave(self._live.lam)

    @cached_property
    def _plan(self) -> Tensor:
        if self.exact_plan is not None:
            dense = self.exact_plan.to_dense() if self.exact_plan.is_sparse else self.exact_plan
            return self.differentiation.plan(self.problem, dense)
        working = self.problem if self.problem.dtype == self._live.f.dtype else self.problem.to(self._live.f.dtype)
        with calm(working.cost):
            return working.plan(self._live)

    @cached_property
    def _read(self) -> Plan | None:
        """The plan to be read without holding it, where it is large and nothing but the value is to be differentiated."""
        sparse = self.exact_plan is not None and self.exact_plan.is_sparse
        streams = not isinstance(self.problem.cost, Dense) and self.exact_plan is None
        if not sparse and not (streams and isinstance(self.differentiation, Envelope)):
            return None
        flat = self.problem.detach().to(self.potentials.f.dtype).flat()
        p = Potentials(*(x.reshape(y.shape) for x, y in zip(self._frozen, (flat.a, flat.b, flat.a[:, 0]), strict=True)))
        return plan_of(flat, p, in_batch(self.exact_plan) if sparse else None)

    @property
    def _frozen(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.potentials.f, self.potentials.g, self.potentials.lam

    @cached_property
    def _marginals(self) -> tuple[Tensor, Tensor]:
        """Those of a plan that is held, or of points, whose plan need not be to be differentiated."""
        working, batch = self.problem.to(self._live.f.dtype), self.problem.batch_shape
        if isinstance(self.problem.cost, Points) and self.exact_plan is None and can_stream(working):
            with calm(working.cost):
                return tuple(x.reshape(*batch, -1) for x in streamed_marginals(working, self._live))
        return self._plan.sum(-1), self._plan.sum(-2)

    def _of_plan(self, of_dense: Any, of_read: Any, *shape: int) -> Any:
        if self._read is None:
            return self.problem.leave(of_dense())
        with calm(self.problem.cost), torch.no_grad():
            found = of_read(self._read).reshape((*self.problem.batch_shape, *shape))
        return self.problem.leave(self.differentiation.plan(self.problem, found))

    @property
    def plan(self) -> Any:
        """Optimal plan, shape ``(..., n, m)``: all of it, also where the cost is :class:`Points`."""
        return self.problem.leave(self._plan)

    @property
    def sparse_plan(self) -> Any:
        """The plan's positive entries, without a batch: a SciPy COO array, or a sparse torch tensor."""
        if self.problem.batch_shape:
            raise ValueError(
                f"sparse_plan of a batch of shape {self.problem.batch_shape}: sparse arrays have two dimensions. "
                "Take the plan, or solve the problems one by one."
            )
        plan = (self._plan if self.exact_plan is None else self.exact_plan).detach().to_sparse().coalesce()
        if not self.problem.as_numpy:
            return plan
        from scipy.sparse import coo_array

        (i, j), values = plan.indices().numpy(), plan.values().numpy()
        return coo_array((values, (i, j)), shape=tuple(plan.shape))

    @property
    def row_marginal(self) -> Any:
        """``P 1``, shape ``(..., n)``."""
        return self._of_plan(lambda: self._marginals[0], lambda plan: plan.marginals()[0], self.problem.shape[-2])

    @property
    def column_marginal(self) -> Any:
        """``P' 1``, shape ``(..., m)``."""
        return self._of_plan(lambda: self._marginals[1], lambda plan: plan.marginals()[1], self.problem.shape[-1])

    @property
    def mass(self) -> Any:
        """Total mass of the plan, shape ``(...)``."""
        return self._of_plan(lambda: self._marginals[0].sum(-1), lambda plan: plan.marginals()[0].sum(-1))

    @property
    def transport_cost(self) -> Any:
        """``<C, P>``: the part of the value that is transport, shape ``(...)``."""
        return self._of_plan(self._spent, lambda plan: plan.sum(lambda chunk: _spent(chunk.values, chunk.cost)))

    def _spent(self) -> Tensor:
        cost = self.problem.cost.dense()
        finite = torch.where(cost.isfinite(), cost, 0.0)  # inside: 0 * inf would be NaN in the gradient
        return (finite * self._plan).sum((-2, -1))

    def gradient(self, of: str = "value", weights: Any = None) -> Gradients:
        """Derivatives of one output, or of a weighted sum of its entries, in every datum: autograd for NumPy users.

        Exact at convergence, by the envelope theorem for the value and the implicit function theorem for the rest. These err
        with the plan, in first order: solve with ``gradient=Implicit()``, which asks more of the solver, or a small tolerance.

        Args:
            of: ``"value"``, ``"plan"``, ``"f"``, ``"g"``, ``"mass_multiplier"``, ``"row_marginal"``, ``"column_marginal"``,
                ``"mass"`` or ``"transport_cost"``; at ``epsilon = 0`` the value only.
            weights: finite, of the output's shape; may be left out where the output is one number per problem, and is 1.

        Raises:
            ValueError: on an unknown output, weights of another shape, or an output without a derivative.

        Example:
            >>> from iotsolve import Problem, solve
            >>> solution = solve(Problem(np.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.5))
            >>> bool(np.allclose(solution.gradient().cost, solution.plan))
            True
            >>> solution.gradient(of="plan", weights=np.eye(2)).cost.shape
            (2, 2)
        """
        if of not in _DIFFERENTIABLE:
            raise ValueError(f"of = {of!r}: no output of that name. Take one of {', '.join(_DIFFERENTIABLE)}.")
        if of != "value" and self.problem.is_exact:
            raise ValueError(
                f"of = {of!r} with epsilon = 0: the plan of a linear program is piecewise constant and has no useful "
                "derivative. Use epsilon > 0, or of='value'."
            )
        with torch.enable_grad():
            plan = None if self.exact_plan is None else self.exact_plan.double()
            p = self.potentials.detach().to(torch.float64)
            twin = replace(
                self, problem=as_leaves(self.problem), potentials=p, exact_plan=plan, differentiation=Implicit()
            )
            output = getattr(twin, of)
            weights = _weights(of, weights, output)
            # a potential of +inf, at a bin that nothing can reach, is constant
            return gradients((weights * torch.where(output.isfinite(), output, 0.0)).sum(), twin.problem)

    @cached_property
    def certificate(self) -> Certificate:
        """Bounds and errors, float64, from the problem and the potentials alone."""
        p = self.potentials
        return certify(self.problem, p.f, p.g, p.lam, plan=self.exact_plan, tolerance=self.tolerance)

    def __repr__(self) -> str:
        n, m = self.problem.shape[-2:]
        if not isinstance(self.status, Status):
            return f"Solution({np.size(self.status)} problems of {n} x {m}: {int(np.sum(self.converged))} converged)"
        return f"Solution({n} x {m}, value {float(self.value):.6g}, {self.status.name} in {self.steps} steps)"


def _spent(plan: Tensor, cost: Tensor) -> Tensor:
    return torch.where(plan > 0, torch.where(plan > 0, cost, 0.0) * plan, 0.0)


_DIFFERENTIABLE = (
    *("value", "plan", "f", "g", "mass_multiplier"),
    *("row_marginal", "column_marginal", "mass", "transport_cost"),
)


def _weights(of: str, weights: Any, output: Tensor) -> Tensor:
    if weights is None:
        if of in ("value", "mass", "mass_multiplier", "transport_cost"):
            return torch.ones_like(output)
        raise ValueError(
            f"weights = None: {of} has shape {tuple(output.shape)} and needs weights of that shape, to say which sum of its "
            "entries is differentiated."
        )
    try:
        given = torch.as_tensor(weights, dtype=output.dtype, device=output.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"weights = {weights!r}: must be an array of real numbers of {of}'s shape.") from error
    if given.shape != output.shape or not given.isfinite().all():
        raise ValueError(
            f"weights has shape {tuple(given.shape)}: must be {tuple(output.shape)}, that of {of}, and finite. "
            "Was it made for another output, or transposed?"
        )
    return given
