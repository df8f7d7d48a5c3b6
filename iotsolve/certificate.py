"""How right a solution is: bounds of the optimal value and errors of the plan.

Computed in float64 from the problem and the potentials alone, by code no solver uses: weak duality puts the optimal value
between ``dual`` and ``primal``, whoever found the potentials and however. A plan is read in passes and never held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iotsolve.costs import quiet
from iotsolve.marginals import kl_divergence, number
from iotsolve.newton import DualSystem
from iotsolve.plans import Chunk, Factors, Plan, QuickPlan, in_batch, is_quick, plan_of, quick_plan, streams
from iotsolve.problem import OVERFLOWN, Potentials, Problem, in_double, in_matrix, saturated
from iotsolve.validation import check_multiplier, check_tolerance, default_tolerance

__all__ = ["Certificate", "certify"]


@dataclass(frozen=True)
class Certificate:
    """Bounds of the optimal value and the errors of the plan; float64, NumPy arrays where the problem has a batch.

    Attributes:
        primal: objective of a feasible plan (the plan, rounded onto its constraints); ``inf`` if none was found.
        dual: objective of the potentials, repaired into the dual's domain; ``dual <= optimal value <= primal``.
        gap: ``primal - dual``, summed from non-negative terms without cancellation.
        scale: sum of the absolute terms of the dual: what the gap is large or small against.
        rounding: what sums of terms of this size, in the problem's own dtype, can be off by, of half precision by the mismatch
            of totals too; a smaller gap says nothing.
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
        with np.errstate(over="ignore"):
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


def certify(
    problem: Problem, f: Any, g: Any, lam: Any = 0.0, *, plan: Any = None, tolerance: float | None = None
) -> Certificate:
    """Certificate of anybody's potentials: ours, another library's, a guess.

    Args:
        problem: the problem they are meant to solve.
        f: potentials of the rows, shape ``(..., n)``, cost units. Projected into the dual's domain first.
        g: potentials of the columns, shape ``(..., m)``.
        lam: multiplier of ``mass``, shape ``(...)``; 0 without it.
        plan: needed at ``epsilon = 0`` only, where potentials do not determine a plan; without a batch also sparse COO.
        tolerance: relative error that counts as certified; by default what the problem's dtype allows.

    Raises:
        ValueError: on potentials of another shape, or a multiplier of a mass that is not asked for.

    Example:
        >>> import numpy as np
        >>> from iotsolve import Problem, certify
        >>> problem = Problem(np.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.5)
        >>> bool(certify(problem, np.zeros(2), np.zeros(2)).gap > 0)
        True
    """
    with quiet(problem.cost), torch.no_grad(), np.errstate(all="ignore"):  # what is not finite does not hold
        return _certify(problem, f, g, lam, plan, tolerance)


