"""What a solve returns: everything but the potentials computed when first looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iotsolve.certificate import Certificate, certify
from iotsolve.costs import Dense, calm
from iotsolve.distributed import Alone, Ranks, Sharded, ranks_of
from iotsolve.gradient import (
    Envelope,
    Gradient,
    Gradients,
    Implicit,
    as_leaves,
    gradients,
    linear,
    streamable,
    streamed_marginals,
    streamed_parts,
)
from iotsolve.kernels.precision import product
from iotsolve.kernels.uncompiled import uncompiled
from iotsolve.marginals import number
from iotsolve.plans import Plan, in_batch, plan_of, streams
from iotsolve.problem import Potentials, Problem, in_double, log_scaling
from iotsolve.solver import Status
from iotsolve.watch import Watch

__all__ = ["Solution", "SolveError"]


def _remembered(make: Callable[[Solution], Any]) -> property:
    """As ``cached_property``, but what was made where autograd does not look, for a log perhaps, is made again where it does."""
    name, make = f"_made{make.__name__}", uncompiled(make)

    @wraps(make)
    def read(self: Solution) -> Any:
        followed = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        was_followed, made = self.__dict__.get(name, (None, None))
        if was_followed is None or followed > was_followed:
            made = make(self)
            self.__dict__[name] = followed, made
        return made

    return property(read)


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
    found: Potentials
    status: Any
    steps: Any
    differentiation: Gradient
    exact_plan: Tensor | None = None
    tolerance: float | None = None
    watch: Watch = field(default=Watch(), repr=False, compare=False)
    excess: Tensor | None = field(default=None, repr=False, compare=False)
    """Of the potentials, as in an :class:`Outcome`."""

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

    @property
    def value(self) -> Any:
        """Optimal objective, entropy and penalties included, shape ``(...)``."""
        return self._given(self._value)

    @_remembered
    def _value(self) -> Tensor:
        self.watch.check()
        return self.differentiation.value(self.problem, self.found, self._given_plan, self.excess)

    def _given(self, x: Tensor) -> Any:
        """Numbers and vectors as the caller is to have them: in memory of their own, to do with as one likes."""
        return self.problem.leave(x.clone())

    @_remembered
    def _live(self) -> Potentials:
        self.watch.check()
        return self.differentiation.potentials(self.problem, self.found)

    @property
    def potentials(self) -> Potentials:
        """``f``, ``g`` and ``mass_multiplier`` as tensors: for ``init``, ``certify`` and :meth:`Problem.plan`."""
        return self._live

    @property
    def f(self) -> Any:
        """Potentials of the rows, shape ``(..., n)``, cost units."""
        return self._given(self._live.f)

    @property
    def g(self) -> Any:
        """Potentials of the columns, shape ``(..., m)``, cost units."""
        return self._given(self._live.g)

    @property
    def mass_multiplier(self) -> Any:
        """Multiplier ``lam`` of ``mass``, shape ``(...)``; 0 without it."""
        return self._given(self._live.lam)

    @property
    def _plan(self) -> Tensor:
        """All of the plan, made once; and again if somebody has changed it in place."""
        kept = self._kept
        if kept[0] is None or (kept[1] is not None and kept[0]._version != kept[1]):
            plan = self._made()
            kept[:] = plan, None if plan.is_inference() else plan._version
        return kept[0]

    @_remembered
    def _kept(self) -> list[Any]:
        """The plan and its version, or nothing yet."""
        return [None, None]

    @uncompiled
    def _made(self) -> Tensor:
        self.watch.check()
        if self.exact_plan is not None:
            plan = self.exact_plan.to(self.found.f.dtype, copy=True)
            plan = plan.to_dense() if plan.is_sparse else plan
            return self.differentiation.plan(self.problem, plan.reshape(self.problem.shape))
        problem, p = self.problem, self._live
        with calm(problem.cost):
            if p.f.dtype == problem.working_dtype or p.f.requires_grad:
                return problem.to(p.f.dtype).plan(p)
            plan = p.f.new_empty(problem.shape, dtype=problem.dtype)  # no copies in float64 of what is rounded in the end
            for rows, block in in_double(problem).plan_blocks(p):
                plan[..., rows, :] = block
            return plan

    @_remembered
    def _read(self) -> Plan | None:
        """The plan to be read without holding it, where it is large and nothing but the value is to be differentiated."""
        self.watch.check()
        sparse = self.exact_plan is not None and self.exact_plan.is_sparse
        never_held = not isinstance(self.problem.cost, Dense) and self.exact_plan is None
        if not sparse and not (never_held and isinstance(self.differentiation, Envelope)):
            return None
        dtype = torch.float64 if streams(self.problem.cost) and not sparse else self.found.f.dtype
        flat = self.problem.detach().to(dtype).flat()
        frozen = zip(self._frozen, (flat.a, flat.b, flat.a[:, 0]), strict=True)
        p = Potentials(*(x.reshape(y.shape).to(dtype) for x, y in frozen))
        return plan_of(flat, p, in_batch(self._given_plan) if sparse else None)

    @property
    def _given_plan(self) -> Tensor | None:
        """The plan of a solver that has one, in the precision of the data: its certificate is that of the plan in float64."""
        return None if self.exact_plan is None else self.exact_plan.to(self.found.f.dtype)

    @property
    def _frozen(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.found.f, self.found.g, self.found.lam

    @_remembered
    def _streamed(self) -> tuple[Problem, Potentials, Ranks | Alone] | None:
        """What a plan is made of that need not be held to be differentiated, and who has a share in it; None of other plans."""
        self.watch.check()
        if self.exact_plan is not None or isinstance(self.problem.cost, Dense):
            return None
        ranks = ranks_of(self.problem.cost)
        if isinstance(self.differentiation, Envelope):
            return (self.problem.to(self.found.f.dtype), self.found, ranks) if streams(self.problem.cost) else None
        twin = streamable(self.problem.to(torch.float64), self.found.to(torch.float64))
        if twin is None:
            return None
        live = self._live
        return twin, Potentials(*(ranks.shared(x.double()) for x in (live.f, live.g, live.lam))), ranks

    @_remembered
    def _marginals(self) -> tuple[Tensor, Tensor]:
        """Those of a plan that is held, or of one that need not be."""
        if self._streamed is None:
            return self._plan.sum(-1), self._plan.sum(-2)
        problem, p, ranks = self._streamed
        with calm(problem.cost):
            r, c = streamed_marginals(problem, p)
        whole = zip((ranks.whole(r), ranks.total(c)), (self.problem.a, self.problem.b), strict=True)
        r, c = ((x.reshape(weights.shape), weights > 0) for x, weights in whole)
        # at an empty bin 0, of which only the derivative was asked
        return tuple(torch.where(filled, x, x - x.detach()) for x, filled in (r, c))

    @uncompiled
    def _of_plan(self, of_dense: Any, of_read: Any, *shape: int) -> Any:
        self.watch.check()
        if self._read is None:
            return self._given(of_dense())
        with calm(self.problem.cost), torch.no_grad():
            found = of_read(self._read).reshape((*self.problem.batch_shape, *shape)).to(self.found.f.dtype)
        return self._given(self.differentiation.plan(self.problem, found))

    @property
    def plan(self) -> Any:
        """Optimal plan, shape ``(..., n, m)``: all of it, also where the cost is :class:`Points`. An array of NumPy is not to be
        written to, since other outputs are made of it: change a copy.
        """
        plan = self.problem.leave(self._plan)
        if isinstance(plan, np.ndarray):
            plan.flags.writeable = False
        return plan

    @property
    def sparse_plan(self) -> Any:
        """The plan's positive entries, without a batch: a SciPy COO array, or a sparse torch tensor."""
        if self.problem.batch_shape:
            raise ValueError(
                f"sparse_plan of a batch of shape {self.problem.batch_shape}: sparse arrays have two dimensions. "
                "Take the plan, or solve the problems one by one."
            )
        plan = self._plan if self.exact_plan is None else self.exact_plan.to(self.found.f.dtype, copy=True)
        plan = plan.detach().to_sparse().coalesce()
        if not self.problem.as_numpy:
            return plan
        from scipy.sparse import coo_array

        (i, j), values = plan.indices().numpy(), plan.values().numpy()
        return coo_array((values, (i, j)), shape=tuple(plan.shape))

    @uncompiled
    def apply(self, values: Any, *, axis: int = -1) -> Any:
        """The plan times a matrix: ``P V`` of ``V`` with a row for every column of the problem, or with ``axis=-2`` ``P' V``.

        What the columns have, carried to the rows: divided by the row marginal it is a mean, of points the barycentric
        projection, of labels a transfer. Of :class:`iotsolve.Points` that are scalar products at heart the plan is read in
        blocks, in memory O((n + m) (d + k)), as are the derivatives, which there are of any order in ``V``, and in the
        problem's data as the choice of ``gradient`` has them. With :class:`iotsolve.distributed.Sharded` rows, ``P V`` has this
        rank's rows, a loss of which is its share of the whole one, and ``P' V`` takes this rank's and is whole on every rank.

        Args:
            values: shape ``(..., m)`` or ``(..., m, k)``; with ``axis=-2`` ``(..., n)`` or ``(..., n, k)``.
            axis: the axis of the plan that is summed over.

        Returns:
            Shape ``(..., n)`` or ``(..., n, k)``; with ``axis=-2`` with ``m`` for ``n``.

        Raises:
            ValueError: on values of another shape or an axis other than -1 and -2.

        Example:
            >>> from iotsolve import Points, Problem, solve
            >>> x, y = np.array([[0.0], [1.0]]), np.array([[5.0], [7.0]])
            >>> solution = solve(Problem(Points(x, y)))
            >>> solution.apply(y) / solution.row_marginal[:, None]
            array([[5.],
                   [7.]])
        """
        self.watch.check()
        given, single = self._operand(values, axis)
        with calm(self.problem.cost):
            if self._streamed is not None:
                found = self._streamed_product(given, axis)
            elif self._read is not None:
                flat = given.reshape(-1, *given.shape[-2:])
                found = linear(self._read, flat.to(self._read.problem.dtype), axis)
                found = found.reshape(*given.shape[:-2], *found.shape[-2:])
            else:
                plan = self._plan if axis == -1 else self._plan.mT
                found = product(plan, given.to(plan.dtype))
        if isinstance(self.differentiation, Envelope):
            found = self.differentiation.plan(self.problem, found)
        return self.problem.leave(found.squeeze(-1) if single else found)

    def _streamed_product(self, values: Tensor, axis: int) -> Tensor:
        problem, p, ranks = self._streamed
        points, (a, f), (b, g), eps = streamed_parts(problem, p)
        values = values.reshape(-1, values.shape[-1]).to(p.f.dtype)
        values = ranks.shared(values) if axis == -1 else values
        found = points.plan_times(log_scaling(a, f, eps), log_scaling(b, g, eps), values, eps, axis=axis)
        found = found if axis == -1 else ranks.total(found)
        return found.reshape(*self.problem.batch_shape, *found.shape)

    def _operand(self, values: Any, axis: int) -> tuple[Tensor, bool]:
        """Values as a matrix, and whether they came as a vector."""
        if axis not in (-1, -2):
            raise ValueError(
                f"axis = {axis!r}: must be -1, which sums over columns and gives P V, or -2, which sums over rows and gives P' V."
            )
        cost, batch = self.problem.cost, tuple(self.problem.batch_shape)
        n, m = (cost.local if isinstance(cost, Sharded) else cost).shape[-2:]
        size = m if axis == -1 else n
        try:
            given = values if isinstance(values, Tensor) else np.require(values, requirements="W")
            given = torch.as_tensor(given, device=cost.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"values = {values!r}: must be an array of real numbers.") from error
        if given.is_complex():
            raise ValueError(f"values are complex ({given.dtype}): must be real. Take real and imaginary part one by one.")
        given = given if given.is_floating_point() else given.to(self.problem.dtype)
        single = tuple(given.shape) == (*batch, size)
        if not single and (given.dim() != len(batch) + 2 or tuple(given.shape[:-1]) != (*batch, size)):
            raise ValueError(
                f"values has shape {tuple(given.shape)}: must be {(*batch, size)}, or that and a number of columns, for axis = "
                f"{axis} of a plan of shape {tuple(self.problem.shape)}. Is it meant for the other axis?"
            )
        return given.unsqueeze(-1) if single else given, single

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
        if self._streamed is not None:
            problem, p, ranks = self._streamed
            points, (a, f), (b, g), eps = streamed_parts(problem, p)
            with calm(points):
                spent = points.transport(log_scaling(a, f, eps), log_scaling(b, g, eps), eps)
            return ranks.total(spent).reshape(self.problem.batch_shape)
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
        self.watch.check()
        with torch.enable_grad():
            plan = None if self.exact_plan is None else self.exact_plan.double()
            p = self.found.detach().to(torch.float64)
            twin = replace(
                self, problem=as_leaves(self.problem), found=p, exact_plan=plan, differentiation=Implicit()
            )
            output = getattr(twin, of)
            weights = _weights(of, weights, output)
            # a potential of +inf, at a bin that nothing can reach, is constant
            return gradients((weights * torch.where(output.isfinite(), output, 0.0)).sum(), twin.problem)

    @cached_property
    def certificate(self) -> Certificate:
        """Bounds and errors, float64, from the problem and the potentials alone."""
        self.watch.check()
        p = self.found
        return certify(self.problem, p.f, p.g, p.lam, plan=self.exact_plan, tolerance=self.tolerance)

    def __repr__(self) -> str:
        n, m = self.problem.shape[-2:]
        if not isinstance(self.status, Status):
            return f"Solution({np.size(self.status)} problems of {n} x {m}: {int(np.sum(self.converged))} converged)"
        try:
            value = f"value {number(self.value):.6g}"
        except ValueError:  # who looks at a solution in a debugger is not to be told off
            value = "of data that were changed since"
        return f"Solution({n} x {m}, {value}, {self.status.name} in {self.steps} steps)"


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
