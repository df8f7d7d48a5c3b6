"""First order: alternating ``aprox`` updates in the log domain, one for every pair of marginals.

Differs from the textbook algorithm in that 1. the side's object, not the solver, knows how far to move; 2. a free side is
not visited, so that a semi-relaxed problem is one soft-min; 3. the translation ``(f + t, g - t)``, along which unbalanced
problems crawl, is solved in closed form after each sweep (Sejourne, Vialard, Peyre, AISTATS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from iotsolve.costs import Points
from iotsolve.distributed import Sharded
from iotsolve.marginals import Marginal, Scalar, number
from iotsolve.mixing import Mixing
from iotsolve.problem import Potentials, Problem, log_marginal
from iotsolve.validation import check_steps, check_tolerance, check_window, default_tolerance

__all__ = ["Sinkhorn", "SinkhornState", "answered", "swept"]


@dataclass(frozen=True)
class SinkhornState:
    """Potentials with the soft-minima they give: ``s`` over columns at ``g``, ``t`` over rows at ``f``; None if not needed."""

    potentials: Potentials
    s: Tensor | None
    t: Tensor | None
    memory: Mixing | None = None

    def marginals(self, problem: Problem) -> tuple[Tensor | None, Tensor | None]:
        """``P 1`` and ``P' 1`` at no further cost; None on a side nobody asks about."""
        p = self.potentials
        f, g = (x if problem.mass is None else x + p.lam.unsqueeze(-1) for x in (p.f, p.g))
        return (
            None if self.s is None else problem.marginal_of(f, self.s, axis=-1),
            None if self.t is None else problem.marginal_of(g, self.t, axis=-2),
        )

    def answer(self, problem: Problem) -> Potentials:
        """The potentials, those of empty bins brought up to date: no stopping rule waits for them, but gradients read them."""
        return self.potentials if problem.is_full else self.completed(problem)

    def excess(self, problem: Problem) -> Tensor | None:
        """``f + lam - s``, where a pass over points would be needed to know it."""
        if self.s is None or not (isinstance(problem.cost, Points) and problem.is_plain):
            return None
        f = self.potentials.f - self.s
        return f if problem.mass is None else f + self.potentials.lam.unsqueeze(-1)

    def completed(self, problem: Problem) -> Potentials:
        """The potentials, from the soft-minima those of empty bins, and of bins that reach no weight, where they are ``+inf``."""
        p, lam = self.potentials, self.potentials.lam.unsqueeze(-1)
        f, g = p.f, p.g
        if self.s is not None:
            f = torch.where((problem.a > 0) & (self.s < torch.inf), f, problem.rows.aprox(self.s - lam, problem.epsilon))
        if self.t is not None and not problem.columns.is_free:
            g = torch.where((problem.b > 0) & (self.t < torch.inf), g, problem.columns.aprox(self.t - lam, problem.epsilon))
        return Potentials(f, g, p.lam)

    def moved(self, t: Tensor, u: Tensor) -> SinkhornState:
        """The state of ``(f + t, g + u, lam - t - u)``, whose plan is the same."""
        p, t, u = self.potentials, t.unsqueeze(-1), u.unsqueeze(-1)
        potentials = Potentials(p.f + t, p.g + u, p.lam - (t + u).squeeze(-1))
        s, t = None if self.s is None else self.s - u, None if self.t is None else self.t - t
        return replace(self, potentials=potentials, s=s, t=t)

    def projected(self, problem: Problem) -> SinkhornState:
        """The state with potentials that rounding has put just outside the dual's domain back on its border."""
        p = self.potentials
        return replace(self, potentials=replace(p, f=problem.rows.project(p.f), g=problem.columns.project(p.g)))

    def where(self, mine: Tensor, other: SinkhornState) -> SinkhornState:
        """This state for some problems of the batch, another for the rest; both have taken a step, or will."""

        def choose(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            return x if x is None or y is None else torch.where(mine.reshape(-1, *[1] * (x.dim() - 1)), x, y)

        p, q = self.potentials, other.potentials
        potentials = Potentials(choose(p.f, q.f), choose(p.g, q.g), choose(p.lam, q.lam))
        memory = self.memory if self.memory is None or other.memory is None else self.memory.where(mine, other.memory)
        return SinkhornState(potentials, choose(self.s, other.s), choose(self.t, other.t), memory)

    def select(self, index: Tensor) -> SinkhornState:
        p = Potentials(self.potentials.f[index], self.potentials.g[index], self.potentials.lam[index])
        memory = None if self.memory is None else self.memory.select(index)
        return SinkhornState(p, *(None if x is None else x[index] for x in (self.s, self.t)), memory)


@dataclass(frozen=True)
class Sinkhorn:
    """Sinkhorn's algorithm for any pair of marginals (Chizat et al., Math. Comp. 2018).

    Args:
        tolerance: relative marginal error (hard sides, ``mass``) and relative duality gap at which to stop; by default
            1e-8 in float64 and 1e-5 in float32.
        max_steps: sweeps over both sides, annealing included.
        stationary: also require that the L1 distance of every marginal from what its potential asks for is within tolerance.
            On soft sides the gap is of second order in the plan's error; this is the first-order condition that gradients of
            the plan need, and ``gradient=Implicit()`` switches it on.
        annealing: ratio of successive epsilons on the way down from the cost range, in ``(0, 1)``; None starts at epsilon.
        mixing: how many sweeps back Anderson's mixing looks, which begins after eight at the problem's epsilon and saves most of
            them where they are many; 0 for the textbook's sweeps.

    Raises:
        ValueError: on a tolerance, step count or ratio out of range.

    Example:
        >>> import numpy as np
        >>> from iotsolve import Problem, solve
        >>> solve(Problem(np.eye(3), epsilon=0.5), Sinkhorn(tolerance=1e-10)).status.name
        'CONVERGED'
    """

    tolerance: float | None = None
    max_steps: int = 10_000
    annealing: float | None = 0.5
    stationary: bool = False
    mixing: int = 15

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        check_steps(self.max_steps, default=10_000)
        check_window(self.mixing)
        if self.annealing is not None and not (isinstance(self.annealing, Real) and 0 < self.annealing < 1):
            raise ValueError(
                f"annealing = {self.annealing!r}: is a ratio of successive epsilons, so must be in (0, 1); None switches it off."
            )

    def threshold(self, problem: Problem) -> float:
        return default_tolerance(problem.dtype) if self.tolerance is None else self.tolerance

    def schedule(self, problem: Problem, start: Potentials | None) -> tuple[list[Scalar], np.ndarray]:
        """The epsilons of the annealing sweeps, and how many of them each problem leaves out; none on a warm start.

        They go up from the problem's own by powers of the ratio: a batch shares them, and a problem of a smaller cost range
        joins later, with the steps that it would take alone.
        """
        one_sided = problem.rows.is_free or problem.columns.is_free
        if self.annealing is None or start is not None or one_sided:
            return [], np.zeros(problem.batch_shape)
        target, cost = number(problem.epsilon), problem.cost
        cost = cost if problem.is_full else cost.between(problem.a > 0, problem.b > 0)
        top = cost.range().double().cpu().numpy()
        with np.errstate(over="ignore"):
            steps = np.log(np.where(target < _EASY * top, top, target) / target) / -math.log(self.annealing)
        count = np.minimum(np.floor(steps), self.max_steps - 1)
        longest = int(count.max())
        return [target / self.annealing**k for k in range(longest, 0, -1)], longest - count

    def init(self, problem: Problem, start: Potentials | None) -> SinkhornState:
        """The state of the start; a given one comes with all its soft-minima, so that it can be judged as it is."""
        rows, columns, given = problem.rows, problem.columns, start is not None
        if not given:
            lam = problem.a.new_zeros(problem.batch_shape)
            start = Potentials(torch.zeros_like(problem.a), torch.zeros_like(problem.b), lam)
        f = torch.zeros_like(start.f) if rows.is_free else start.f  # never visited
        g = torch.zeros_like(start.g) if columns.is_free else start.g
        s = None if rows.is_free else problem.softmin(g, problem.epsilon, axis=-1)
        both = given and (rows.is_free or not columns.is_free)
        return SinkhornState(
            Potentials(f, g, start.lam), s, problem.softmin(f, problem.epsilon, axis=-2) if both else None
        )

    def step(self, problem: Problem, state: SinkhornState, epsilon: Scalar) -> SinkhornState:
        p, s, t = state.potentials, state.s, None
        rows, columns = problem.rows, problem.columns

        def lowered(x: Tensor) -> Tensor:
            return x if problem.mass is None else x - p.lam.unsqueeze(-1)

        memory = state.memory
        if memory is not None:
            memory = memory.mixed(*_iterate(problem, state), _FARTHEST * epsilon)
            if isinstance(problem.cost, Sharded):  # unlike processors round unlike, and mixing magnifies it
                memory = replace(memory, at=problem.cost.ranks.first(memory.at))
            s, p = (memory.at, p) if problem.mass is None else (memory.at[:, :-1], replace(p, lam=memory.at[:, -1]))
        if s is not None:
            p = replace(p, f=rows.aprox(lowered(s), epsilon))
        if not columns.is_free or rows.is_free:  # two free sides still have a mass to be known
            t = problem.softmin(p.f, epsilon, axis=-2)
            p = replace(p, g=columns.aprox(lowered(t), epsilon))
        if problem.mass is not None:
            log_moved = _log_mass(problem.a, p.f, s, epsilon) if t is None else _log_mass(problem.b, p.g, t, epsilon)
            p = replace(p, lam=epsilon * (_log(problem.mass) - log_moved))
        if s is not None and not columns.is_free:
            s = problem.softmin(p.g, epsilon, axis=-1)
        return translate(problem, SinkhornState(p, s, t, memory))

    def hasten(self, problem: Problem, state: SinkhornState) -> SinkhornState:
        """The state for a long way, which from now on remembers its steps: where two sides wait for each other."""
        if not self.mixing or problem.rows.is_free or problem.columns.is_free:
            return state
        return replace(state, memory=Mixing.empty(_iterate(problem, state)[0], self.mixing))

    def relent(self, state: SinkhornState, those: Tensor) -> SinkhornState | None:
        """The state of plain sweeps for some problems, that mixed ones get nowhere with; None if they are plain anyway."""
        return None if state.memory is None else replace(state, memory=state.memory.given_up(those))

    def settle(self, problem: Problem, state: SinkhornState) -> SinkhornState:
        """The translation that has no closed form: a bisection, so asked for now and then only."""
        fresh = settle(problem, state)
        if state.memory is None:
            return fresh
        before, after = (_iterate(problem, x)[0] for x in (state, fresh))
        return replace(fresh, memory=state.memory.restarted((before != after).any(-1)))


def answered(problem: Problem, p: Potentials) -> Potentials:
    """The potentials with those of empty bins as the others determine them, by a soft-min over each side, and those of bins that
    no allowed arc joins to a weight, for which it is ``+inf``.
    """
    if problem.is_full and problem.cost.all_finite():
        return p
    s = None if problem.rows.is_free else problem.softmin(p.g, problem.epsilon, axis=-1)
    return SinkhornState(p, s, problem.softmin(p.f, problem.epsilon, axis=-2)).completed(problem)


def swept(problem: Problem, p: Potentials) -> Potentials:
    """The potentials after one sweep, each exactly at its kink if it is at one."""
    method = Sinkhorn()
    return method.step(problem, method.init(problem, p), problem.epsilon).potentials


def _iterate(problem: Problem, state: SinkhornState) -> tuple[Tensor, Tensor]:
    """What a sweep makes another one of, with its weights: the soft-minima that rows answer to, and the multiplier."""
    if problem.mass is None:
        return state.s, problem.a
    lam = state.potentials.lam.unsqueeze(-1)
    return torch.cat([state.s, lam], -1), torch.cat([problem.a, torch.ones_like(lam) * problem.mass], -1)


_FARTHEST = 30.0  # from a sweep's own answer, in epsilons: exponentials stay in range
_SMALL, _SMALL_ON_DEVICE = 2**11, 2**18  # bins
_EASY = 0.05  # epsilon, in cost ranges, above which annealing only costs sweeps


def translate(problem: Problem, state: SinkhornState) -> SinkhornState:
    """The best ``(f + t, g - t)``, or with ``mass`` ``(f + t, g + u, lam - t - u)``, in closed form for KL and FIXED sides.

    The plan stays and the dual rises.
    """
    rows, columns, p = problem.rows, problem.columns, state.potentials
    soft_r, soft_c = rows.softness, columns.softness
    if problem.mass is not None:
        log_mass = _log(problem.mass)
        t = (_log_demand(rows, problem.a, p.f) - log_mass) / soft_r if soft_r else torch.zeros_like(p.lam)
        u = (_log_demand(columns, problem.b, p.g) - log_mass) / soft_c if soft_c else torch.zeros_like(p.lam)
        return state.moved(t, u) if soft_r or soft_c else state
    if soft_r is None or soft_c is None or not (soft_r or soft_c):
        return state
    t = (_log_demand(rows, problem.a, p.f) - _log_demand(columns, problem.b, p.g)) / (soft_r + soft_c)
    return state.moved(t, -t)


def settle(problem: Problem, state: SinkhornState) -> SinkhornState:
    """The same translation for every other pair: the root of a monotone function, by bisection.

    ``sum a phi_r'(f + t) = sum b phi_c'(g - t)``, or with ``mass`` ``sum a phi_r'(f + t) = mass`` on each side.
    """
    rows, columns, p = problem.rows, problem.columns, state.potentials
    if rows.is_free or columns.is_free or (rows.softness is not None and columns.softness is not None):
        return state

    def demand(side: Marginal, weights: Tensor, potential: Tensor, shift: Tensor) -> Tensor:
        asked = side.response(torch.where(weights > 0, potential, 0.0) + shift.unsqueeze(-1))
        return torch.where(weights > 0, weights * asked, 0.0).sum(-1)

    def lowest(side: Marginal, weights: Tensor, potential: Tensor) -> Tensor:
        return side.floor - torch.where(weights > 0, potential, math.inf).amin(-1)

    negligible = 16 * torch.finfo(p.f.dtype).eps * (problem.a.sum(-1) + problem.b.sum(-1))
    small = p.f.numel() + p.g.numel() <= (_SMALL if p.f.device.type == "cpu" else _SMALL_ON_DEVICE)
    parts = 16 if small else 2  # of small vectors sixteen cost what one costs
    reach = 4 * sum(torch.where(x.isfinite(), x, 0.0).abs().amax(-1) for x in (p.f, p.g)) + 4 * p.lam.abs()
    one = torch.ones((), dtype=p.f.dtype, device=p.f.device)
    reach = reach + 8 * sum(side.divergence(0 * one, one).amax() for side in (rows, columns))  # kinks lie within rho

    def root(falling: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
        return _root(falling, torch.maximum(low, -reach), torch.minimum(high, reach), negligible, parts)

    low_r, low_c = lowest(rows, problem.a, p.f), lowest(columns, problem.b, p.g)
    if problem.mass is None:
        t = root(lambda t: demand(rows, problem.a, p.f, t) - demand(columns, problem.b, p.g, -t), low_r, -low_c)
        return state.moved(t, -t).projected(problem)
    t = u = torch.zeros_like(p.lam)
    if rows.softness is None:
        t = root(lambda t: demand(rows, problem.a, p.f, t) - problem.mass, low_r, reach)
    if columns.softness is None:
        u = root(lambda u: demand(columns, problem.b, p.g, u) - problem.mass, low_c, reach)
    return state.moved(t, u).projected(problem)


def _root(falling: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, negligible: Tensor, parts: int) -> Tensor:
    """The point nearest 0 at which a falling step function crosses 0, within bounds.

    On a plateau, where sums of weights differ from each other by rounding alone, nothing moves. Both of its ends are narrowed
    down at once, by looking at ``parts - 1`` points between, in as many rounds as sixty halvings take.
    """
    level = torch.stack([negligible, -negligible])
    low, high = (torch.stack([x, x]) for x in (low.clamp(max=0.0), high.clamp(min=0.0)))
    shares = torch.arange(1, parts, device=low.device).to(low.dtype).reshape(-1, 1, 1) / parts
    for _ in range(round(60 / math.log2(parts))):
        width = high - low
        passed = (falling(low + width * shares) > level).sum(0)
        low, high = low + width * (passed / parts), low + width * ((passed + 1) / parts)
    first, last = high[0], low[1]
    return torch.where(first > 0, first, torch.where(last < 0, last, 0.0))


def _log_demand(side: Marginal, weights: Tensor, potential: Tensor) -> Tensor:
    """``log sum a phi'(f)``: the total mass the side asks for."""
    reached = torch.where(weights > 0, potential, 0.0)
    return torch.logsumexp(weights.log() - side.softness * reached, -1) + (
        side.bounds[0] and math.log(number(side.bounds[0]))
    )


def _log_mass(weights: Tensor, potential: Tensor, softmin: Tensor, epsilon: Scalar) -> Tensor:
    return torch.logsumexp(log_marginal(weights, potential, softmin, epsilon), -1)


def _log(x: Scalar) -> Scalar:
    return x.log() if isinstance(x, Tensor) else math.log(x)