def _certify(problem: Problem, f: Any, g: Any, lam: Any, exact: Any, tolerance: float | None) -> Certificate:
    check_multiplier(problem, lam)
    check_tolerance(tolerance)
    problem = saturated(problem.current().detach())
    double = in_double(problem).flat()
    n, m = problem.shape[-2:]
    tolerance = default_tolerance(problem.dtype) if tolerance is None else tolerance
    if not (problem.is_exact or streams(problem.cost)):
        double = in_matrix(double)
    if _is_balanced(double) and (found := _certify_balanced(problem, double, f, g, tolerance)) is not None:
        return found

    def enter(name: str, x: Any, *shape: int) -> Tensor:
        x = problem.enter(name, x, *shape).detach().double()
        if x.is_sparse:
            return x if x.dim() == 3 else in_batch(x)
        return x.expand((*problem.batch_shape, *shape)).reshape(-1, *shape)

    f, g = double.rows.project(enter("f", f, n)), double.columns.project(enter("g", g, m))
    p = Potentials(f, g, enter("lam", lam))
    sound = True
    if problem.is_exact:
        p, sound = _repair(double, p)
        plan = plan_of(double, p, double.a.new_zeros(double.shape) if exact is None else enter("plan", exact, n, m))
    else:
        plan = plan_of(double, p, lazy=not (double.rows.is_hard or double.columns.is_hard))
    r, c = plan.marginals()
    rows, columns, mass = double.violations(r, c)
    moved = r.sum(-1)
    known = ~torch.cat([p.f, p.g, p.lam.unsqueeze(-1)], -1).isnan().any(-1) & (moved < OVERFLOWN)
    entropy = torch.zeros_like(p.lam) if problem.is_exact else double.epsilon * (moved - double.product)
    sides, scale = double.dual_sides_and_scale(p)
    dual = torch.where(known, sides - entropy if sound else double.dual_at(p), -math.inf)
    scale = scale + entropy.abs()
    found = _nearby(plan, p, tolerance, scale)
    if found is None and isinstance(plan, QuickPlan):
        plan = plan.exact
    rounded, feasible, gap = found or _round(plan, p, _CLOSE * tolerance * scale)
    sane = dual.isfinite() & gap.isfinite()
    gap = torch.where(feasible & sane, gap.clamp(min=0.0), math.inf)
    # dual + gap has the better digits near the optimum, and none where the gap dwarfs the value it should lead back to
    close = sane & (gap <= 1e-6 * dual.abs())
    if rounded is None or bool((close | ~feasible).all()):
        primal = dual + gap
    else:
        primal = torch.where(close, dual + gap, _primal(plan, rounded))
    primal = torch.where(feasible & ~primal.isnan(), primal, math.inf)
    lost = 16 * torch.finfo(problem.working_dtype).eps
    if problem.working_dtype != problem.dtype:  # weights in half precision, whose totals are further apart than sums are off
        lost = lost + torch.where(moved > 0, 2 * double.mismatch() / moved, 0.0)
    rounding_error = lost * (scale + double.magnitude(moved))
    numbers = (primal, dual, gap, scale, rounding_error, rows, columns, mass, double.mismatch(), moved)
    as_arrays = [x.reshape(problem.batch_shape)[()] for x in torch.stack(numbers).cpu().numpy()]
    return Certificate(*as_arrays, tolerance=tolerance)


def _primal(plan: Plan, factors: Factors) -> Tensor:
    """Objective of the rounded plan."""
    problem = plan.problem
    r, c = plan.marginals(factors.on)
    value = problem.rows.divergence(r, problem.a).sum(-1) + problem.columns.divergence(c, problem.b).sum(-1)

    def transport(chunk: Chunk) -> Tensor:
        x = factors.on(chunk)
        return torch.where(x > 0, torch.where(x > 0, chunk.cost, 0.0) * x, 0.0)

    def entropy(chunk: Chunk) -> Tensor:
        return kl_divergence(factors.on(chunk), chunk.rows(problem.a) * chunk.columns(problem.b))

    value = value + plan.sum(transport)
    return value if problem.is_exact else value + problem.epsilon * plan.sum(entropy)


