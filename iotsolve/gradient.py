"""How a solution is differentiated: a choice, made at the call, and the library's only autograd functions.

``Envelope`` differentiates the value alone, exactly and for the price of one plan. ``Implicit`` differentiates everything
the potentials determine, by one linear system; ``Unroll`` does the same through the solver's own last sweeps. What a choice
cannot differentiate raises when asked; it never returns a gradient with a part missing.

A potential is *held* where a kink of its side keeps it (a bound that is not active, TV at its clamp, a FREE side); it is
*idle* where its bin carries no mass, so that it follows the other side and nothing follows it but empty bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from iotsolve.costs import Cost, Dense, Points, Scalar, calm
from iotsolve.distributed import Alone, Ranks, Sharded, ranks_of
from iotsolve.kernels.once import Backward, Refuse, final, single
from iotsolve.marginals import Marginal, number
from iotsolve.newton import DualSystem
from iotsolve.plans import Plan, quick_plan, streams
from iotsolve.problem import Potentials, Problem, in_double, log_scaling, weighted
from iotsolve.sinkhorn import Sinkhorn

__all__ = ["Envelope", "Gradient", "Gradients", "Implicit", "Unroll"]


class Gradient(Protocol):
    def value(self, problem: Problem, p: Potentials, plan: Tensor | None, excess: Tensor | None = None) -> Tensor: ...

    def potentials(self, problem: Problem, p: Potentials) -> Potentials: ...

    def plan(self, problem: Problem, plan: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Envelope:
    """Differentiate the value by the envelope theorem: the dual at frozen potentials.

    Exact at convergence in cost, a, b, epsilon, mass and the marginals' parameters; at epsilon > 0 twice differentiable, by
    the implicit function theorem. Plan, potentials and marginals carry no gradient: asking for one raises a RuntimeError
    that says so. Under FIXED/FIXED only directions with equal change of the two totals are meaningful. At epsilon = 0 the
    result is one subgradient: that of the plan and potentials returned.

    Example:
        >>> import torch
        >>> from iotsolve import Problem, solve
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        >>> solution = solve(Problem(cost, epsilon=0.5))
        >>> solution.value.backward()
        >>> bool(torch.allclose(cost.grad, solution.plan.detach()))
        True
    """

    def value(self, problem: Problem, p: Potentials, plan: Tensor | None, excess: Tensor | None = None) -> Tensor:
        names, tensors = _inputs(problem)
        return _EnvelopeValue.apply(problem.detach(), p, plan, excess, names, *tensors)

    def potentials(self, problem: Problem, p: Potentials) -> Potentials:
        return _refuse(problem, p)

    def plan(self, problem: Problem, plan: Tensor) -> Tensor:
        return Refuse.apply(_VALUE_ONLY, plan, *_inputs(problem)[1]) if _live(problem) else plan


@dataclass(frozen=True)
class Implicit:
    """Differentiate potentials, plan, marginals and mass through the optimality conditions (implicit function theorem).

    Exact at convergence, for epsilon > 0, away from kinks; bins held by a kink (a bound not active, TV at its clamp) do not
    move. The error is that of the marginals, not its square: solve to a marginal tolerance you would accept in the
    gradient. At a bin of weight 0 the derivative is that towards positive weights.

    Example:
        >>> import torch
        >>> from iotsolve import Problem, solve
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.5]], dtype=torch.float64, requires_grad=True)
        >>> solution = solve(Problem(cost, epsilon=0.5), gradient=Implicit())
        >>> solution.transport_cost.backward()
        >>> cost.grad.shape
        torch.Size([2, 2])
    """

    def value(self, problem: Problem, p: Potentials, plan: Tensor | None, excess: Tensor | None = None) -> Tensor:
        return Envelope().value(problem, p, plan, excess)

    def potentials(self, problem: Problem, p: Potentials) -> Potentials:
        return _follow(problem, p, _pull_implicit)

    def plan(self, problem: Problem, plan: Tensor) -> Tensor:
        return Envelope().plan(problem, plan)


@dataclass(frozen=True)
class Unroll:
    """Differentiate the same outputs as :class:`Implicit` through the last sweeps of :class:`Sinkhorn`, by autograd.

    The sweeps start from the potentials found, detached: they move nothing and only carry derivatives, which converge to
    those of ``Implicit`` at the rate at which the sweeps contract. The value is differentiated as by ``Envelope``. They are
    run in the backward pass, in float64, and ``steps`` times some matrices of the cost's size are kept while it lasts; of points
    whose cost is a scalar product at heart, vectors.

    Args:
        steps: number of sweeps, at least 1.

    Raises:
        ValueError: if ``steps`` is no whole number or below 1.

    Example:
        >>> import torch
        >>> from iotsolve import Problem, solve
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.5]], dtype=torch.float64, requires_grad=True)
        >>> def derivative(choice):
        ...     plan = solve(Problem(cost, epsilon=0.5), gradient=choice).plan
        ...     return torch.autograd.grad(plan[0, 0], cost)[0]
        >>> bool(torch.allclose(derivative(Unroll(20)), derivative(Implicit())))
        True
    """

    steps: int

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(
                f"Unroll(steps={self.steps!r}): must be a whole number of sweeps, at least 1. How many are enough depends on "
                "how fast the sweeps contract; solution.steps says how many the solver took. Implicit() needs no such number."
            )

    def value(self, problem: Problem, p: Potentials, plan: Tensor | None, excess: Tensor | None = None) -> Tensor:
        return Envelope().value(problem, p, plan, excess)

    def potentials(self, problem: Problem, p: Potentials) -> Potentials:
        return _follow(problem, p, lambda *arguments: _pull_sweeps(self.steps, *arguments))

    def plan(self, problem: Problem, plan: Tensor) -> Tensor:
        return Envelope().plan(problem, plan)


def _inputs(problem: Problem) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    named = problem.tensors()
    return tuple(named), tuple(named.values())


def _live(problem: Problem) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in problem.tensors().values())


# -- what is refused ---------------------------------------------------------------------------------------------------


_VALUE_ONLY = (
    "gradient=Envelope() differentiates solution.value only; a loss of the plan, the potentials, the marginals or the "
    "transport cost was sent backward. Solve with gradient=Implicit() (epsilon > 0), or detach that output."
)
_ONCE = (
    "this derivative was differentiated once more than the library can. The value can be differentiated twice (epsilon > 0), "
    "the plan, the potentials, the marginals and the transport cost once. Was create_graph=True passed once too often? "
    "Differences of the last derivative can stand in for the next one."
)
_LINEAR = (
    "a gradient at epsilon = 0 was differentiated again: plan and potentials of a linear program jump from vertex to vertex "
    "and have no useful derivative. Use epsilon > 0 for Hessian products."
)


def _refuse(problem: Problem, p: Potentials) -> Potentials:
    if not _live(problem):
        return p
    return Potentials(*(Refuse.apply(_VALUE_ONLY, x, *_inputs(problem)[1]) for x in (p.f, p.g, p.lam)))


# -- the value ---------------------------------------------------------------------------------------------------------


class _EnvelopeValue(Backward):
    @staticmethod
    def forward(
        ctx,
        problem: Problem,
        p: Potentials,
        plan: Tensor | None,
        excess: Tensor | None,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.problem, ctx.p, ctx.plan, ctx.names = problem, _snapped(problem, p, p.f.dtype), plan, names
        ctx.save_for_backward(*tensors)
        with calm(problem.cost):
            read = _read_at(problem, p)
            known = _known_rows(read, p, excess) if plan is None else None
            ctx.known = known if ctx.p.g is p.g and ctx.p.f is p.f else None
            if known is None:
                return _lagrangian(read, p, plan)
            product = float(read.amounts.prod())  # of the one problem that a bilinear cost is of
            return _dual_sides(read, p) - read.epsilon * (known[1].sum(-1) - product)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        single(upstream)
        needed, tensors = ctx.needs_input_grad[5:], ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.plan is None:
            return (None,) * 5 + _differentiable_gradient(ctx, upstream, needed, tensors)
        return (None,) * 5 + final(_LINEAR, _gradient(ctx, upstream.detach(), needed, tensors), upstream, *tensors)


def _known_rows(problem: Problem, p: Potentials, excess: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The rows' soft-minima and marginals of a bilinear cost, where nothing is infinite: what its derivatives need as well."""
    of_points = isinstance(problem.cost, Points) and streams(problem.cost) and not isinstance(problem.epsilon, Tensor)
    if not (of_points and problem.is_plain):
        return None
    f = _lifted(problem, p)
    s = problem.softmin(p.g, problem.epsilon, axis=-1) if excess is None else f - excess
    return s, (problem.a.log() + (f - s if excess is None else excess) / problem.epsilon).exp()


