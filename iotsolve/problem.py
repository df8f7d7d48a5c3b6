"""The one problem.

    P* = argmin_{P >= 0}  <C, P> + eps KL(P | a x b) + D_rows(P 1 | a) + D_cols(P' 1 | b)      [ subject to sum P = mass ]

Notation, used everywhere in the library and defined only here:

    C        cost, shape (..., n, m); +inf is a forbidden arc
    a, b     weights of the rows (..., n) and columns (..., m), non-negative
    eps      strength of the entropy, in cost units; 0 is the linear program
    P        plan, shape (..., n, m);  r = P 1 and c = P' 1 its marginals
    f, g     potentials of the rows and columns, in cost units
    lam      multiplier of ``mass``, in cost units; 0 without it
    phi      -D*(-f) per unit of weight, see marginals.py

    P_ij = a_i b_j exp((f_i + g_j + lam - C_ij) / eps)
    dual = sum_i a_i phi_rows(f_i) + sum_j b_j phi_cols(g_j) + lam mass - eps (sum P - sum a sum b)

Gauge: FIXED/FIXED has <f, a> = <g, b>; a FIXED side beside ``mass`` has a potential of weighted mean 0.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iotsolve.costs import Cost, Dense, Points, Scalar, calm
from iotsolve.distributed import Ranks, Sharded, ranks_of
from iotsolve.kernels.precision import product
from iotsolve.kernels.uncompiled import uncompiled
from iotsolve.marginals import FIXED, Between, Marginal, kl_divergence, number
from iotsolve.validation import (
    as_cost,
    as_scalar,
    as_weights,
    check_alike,
    check_multiplier,
    check_problem,
    check_tolerance,
    common_batch,
    default_tolerance,
    rounding,
    shared,
)
from iotsolve.watch import Watch

__all__ = [
    "OVERFLOWN",
    "Potentials",
    "Problem",
    "in_double",
    "in_matrix",
    "log_scaling",
    "saturated",
    "weighed_in_double",
    "weighted",
]


@dataclass(frozen=True)
class Potentials:
    """Dual variables of a problem: rows ``f (..., n)``, columns ``g (..., m)`` and the multiplier of ``mass`` ``lam (...)``."""

    f: Float[Tensor, "*batch n"]
    g: Float[Tensor, "*batch m"]
    lam: Float[Tensor, "*batch"]

    def to(self, dtype: torch.dtype) -> Potentials:
        return Potentials(self.f.to(dtype), self.g.to(dtype), self.lam.to(dtype))

    def detach(self) -> Potentials:
        return Potentials(self.f.detach(), self.g.detach(), self.lam.detach())

    def arrays(self) -> tuple[np.ndarray, ...]:
        """All three as flat NumPy arrays."""
        return tuple(x.detach().numpy().reshape(-1) for x in (self.f, self.g, self.lam))


@dataclass(frozen=True)
class Judged:
    """The plan of some potentials that somebody has judged: its marginals and all of it, flat, in float64."""

    potentials: tuple[np.ndarray, ...]
    sums: tuple[Tensor, Tensor]
    values: np.ndarray

    def is_of(self, p: Potentials) -> bool:
        return all(map(np.array_equal, self.potentials, p.arrays()))


class Memory:
    """What was last judged of a problem, for whoever asks for it next: its solver, its certificate, and who reads the plan.

    One plan is kept in a process, the last one: solutions that somebody collects hold none.
    """

    def __init__(self) -> None:
        self._last: Callable[[], Judged | None] = _nothing

    def keep(self, judged: Judged) -> Judged:
        _latest[:] = [judged]
        self._last = weakref.ref(judged)
        return judged

    def of(self, p: Potentials) -> Judged | None:
        """What is known of these potentials' plan."""
        last = self._last()
        return last if last is not None and last.is_of(p) else None

    def take(self, p: Potentials) -> Tensor | None:
        """The plan, which is forgotten: it is the caller's now."""
        if (last := self.of(p)) is None or not float(last.sums[0].sum()) < OVERFLOWN:
            return None
        self._last = _nothing
        _latest.clear()
        return torch.from_numpy(last.values)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Memory, ()  # a copy begins with nothing


_latest: list[Judged] = []


def _nothing() -> None:
    return None