def _gap(plan: Plan, factors: Factors | None, sums: tuple[Tensor, Tensor], p: Potentials) -> Tensor:
    """``primal(rounded) - dual``, as a sum of non-negative terms, for a rounded plan of marginals that satisfy the hard sides.

    The plan as it is if there is nothing to round, ``factors`` None.

    eps KL(Q | P_fg) + FY_rows(Q 1, f) + FY_cols(Q' 1, g); at eps = 0 the first term is <C - f - g - lam, Q>. Where the plan
    of the potentials has underflowed, its logarithm has not.
    """
    problem = plan.problem
    f, g = p.f + p.lam.unsqueeze(-1), p.g

    def slack(chunk: Chunk) -> Tensor:
        u, v = chunk.rows(f), chunk.columns(g)
        known = u.isfinite() & v.isfinite() & chunk.cost.isfinite()
        return torch.where(known, u + v - torch.where(known, chunk.cost, 0.0), 0.0)

    def entries(chunk: Chunk) -> Tensor:
        return chunk.values if factors is None else factors.on(chunk)

    def unused(chunk: Chunk) -> Tensor:
        x = entries(chunk)
        return torch.where(x > 0, -slack(chunk) * x, 0.0)

    def change(chunk: Chunk) -> Tensor:
        old, new = chunk.values, factors.on(chunk)
        near = old * _change_cost(torch.where(old > 0, new / torch.where(old > 0, old, 1.0) - 1.0, 0.0))
        added = (old <= 0) & (new > 0)
        if not added.any():
            return near
        weights = chunk.rows(problem.a.log()) + chunk.columns(problem.b.log())
        log_old = torch.where(chunk.cost.isfinite(), slack(chunk) / problem.epsilon + weights, -math.inf)
        return torch.where(added, new * (new.log() - log_old) - new, near)

    if problem.is_exact:
        first = plan.sum(lambda chunk: (chunk.cost - (chunk.rows(f) + chunk.columns(g))).mul_(entries(chunk)))
        first = first if first.isfinite().all() else plan.sum(unused)  # by the long way, where something is infinite
    elif factors is None:
        first = torch.zeros_like(p.lam)
    else:
        cost, told = _linear_change_cost(plan, factors)
        first = problem.epsilon * (cost if told.all() else torch.where(told, cost, plan.sum(change)))
    return first + problem.side_gaps(*sums, p)


def _linear_change_cost(plan: Plan, factors: Factors) -> tuple[Tensor, Tensor]:
    """A bound of ``sum P h(x)`` for a small linear change ``x = u + v + w``, from products with vectors, and for which problems
    it says something: ``h(x) <= x^2 / (2 - 2 |x|)``.
    """
    (r, c), (u, v, w) = plan.marginals(), (factors.u, factors.v, factors.w)
    largest = u.abs().amax(-1) + v.abs().amax(-1) + w.abs()
    told = factors.is_linear & (largest <= _SMALL_CHANGE)
    if not told.any():
        return largest, told
    squares = (r * u**2).sum(-1) + (c * v**2).sum(-1) + w**2 * r.sum(-1)
    squares = squares + 2 * (u * plan.times(v)).sum(-1) + 2 * w * ((r * u).sum(-1) + (c * v).sum(-1))
    return squares.clamp(min=0.0) / (2 - 2 * largest.clamp(max=_SMALL_CHANGE)), told


_SMALL_CHANGE = 0.01  # of an entry, relative: what is said of its cost is true to a hundredth


def _change_cost(x: Tensor) -> Tensor:
    """``(1 + x) log(1 + x) - x``: what a relative change of an entry costs in KL; no cancellation near 0."""
    return torch.where(x > -1, (1 + x) * torch.log1p(torch.where(x > -1, x, 0.0)), 0.0) - x


def _repair(problem: Problem, p: Potentials) -> tuple[Potentials, bool]:
    """Dual-feasible potentials at epsilon = 0, never worse than those given: lower f to its c-transform where it is too high.

    And whether that is all there was to do, so that nobody need look again: the sides' domains may stand in the way.
    """
    ceiling = problem.cost.reduced_min(p.g + p.lam.unsqueeze(-1), problem.b, axis=-1)
    f = torch.where(problem.a > 0, torch.minimum(p.f, ceiling), p.f)
    low = f < problem.rows.project(f)  # where the domain forbids so low a potential, the columns give way
    f, g = problem.rows.project(f), p.g
    if low.any():
        ceiling = problem.cost.reduced_min(f + p.lam.unsqueeze(-1), problem.a, axis=-2)
        g = torch.where((problem.b > 0) & low.any(-1, keepdim=True), torch.minimum(g, ceiling), g)
    projected = problem.columns.project(g)
    return Potentials(f, projected, p.lam), not low.any() and torch.equal(projected, g)