def _lifted(problem: Problem, p: Potentials) -> Tensor:
    return p.f if problem.mass is None else p.f + p.lam.unsqueeze(-1)


def _gradient(ctx: Any, upstream: Tensor, needed: Sequence[bool], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The Lagrangian's partial derivatives at frozen potentials; the entropy's, in closed form, keep no plan."""
    p, plan, upstream = ctx.p, ctx.plan, upstream.to(ctx.p.f.dtype)
    wanted = {name for name, need in zip(ctx.names, needed, strict=True) if need}
    if plan is None:
        found = _entropic(_read_at(ctx.problem, p), p, upstream, wanted, ctx.known)
        r, c = found.pop("r"), found.pop("c")

        def scalar(problem: Problem) -> Tensor:
            moved = _moved(problem, p)
            return (upstream * (_dual_sides(problem, moved) - weighted(r, moved.f) - weighted(c, moved.g))).sum()

        wanted -= {"epsilon", *ctx.problem.cost.tensors()}  # on which the entropy alone depends
    else:
        found = {}

        def scalar(problem: Problem) -> Tensor:
            return (_lagrangian(problem, _moved(problem, p), plan) * upstream).sum()

    sides = [None] * len(tensors)
    if wanted:
        sides = _pull(ctx.problem, scalar, ctx.names, needed, tensors, p.f.dtype)
    total = [_add(found.get(name), side) for name, side in zip(ctx.names, sides, strict=True)]
    return [None if x is None else _narrowed(x, t.dtype) for x, t in zip(total, tensors, strict=True)]


def _differentiable_gradient(
    ctx: Any, upstream: Tensor, needed: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The same derivatives with a history: of the inputs themselves, and of the potentials that follow them.

    They are taken with respect to other names of the inputs, so that the potentials' own dependence, to which the value is
    stationary, is not followed here; the second derivative follows it. With rows on many ranks each takes those of its share.
    """
    p, ranks = _snapped(ctx.problem, ctx.p, torch.float64), _ranks(ctx.problem)
    with calm(ctx.problem.cost), torch.enable_grad():
        problem = ctx.problem.with_tensors(dict(zip(ctx.names, tensors, strict=True)))
        following = _gauged_and_following(problem, p, _pull_implicit)
        following = Potentials(*map(ranks.shared, (following.f, following.g, following.lam)))
        names = {n: (t if n == "x" else ranks.shared(t)).view_as(t) for n, t in zip(ctx.names, tensors, strict=True)}
        twin = _smooth_twin(ctx.problem.with_tensors(names).to(torch.float64), p)
        value = _share(twin, _moved(twin, following))
        wanted = [n for n, need in zip(ctx.names, needed, strict=True) if need]
        value = (ranks.shared(upstream).double() * value).sum()
        found = torch.autograd.grad(value, [names[n] for n in wanted], create_graph=True, allow_unused=True)
        whole = {n: x if n == "x" or x is None else ranks.total(x) for n, x in zip(wanted, found, strict=True)}
    return tuple(whole.get(name) for name in ctx.names)


def _share(problem: Problem, p: Potentials) -> Tensor:
    """This process's share of the dual, differentiable any number of times, in which nothing is exchanged."""
    if not isinstance(problem.cost, Sharded):
        return _lagrangian(problem, p, None)
    ranks = problem.cost.ranks
    points, (a, f), (b, g), eps = streamed_parts(problem, p)
    product = problem.a.sum(-1) * problem.b.sum(-1)
    return (_dual_sides(problem, p) + eps * product) / ranks.count - eps * points.plan_mass(a, b, f, g, eps)


def _read_at(problem: Problem, p: Potentials) -> Problem:
    """The problem in the potentials' precision; a cost that compiled passes read in float64 stays what it is."""
    return in_double(problem) if p.f.dtype == torch.float64 else problem.to(p.f.dtype)


def _pull(
    problem: Problem,
    scalar: Callable[[Problem], Tensor],
    names: Sequence[str],
    needed: Sequence[bool],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``scalar(problem)`` in the tensors asked for: the backward pass, evaluated as a formula of its own."""
    with calm(problem.cost), torch.enable_grad():
        leaves = {
            n: t.detach().to(dtype).requires_grad_(need) for n, t, need in zip(names, tensors, needed, strict=True)
        }
        wanted = [leaves[n] for n, need in zip(names, needed, strict=True) if need]
        value = scalar(problem.with_tensors(leaves))
        if not value.requires_grad:
            return (None,) * len(names)
        found = iter(torch.autograd.grad(value, wanted, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


def _snapped(problem: Problem, p: Potentials, dtype: torch.dtype) -> Potentials:
    """The potentials in a precision, exactly at their kinks: a solver that counts in epsilons comes back a digit beside them."""
    rounding, given = 8 * torch.finfo(p.f.dtype).eps, p.to(dtype)
    rows, columns = (side.at(w.to(dtype)) for side, w in zip(problem.sides, (problem.a, problem.b), strict=True))
    return Potentials(rows.snapped(given.f, rounding), columns.snapped(given.g, rounding), given.lam)


def _moved(problem: Problem, p: Potentials) -> Potentials:
    return Potentials(problem.rows.moved(p.f), problem.columns.moved(p.g), p.lam)


def _lagrangian(problem: Problem, p: Potentials, plan: Tensor | None) -> Tensor:
    """The dual; at epsilon = 0 with <C - f - g - lam, P> in place of the entropy, which is 0 and whose derivative is not."""
    if plan is None:
        return _dual_sides(problem, p) + problem.dual_entropy(p)
    lifted = p.f + p.lam.unsqueeze(-1)
    if plan.is_sparse:
        i, j = plan.indices()
        only = (torch.zeros_like(i),) * len(problem.batch_shape)  # the one problem of a batch that has a sparse plan
        slack = lifted[(*only, i)] + p.g[(*only, j)] - problem.cost.entries((*only, i, j))
        spent = (plan.values() * slack).sum()
    else:
        spent = (problem.cost.slack(lifted, p.g)[0] * plan).sum((-2, -1))
    return _dual_sides(problem, p) - spent


def _dual_sides(problem: Problem, p: Potentials) -> Tensor:
    """``problem.dual_sides`` without the NaN that the derivative of a conjugate has at ``f = inf``.

    A bin that nothing can reach pays for being empty, whatever its potential.
    """
    total = 0.0 if problem.mass is None else p.lam * problem.mass
    plain = not (torch.is_grad_enabled() or problem.is_exact) and problem.is_plain
    for side, weights, f in ((problem.rows, problem.a, p.f), (problem.columns, problem.b, p.g)):
        if plain:
            total = total + (weights * side.conjugate(f)).sum(-1)
            continue
        reached = f.isfinite()
        terms = side.conjugate(torch.where(reached, f, 0.0))
        if not reached.all():
            terms = torch.where(reached, terms, side.divergence(torch.zeros_like(f), torch.ones_like(f)))
        total = total + weighted(weights, terms)
    return total


def _entropic(
    problem: Problem, p: Potentials, upstream: Tensor, needed: set[str], known: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """Derivatives of the entropic term ``-eps (sum P - sum a sum b)`` at frozen potentials, with the marginals of P.

    In closed form and block by block, so that a backward pass costs one plan and keeps none. At an empty bin ``P 1 / a`` is
    the limit, by one more soft-min.
    """
    with calm(problem.cost), torch.no_grad():
        if known is not None and needed and needed <= {"x", "y"} and problem.cost.metric != "cosine":
            return _of_known(problem, p, upstream, needed, *known)
        eps, side, lifted = problem.epsilon, upstream.unsqueeze(-1), _lifted(problem, p)
        found = (_of_points if streams(problem.cost) else _of_blocks)(problem, p, upstream, needed)
        r, c = found["r"], found["c"]
        if "a" in needed:
            density = _density(r, problem.a, lifted, problem.cost, problem.b, p.g, eps, axis=-1)
            found["a"] = _in_range(side * eps * (problem.b.sum(-1, keepdim=True) - density))
        if "b" in needed:
            density = _density(c, problem.b, p.g, problem.cost, problem.a, lifted, eps, axis=-2)
            found["b"] = _in_range(side * eps * (problem.a.sum(-1, keepdim=True) - density))
    return found


def _of_blocks(problem: Problem, p: Potentials, upstream: Tensor, needed: set[str]) -> dict[str, Tensor]:
    """The marginals, and the derivatives in epsilon and in what the cost is made of, plan block by plan block."""
    lifted = p.f + p.lam.unsqueeze(-1)
    data = {name: x.detach() for name, x in problem.cost.tensors().items()}
    found = {name: torch.zeros_like(x) for name, x in data.items() if name in needed}
    behind = {name: data[name].requires_grad_() for name in found if name != "cost"}  # what a cost is computed from
    blocks = problem.cost.with_tensors(data).blocks()
    rows, c, spent = [], torch.zeros_like(p.g), torch.zeros_like(p.lam)
    for part, plan in problem.plan_blocks(p):
        with torch.enable_grad():
            _, block = next(blocks)
        rows.append(plan.sum(-1))
        c = c + plan.sum(-2)
        if "epsilon" in needed:
            spent = spent + block.spent(plan)
        plan = plan.mul_(upstream[..., None, None])
        if "cost" in needed:
            found["cost"][..., part, :] = plan
        elif behind:
            further = torch.autograd.grad(block.dense(), list(behind.values()), plan)
            found |= {name: found[name] + x for name, x in zip(behind, further, strict=True)}
    r = torch.cat(rows, -1)
    if "epsilon" in needed:
        slack = weighted(r, lifted) + weighted(c, p.g) - spent
        excess = r.sum(-1) - problem.a.sum(-1) * problem.b.sum(-1)
        found["epsilon"] = (upstream * (slack / problem.epsilon - excess)).sum().reshape(problem.epsilon.shape)
    return found | {"r": r, "c": c}


def _of_known(
    problem: Problem, p: Potentials, upstream: Tensor, needed: set[str], softmin: Tensor, r: Tensor
) -> dict[str, Tensor]:
    """The derivatives in points alone, in closed form, at what is known of the rows; nobody asks for the columns' marginal."""
    logs = torch.add(problem.b.log(), p.g, alpha=1.0 / problem.epsilon).flatten()
    carried, wanted = (r * upstream.unsqueeze(-1)).flatten(), ("x" in needed, "y" in needed)
    cost = problem.cost
    found = zip(("x", "y"), (cost.x, cost.y), cost.pulled(logs, softmin.flatten(), carried, problem.epsilon, wanted), strict=True)
    return {name: slope.reshape(z.shape) for name, z, slope in found if slope is not None} | {"r": r, "c": None}


def _of_points(problem: Problem, p: Potentials, upstream: Tensor, needed: set[str]) -> dict[str, Tensor]:
    """The same through the soft-minima of a bilinear cost: the rows' marginals are ``a exp((f + lam - s) / eps)``."""
    shape = p.f.shape[:-1]
    ranks, (points, (a, f), (b, g), _) = _ranks(problem), streamed_parts(problem, p)
    named = {"x": points.x, "y": points.y, "epsilon": torch.as_tensor(problem.epsilon, dtype=p.f.dtype, device=p.f.device)}
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in named.items()}
    with torch.enable_grad():
        eps = leaves["epsilon"] if "epsilon" in needed else problem.epsilon
        live = points.viewed(replace(points, x=leaves["x"], y=leaves["y"]))
        plain = problem.is_plain
        sides = ((b, g),) if needed <= set(named) else ((a, f), (b, g))  # nobody asks for the columns' marginal, or someone does
        logs = [w.log() + z / eps if plain else log_scaling(w, z, eps) for w, z in sides]
        s, t = live.soft_minima(None if len(logs) == 1 else logs[0], logs[-1], eps)
        r = _reached(a, f, s, eps, plain=plain)
        wanted, rate = [name for name in leaves if name in needed], -eps * upstream.sum()
        slopes = ()
        if "epsilon" in needed:
            excess = r.sum() - problem.a.sum() * problem.b.sum() / ranks.count
            slopes = torch.autograd.grad(rate * excess, [leaves[name] for name in wanted])
        elif wanted:
            slopes = torch.autograd.grad(r, [leaves[name] for name in wanted], rate.expand_as(r))
    found = {name: x if name == "x" else ranks.sum(x) for name, x in zip(wanted, slopes, strict=True)}
    found |= {"r": ranks.gather(r.detach()).reshape(*shape, -1), "c": None}
    if t is not None:
        t = ranks.softmin(t.detach(), problem.epsilon)
        found["c"] = _reached(b, g, t, problem.epsilon, plain=plain).reshape(*shape, -1)
    return found


def _reached(weights: Tensor, potential: Tensor, softmin: Tensor, eps: Scalar, *, plain: bool = False) -> Tensor:
    """A marginal of the plan, from the soft-minimum on its side; ``plain``: nothing is infinite."""
    if plain:
        return weights * ((potential - softmin) / eps).exp()
    carries = (weights > 0) & potential.isfinite() & softmin.isfinite()
    return weights * torch.where(carries, (torch.where(carries, potential - softmin, 0.0) / eps).exp(), 0.0)


def _in_range(x: Tensor) -> Tensor:
    """The largest number in the place of infinity: a slope at an empty bin that the costs prefer."""
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in a precision, in which those that are finite stay so."""
    largest = torch.finfo(dtype).max
    if largest >= torch.finfo(x.dtype).max:
        return x.to(dtype)
    return torch.where(x.isfinite(), x.clamp(-largest, largest), x).to(dtype)


def _density(
    marginal: Tensor,
    weights: Tensor,
    own: Tensor,
    cost: Cost,
    others: Tensor,
    other: Tensor,
    eps: Scalar,
    *,
    axis: int,
):
    """``sum_j b_j exp((f_i + g_j - C_ij) / eps)``: the marginal per unit of weight, at empty bins too."""
    if (weights > 0).all():
        return marginal / weights
    exponent = (own - cost.softmin(log_scaling(others, other, eps), eps, axis=axis)) / eps
    largest = torch.finfo(own.dtype).max
    return torch.where(own.isfinite(), torch.exp(exponent).clamp(max=largest), 0.0)


# -- the potentials ----------------------------------------------------------------------------------------------------

Pull = Callable[..., tuple[Tensor | None, ...]]


def _follow(problem: Problem, p: Potentials, pull: Pull) -> Potentials:
    """The potentials, with the derivatives in the problem's tensors that ``pull`` finds."""
    if problem.is_exact:
        return _refuse(problem, p)
    return _moved(problem, _gauged_and_following(problem, p, pull)) if _live(problem) else p


def _gauged_and_following(problem: Problem, p: Potentials, pull: Pull) -> Potentials:
    """All but what a held potential owes to its penalty's parameter, which :func:`_moved` adds."""
    names, tensors = _inputs(problem)
    return problem.gauge(Potentials(*_FollowingPotentials.apply(problem.detach(), p, pull, names, *tensors)))


class _FollowingPotentials(Backward):
    @staticmethod
    def forward(ctx, problem: Problem, p: Potentials, pull: Pull, names: tuple[str, ...], *tensors: Tensor):
        ctx.problem, ctx.p, ctx.pull, ctx.names = problem, _snapped(problem, p, torch.float64), pull, names
        ctx.save_for_backward(*tensors)
        with calm(problem.cost):
            f, g = _with_idle(problem.to(torch.float64), ctx.p)
        return f.to(p.f.dtype, copy=True), g.to(p.g.dtype, copy=True), p.lam.clone()

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        single(*upstream)
        needed, tensors = ctx.needs_input_grad[4:], ctx.saved_tensors
        ups = Potentials(*(up.detach().double() for up in upstream))
        with torch.no_grad():
            problem = ctx.problem.to(torch.float64)
            found = ctx.pull(problem, ctx.p, ups, ctx.names, needed, tensors)
            found = [None if x is None else _narrowed(x, t.dtype) for x, t in zip(found, tensors, strict=True)]
        return (None,) * 4 + final(_ONCE, found, *upstream, *tensors)


def _pull_implicit(
    problem: Problem,
    p: Potentials,
    upstream: Potentials,
    names: Sequence[str],
    needed: Sequence[bool],
    tensors: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The adjoint of the optimality conditions: idle bins first, which depend on the others, then the others by one solve."""
    ranks = _ranks(problem)
    idle_f, idle_g = _idle(problem, p)
    eliminated: tuple[Tensor | None, ...] = (None,) * len(names)
    for _ in range(2):  # empty bins first, which may follow bins with weight that are idle themselves
        if not ((idle_f & (upstream.f != 0)).any() or (idle_g & (upstream.g != 0)).any()):
            break  # on all ranks, which have the same loss
        found, upstream = _pull_idle(problem, p, upstream, (idle_f, idle_g), names, needed, tensors)
        eliminated = tuple(_add(x, y) for x, y in zip(eliminated, found, strict=True))
    with calm(problem.cost):
        u, v, w = _adjoint(problem, p, upstream, (_moving(problem.rows, p.f), _moving(problem.columns, p.g)))

    def asked(live: Problem) -> Tensor:
        total = (u * live.a * live.rows.response(_finite(p.f))).sum(-1)
        total = total + (v * live.b * live.columns.response(_finite(p.g))).sum(-1)
        return (total if live.mass is None else total + w * live.mass).sum()

    def had(live: Problem) -> Tensor:
        if streams(live.cost) and (twin := _streamed_twin(live, p)) is not None:  # of this process's rows
            r, c = streamed_marginals(twin, _moved(twin, p))
            return ((u.flatten()[_own(live.cost)] + w) * r).sum() + (v.flatten() * c).sum()
        plan = live.plan(_moved(live, p))
        return (plan * (u.unsqueeze(-1) + v.unsqueeze(-2) + w[..., None, None])).sum()

    found = [_pull(problem, of, names, needed, tensors, torch.float64) for of in (asked, had)]
    found = [_add(x, None if y is None else -y) for x, y in zip(found[0], _added(ranks, names, found[1]), strict=True)]
    return tuple(_add(x, y) for x, y in zip(found, eliminated, strict=True))


def _pull_idle(
    problem: Problem,
    p: Potentials,
    upstream: Potentials,
    idle: tuple[Tensor, Tensor],
    names: Sequence[str],
    needed: Sequence[bool],
    tensors: Sequence[Tensor],
) -> tuple[tuple[Tensor | None, ...], Potentials]:
    """What idle bins owe to the data at frozen potentials, and upstream without them: what they owe to others is added there."""
    ranks, (idle_f, idle_g) = _ranks(problem), idle
    x = Potentials(*(t.clone().requires_grad_() for t in (p.f, p.g, p.lam)))
    parts: list[Tensor] = []

    def of_idle(live: Problem) -> Tensor:
        f, g = _idle_potentials(_smooth_twin(live, p), _moved(live, x))
        total = torch.where(idle_f, upstream.f * f, 0.0).sum() + torch.where(idle_g, upstream.g * g, 0.0).sum()
        total = total / ranks.count  # each has the whole of it, and their derivatives are added
        slopes = torch.autograd.grad(total, (x.f, x.g, x.lam), retain_graph=True, materialize_grads=True)
        parts.extend(ranks.sum(slope) for slope in slopes)
        return total

    found = _added(ranks, names, _pull(problem, of_idle, names, needed, tensors, torch.float64))
    left = Potentials(
        torch.where(idle_f, 0.0, upstream.f) + torch.where(p.f.isfinite(), parts[0], 0.0),
        torch.where(idle_g, 0.0, upstream.g) + torch.where(p.g.isfinite(), parts[1], 0.0),
        upstream.lam + parts[2],
    )
    return found, left


def _ranks(problem: Problem) -> Ranks | Alone:
    return ranks_of(problem.cost)


def _added(ranks: Ranks | Alone, names: Sequence[str], found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Shares of derivatives over ranks, which have their own rows and all of the rest."""
    return tuple(z if name == "x" or z is None else ranks.sum(z) for name, z in zip(names, found, strict=True))


def _own(cost: Cost) -> slice:
    """This process's rows."""
    return cost.own if isinstance(cost, Sharded) else slice(None)


def streamable(problem: Problem, p: Potentials) -> Problem | None:
    """The problem as a thing whose plan is differentiated block by block, every process its own rows; None if that cannot be.

    With rows on many ranks, what all have is shared among them, for a loss that is the same on every one.
    """
    twin = _streamed_twin(problem, p) if streams(problem.cost) else None
    if twin is None or not isinstance(problem.cost, Sharded):
        return twin
    ranks = problem.cost.ranks
    return twin.with_tensors({name: x if name == "x" else ranks.shared(x) for name, x in twin.tensors().items()})


def streamed_marginals(problem: Problem, p: Potentials) -> tuple[Tensor, Tensor]:
    """``(n,)`` and ``(m,)``: the plan's marginals, of which autograd follows the points, the weights and the potentials; of this
    process's rows where they are on many. Through the soft-minima of a bilinear cost, in O((n + m) d) memory.
    """
    points, (a, f), (b, g), eps = streamed_parts(problem, p)
    s, t = points.soft_minima(log_scaling(a, f, eps), log_scaling(b, g, eps), eps)
    return _reached(a, f, s, eps), _reached(b, g, t, eps)


def streamed_parts(
    problem: Problem, p: Potentials
) -> tuple[Points, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Scalar]:
    """What a pass over this process's rows reads: points, weights and potentials of the rows and of the columns, epsilon."""
    cost, own = problem.cost, _own(problem.cost)
    rows = problem.a.flatten()[own], (p.f + p.lam.unsqueeze(-1)).flatten()[own]
    return cost.local if isinstance(cost, Sharded) else cost, rows, (problem.b.flatten(), p.g.flatten()), problem.epsilon


def _pull_sweeps(
    steps: int,
    problem: Problem,
    p: Potentials,
    upstream: Potentials,
    names: Sequence[str],
    needed: Sequence[bool],
    tensors: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The solver's own sweeps, followed by autograd."""
    solver, ranks = Sinkhorn(), _ranks(problem)
    free_f, free_g = _moving(problem.rows, p.f), _moving(problem.columns, p.g)

    def scalar(live: Problem) -> Tensor:
        twin = _smooth_twin(live, p)
        state = solver.init(twin, p)
        for _ in range(steps):
            state = solver.step(twin, state, twin.epsilon)
        found = state.potentials
        total = (
            torch.where(free_f, upstream.f * found.f, 0.0).sum() + torch.where(free_g, upstream.g * found.g, 0.0).sum()
        )
        return (total + (upstream.lam * found.lam).sum()) / ranks.count  # each has the whole of it

    return _added(ranks, names, _pull(problem, scalar, names, needed, tensors, torch.float64))


def _adjoint(
    problem: Problem, p: Potentials, upstream: Potentials, moving: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve Hessian(dual) (u, v, w) = upstream over the bins that move and carry mass; shapes as the potentials'."""
    flat = problem.flat()
    f, g, lam = p.f.reshape(flat.a.shape), p.g.reshape(flat.b.shape), p.lam.reshape(-1)
    eps = flat.epsilon
    if streams(flat.cost):  # else the plan is held as a matrix
        plan = quick_plan(flat, Potentials(f, g, lam)).precise
        r, c = plan.marginals()
    else:
        plan = flat.plan(Potentials(f, g, lam))
        r, c = plan.sum(-1), plan.sum(-2)
    keep_f, keep_g = (r > 0) & moving[0].reshape(f.shape), (c > 0) & moving[1].reshape(g.shape)
    bend_f, bend_g = flat.rows.curvature(f), flat.columns.curvature(g)
    system = DualSystem(
        plan,
        r + eps * torch.where(keep_f, flat.a * bend_f, 0.0),
        c + eps * torch.where(keep_g, flat.b * bend_g, 0.0),
        keep_f,
        keep_g,
        flat.mass is not None,
    )
    right_f, right_g = upstream.f.reshape(f.shape), upstream.g.reshape(g.shape)
    solved = system.solve(
        torch.where(keep_f, right_f, 0.0), torch.where(keep_g, right_g, 0.0), upstream.lam.reshape(lam.shape)
    )
    u, v, w = solved
    if flat.rows.is_fixed and flat.columns.is_fixed and flat.mass is None:  # (u + t, v - t) is as good, but for digits
        t = (((flat.a * u).sum(-1) - (flat.b * v).sum(-1)) / (flat.a.sum(-1) + flat.b.sum(-1))).unsqueeze(-1)
        u, v = torch.where(keep_f, u - t, 0.0), torch.where(keep_g, v + t, 0.0)
    shapes = (p.f.shape, p.g.shape, p.lam.shape)
    return tuple((eps * x).reshape(shape) for x, shape in zip((u, v, w), shapes, strict=True))


# -- products with a plan that is read ---------------------------------------------------------------------------------


def linear(plan: Plan, values: Tensor, axis: int) -> Tensor:
    """``plan.apply``, of which autograd follows the values."""
    return _Linear.apply(plan, axis, values)


class _Linear(Backward):
    @staticmethod
    def forward(ctx, plan: Plan, axis: int, values: Tensor) -> Tensor:
        ctx.plan, ctx.axis = plan, axis
        return plan.apply(values, axis=axis)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        single(upstream)
        return None, None, linear(ctx.plan, upstream, -3 - ctx.axis)


# -- bins that are held, idle or out of reach --------------------------------------------------------------------------


def _moving(side: Marginal, f: Tensor) -> Tensor:
    """Bins whose potential no kink holds."""
    if side.is_free:
        return torch.zeros_like(f, dtype=torch.bool)
    return side.curvature(f).isfinite() & f.isfinite()


def _idle(problem: Problem, p: Potentials) -> tuple[Tensor, Tensor]:
    """Bins that move and carry nothing, for want of weight or because the little that is asked for underflows."""
    return (
        _moving(problem.rows, p.f) & (problem.a * problem.rows.response(_finite(p.f)) == 0),
        _moving(problem.columns, p.g) & (problem.b * problem.columns.response(_finite(p.g)) == 0),
    )


def _idle_potentials(twin: Problem, p: Potentials) -> tuple[Tensor, Tensor]:
    """Every bin's potential as the other side's determine it: one update each, from the same potentials."""
    eps, lam = twin.epsilon, p.lam.unsqueeze(-1)
    s = twin.cost.softmin(log_scaling(twin.b, p.g, eps), eps, axis=-1)
    t = twin.cost.softmin(log_scaling(twin.a, p.f, eps), eps, axis=-2)
    return twin.rows.aprox(s - lam, eps), twin.columns.aprox(t - lam, eps)


def _with_idle(problem: Problem, p: Potentials) -> tuple[Tensor, Tensor]:
    """``f`` and ``g`` with those of idle bins brought up to date."""
    idle_f, idle_g = _idle(problem, p)
    if not (idle_f.any() or idle_g.any()):
        return p.f, p.g
    f, g = _idle_potentials(_smooth_twin(problem, p), p)
    return torch.where(idle_f, f, p.f), torch.where(idle_g, g, p.g)


def _smooth_twin(problem: Problem, p: Potentials) -> Problem:
    """The same problem where every derivative exists and is finite; float64.

    Empty bins get a weight too small to change a digit, through which one-sided derivatives pass, and forbidden arcs a cost
    at which they carry exactly 0. So do the arcs of bins that nothing can reach, and those of empty bins whose potentials
    make even that weight count: a derivative through them, of 1e80 and more, is not told.
    """
    if streams(problem.cost) and (twin := _streamed_twin(problem, p)) is not None:
        return twin
    a, b, matrix = problem.a, problem.b, problem.cost.dense()
    empty_a, empty_b = a.detach() <= 0, b.detach() <= 0
    slack, allowed = Dense(matrix.detach()).slack(p.f + p.lam.unsqueeze(-1), p.g)
    eps = number(problem.epsilon)
    tiny = empty_a.unsqueeze(-1) | empty_b.unsqueeze(-2)
    allowed = allowed & ~(tiny & (slack > _COUNTS * eps))
    sizes = [float(torch.where(x.isfinite(), x, 0.0).abs().max()) for x in (matrix.detach(), p.f, p.g, p.lam)]
    one = torch.ones((), dtype=a.dtype, device=a.device)
    softness = [float(side.divergence(0 * one, one).detach().max()) for side in (problem.rows, problem.columns)]
    far = 1e4 * (sum(sizes) + sum(softness) + eps)
    return problem.with_tensors({"cost": torch.where(allowed, matrix, far), **_specks(problem)})


def _specks(problem: Problem) -> dict[str, Tensor]:
    """The weights, in which no bin is empty."""
    weights = {"a": problem.a, "b": problem.b}
    return {name: w + (w.detach() <= 0).to(w.dtype) * _SPECK for name, w in weights.items()}


def _streamed_twin(problem: Problem, p: Potentials) -> Problem | None:
    """The same without the cost as a matrix, of what streams: where every bin is within reach, and no empty one counts for
    another. None elsewhere; with rows on many ranks, where nothing is a matrix, an error.
    """
    held = not all(bool(x.isfinite().all()) for x in (p.f, p.g, p.lam))
    if not held and problem.is_full:
        return problem
    if not held:
        cost, (a, f), (b, g), _ = streamed_parts(problem.detach(), p.detach())
        cost = replace(cost, x=cost.x.flatten(0, -2), y=cost.y.flatten(0, -2), barred=None)
        for turned, own, other, empty in ((cost, f, g, a <= 0), (cost.transposed, g, f, b <= 0)):
            if empty.any():
                nearest = replace(turned, x=turned.x[empty]).reduced_min(other, torch.ones_like(other), axis=-1)
                held = held or float((own[empty] - nearest).max()) > _COUNTS * number(problem.epsilon)
    if isinstance(problem.cost, Sharded):
        held = bool(problem.cost.ranks.sum(torch.tensor(float(held), device=problem.cost.device)))
        if held:
            raise ValueError(
                "derivatives at bins that nothing can reach, or at empty bins that others are very near, need the cost as a "
                "matrix, and its rows are on many ranks. Drop those bins."
            )
    return None if held else problem.with_tensors(_specks(problem))


_SPECK = 1e-100  # its square and its inverse's are in range
_COUNTS = 190.0  # e^190 specks are a digit


def _finite(f: Tensor) -> Tensor:
    return torch.where(f.isfinite(), f, 0.0)


# -- without torch -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    """Derivatives of one number in every datum of a problem; float64 NumPy arrays and floats.

    Attributes:
        cost: shape ``(..., n, m)``; 0 at forbidden arcs.
        a: shape ``(..., n)``, towards positive weights at empty bins.
        b: shape ``(..., m)``.
        epsilon: summed over a batch, which shares it; None at ``epsilon = 0``.
        mass: summed over a batch; None if the problem has no ``mass``.
        rows: by the name of the parameter, summed over a batch: ``rho``, or the bounds ``lo`` and ``hi`` that are positive
            and finite; empty for FIXED and FREE.
        columns: the same.

    Example:
        >>> import numpy as np
        >>> from iotsolve import KL, Problem, solve
        >>> found = solve(Problem(np.eye(2), epsilon=0.5, rows=KL(1.0))).gradient()
        >>> found.cost.shape, list(found.rows), found.columns, found.mass
        ((2, 2), ['rho'], {}, None)
    """

    cost: np.ndarray
    a: np.ndarray
    b: np.ndarray
    epsilon: float | None
    mass: float | None
    rows: dict[str, float]
    columns: dict[str, float]


def as_leaves(problem: Problem) -> Problem:
    """The same problem in float64 tensors, every number of it a leaf of its own."""

    def leaf(x: Scalar) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64, device=problem.a.device).detach().clone().requires_grad_()

    def of_leaves(side: Marginal) -> Marginal:
        given = {field.name: getattr(side, field.name) for field in fields(side)}
        settled = side.is_fixed or side.is_free
        return replace(
            side, **{k: leaf(x) if 0 < number(x) < np.inf and not settled else number(x) for k, x in given.items()}
        )

    rows, columns = (of_leaves(side) for side in problem.sides)
    return Problem.unchecked(
        leaf(problem.cost.dense()),
        leaf(problem.a),
        leaf(problem.b),
        epsilon=0.0 if problem.is_exact else leaf(problem.epsilon),
        rows=rows,
        columns=columns,
        mass=None if problem.mass is None else leaf(problem.mass),
    )


def gradients(scalar: Tensor, leaves: Problem) -> Gradients:
    """Derivatives of ``scalar`` in the tensors of a problem of :func:`as_leaves`."""
    named = leaves.tensors()
    found = torch.autograd.grad(scalar, list(named.values()), materialize_grads=True)
    arrays = {name: x.cpu().numpy()[()] for name, x in zip(named, found, strict=True)}

    def of(side: str) -> dict[str, float]:
        return {name.partition(".")[2]: float(x) for name, x in arrays.items() if name.startswith(f"{side}.")}

    epsilon, mass = (float(arrays[name]) if name in arrays else None for name in ("epsilon", "mass"))
    return Gradients(arrays["cost"], arrays["a"], arrays["b"], epsilon, mass, of("rows"), of("columns"))