@dataclass(frozen=True, init=False, eq=False)
class Problem:
    """An optimal-transport problem: frozen data, validated once.

    Args:
        cost: shape ``(..., n, m)``, NumPy or torch; finite, or ``+inf`` for a forbidden arc. Or :class:`Points`, which is
            never held as a matrix.
        a: weights of the rows, shape ``(n,)`` or ``(..., n)``, non-negative; uniform ``1/n`` by default.
        b: weights of the columns, shape ``(m,)`` or ``(..., m)``; uniform ``1/m`` by default.
        epsilon: strength of the entropy in cost units, ``>= 0``; 0 (default) is exact transport.
        rows: marginal object of the rows: ``FIXED``, ``FREE``, ``AT_MOST``, ``Between(lo, hi)``, ``KL(rho)``, ``TV(rho)``,
            ``ChiSquared(rho)``, ``L2(rho)``.
        columns: marginal object of the columns.
        mass: total mass of the plan, or None to leave it to the marginals.

    Raises:
        ValueError: on NaN, negative weights, unequal totals under FIXED/FIXED, bounds that cannot meet, problems with
            no answer (unbounded, or a plan of zero mass), and shapes that do not fit. The message tells value, rule,
            cause and fix.

    Example:
        >>> import numpy as np
        >>> problem = Problem(np.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1)
        >>> problem.shape
        (2, 2)
    """

    cost: Cost
    a: Float[Tensor, "*batch n"]
    b: Float[Tensor, "*batch m"]
    epsilon: Scalar
    rows: Marginal
    columns: Marginal
    mass: Scalar | None
    as_numpy: bool
    forgiven: float
    sides: tuple[Marginal, Marginal]
    is_checked: bool
    is_even: bool
    memory: Memory | None = field(default=None, repr=False)
    watch: Watch | None = field(default=None, repr=False)

    @uncompiled
    def __init__(
        self,
        cost: Any,
        a: Any = None,
        b: Any = None,
        *,
        epsilon: Scalar = 0.0,
        rows: Marginal = FIXED,
        columns: Marginal = FIXED,
        mass: Scalar | None = None,
    ) -> None:
        ranks = ranks_of(cost)
        with ranks.together():
            even = a is None and b is None
            with torch.enable_grad():  # data are what they are: under no_grad views of them would lead nowhere, unsaid
                cost, as_numpy = as_cost(cost)
                n, m = cost.shape[-2:]
                a, b = as_weights("a", a, n, cost), as_weights("b", b, m, cost)
                epsilon = as_scalar("epsilon", epsilon, hint="0 is exact transport")
                mass = None if mass is None else as_scalar("mass", mass, hint="leave it None to let the marginals decide")
                batch = common_batch(cost, a, b)
                self._set(cost.expand(batch), a.expand(*batch, n), b.expand(*batch, m), epsilon, rows, columns, mass)
            object.__setattr__(self, "as_numpy", as_numpy)
            object.__setattr__(self, "is_even", even)
            if even:
                each = np.float32 if a.dtype == torch.float32 else np.float64
                totals = [size * float(each(1.0 / size)) for size in (n, m)]
                self.__dict__.update(is_full=True, amounts=np.multiply.outer(totals, np.ones(batch)))
            with calm(cost):
                check_problem(self)
        if isinstance(ranks, Ranks):
            check_alike(self, ranks)
        object.__setattr__(self, "is_checked", True)
        object.__setattr__(self, "watch", Watch.over(self.tensors(), as_numpy=as_numpy))

    def _set(
        self,
        cost: Cost | Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Scalar,
        rows: Marginal,
        columns: Marginal,
        mass: Scalar | None,
    ) -> None:
        cost = Dense(cost) if isinstance(cost, Tensor) else cost
        values = dict(cost=cost, a=a, b=b, epsilon=epsilon, mass=mass, as_numpy=False, forgiven=rounding(cost.dtype))
        values |= dict(sides=(rows, columns), rows=rows, columns=columns, is_checked=False, is_even=False)
        if isinstance(rows, Marginal) and isinstance(columns, Marginal):  # else validation has the word
            values |= dict(rows=rows.at(a), columns=columns.at(b))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def unchecked(
        cls,
        cost: Cost | Tensor,
        a: Tensor,
        b: Tensor,
        *,
        epsilon: Scalar,
        rows: Marginal = FIXED,
        columns: Marginal = FIXED,
        mass: Scalar | None = None,
    ) -> Problem:
        """The same object without validation and without a look at the data: for training steps that build thousands."""
        problem = object.__new__(cls)
        problem._set(cost, a, b, epsilon, rows, columns, mass)
        return problem

    def current(self) -> Problem:
        """The problem of what its arrays are now: itself, or if they were changed in place a new one, validated as it was.

        Raises:
            ValueError: if what they are now is no problem.
        """
        changed = self.watch is not None and self.watch.changed() is not None
        if isinstance(self.cost, Sharded) and self.watch is not None:  # validation is a meeting of all ranks, or of none
            changed = bool(self.cost.ranks.sum(torch.tensor(float(changed), device=self.cost.device)))
        if not changed:
            return self
        rows, columns = self.sides
        anew = Problem(self.cost, self.a, self.b, epsilon=self.epsilon, rows=rows, columns=columns, mass=self.mass)
        object.__setattr__(anew, "as_numpy", self.as_numpy)
        object.__setattr__(anew, "forgiven", self.forgiven)
        return anew

    # -- shape and place ---------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., n, m)``."""
        return tuple(self.cost.shape)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions: one independent problem each."""
        return self.shape[:-2]

    @property
    def dtype(self) -> torch.dtype:
        return self.cost.dtype

    @property
    def working_dtype(self) -> torch.dtype:
        """The arithmetic a problem is solved in: float32 for half precision, its own otherwise."""
        return torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype

    @cached_property
    def is_full(self) -> bool:
        """True if no bin is empty."""
        return all(float(shared(w).min()) > 0 for w in (self.a, self.b))

    @cached_property
    def is_plain(self) -> bool:
        """True if no bin is empty and no arc forbidden: no exponent is infinite, and none has to be looked at."""
        return self.is_full and self.cost.all_finite()

    @property
    def _totals(self) -> tuple[Tensor, Tensor]:
        return self._settled_totals if not (self.a.requires_grad or self.b.requires_grad) else self._summed()

    @cached_property
    def _settled_totals(self) -> tuple[Tensor, Tensor]:
        return self._summed()

    def _summed(self) -> tuple[Tensor, Tensor]:
        return self.a.sum(-1), self.b.sum(-1)

    @cached_property
    def amounts(self) -> np.ndarray:
        """The totals of ``a`` and of ``b``, ``(2, ...)``, for whoever decides something by them: float64, on the host."""
        return torch.stack([w.detach().sum(-1) for w in (self.a, self.b)]).cpu().double().numpy()

    @property
    def product(self) -> Tensor:
        """``sum a x b`` of each problem."""
        return self._totals[0] * self._totals[1]

    @property
    def is_exact(self) -> bool:
        """True for ``epsilon = 0``."""
        return not isinstance(self.epsilon, Tensor) and self.epsilon == 0

    # -- derived problems --------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the problem by name: the inputs a gradient can flow to."""
        named = {**self.cost.tensors(), "a": self.a, "b": self.b}
        named |= {name: x for name, x in (("epsilon", self.epsilon), ("mass", self.mass)) if isinstance(x, Tensor)}
        for name, side in zip(("rows", "columns"), self.sides, strict=True):
            named |= {f"{name}.{k}": v for k, v in side.tensors().items()}
        return named

    def with_tensors(self, named: dict[str, Tensor]) -> Problem:
        """The same problem with some of :meth:`tensors` replaced, unvalidated."""
        sides = {}
        for name, side in zip(("rows", "columns"), self.sides, strict=True):
            own = {k.split(".")[1]: v for k, v in named.items() if k.startswith(name)}
            sides[name] = replace(side, **own) if own else side
        problem = Problem.unchecked(
            self.cost.with_tensors(named),
            named.get("a", self.a),
            named.get("b", self.b),
            epsilon=named.get("epsilon", self.epsilon),
            mass=named.get("mass", self.mass),
            **sides,
        )
        object.__setattr__(problem, "as_numpy", self.as_numpy)
        object.__setattr__(problem, "forgiven", self.forgiven)  # in the precision of what was given
        return problem

    def with_epsilon(self, epsilon: float) -> Problem:
        """The same problem at another epsilon, unvalidated."""
        problem = self._viewed(self.tensors())
        problem.__dict__.update(epsilon=epsilon, memory=None)
        return problem

    def with_cost(self, cost: Cost) -> Problem:
        """The same problem of a cost of the same size, unvalidated."""
        problem = self._viewed(self.tensors())
        problem.__dict__.update(cost=cost, memory=None)
        return problem

    def with_sides(self, rows: Marginal, columns: Marginal) -> Problem:
        """The same problem with other sides, unvalidated."""
        problem = self._viewed(self.tensors())
        for name, value in (("rows", rows), ("columns", columns), ("sides", (rows, columns))):
            object.__setattr__(problem, name, value)
        return problem

    def detach(self) -> Problem:
        named = self.tensors()
        if not any(x.requires_grad for x in named.values()):
            return self
        return self._viewed({k: v.detach() for k, v in named.items()})

    def to(self, dtype: torch.dtype) -> Problem:
        named = self.tensors()
        if all(x.dtype == dtype for x in named.values()):
            return self
        return self._viewed({k: v.to(dtype) for k, v in named.items()})

    def _viewed(self, named: dict[str, Tensor]) -> Problem:
        """:meth:`with_tensors` of tensors with the same numbers, of which a cost may keep what it knows."""
        problem = self.with_tensors(named)
        if isinstance(self.cost, Dense):
            object.__setattr__(problem, "cost", self.cost.viewed(problem.cost.matrix))
        elif isinstance(self.cost, Points) and isinstance(problem.cost, Points):
            self.cost.viewed(problem.cost)
        if self.__dict__.get("is_full"):  # and so is every part
            problem.__dict__["is_full"] = True
        if "known_logs" in self.__dict__:
            problem.__dict__["known_logs"] = {}
        known, batch = self.__dict__.get("amounts"), problem.a.shape[:-1]
        if known is not None and problem.a.dtype == self.a.dtype and math.prod(batch) * 2 == known.size:
            problem.__dict__["amounts"] = known.reshape(2, *batch)
        if problem.dtype == self.dtype:
            problem.__dict__["memory"] = self.memory
        return problem

    def remembering(self) -> Problem:
        """The same problem for one solve and its solution, which share the plan they compute, if it is one and small, and what
        they find out of points; of arrays that are changed in place the next solve knows nothing.
        """
        n, m = self.shape[-2:]
        cost, twin = self.cost, object.__new__(Problem)
        twin.__dict__.update(self.__dict__)
        # another solve's memory, and numbers of weights that are the caller's
        for name in ("_flat",) if self.is_even else ("_flat", "amounts", "mismatched", "_settled_totals"):
            twin.__dict__.pop(name, None)
        if self.a.is_inference() or self.b.is_inference():  # nobody tells whether they were changed
            twin.__dict__.update(rows=self.sides[0].at(self.a), columns=self.sides[1].at(self.b))
        if isinstance(cost, Points):
            twin.__dict__["cost"] = replace(cost)
            return twin
        few = isinstance(cost, Dense) and cost.matrix.numel() == n * m <= _REMEMBERED
        if few and not self.is_exact and cost.dtype == torch.float64 and cost.is_compiled:
            twin.__dict__.update(memory=Memory(), is_full=self.is_full)
        return twin

    def swept(self) -> Problem:
        """The same problem for many sweeps, during which nobody changes its weights: their logarithms are taken once."""
        twin = object.__new__(Problem)
        twin.__dict__.update(self.__dict__, known_logs={})
        return twin

    def working(self) -> Problem:
        """The detached problem in the arithmetic it is solved in: half precision is solved in float32. The sides' parameters keep
        their digits: potentials rest exactly at their kinks, and are read there by whoever has all of these.
        """
        problem, dtype = self.detach(), self.working_dtype
        named = {k: v for k, v in problem.tensors().items() if not k.startswith(("rows.", "columns."))}
        if all(x.dtype == dtype for x in named.values()):
            return problem
        return problem._viewed({k: v.to(dtype) for k, v in named.items()})

    def flat(self) -> Problem:
        """The same problems with exactly one batch dimension."""
        if len(self.batch_shape) == 1:
            return self
        if (known := self.__dict__.get("_flat")) is not None:
            return known
        cost = {name: x.reshape(-1, *x.shape[-2:]) for name, x in self.cost.tensors().items()}
        flat = self._viewed({**cost, "a": self.a.reshape(-1, self.shape[-2]), "b": self.b.reshape(-1, self.shape[-1])})
        if self.memory is not None and not any(x.requires_grad for x in self.tensors().values()):
            self.__dict__["_flat"] = flat  # for the certificate, which looks at it next
        return flat

    def select(self, index: Tensor | int) -> Problem:
        """The problems at ``index`` along the first batch dimension."""
        cost = {name: x[index] for name, x in self.cost.tensors().items()}
        chosen = self._viewed({**cost, "a": self.a[index], "b": self.b[index]})
        chosen.__dict__.pop("amounts", None)
        return chosen

    # -- the mathematics ---------------------------------------------------------------------------------------------

    def plan(self, p: Potentials) -> Float[Tensor, "*batch n m"]:
        """``P_ij = a_i b_j exp((f_i + g_j + lam - C_ij) / eps)``."""
        if self._traced(p):
            return self.a.unsqueeze(-1) * self._density(p) * self.b.unsqueeze(-2)
        if self.memory is not None and (known := self.memory.take(p)) is not None:
            return known.reshape(self.shape)
        rows = log_scaling(self.a, p.f + p.lam.unsqueeze(-1), self.epsilon)
        return self.cost.gibbs(rows, log_scaling(self.b, p.g, self.epsilon), self.epsilon)

    def plan_blocks(self, p: Potentials) -> Iterator[tuple[slice, Tensor]]:
        """The plan in the blocks of rows in which its cost is read."""
        rows = log_scaling(self.a, p.f + p.lam.unsqueeze(-1), self.epsilon)
        columns = log_scaling(self.b, p.g, self.epsilon)
        for part, block in self.cost.blocks():
            yield part, block.gibbs(rows[..., part], columns, self.epsilon)

    def log_plan(self, p: Potentials) -> Float[Tensor, "*batch n m"]:
        """``log P``, ``-inf`` at arcs that carry nothing."""
        slack, allowed = self.cost.slack(p.f + p.lam.unsqueeze(-1), p.g)
        log_weights = self.a.log().unsqueeze(-1) + self.b.log().unsqueeze(-2)
        return torch.where(allowed, slack / self.epsilon + log_weights, -math.inf)

    def _traced(self, p: Potentials) -> bool:
        """Whether autograd follows: then masks are needed so that no derivative of a forbidden or empty entry is NaN."""
        inputs = (p.f, p.g, p.lam, *self.tensors().values())
        return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    def _density(self, p: Potentials) -> Tensor:
        """``exp((f + g + lam - C) / eps)`` for autograd, bounded: times any weight it is finite, times a weight of 0 it is 0."""
        slack, allowed = self.cost.slack(p.f + p.lam.unsqueeze(-1), p.g)
        carries = allowed & ((self.a > 0).unsqueeze(-1) | (self.b > 0).unsqueeze(-2))
        heaviest = torch.maximum(self.a.detach().amax(), self.b.detach().amax()).clamp(min=1.0)
        largest = math.log(torch.finfo(slack.dtype).max) - 1.0 - heaviest.log()
        exponent = (torch.where(carries, slack, 0.0) / self.epsilon).clamp(max=largest)
        return torch.where(carries, torch.exp(exponent), 0.0)

    def primal(self, plan: Any, *, tolerance: float | None = None) -> Any:
        """Full objective of any plan: transport, entropy and penalties; ``+inf`` if the plan is not allowed.

        Args:
            plan: non-negative, shape ``(..., n, m)``, NumPy or torch; without batch dimensions also sparse COO.
            tolerance: violation of hard sides and of ``mass`` still counted as rounding, relative to the plan's mass; what a
                solver stops at by default.
        """
        check_tolerance(tolerance)
        return self.leave(self.current().primal_at(self.enter("plan", plan, *self.shape[-2:]), tolerance=tolerance))

    def primal_at(self, plan: Tensor, *, tolerance: float | None = None) -> Tensor:
        """:meth:`primal` on tensors."""
        r, c = _sum(plan, -1), _sum(plan, -2)
        index, values = _entries(plan)
        cost = self.cost.entries(index) if index else self.cost.dense()
        carrying = values > 0
        transport = torch.where(carrying, torch.where(carrying, cost, 0.0) * values, 0.0)
        value = _total(transport, index)
        if not self.is_exact:
            value = value + self.epsilon * self._entropy(index, values)
        value = value + self.rows.divergence(r, self.a).sum(-1) + self.columns.divergence(c, self.b).sum(-1)
        violation = self.violations(r, c)
        limit = default_tolerance(plan.dtype) if tolerance is None else tolerance
        allowed = sum(violation) <= limit * r.sum(-1)
        if self.is_exact:
            allowed = allowed & (_total(values * (self._reference(index) == 0), index) == 0)
        return torch.where(allowed & _nonnegative(values), value, math.inf)

    def _reference(self, index: tuple[Tensor, ...]) -> Tensor:
        if index:
            return self.a[index[0]] * self.b[index[1]]
        return self.a.unsqueeze(-1) * self.b.unsqueeze(-2)

    def _entropy(self, index: tuple[Tensor, ...], values: Tensor) -> Tensor:
        reference = self._reference(index)
        kl = _total(kl_divergence(values, reference), index)
        return kl + self.a.sum(-1) * self.b.sum(-1) - reference.sum() if index else kl

    def dual(self, f: Any, g: Any, lam: Any = 0.0) -> Any:
        """Dual objective: a lower bound of the optimal value for every ``f, g, lam``; ``-inf`` outside the dual's domain.

        Args:
            f: shape ``(..., n)``, cost units.
            g: shape ``(..., m)``, cost units.
            lam: multiplier of ``mass``, shape ``(...)``; 0 without it.
        """
        check_multiplier(self, lam)
        n, m = self.shape[-2:]
        p = Potentials(
            self.enter("f", f, n), self.enter("g", g, m), self.enter("lam", lam).expand(tuple(self.batch_shape))
        )
        return self.leave(self.current().dual_at(p))

    def dual_at(self, p: Potentials) -> Tensor:
        """:meth:`dual` on tensors."""
        value = self.dual_sides(p)
        if not self.is_exact:
            return value + self.dual_entropy(p)
        ceiling = self.cost.reduced_min(p.g + p.lam.unsqueeze(-1), self.b, axis=-1)
        reached = (self.a > 0) & ceiling.isfinite() & p.f.isfinite()
        excess = torch.where(reached, p.f - torch.where(reached, ceiling, 0.0), -math.inf).amax(-1)
        rounding = 64 * torch.finfo(p.f.dtype).eps * (p.f.abs().amax(-1) + p.g.abs().amax(-1) + p.lam.abs())
        return torch.where(excess <= rounding, value, -math.inf)

    def dual_sides(self, p: Potentials) -> Tensor:
        """``sum a phi_rows(f) + sum b phi_cols(g) + lam mass``."""
        value = weighted(self.a, self.rows.conjugate(p.f)) + weighted(self.b, self.columns.conjugate(p.g))
        return value if self.mass is None else value + p.lam * self.mass

    def dual_entropy(self, p: Potentials) -> Tensor:
        """``-eps (sum P - sum a sum b)``, differentiable at empty bins too."""
        if self._traced(p) and self.streams_everywhere(p):
            total = self.cost.plan_mass(self.a, self.b, p.f + p.lam.unsqueeze(-1), p.g, self.epsilon)
        elif self._traced(p):
            total = (product(self._density(p), self.b.unsqueeze(-1)).squeeze(-1) * self.a).sum(-1)
        elif isinstance(self.cost, Dense):
            total = sum(plan.sum((-2, -1)) for _, plan in self.plan_blocks(p))
        else:
            s = self.softmin(p.g, self.epsilon, axis=-1)
            total = self.marginal_of(p.f + p.lam.unsqueeze(-1), s, axis=-1).sum(-1)
        return -self.epsilon * (total - self.a.sum(-1) * self.b.sum(-1))

    def duality_gap(self, plan: Tensor, p: Potentials) -> Tensor:
        """``primal(plan) - dual(p)`` as a sum of non-negative terms, for a plan that satisfies the hard sides.

        eps KL(Q | P_fg) + FY_rows(Q 1, f) + FY_cols(Q' 1, g); at eps = 0 the first term is <C - f - g - lam, Q>.
        """
        if self.is_exact:
            slack, _ = self.cost.slack(p.f + p.lam.unsqueeze(-1), p.g)
            first = torch.where(plan > 0, -slack * plan, 0.0).sum((-2, -1))
        else:
            first = self.epsilon * kl_divergence(plan, self.plan(p)).sum((-2, -1))
        return first + self.side_gaps(plan.sum(-1), plan.sum(-2), p)

    def side_gaps(self, r: Tensor, c: Tensor, p: Potentials) -> Tensor:
        """Fenchel-Young terms of both sides at marginals ``r`` and ``c``."""
        rows = self.rows.fenchel_young(r, p.f, self.a)
        columns = self.columns.fenchel_young(c, p.g, self.b)
        return rows.sum(-1) + columns.sum(-1)

    def violations(self, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L1 distance of the marginals from the hard sides, and of the total from ``mass``."""
        nothing = torch.zeros_like(r[..., 0])
        rows, columns = (
            side.violation(x, weights).sum(-1) if side.is_hard else nothing
            for side, x, weights in ((self.rows, r, self.a), (self.columns, c, self.b))
        )
        return rows, columns, nothing if self.mass is None else (r.sum(-1) - self.mass).abs()

    def mismatch(self) -> Tensor:
        """:attr:`mismatched` as a tensor."""
        return torch.as_tensor(self.mismatched, dtype=self.a.dtype, device=self.a.device)

    @cached_property
    def mismatched(self) -> np.ndarray:
        """By how much the totals the two sides and ``mass`` ask for differ, if that is rounding; 0 if it is more."""
        if self.mass is None and not (self.rows.is_hard or self.columns.is_hard):
            return np.zeros(self.batch_shape)
        apart, most = self._totals_apart()
        return np.where(apart <= 2 * self.forgiven * most, apart, 0.0)

    def contradicts_itself(self) -> Bool[Tensor, "*batch"]:
        """Whether the totals differ by more than rounding: construction refuses that, :meth:`with_tensors` cannot."""
        if self.is_checked:
            return torch.zeros(self.batch_shape, dtype=torch.bool, device=self.cost.device)
        apart, most = self._totals_apart()
        return torch.as_tensor(apart > 2 * self.forgiven * most, device=self.cost.device)

    @np.errstate(over="ignore", invalid="ignore")  # infinite bounds
    def _totals_apart(self) -> tuple[np.ndarray, np.ndarray]:
        """By how much the least total asked for exceeds the largest allowed, and the latter."""
        (rows, columns), bounds = self.amounts, (self.rows.bounds, self.columns.bounds)
        (lo_r, hi_r), (lo_c, hi_c) = (map(number, ends) for ends in bounds)
        lowest, highest = np.maximum(lo_r * rows, lo_c * columns), np.minimum(hi_r * rows, hi_c * columns)
        if self.mass is not None:
            lowest, highest = np.maximum(lowest, number(self.mass)), np.minimum(highest, number(self.mass))
        return np.maximum(lowest - highest, 0.0), highest

    def streams_everywhere(self, p: Potentials) -> bool:
        """Whether products of the plan of potentials have every derivative without the cost as a matrix: a bilinear cost, and no
        bin that is empty or out of reach.
        """
        bilinear = isinstance(self.cost, Points) and self.cost.is_bilinear
        return bilinear and self.is_full and all(bool(x.isfinite().all()) for x in (p.f, p.g, p.lam))

    def softmin(self, potential: Tensor, epsilon: Scalar, *, axis: int) -> Tensor:
        """The soft-minimum of the cost less a potential: over columns (axis -1, of theirs) or over rows."""
        plain = not (torch.is_grad_enabled() or isinstance(epsilon, Tensor)) and self.is_plain
        if plain and isinstance(self.cost, Points):
            return self.cost.softmin_at(self._logs(axis), potential, epsilon, axis=axis)
        return self.cost.softmin(self.log_scaled(potential, epsilon, axis=axis), epsilon, axis=axis)

    def log_scaled(self, potential: Tensor, epsilon: Scalar, *, axis: int) -> Tensor:
        """:func:`log_scaling` of the columns' weights (axis -1) or of the rows'."""
        if torch.is_grad_enabled() or isinstance(epsilon, Tensor) or not self.is_plain:
            return log_scaling(self.b if axis == -1 else self.a, potential, epsilon)
        return torch.add(self._logs(axis), potential, alpha=1.0 / epsilon)

    def _logs(self, axis: int) -> Tensor:
        """The logarithms of the columns' weights (axis -1) or of the rows'."""
        known, weights = self.__dict__.get("known_logs", {}), self.b if axis == -1 else self.a
        if axis not in known:
            known[axis] = weights.log()
        return known[axis]

    def marginal_of(self, potential: Tensor, softmin: Tensor, *, axis: int) -> Tensor:
        """``a exp((f - s) / epsilon)`` of the rows (axis -1: of a soft-minimum over columns) or of the columns; 0 where nothing
        arrives.
        """
        weights = self.a if axis == -1 else self.b
        if not torch.is_grad_enabled() and self.is_plain:
            if potential is softmin:
                return weights
            return (self._logs(-3 - axis) + (potential - softmin) / self.epsilon).exp()
        return log_marginal(weights, potential, softmin, self.epsilon).exp()

    def dual_sides_and_scale(self, p: Potentials) -> tuple[Tensor, Tensor]:
        """:meth:`dual_sides`, and the sum of the absolute values of its terms."""
        terms = [(self.a, self.rows.conjugate(p.f)), (self.b, self.columns.conjugate(p.g))]
        terms = torch.cat([w * x if self.is_full else _terms(w, x) for w, x in terms], -1)
        value, scale = terms.sum(-1), torch.linalg.vector_norm(terms, 1, dim=-1)
        if self.mass is None:
            return value, scale
        mass = p.lam * self.mass
        return value + mass, scale + mass.abs()

    def magnitude(self, mass: Scalar) -> Tensor:
        """Size of the terms that a value near 0 may be the difference of: the price of no plan, and the entropy's."""
        return self._empty + self.epsilon * (mass + self.product)

    @cached_property
    def _empty(self) -> Tensor:
        """The price of no plan."""
        return self.rows.idle(self.a).sum(-1) + self.columns.idle(self.b).sum(-1)

    def gauge(self, p: Potentials) -> Potentials:
        """The equivalent potentials in the gauge named at the top of this file; the plan does not change."""
        if self.mass is None:
            if not (self.rows.is_fixed and self.columns.is_fixed):
                return p
            with calm(p.f):
                on_rows, on_columns = (
                    (w * x).sum(-1) if self.is_full else _over_reached(w, x) for w, x in ((self.a, p.f), (self.b, p.g))
                )
                known = None if self.a.requires_grad or self.b.requires_grad else self.__dict__.get("amounts")
                one = known is not None and known.size == 2
                both = float(known.sum()) if one else self._totals[0] + self._totals[1]
                shift = ((on_rows - on_columns) / both).unsqueeze(-1)
            return Potentials(p.f - shift, p.g + shift, p.lam)
        f, g, lam = p.f, p.g, p.lam
        if self.rows.is_fixed:
            shift = _over_reached(self.a, f) / self.a.sum(-1)
            f, lam = f - shift.unsqueeze(-1), lam + shift
        if self.columns.is_fixed:
            shift = _over_reached(self.b, g) / self.b.sum(-1)
            g, lam = g - shift.unsqueeze(-1), lam + shift
        return Potentials(f, g, lam)

    # -- the border to NumPy -----------------------------------------------------------------------------------------

    def enter(self, name: str, x: Any, *shape: int) -> Tensor:
        """``x`` as a tensor of shape ``(..., *shape)``, the leading dimensions this problem's or none."""
        if not isinstance(x, Tensor):
            try:
                x = np.require(x, dtype=np.float64, requirements="W")  # a plan of ours is read-only, of which torch warns
                x = torch.as_tensor(x, dtype=self.dtype, device=self.cost.device)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{name} = {x!r}: must be an array of numbers. Were rows of unequal length passed?"
                ) from error
        if tuple(x.shape) not in {shape, (*self.batch_shape, *shape)}:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: must be {(*self.batch_shape, *shape)} for this problem of shape "
                f"{self.shape}. Was it made for another problem, or transposed?"
            )
        return x

    def leave(self, x: Tensor) -> Any:
        """``x`` as the caller gave the cost: NumPy (a scalar where it has no shape), or torch in the cost's dtype."""
        return x.detach().to(self.dtype).numpy()[()] if self.as_numpy else x.to(self.dtype)