def _round(plan: Plan, p: Potentials, enough: Tensor) -> tuple[Factors, Tensor, Tensor]:
    """What makes the plan feasible on its own support, whether it does, and the gap then; the better of two, unless the first
    has a gap of ``enough``.

    ``P o (1 + u + v)`` with the marginals the potentials ask for costs second order in the violation; alternating scalings
    onto the hard sides do what is left, and serve alone where a bound is nearly but not quite active. The rank-one fill of
    Altschuler, Weed, Rigollet (NeurIPS 2017) is for fixed sides that those did not reach.
    """
    problem, identity = plan.problem, Factors.identity(plan.problem)
    fixed = problem.rows.is_fixed and problem.columns.is_fixed and problem.mass is None
    exactly, feasible = (bool(near(problem, *plan.marginals()).all()) for near in (_exactly, _feasible))
    if exactly or (feasible and problem.is_exact):  # as near as unequal totals of the weights let it be
        gap = _gap(plan, None, plan.marginals(), p)
        if exactly or bool((gap.abs() <= enough).all()):
            return identity, _feasible(problem, *plan.marginals()), gap
    corrected = _linear_correction(plan, p)
    best = None
    for start in [corrected] if fixed else [corrected, identity]:
        rounded, sums = _scale_onto(plan, start, patient=not fixed)
        rounded, sums = _fill(plan, rounded, sums) if fixed else (rounded, sums)
        feasible, gap = _feasible(problem, *sums), _gap(plan, rounded, sums, p)
        if best is not None:
            better = feasible & ~(best[1] & ((best[2] <= gap) | (best[2] <= enough)))
            rounded, feasible, gap = rounded.where(better, best[0]), feasible | best[1], torch.where(better, gap, best[2])
        best = rounded, feasible, gap
        if bool((feasible & (gap <= enough)).all()):
            break
    return best


def _nearby(plan: Plan, p: Potentials, tolerance: float, scale: Tensor) -> tuple[None, Tensor, Tensor] | None:
    """That there is a feasible plan near the stored one, and a bound of its gap, from products with vectors alone.

    For plans whose violations are so small that float32 resolves what corrects them. A soft side needs no correction and one
    fixed side is scaled. None if this says nothing; for two fixed sides see :func:`_certify_balanced`.
    """
    if not isinstance(plan, QuickPlan):
        return None
    problem, (r, c), enough = plan.problem, plan.marginals(), tolerance * scale
    fixed = [side.is_fixed for side in (problem.rows, problem.columns)]
    if problem.mass is not None or fixed != [side.is_hard for side in (problem.rows, problem.columns)]:
        return None
    if all(fixed):
        return None
    if not any(fixed):
        gap = problem.side_gaps(r, c, p)
        return (None, gap.isfinite(), gap) if (gap <= enough).all() else None
    a, b = (side.allowed(x, w) for side, x, w in ((problem.rows, r, problem.a), (problem.columns, c, problem.b)))
    off = (a - r).abs().sum(-1) + (b - c).abs().sum(-1)
    if not (off <= max(_RESOLVED, tolerance) * r.sum(-1)).all():
        return None
    scale_r, scale_c = _ratio(a, r), _ratio(b, c)
    first = problem.epsilon * ((r * _change_cost(scale_r - 1)).sum(-1) + (c * _change_cost(scale_c - 1)).sum(-1))
    if fixed[0]:
        r, c = a, c + plan.times_back(scale_r - 1)
    else:
        r, c = r + plan.times(scale_c - 1), b
    gap = first + problem.side_gaps(r, c, p)  # first order in the violation where the other side has a price for it
    return (None, gap.isfinite(), gap) if (gap <= enough).all() else None


_RESOLVED = 1e-5  # violation from which on corrections need float64, unless no digit of theirs is asked for


def _is_balanced(problem: Problem) -> bool:
    """Whether this is plain entropic transport on compiled passes."""
    fixed = problem.rows.is_fixed and problem.columns.is_fixed and problem.mass is None
    return fixed and not problem.is_exact and is_quick(problem.cost)


