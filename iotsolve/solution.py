"""What a solve returns, and how right it is.

The certificate is computed in float64 from the problem and the potentials alone, by code no solver uses: weak duality puts
the optimal value between ``dual`` and ``primal``, whoever found the potentials and however.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iotsolve.costs import calm
from iotsolve.gradient import Gradient, Gradients, Implicit, as_leaves, gradients
from iotsolve.marginals import number
from iotsolve.newton import DualSystem
from iotsolve.problem import Potentials, Problem
from iotsolve.solver import Status
from iotsolve.validation import default_tolerance

__all__ = ["Certificate", "Solution", "SolveError", "certify"]


@dataclass(frozen=True)
class Certificate:
    """Bounds of the optimal value and the errors of the plan; float64, NumPy arrays where the problem has a batch.

    Attributes:
        primal: objective of a feasible plan (the plan, rounded onto its constraints); ``inf`` if none was found.
        dual: objective of the potentials, repaired into the dual's domain; ``dual <= optimal value <= primal``.
        gap: ``primal - dual``, summed from non-negative terms without cancellation.
        scale: sum of the absolute terms of the dual: what the gap is large or small against.
        rounding: what sums of terms of this size, in the problem's own dtype, can be off by; a smaller gap says nothing.
        row_violation: L1 distance of the unrounded row marginal from what a hard side allows; 0 on a soft side.
        column_violation: the same for the columns.
        mass_violation: distance of the total from ``mass``; 0 without it.
        mismatch: by how much the totals asked for differ, by the rounding of the weights; no plan can violate less.
        mass: total mass of the plan.
        tolerance: relative error that counts as certified.
    """

    primal: Any
    dual: Any
    gap: Any
    scale: Any
    rounding: Any
    row_violation: Any
    column_violation: Any
    mass_violation: Any
    mismatch: Any
    mass: Any
    tolerance: float

    @property
    def relative_gap(self) -> Any:
        """``gap / scale``."""
        return _ratio_or_infinity(self.gap, self.scale)

    @property
    def relative_violation(self) -> Any:
        """Sum of the violations, less what the mismatch makes unavoidable, over the mass of the plan."""
        total = np.asarray(self.row_violation + self.column_violation + self.mass_violation)
        return _ratio_or_infinity(np.maximum(total - 2 * self.mismatch, 0.0), self.mass)

    @property
    def holds(self) -> Any:
        """True where gap and violations are both within tolerance, or the gap within rounding."""
        close = np.asarray(self.gap) <= np.maximum(self.tolerance * np.asarray(self.scale), self.rounding)
        return close[()] & np.isfinite(self.gap) & (self.relative_violation <= self.tolerance)

    def __str__(self) -> str:
        if np.ndim(self.gap):
            worst = np.max(self.relative_gap)
            return f"{int(np.sum(self.holds))} of {np.size(self.holds)} certified, worst relative gap {worst:.1e}"
        verdict = "certified" if self.holds else "NOT certified"
        return (
            f"{verdict}: {self.dual:.12g} <= optimal value <= {self.primal:.12g} (gap {self.gap:.1e}), "
            f"violations rows {self.row_violation:.1e}, columns {self.column_violation:.1e}, mass {self.mass_violation:.1e}"
        )


def _ratio_or_infinity(error: Any, size: Any) -> Any:
    """``error / size``; 0 where there is no error, ``inf`` where it is not to be had."""
    error, size = np.broadcast_arrays(error, size)
    sound = (size > 0) & np.isfinite(error) & np.isfinite(size)
    return np.divide(error, size, out=np.where(error == 0, 0.0, np.inf), where=sound)[()]


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
        return np.vectorize(lambda s: s is Status.CONVERGED, otypes=[bool])(self.status)

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
            return self.differentiation.plan(self.problem, self.exact_plan)
        working = self.problem if self.problem.dtype == self._live.f.dtype else self.problem.to(self._live.f.dtype)
        with calm(working.cost.dense()):
            return working.plan(self._live)

    @property
    def plan(self) -> Any:
        """Optimal plan, shape ``(..., n, m)``."""
        return self.problem.leave(self._plan)

    @property
    def row_marginal(self) -> Any:
        """``P 1``, shape ``(..., n)``."""
        return self.problem.leave(self._plan.sum(-1))

    @property
    def column_marginal(self) -> Any:
        """``P' 1``, shape ``(..., m)``."""
        return self.problem.leave(self._plan.sum(-2))

    @property
    def mass(self) -> Any:
        """Total mass of the plan, shape ``(...)``."""
        return self.problem.leave(self._plan.sum((-2, -1)))

    @property
    def transport_cost(self) -> Any:
        """``<C, P>``: the part of the value that is transport, shape ``(...)``."""
        cost = self.problem.cost.dense()
        finite = torch.where(cost.isfinite(), cost, 0.0)  # inside: 0 * inf would be NaN in the gradient
        return self.problem.leave((finite * self._plan).sum((-2, -1)))

    def gradient(self, of: str = "value", weights: Any = None) -> Gradients:
        """Derivatives of one output, or of a weighted sum of its entries, in every datum: autograd for NumPy users.

        Exact at convergence, by the envelope theorem for the value and the implicit function theorem for the rest.

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


def certify(
    problem: Problem, f: Any, g: Any, lam: Any = 0.0, *, plan: Any = None, tolerance: float | None = None
) -> Certificate:
    """Certificate of anybody's potentials: ours, another library's, a guess.

    Args:
        problem: the problem they are meant to solve.
        f: potentials of the rows, shape ``(..., n)``, cost units. Projected into the dual's domain first.
        g: potentials of the columns, shape ``(..., m)``.
        lam: multiplier of ``mass``, shape ``(...)``.
        plan: needed at ``epsilon = 0`` only, where potentials do not determine a plan.
        tolerance: relative error that counts as certified; by default what the problem's dtype allows.

    Example:
        >>> import numpy as np
        >>> from iotsolve import Problem, certify
        >>> problem = Problem(np.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.5)
        >>> bool(certify(problem, np.zeros(2), np.zeros(2)).gap > 0)
        True
    """
    with calm(problem.cost.dense()), torch.no_grad():
        return _certify(problem, f, g, lam, plan, tolerance)


def _certify(problem: Problem, f: Any, g: Any, lam: Any, plan: Any, tolerance: float | None) -> Certificate:
    double = problem.detach().to(torch.float64).flat()
    n, m = problem.shape[-2:]

    def enter(name: str, x: Any, *shape: int) -> Tensor:
        x = problem.enter(name, x, *shape).detach().double()
        return x.expand((*problem.batch_shape, *shape)).reshape(-1, *shape)

    f, g = double.rows.project(enter("f", f, n)), double.columns.project(enter("g", g, m))
    p = Potentials(f, g, enter("lam", lam))
    if problem.is_exact:
        p = _repair(double, p)
        plan = double.a.new_zeros(double.shape) if plan is None else enter("plan", plan, n, m)
    else:
        plan = double.plan(p)
    r, c = plan.sum(-1), plan.sum(-2)
    rows, columns, mass = double.violations(r, c)
    known = ~(p.f.isnan().any(-1) | p.g.isnan().any(-1) | p.lam.isnan())
    dual = torch.where(known, double.dual_at(p), -math.inf)
    rounded, feasible, gap = _round(double, plan, p)
    sane = dual.isfinite() & gap.isfinite()
    gap = torch.where(feasible & sane, gap.clamp(min=0.0), math.inf)
    # dual + gap has the better digits near the optimum, and none where the gap dwarfs the value it should lead back to
    close = sane & (gap <= 1e-6 * dual.abs())
    primal = torch.where(feasible, torch.where(close, dual + gap, double.primal_at(rounded)), math.inf)
    entropy = torch.zeros_like(dual) if problem.is_exact else double.dual_entropy(p)
    scale = double.dual_scale(p) + entropy.abs()
    rounding_error = 4 * torch.finfo(problem.working_dtype).eps * (scale + double.magnitude(r.sum(-1)))
    numbers = (primal, dual, gap, scale, rounding_error, rows, columns, mass, double.mismatch(), r.sum(-1))
    as_arrays = [x.reshape(problem.batch_shape).cpu().numpy()[()] for x in numbers]
    return Certificate(*as_arrays, tolerance=default_tolerance(problem.dtype) if tolerance is None else tolerance)


def _gap(problem: Problem, plan: Tensor, rounded: Tensor, p: Potentials) -> Tensor:
    """``primal(rounded) - dual``: at epsilon > 0 ``eps KL(rounded | plan)`` and the sides' terms.

    Where the plan of the potentials has underflowed, its logarithm has not.
    """
    if problem.is_exact:
        return problem.duality_gap(rounded, p)
    there = plan > 0
    change = torch.where(there, rounded / torch.where(there, plan, 1.0) - 1.0, 0.0)
    near = (plan * _change_cost(change)).sum((-2, -1))
    added = (~there & (rounded > 0)).flatten(-2).any(-1)
    if added.any():
        far = rounded * (rounded.log() - problem.log_plan(p)) - rounded
        near = near + torch.where(~there & (rounded > 0), far, 0.0).sum((-2, -1))
    return problem.epsilon * near + problem.side_gaps(rounded.sum(-1), rounded.sum(-2), p)


def _change_cost(x: Tensor) -> Tensor:
    """``(1 + x) log(1 + x) - x``: what a relative change of an entry costs in KL; no cancellation near 0."""
    return torch.where(x > -1, (1 + x) * torch.log1p(torch.where(x > -1, x, 0.0)), 0.0) - x


def _repair(problem: Problem, p: Potentials) -> Potentials:
    """Dual-feasible potentials at epsilon = 0, never worse than those given: lower f to its c-transform where it is too high."""
    ceiling = problem.cost.reduced_min(p.g + p.lam.unsqueeze(-1), problem.b, axis=-1)
    f = torch.where(problem.a > 0, torch.minimum(p.f, ceiling), p.f)
    low = f < problem.rows.project(f)  # where the domain forbids so low a potential, the columns give way
    f = problem.rows.project(f)
    ceiling = problem.cost.reduced_min(f + p.lam.unsqueeze(-1), problem.a, axis=-2)
    g = torch.where((problem.b > 0) & low.any(-1, keepdim=True), torch.minimum(p.g, ceiling), p.g)
    return Potentials(f, problem.columns.project(g), p.lam)


def _round(problem: Problem, plan: Tensor, p: Potentials) -> tuple[Tensor, Tensor, Tensor]:
    """A feasible plan near ``plan`` on the same support, whether it was found, and its gap; the better of two.

    ``P o (1 + u + v)`` with the marginals the potentials ask for costs second order in the violation; alternating scalings
    onto the hard sides do what is left, and serve alone where a bound is nearly but not quite active. The rank-one fill of
    Altschuler, Weed, Rigollet (NeurIPS 2017) is for fixed sides that those did not reach.
    """
    fixed = problem.rows.is_fixed and problem.columns.is_fixed and problem.mass is None
    starts = [_linear_correction(problem, plan, p)] if fixed else [plan]
    hard = problem.rows.is_hard or problem.columns.is_hard or problem.mass is not None
    if hard and not fixed and not _exactly(problem, plan).all():
        starts.append(_linear_correction(problem, plan, p))
    best = None
    for start in starts:
        rounded = _scale_onto(problem, start)
        rounded = _fill(problem, rounded) if fixed else rounded
        feasible, gap = _feasible(problem, rounded), _gap(problem, plan, rounded, p)
        if best is None:
            best = rounded, feasible, gap
            continue
        better = feasible & (~best[1] | ~(best[2] <= gap))
        best = (
            torch.where(better[..., None, None], rounded, best[0]),
            feasible | best[1],
            torch.where(better, gap, best[2]),
        )
    return best


def _feasible(problem: Problem, plan: Tensor) -> Tensor:
    return _off(problem, plan) <= 1e-12 * torch.maximum(problem.a.sum(-1), problem.b.sum(-1)) + 2 * problem.mismatch()


def _exactly(problem: Problem, plan: Tensor) -> Tensor:
    return _off(problem, plan) <= _TINY * torch.maximum(problem.a.sum(-1), problem.b.sum(-1))


_TINY = 1e-14  # relative violation of a plan that is as feasible as float64 sums can say


def _off(problem: Problem, plan: Tensor) -> Tensor:
    return sum(problem.violations(plan.sum(-1), plan.sum(-2)))


def _linear_correction(problem: Problem, plan: Tensor, p: Potentials) -> Tensor:
    r, c = plan.sum(-1), plan.sum(-2)
    pinned_rows = (r > 0) & problem.rows.pinned(r, p.f, problem.a)
    pinned_columns = (c > 0) & problem.columns.pinned(c, p.g, problem.b)
    system = DualSystem(plan, r, c, pinned_rows, pinned_columns, problem.mass is not None)
    missing = problem.rows.target(r, p.f, problem.a) - r, problem.columns.target(c, p.g, problem.b) - c
    lacking = torch.zeros_like(p.lam) if problem.mass is None else problem.mass - r.sum(-1)
    u, v, w = system.solve(*missing, lacking, enough=0.1 * torch.finfo(torch.float64).eps * r.sum(-1))
    factor = 1 + u.unsqueeze(-1) + v.unsqueeze(-2) + w[..., None, None]
    sound = (factor.isfinite() & ((factor > 0) | (plan == 0))).flatten(-2).all(-1)
    return torch.where(sound[..., None, None], plan * factor, plan)


def _scale_onto(problem: Problem, plan: Tensor, *, max_steps: int = 100) -> Tensor:
    """Alternate the KL projections onto the rows', the columns' and the mass's constraint until all hold."""
    for _ in range(max_steps):
        if _exactly(problem, plan).all():
            break
        for side, weights, axis in ((problem.rows, problem.a, -1), (problem.columns, problem.b, -2)):
            if side.is_hard:
                have = plan.sum(axis)
                plan = plan * _ratio(side.allowed(have, weights), have).unsqueeze(axis)
        if problem.mass is not None:
            plan = (
                plan
                * _ratio(torch.full_like(problem.a[..., 0], number(problem.mass)), plan.sum((-2, -1)))[..., None, None]
            )
    return plan