_REMEMBERED = 2**18  # entries of a plan that is kept for whoever asks for it next
OVERFLOWN = 1e300  # total of a plan one of whose entries may have: exponentials end there and are not infinite


def in_double(problem: Problem, *, costs: bool = True) -> Problem:
    """The problem in float64, but for a matrix that compiled passes read in float64 anyway, or for any if ``costs`` are what is
    only subtracted from potentials.
    """
    named = problem.tensors()
    if isinstance(problem.cost, Dense) and (problem.cost.is_compiled or not costs):
        del named["cost"]
    if all(x.dtype == torch.float64 for x in named.values()):
        return problem
    return problem._viewed({name: x.double() for name, x in named.items()})


def weighed_in_double(problem: Problem) -> Problem:
    """The problem with weights, and so potentials, in float64: these are vectors, and at a small epsilon the digits that float32
    lacks are theirs.
    """
    if problem.a.dtype == torch.float64:
        return problem
    return problem._viewed({**problem.tensors(), "a": problem.a.double(), "b": problem.b.double()})


def in_matrix(problem: Problem) -> Problem:
    """The cost of points as a matrix, for as long as somebody reads it many times: of few points, whose stored kernel a CPU
    sweeps in a tenth of the time, and of more that no compiled pass reads (euclidean distances, functions, batches).
    """
    cost = problem.cost
    if not isinstance(cost, Points):
        return problem
    most = _FEW_ON_DEVICE if cost.device.type != "cpu" else _FEW if cost.is_bilinear else _MANY
    if math.prod(cost.shape) > most:
        return problem
    mixed = cost.dtype == torch.float32 and problem.a.dtype == torch.float64
    if mixed and 2.0**-24 * float(cost.range().amax()) > _SEEN * number(problem.epsilon):
        cost = cost.with_tensors({name: x.double() for name, x in cost.tensors().items()})
    matrix = torch.empty(cost.shape, dtype=cost.dtype, device=cost.device)
    for rows, block in cost.blocks():  # differences of all points at once would be as many matrices as there are dimensions
        matrix[..., rows, :] = block.matrix
    return problem.with_cost(Dense(matrix))