def _certify_balanced(problem: Problem, double: Problem, f: Any, g: Any, tolerance: float) -> Certificate | None:
    """The certificate between two fixed sides from one pass over the cost and products with vectors; None if that is not enough.

    In NumPy, in which small vectors cost a third: the usual problem, certified in the time of a few sweeps. The plan is scaled
    down to at most the marginals, and what is lacking then is filled in by a rank-one piece; if that is too dear, it is corrected
    linearly first, which its float32 copy resolves. With ``x`` the relative change of an entry and ``t`` the piece, the change
    costs ``sum P h(x)`` with ``h(x) = (1 + x) log(1 + x) - x <= x^2 / (2 - 2 |x|)``, and the piece by convexity at most
    ``sum t log(1 + t / P)``, which its largest ratio bounds.
    """
    (n, m), batch, eps = problem.shape[-2:], problem.batch_shape, number(problem.epsilon)
    f, g = (
        problem.enter(name, x, size).detach().double().expand(*batch, size).reshape(-1, size)
        for name, x, size in (("f", f, n), ("g", g, m))
    )
    p = Potentials(f, g, f.new_zeros(len(f)))
    f, g, a, b = (x.numpy() for x in (f, g, double.a, double.b))
    product = a.sum(-1) * b.sum(-1)
    a, b = number(double.rows.bounds[0]) * a, number(double.columns.bounds[0]) * b
    with np.errstate(divide="ignore", invalid="ignore"):
        on_rows, on_columns = a * f, b * g
        scale = abs(on_rows).sum(-1) + abs(on_columns).sum(-1)
        dearest = _dearest(double, f, g)
        # a solver's usual violation times the price of filling it in: is there likely something to correct?
        dear = (dearest + np.log(tolerance)) * eps > 4 * scale
        plan = quick_plan(double, p, single=True, lazy=len(f) > 1 or not dear.any())
        r, c = (x.numpy() for x in plan.sums)
        moved, missing_r, missing_c = r.sum(-1), a - r, b - c
        rows, columns = abs(missing_r).sum(-1), abs(missing_c).sum(-1)
        small = rows + columns <= _RESOLVED * moved
        if not (small | (rows + columns <= tolerance * moved)).all():
            return None
        entropy = eps * (moved - product)
        dual, scale = on_rows.sum(-1) + on_columns.sum(-1) - entropy, scale + abs(entropy)
        enough = tolerance * scale
        gap = eps * _filled(a, b, r, c, dearest)
        if len(left := np.flatnonzero(~(gap <= enough))):  # of a batch those alone
            if len(left) < len(gap):
                plan = quick_plan(double.select(left), Potentials(p.f[left], p.g[left], p.lam[left]), single=True)
            target = enough[left] / (4 * eps * np.maximum(dearest[left], 1.0))
            gap[left] = np.fmin(gap[left], eps * _corrected(plan, a[left], b[left], dearest[left], target))
    if not (np.isfinite(dual) & np.isfinite(gap) & (small | (gap <= enough))).all():
        return None
    apart, most = abs(a.sum(-1) - b.sum(-1)), np.minimum(a.sum(-1), b.sum(-1))
    mismatch = np.where(apart <= 2 * problem.forgiven * most, apart, 0.0)
    rounding = 16 * torch.finfo(problem.working_dtype).eps * (scale + eps * (moved + product))
    numbers = (dual + gap, dual, gap, scale, rounding, rows, columns, 0 * rows, mismatch, moved)
    return Certificate(*(x.reshape(batch)[()] for x in numbers), tolerance=tolerance)


