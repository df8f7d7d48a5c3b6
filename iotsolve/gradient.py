"""How a solution is differentiated: a choice, made at the call, and the library's only autograd functions.

``Envelope`` differentiates the value alone, exactly and for the price of one plan. ``Implicit`` differentiates everything
the potentials determine, by one linear system. What a choice cannot differentiate raises when asked; it never returns a
gradient with a part missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from iotsolve.costs import Dense, Scalar, calm
from iotsolve.newton import DualSystem
from iotsolve.problem import Potentials, Problem, log_scaling, weighted

__all__ = ["Envelope", "Gradient", "Implicit"]


class Gradient(Protocol):
    def value(self, problem: Problem, p: Potentials, plan: Tensor | None) -> Tensor: ...

    def potentials(self, problem: Problem, p: Potentials) -> Potentials: ...

    def plan(self, problem: Problem, plan: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Envelope:
    """Differentiate the value by the envelope theorem: the dual at frozen potentials.

    Exact at convergence in cost, a, b, epsilon, mass and the marginals' parameters. Plan, potentials and marginals carry no
    gradient: asking for one raises a RuntimeError that says so. Under FIXED/FIXED only directions with equal change of the
    two totals are meaningful. At epsilon = 0 the result is one subgradient: that of the plan and potentials returned.

    Example:
        >>> import torch
        >>> from iotsolve import Problem, solve
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        >>> solution = solve(Problem(cost, epsilon=0.5))
        >>> solution.value.backward()
        >>> bool(torch.allclose(cost.grad, solution.plan.detach()))
        True
    """

    def value(self, problem: Problem, p: Potentials, plan: Tensor | None) -> Tensor:
        names, tensors = _inputs(problem)
        return _EnvelopeValue.apply(problem.detach(), p, plan, names, *tensors)

    def potentials(self, problem: Problem, p: Potentials) -> Potentials:
        return _refuse(problem, p)

    def plan(self, problem: Problem, plan: Tensor) -> Tensor:
        return _Refuse.apply(plan, *_inputs(problem)[1]) if _live(problem) else plan


@dataclass(frozen=True)
class Implicit:
    """Differentiate potentials, plan, marginals and mass through the optimality conditions (implicit function theorem).

    Exact at convergence, for epsilon > 0, away from kinks; bins held by a kink (a bound not active, TV at its clamp) do not
    move. The error is that of the marginals, not its square: solve to a marginal tolerance you would accept in the
    gradient. Bins of weight 0 keep their potential fixed.

    Example:
        >>> import torch
        >>> from iotsolve import Problem, solve
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.5]], dtype=torch.float64, requires_grad=True)
        >>> solution = solve(Problem(cost, epsilon=0.5), gradient=Implicit())
        >>> solution.transport_cost.backward()
        >>> cost.grad.shape
        torch.Size([2, 2])
    """

    def value(self, problem: Problem, p: Potentials, plan: Tensor | None) -> Tensor:
        return Envelope().value(problem, p, plan)

    def potentials(self, problem: Problem, p: Potentials) -> Potentials:
        if problem.is_exact:
            return _refuse(problem, p)
        if not _live(problem):
            return p
        names, tensors = _inputs(problem)
        return problem.gauge(Potentials(*_ImplicitPotentials.apply(problem.detach(), p, names, *tensors)))

    def plan(self, problem: Problem, plan: Tensor) -> Tensor:
        return Envelope().plan(problem, plan)


def _inputs(problem: Problem) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    named = problem.tensors()
    return tuple(named), tuple(named.values())


def _live(problem: Problem) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in problem.tensors().values())


def _refuse(problem: Problem, p: Potentials) -> Potentials:
    if not _live(problem):
        return p
    return Potentials(*(_Refuse.apply(x, *_inputs(problem)[1]) for x in (p.f, p.g, p.lam)))


def _moved(problem: Problem, p: Potentials) -> Potentials:
    return Potentials(problem.rows.moved(p.f), problem.columns.moved(p.g), p.lam)


def _pull(
    ctx: Any, scalar, names: tuple[str, ...], tensors: tuple[Tensor, ...], needed: tuple[bool, ...], dtype: torch.dtype
):
    """Gradients of ``scalar(problem)`` in the tensors asked for: the backward pass, evaluated as a formula of its own."""
    with calm(ctx.problem.cost.dense()), torch.enable_grad():
        leaves = {
            n: t.detach().to(dtype).requires_grad_(need) for n, t, need in zip(names, tensors, needed, strict=True)
        }
        wanted = [leaves[n] for n, need in zip(names, needed, strict=True) if need]
        value = scalar(ctx.problem.with_tensors(leaves))
        if not value.requires_grad:
            return (None,) * len(names)
        found = iter(torch.autograd.grad(value, wanted, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


class _EnvelopeValue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, problem: Problem, p: Potentials, plan: Tensor | None, names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.problem, ctx.p, ctx.plan, ctx.names = problem, p, plan, names
        ctx.save_for_backward(*tensors)
        with calm(problem.cost.dense()):
            return _lagrangian(problem.to(p.f.dtype), p, plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        p, plan, upstream = ctx.p, ctx.plan, upstream.to(ctx.p.f.dtype)
        needed = ctx.needs_input_grad[4:]
        if plan is None:
            wanted = {name for name, need in zip(ctx.names, needed, strict=True) if need}
            found = _entropic(ctx.problem.to(p.f.dtype), p, upstream, wanted)
            r, c = found.pop("r"), found.pop("c")

            def scalar(problem: Problem) -> Tensor:
                moved = _moved(problem, p)
                return (upstream * (problem.dual_sides(moved) - weighted(r, moved.f) - weighted(c, moved.g))).sum()
        else:
            found = {}

            def scalar(problem: Problem) -> Tensor:
                return (_lagrangian(problem, _moved(problem, p), plan) * upstream).sum()

        sides = _pull(ctx, scalar, ctx.names, ctx.saved_tensors, needed, p.f.dtype)
        total = (_add(found.get(name), side) for name, side in zip(ctx.names, sides, strict=True))
        like = zip(total, ctx.saved_tensors, strict=True)
        return (None,) * 4 + tuple(None if x is None else x.to(t.dtype) for x, t in like)


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


def _entropic(problem: Problem, p: Potentials, upstream: Tensor, needed: set[str]) -> dict[str, Tensor]:
    """Derivatives of the entropic term ``-eps (sum P - sum a sum b)`` at frozen potentials, with the marginals of P.

    In closed form, so that a backward pass costs one plan and keeps none. At an empty bin ``P 1 / a`` is the limit, by one
    more soft-min.
    """
    with calm(problem.cost.dense()), torch.no_grad():
        plan, eps = problem.plan(p), problem.epsilon
        r, c = plan.sum(-1), plan.sum(-2)
        found = {"r": r, "c": c}
        side = upstream.unsqueeze(-1)
        lifted = p.f + p.lam.unsqueeze(-1)
        if "a" in needed:
            density = _density(r, problem.a, lifted, problem.cost, problem.b, p.g, eps, axis=-1)
            found["a"] = side * eps * (problem.b.sum(-1, keepdim=True) - density)
        if "b" in needed:
            density = _density(c, problem.b, p.g, problem.cost, problem.a, lifted, eps, axis=-2)
            found["b"] = side * eps * (problem.a.sum(-1, keepdim=True) - density)
        if "epsilon" in needed:
            slack = weighted(r, lifted) + weighted(c, p.g) - problem.cost.spent(plan)
            excess = r.sum(-1) - problem.a.sum(-1) * problem.b.sum(-1)
            found["epsilon"] = (upstream * (slack / eps - excess)).sum().reshape(problem.epsilon.shape)
        if "cost" in needed:
            found["cost"] = plan.mul_(upstream[..., None, None])
    return found


def _density(
    marginal: Tensor,
    weights: Tensor,
    own: Tensor,
    cost: Dense,
    others: Tensor,
    other: Tensor,
    eps: Scalar,
    *,
    axis: int,
):
    """``sum_j b_j exp((f_i + g_j - C_ij) / eps)``: the marginal per unit of weight, at empty bins too."""
    if (weights > 0).all():
        return marginal / weights
    return torch.exp((own - cost.softmin(log_scaling(others, other, eps), eps, axis=axis)) / eps)


def _lagrangian(problem: Problem, p: Potentials, plan: Tensor | None) -> Tensor:
    """The dual; at epsilon = 0 with <C - f - g - lam, P> in place of the entropy, which is 0 and whose derivative is not."""
    if plan is None:
        return problem.dual_sides(p) + problem.dual_entropy(p)
    slack, _ = problem.cost.slack(p.f + p.lam.unsqueeze(-1), p.g)
    return problem.dual_sides(p) - (slack * plan).sum((-2, -1))


class _ImplicitPotentials(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: Problem, p: Potentials, names: tuple[str, ...], *tensors: Tensor):
        ctx.problem, ctx.p, ctx.names = problem, p, names
        ctx.save_for_backward(*tensors)
        return p.f.clone(), p.g.clone(), p.lam.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, up_f: Tensor, up_g: Tensor, up_lam: Tensor):
        p = ctx.p.to(torch.float64)
        with calm(ctx.problem.cost.dense()):
            upstream = (up.double() for up in (up_f, up_g, up_lam))
            u, v, w, held_f, held_g = implicit_adjoint(ctx.problem.to(torch.float64), p, *upstream)

        def scalar(problem: Problem) -> Tensor:
            moved = _moved(problem, p)
            plan = problem.plan(moved)
            asked = (u * problem.a * problem.rows.response(p.f)).sum(-1) + (
                v * problem.b * problem.columns.response(p.g)
            ).sum(-1)
            if problem.mass is not None:
                asked = asked + w * problem.mass
            had = (plan * (u.unsqueeze(-1) + v.unsqueeze(-2) + w[..., None, None])).sum((-2, -1))
            return (asked - had).sum() + (held_f * moved.f).sum() + (held_g * moved.g).sum()

        tensors = ctx.saved_tensors
        found = _pull(ctx, scalar, ctx.names, tensors, ctx.needs_input_grad[3:], torch.float64)
        return (None,) * 3 + tuple(None if x is None else x.to(t.dtype) for x, t in zip(found, tensors, strict=True))


def implicit_adjoint(problem: Problem, p: Potentials, up_f: Tensor, up_g: Tensor, up_lam: Tensor):
    """Solve Hessian(dual) (u, v, w) = upstream over the bins that move; also the upstream of the bins that are held.

    Shapes as the potentials', float64; any batch.
    """
    flat = problem.flat()
    f, g, lam = p.f.reshape(flat.a.shape), p.g.reshape(flat.b.shape), p.lam.reshape(-1)
    plan = flat.plan(Potentials(f, g, lam))
    r, c = plan.sum(-1), plan.sum(-2)
    bend_f, bend_g = flat.rows.curvature(f), flat.columns.curvature(g)
    keep_f, keep_g = (r > 0) & bend_f.isfinite() & f.isfinite(), (c > 0) & bend_g.isfinite() & g.isfinite()
    if flat.rows.is_free:
        keep_f = torch.zeros_like(keep_f)
    if flat.columns.is_free:
        keep_g = torch.zeros_like(keep_g)
    eps = flat.epsilon
    system = DualSystem(
        plan,
        r + eps * torch.where(keep_f, flat.a * bend_f, 0.0),
        c + eps * torch.where(keep_g, flat.b * bend_g, 0.0),
        keep_f,
        keep_g,
        flat.mass is not None,
    )
    rhs = up_f.reshape(f.shape), up_g.reshape(g.shape), up_lam.reshape(lam.shape)
    u, v, w = system.solve(torch.where(keep_f, rhs[0], 0.0), torch.where(keep_g, rhs[1], 0.0), rhs[2])
    held_f, held_g = torch.where(keep_f, 0.0, rhs[0]), torch.where(keep_g, 0.0, rhs[1])
    shaped = (eps * u).reshape(p.f.shape), (eps * v).reshape(p.g.shape), (eps * w).reshape(p.lam.shape)
    return *shaped, held_f.reshape(p.f.shape), held_g.reshape(p.g.shape)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *inputs: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        raise RuntimeError(
            "gradient=Envelope() differentiates solution.value only; a loss of the plan, the potentials, the marginals or the "
            "transport cost was sent backward. Solve with gradient=Implicit() (epsilon > 0), or detach that output."
        )