_FEW, _MANY, _FEW_ON_DEVICE = 2**24, 2**27, 2**24  # arcs
_SEEN = 1e-6  # relative error of a plan's entries from costs in float32, above which these are float64


def saturated(problem: Problem) -> Problem:
    """The problem with a side held to the end of its bounds that the other's total forces it to, where only rounding is to spare.

    Capacities that sum to the demand are no choice; left as bounds they have a dual that rises forever if rounding has made the
    one sum the smaller, and a linear program has no answer.
    """
    rows, columns = problem.rows, problem.columns
    bounded = all(isinstance(side, Between) for side in (rows, columns))
    if problem.mass is not None or not bounded or (rows.is_fixed and columns.is_fixed):
        return problem
    totals = [w.sum(-1) for w in (problem.a, problem.b)]
    (lo_r, hi_r), (lo_c, hi_c) = (
        (lo * total, hi * total) for (lo, hi), total in zip((rows.bounds, columns.bounds), totals, strict=True)
    )
    lowest, highest = torch.maximum(lo_r, lo_c), torch.minimum(hi_r, hi_c)
    near = 16 * torch.finfo(problem.dtype).eps * highest
    if not bool((highest.isfinite() & (highest - lowest <= near)).all()):
        return problem
    sides = {}
    for name, side, low, high in (("rows", rows, lo_r, hi_r), ("columns", columns, lo_c, hi_c)):
        ends = [(side.hi, (high - lowest).abs()), (side.lo, (low - highest).abs())]
        held = next((end for end, off in ends if number(end) > 0 and bool((off <= near).all())), None)
        sides[name] = side if held is None or side.is_fixed else Between(held, held)
    if sides["rows"] is rows and sides["columns"] is columns:
        return problem
    return problem.with_sides(**sides)