def _filled(
    a: np.ndarray,
    b: np.ndarray,
    r: np.ndarray,
    c: np.ndarray,
    dearest: np.ndarray,
    squares: np.ndarray | None = None,
    largest: np.ndarray | float = 0.0,
) -> np.ndarray:
    """A bound of ``KL(Q | P)``, Q made of a corrected ``P (1 + x)`` by scaling rows and columns down and filling in.

    ``r`` and ``c`` are the marginals after the correction, ``squares = sum P x^2``, ``largest`` bounds ``|x|``, ``dearest``
    bounds ``-log(P / a b)``. Scaling a row down takes from every column at most that share, so that what is lacking in the end
    is bounded without a look at the plan.
    """
    (short_r, over_r, share_r, most_r, full_r), (short_c, over_c, share_c, most_c, full_c) = _off(a, r), _off(b, c)
    lacking = np.maximum(short_r + over_c, short_c + over_r)
    scaled = over_r * most_r + over_c * most_c  # of an entry's mass after the correction: before it at most twice as much
    largest = largest + most_r + most_c
    total = 2 * scaled if squares is None else 1.1 * squares + 44 * scaled
    most = largest * (1 + largest)
    share = np.where(most < 0.5, total * (1 + largest) ** 2 / (2 - 2 * most), np.inf)
    ratio = np.log((share_r + full_r * most_c) * (share_c + full_c * most_r) / lacking) + dearest
    return share + np.where(lacking > 0, lacking * (np.logaddexp(0.0, ratio) + largest), 0.0)


def _corrected(plan: QuickPlan, a: np.ndarray, b: np.ndarray, dearest: np.ndarray, target: np.ndarray) -> np.ndarray:
    """:func:`_filled` of a plan that is corrected linearly first, to a residual of ``target``."""
    system = DualSystem(plan, *plan.sums, *(x > 0 for x in plan.sums), False)
    r, c = (x.numpy() for x in plan.sums)
    missing = torch.from_numpy(a - r), torch.from_numpy(b - c)
    u, v, image, back = system.corrections(*missing, enough=torch.from_numpy(target))
    squares = (r * u * u).sum(-1) + (c * v * v).sum(-1) + 2 * (u * image).sum(-1)
    largest = abs(u).max(-1) + abs(v).max(-1)
    return _filled(a, b, r + r * u + image, c + c * v + back, dearest, np.maximum(squares, 0.0), largest)