def _fill(problem: Problem, plan: Tensor) -> Tensor:
    """Scale down to at most the marginals, then add the missing rank-one piece if it meets no forbidden arc."""
    target_r = problem.rows.allowed(plan.sum(-1), problem.a)
    target_c = problem.columns.allowed(plan.sum(-2), problem.b)
    smaller = plan * _ratio(target_r, plan.sum(-1)).clamp(max=1.0).unsqueeze(-1)
    smaller = smaller * _ratio(target_c, smaller.sum(-2)).clamp(max=1.0).unsqueeze(-2)
    lack_r, lack_c = (target_r - smaller.sum(-1)).clamp(min=0), (target_c - smaller.sum(-2)).clamp(min=0)
    total = lack_r.sum(-1)
    piece = lack_r.unsqueeze(-1) * lack_c.unsqueeze(-2) / torch.where(total > 0, total, 1.0)[..., None, None]
    forbidden = ((piece > 0) & ~problem.cost.dense().isfinite()).flatten(-2).any(-1)
    small = _off(problem, plan) <= 1e-13 * problem.a.sum(-1)
    return torch.where((forbidden | small)[..., None, None], plan, smaller + piece)


def _ratio(want: Tensor, have: Tensor) -> Tensor:
    return torch.where(have > 0, want / torch.where(have > 0, have, 1.0), 1.0)