def log_scaling(weights: Tensor, potential: Tensor, epsilon: Scalar) -> Tensor:
    """``log(a exp(f / epsilon))``, ``-inf`` at empty and unreachable bins."""
    if not torch.is_grad_enabled():  # half as many launches, for what has no derivative to be kept finite
        found = weights.log() + potential / epsilon
        return torch.where(found < math.inf, found, -math.inf)
    reached = (weights > 0) & potential.isfinite()
    return torch.where(reached, weights.log() + torch.where(reached, potential, 0.0) / epsilon, -math.inf)


def log_marginal(weights: Tensor, potential: Tensor, softmin: Tensor, epsilon: Scalar) -> Tensor:
    """``log(a exp((f - s) / epsilon))``, ``-inf`` where nothing arrives."""
    reached = (weights > 0) & softmin.isfinite() & potential.isfinite()
    return torch.where(reached, weights.log() + torch.where(reached, potential - softmin, 0.0) / epsilon, -math.inf)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """``sum weights * values`` in which a bin of weight 0 counts 0 even at an infinite value, with its derivative kept."""
    return _terms(weights, values).sum(-1)


def _over_reached(weights: Tensor, values: Tensor) -> Tensor:
    """``sum weights * values`` over the bins that something can reach; no more weight can come to an empty one of the others."""
    return (weights * torch.where(values.isfinite(), values, 0.0)).sum(-1)


def _terms(weights: Tensor, values: Tensor) -> Tensor:
    largest = torch.finfo(values.dtype).max
    return weights * torch.where(weights > 0, values, values.clamp(-largest, largest))


def _entries(plan: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Index and values of a sparse plan; an empty index and all values of a dense one."""
    if not plan.is_sparse:
        return (), plan
    plan = plan.coalesce()
    return tuple(plan.indices()), plan.values()


def _sum(plan: Tensor, axis: int) -> Tensor:
    return plan.sum(axis).to_dense() if plan.is_sparse else plan.sum(axis)


def _total(values: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    return values.sum() if index else values.sum((-2, -1))


def _nonnegative(values: Tensor) -> Tensor:
    return (values >= 0).all() if values.dim() < 2 else (values >= 0).flatten(-2).all(-1)