def _off(w: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of marginals ``x`` that should be ``w``: what is lacking in all, and what is too much; in one bin the largest shares of
    both, of what it should and of what it does have; and the most that one has of what it should.
    """
    missing = w - x
    relative = np.divide(missing, w, out=np.zeros_like(w), where=w > 0)
    total, size, low, high = missing.sum(-1), abs(missing).sum(-1), relative.min(-1), relative.max(-1)
    return (size + total) / 2, (size - total) / 2, np.maximum(high, 0.0), np.maximum(-low, 0.0) / (1 - low), 1 - low


def _dearest(problem: Problem, f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """A bound of ``(C - f - g) / epsilon`` over the bins with weight."""
    ceiling = problem.cost.ceiling
    if not problem.is_full:
        rows, columns = problem.a > 0, problem.b > 0
        f, g = (np.where(kept.numpy(), x, np.inf) for x, kept in ((f, rows), (g, columns)))
        ceiling = problem.cost.ceiling_between(rows, columns)
    return (ceiling - f.min(-1) - g.min(-1)) / number(problem.epsilon)


def _feasible(problem: Problem, r: Tensor, c: Tensor) -> Tensor:
    off = sum(problem.violations(r, c))
    return off <= 1e-12 * torch.maximum(problem.a.sum(-1), problem.b.sum(-1)) + 2 * problem.mismatch()


def _exactly(problem: Problem, r: Tensor, c: Tensor) -> Tensor:
    return sum(problem.violations(r, c)) <= _TINY * torch.maximum(problem.a.sum(-1), problem.b.sum(-1))


_PROJECTIONS, _LARGE = 100, 2**20  # at most; entries of a plan from which on a look takes long
_CLOSE = 0.1  # of the tolerance: a gap with which nobody tries for a smaller one
_TINY = 1e-14  # relative violation of a plan that is as feasible as float64 sums can say


def _linear_correction(plan: Plan, p: Potentials) -> Factors:
    problem, (r, c), identity = plan.problem, plan.marginals(), Factors.identity(plan.problem)
    pinned_rows = (r > 0) & problem.rows.pinned(r, p.f, problem.a)
    pinned_columns = (c > 0) & problem.columns.pinned(c, p.g, problem.b)
    system = DualSystem(plan, r, c, pinned_rows, pinned_columns, problem.mass is not None)
    missing = problem.rows.target(r, p.f, problem.a) - r, problem.columns.target(c, p.g, problem.b) - c
    lacking = torch.zeros_like(p.lam) if problem.mass is None else problem.mass - r.sum(-1)
    u, v, w = system.solve(*missing, lacking, enough=0.1 * torch.finfo(torch.float64).eps * r.sum(-1))
    corrected = replace(identity, u=u, v=v, w=w)

    if bool((_lowest(u, pinned_rows) + _lowest(v, pinned_columns) + w > -1).all()):  # as nearly always, and no look is needed
        return corrected

    def unsound(chunk: Chunk) -> Tensor:
        factor = corrected.added(chunk)
        return ~(factor.isfinite() & ((factor > 0) | (chunk.values == 0)))

    return identity.where(plan.any(unsound), corrected)


def _lowest(x: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, x, 0.0).amin(-1)


def _scale_onto(plan: Plan, factors: Factors, *, patient: bool) -> tuple[Factors, tuple[Tensor, Tensor]]:
    """Alternate the KL projections onto the rows', the columns' and the mass's constraint until all hold. And the marginals then.

    Of large plans not for ever, where somebody will fill in what is lacking: a projection is two looks at the plan.
    """
    problem, last = plan.problem, torch.full_like(plan.problem.a[..., 0], math.inf)
    large = math.prod(problem.shape) > _LARGE
    r, c = factors.marginals(plan)
    for k in range(_PROJECTIONS):
        if (held := _exactly(problem, r, c).unsqueeze(-1)).all():
            break
        if large and not patient and k % 4 == 0:
            off = sum(problem.violations(r, c))
            if not (off < 0.5 * last).any():
                break
            last = off
        if problem.rows.is_hard:
            ratio = torch.where(held, 1.0, _ratio(problem.rows.allowed(r, problem.a), r))
            factors = replace(factors, alpha=factors.alpha * ratio)
            r, c = plan.marginals(factors.on)
        if problem.columns.is_hard:
            ratio = torch.where(held, 1.0, _ratio(problem.columns.allowed(c, problem.b), c))
            factors = replace(factors, beta=factors.beta * ratio)
            r, c = plan.marginals(factors.on)
        if problem.mass is not None:
            total = r.sum(-1)
            scale = torch.where(held, 1.0, _ratio(torch.full_like(total, number(problem.mass)), total).unsqueeze(-1))
            factors, r, c = replace(factors, alpha=factors.alpha * scale), r * scale, c * scale
    return factors, (r, c)


def _fill(plan: Plan, factors: Factors, sums: tuple[Tensor, Tensor]) -> tuple[Factors, tuple[Tensor, Tensor]]:
    """Scale down to at most the marginals, then add the missing rank-one piece if it meets no forbidden arc."""
    problem, (r, c) = plan.problem, sums
    small = sum(problem.violations(r, c)) <= 1e-13 * problem.a.sum(-1)
    if small.all():
        return factors, sums
    target_r, target_c = problem.rows.allowed(r, problem.a), problem.columns.allowed(c, problem.b)
    smaller = replace(factors, alpha=factors.alpha * _ratio(target_r, r).clamp(max=1.0))
    r, c = plan.marginals(smaller.on)
    smaller = replace(smaller, beta=smaller.beta * _ratio(target_c, c).clamp(max=1.0))
    r, c = plan.marginals(smaller.on)
    lack_r, lack_c = (target_r - r).clamp(min=0), (target_c - c).clamp(min=0)
    total = lack_r.sum(-1, keepdim=True)
    filled = replace(smaller, x=lack_r / torch.where(total > 0, total, 1.0), y=lack_c)
    forbidden = plan.any(lambda chunk: (filled.piece(chunk) > 0) & ~chunk.cost.isfinite())
    factors = factors.where(forbidden | small, filled)
    return factors, plan.marginals(factors.on)


def _ratio(want: Tensor, have: Tensor) -> Tensor:
    return torch.where(have > 0, want / torch.where(have > 0, have, 1.0), 1.0)
