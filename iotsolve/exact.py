"""epsilon = 0: the plan and its duals.

Points on a line are matched in order. FIXED/FIXED goes to POT's network simplex, or to scipy's assignment when the masses are
equal; a FREE side needs no program at all. Every other pair of bounds and TV is a balanced problem with an outside of its own
a side, and goes to the simplex too; where arcs are forbidden, with a mass beside a side without an upper bound, or where costs
are so unequal that the simplex has not the digits, it is one sparse program for HiGHS, whose multipliers are the potentials.
Curved penalties (KL, chi-squared, L2) go to the interior point. Whatever solved it, the duals are made feasible by
c-transforms, and the certificate does not take anybody's word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from iotsolve.costs import Dense, Points
from iotsolve.interior import interior_point
from iotsolve.marginals import FIXED, Marginal, number
from iotsolve.outsides import Answers, with_outsides
from iotsolve.plans import in_batch
from iotsolve.problem import Potentials, Problem
from iotsolve.shortlisted import balanced
from iotsolve.solver import Outcome, Status
from iotsolve.validation import check_steps

if TYPE_CHECKING:
    from scipy.sparse import spmatrix

__all__ = ["Exact", "is_line"]

_Answer = tuple[np.ndarray, np.ndarray, np.ndarray, float, Status, int]
_Answers = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[Status], list[int]]


@dataclass(frozen=True)
class Exact:
    """Exact transport (``epsilon = 0``) for every pair of sides, with or without ``mass``.

    Args:
        max_steps: pivots of the network simplex.

    Raises:
        ValueError: if ``max_steps`` is no whole number or below 1.

    Example:
        >>> from iotsolve import Problem, solve
        >>> float(solve(Problem(np.array([[0.0, 1.0], [1.0, 0.0]])), Exact()).value)
        0.0
    """

    max_steps: int = 10_000_000

    def __post_init__(self) -> None:
        check_steps(self.max_steps, default=10_000_000)

    def run(self, problem: Problem) -> Outcome:
        """Solve every problem of a flat batch, in float64 on the CPU whatever the dtype."""
        problem = _by_weights(problem)
        matched = _on_a_line(problem) if is_line(problem) else None
        if matched is not None:
            return matched
        if isinstance(problem.cost, Points):  # whatever solves it reads it many times
            problem = problem.with_cost(Dense(problem.cost.dense()))
        if (listed := self._shortlisted(problem)) is not None:
            return listed
        double, like = problem.to(torch.float64), problem.cost.dense()
        cost, *weights = (x.detach().cpu().numpy() for x in (double.cost.dense(), double.a, double.b))
        parts = math.ceil(cost.size / _AT_ONCE) if _are_many(cost) else len(cost)
        cuts = np.linspace(0, len(cost), parts + 1).astype(int).tolist()
        found = [self._together(double, x, *(given[x] for given in (cost, *weights))) for x in starmap(slice, pairwise(cuts))]
        plan, f, g, lam = (_tensor(_joined([x[k] for x in found]), like) for k in range(4))
        status, steps = ([x for part in found for x in part[k]] for k in (4, 5))
        p = double.gauge(_tighten(double, Potentials(f, g, lam)))  # here, since in float32 a large shift would take digits
        plan = plan.to_sparse().coalesce() if problem.batch_shape[0] == 1 and like.numel() >= _LARGE else plan
        return Outcome(p.to(like.dtype), status, steps, plan)

    def _together(self, problem: Problem, part: slice, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> _Answers:
        """One problem of a flat batch, or many: what compiled code can do of these at once, and the others one by one."""
        count, found = len(cost), None
        if _is_ordinary(problem) and _are_many(cost):
            plan, f, g, steps, known = _compiled(cost, a, b, self.max_steps)
            found = Answers(plan, f, g, np.zeros(count), steps, known, known)
        elif _has_outsides(problem) and (_are_many(cost) or _is_finite(cost[0], a[0], b[0])):
            found = with_outsides(problem, cost, a, b, self._balanced)
            if found is not None and not found.proved.all():
                found = replace(found, known=found.known & (found.proved | _is_proved(problem, part, found)))
        if found is not None and found.known.all():
            return found.plan, found.f, found.g, found.lam, [Status.CONVERGED] * count, found.steps.tolist()
        plan, f, g, lam = (np.zeros((count, *size)) for size in (cost.shape[1:], a.shape[1:], b.shape[1:], ()))
        status, steps = [Status.CONVERGED] * count, [0] * count
        for k in range(count):
            if found is not None and found.known[k]:
                plan[k], f[k], g[k], lam[k] = found.plan[k], found.f[k], found.g[k], found.lam[k]
                steps[k] = int(found.steps[k])
            else:
                one = problem.select(part.start + k), cost[k], a[k], b[k]
                plan[k], f[k], g[k], lam[k], status[k], steps[k] = self._one(*one)
        return plan, f, g, lam, status, steps

    def _balanced(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
        """Balanced problems whose last bins are the outsides: many small ones by compiled code, others one by one."""
        if _are_many(cost):
            *found, known = _compiled(cost, a, b, self.max_steps)
        else:
            found = np.zeros(cost.shape), np.zeros(a.shape), np.zeros(b.shape), np.zeros(len(a), np.int64)
            known = np.zeros(len(a), bool)
        proved = np.zeros(len(a), bool)
        for k in np.flatnonzero(~known):
            (*answer, _, status, steps), proved[k] = _balanced(cost[k], a[k], b[k], self.max_steps)
            for into, x in zip(found, (*answer, steps), strict=True):
                into[k] = x
            known[k] = status is Status.CONVERGED
        return *found, known, proved

    def _shortlisted(self, problem: Problem) -> Outcome | None:
        """One large balanced problem by a shortlist of its arcs, with a sparse plan; None where that is not the way."""
        sides = (problem.rows.bounds, problem.columns.bounds)
        ordinary = problem.mass is None and sides == ((1.0, 1.0), (1.0, 1.0)) and isinstance(problem.cost, Dense)
        if not (ordinary and problem.batch_shape[0] == 1 and problem.cost.is_compiled):
            return None
        if problem.cost.matrix.numel() < _LISTED:
            return None
        cost, a, b = problem.cost.matrix[0].numpy(), problem.a[0].double().numpy(), problem.b[0].double().numpy()
        rows, columns = np.flatnonzero(a > 0), np.flatnonzero(b > 0)
        whole = len(rows) == len(a) and len(columns) == len(b)
        given = cost if whole else np.ascontiguousarray(cost[np.ix_(rows, columns)])
        low, high = _ends(problem.cost.surveyed().ends, given)
        found = balanced(given, a[rows], b[columns], low, high, self.max_steps)
        if found is None:
            return None
        f, g = np.zeros(len(a)), np.zeros(len(b))
        f[rows], g[columns] = found.f, found.g
        i, j = rows[found.rows], columns[found.columns]
        order = np.argsort(i * len(b) + j)
        index, values = torch.from_numpy(np.stack([i, j])[:, order]), torch.from_numpy(found.flow[order])
        plan = in_batch(torch.sparse_coo_tensor(index, values, cost.shape, check_invariants=False, is_coalesced=True))
        p = Potentials(torch.from_numpy(f)[None], torch.from_numpy(g)[None], torch.zeros(1, dtype=torch.float64, device="cpu"))
        if not whole:
            p = _tighten(problem, p)
        p = problem.gauge(p).to(problem.dtype)
        return Outcome(p, [Status.CONVERGED], [found.steps], plan.to(problem.dtype))

    def _one(self, problem: Problem, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> _Answer:
        rows, columns = problem.rows, problem.columns
        if _is_curved(rows) or _is_curved(columns):
            f, g, lam, plan, steps, status = interior_point(problem)
            return plan, f, g, float(lam), status, steps
        if _is_ordinary(problem) and len(a) == len(b) and np.ptp(a) == np.ptp(b) == 0 and cost.size < _LARGE:
            return _assignment(cost, a)
        if _is_ordinary(problem) and _is_finite(cost, a, b):
            return _network_simplex(cost, a, b, self.max_steps)
        if problem.mass is None and columns.is_free and rows.is_fixed:
            plan, f = _nearest(cost, a * number(rows.bounds[0]), b)
            return plan, f, np.zeros_like(b), 0.0, Status.CONVERGED, 0
        if problem.mass is None and rows.is_free and columns.is_fixed:
            plan, g = _nearest(cost.T, b * number(columns.bounds[0]), a)
            return plan.T, np.zeros_like(a), g, 0.0, Status.CONVERGED, 0
        return _linear_program(problem, cost, a, b)


def _by_weights(problem: Problem) -> Problem:
    """Two fixed sides as what their weights say, which have the same potentials."""
    rows, columns = problem.rows, problem.columns
    if problem.mass is not None or not (rows.is_fixed and columns.is_fixed) or _is_ordinary(problem):
        return problem
    a, b = (number(side.bounds[0]) * weights for side, weights in ((rows, problem.a), (columns, problem.b)))
    return problem.with_tensors({"a": a, "b": b}).with_sides(FIXED, FIXED)


def _are_many(cost: np.ndarray) -> bool:
    return len(cost) >= _MANY and cost[0].size < _LISTED


def _is_finite(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.isfinite(cost[np.ix_(a > 0, b > 0)]).all())


def _is_ordinary(problem: Problem) -> bool:
    return problem.mass is None and problem.rows.bounds == problem.columns.bounds == (1.0, 1.0)


def _has_outsides(problem: Problem) -> bool:
    """Sides of which one is neither fixed nor free, none curved, or a mass that is fixed."""
    rows, columns = problem.rows, problem.columns
    if _is_curved(rows) or _is_curved(columns) or _is_ordinary(problem):
        return False
    return problem.mass is not None or not any(
        one.is_fixed and other.is_free for one, other in ((rows, columns), (columns, rows))
    )


def _compiled(cost: np.ndarray, a: np.ndarray, b: np.ndarray, max_steps: int) -> tuple[np.ndarray, ...]:
    """Small balanced problems at once: plans, potentials, steps, and which of them are known."""
    from iotsolve.kernels import small
    from iotsolve.kernels.threads import each_piece

    count = len(a)
    shared = cost[:1] if cost.strides[0] == 0 else cost
    given = [np.ascontiguousarray(x) for x in (shared, a, b)]
    found = np.zeros(cost.shape), np.zeros(a.shape), np.zeros(b.shape), np.zeros(count, np.int64), np.zeros(count, bool)
    each_piece(count, _READ * cost.size, lambda _, *part: small.transport(*given, *found, max_steps, *part))
    return found


def _is_proved(problem: Problem, part: slice, found: Answers) -> np.ndarray:
    """Whether plan and potentials prove each other optimal."""
    some = problem.select(part)
    like = some.a
    plan, f, g, lam = (torch.as_tensor(x, device=like.device) for x in (found.plan, found.f, found.g, found.lam))
    value, scale = some.dual_sides_and_scale(_tighten(some, Potentials(f, g, lam)))
    gap = some.primal_at(plan) - value
    allowed = _PROVED * scale + 16 * torch.finfo(torch.float64).eps * some.magnitude(like.sum(-1))
    return (gap <= allowed).cpu().numpy()


_PROVED = 1e-9  # of the terms of the dual
_LISTED = 2**14  # arcs from which on a shortlist pays
_MANY = 16  # small problems from which on compiled code is worth its compilation
_READ = 32  # how often an arc is looked at, about
_AT_ONCE = 2**22  # arcs of the problems that are solved at once
_LARGE = 2**16  # arcs from which on the simplex has its potentials sooner than Bellman and Ford theirs


def _ends(ends: tuple[float, float], cost: np.ndarray) -> tuple[float, float]:
    """Least and largest finite cost, where the ends of the whole matrix do not say."""
    low, high = ends
    return (low, high) if math.isfinite(high) else (low, float(cost[np.isfinite(cost)].max(initial=low)))


def is_line(problem: Problem) -> bool:
    """One balanced problem between points of the line, no pair barred, whose cost is or may be convex in the difference."""
    cost, ordinary = problem.cost, problem.rows.bounds == problem.columns.bounds == (1.0, 1.0) and problem.mass is None
    on_line = isinstance(cost, Points) and cost.x.shape[-1] == 1 and cost.metric != "cosine" and cost.barred is None
    return ordinary and on_line and problem.batch_shape[0] == 1


def _on_a_line(problem: Problem) -> Outcome | None:
    """Sorted points are matched in order (the monotone rearrangement), weights and all, in O((n + m) log (n + m)).

    The plan is a staircase of n + m - 1 arcs. Potentials follow it by the cost's differences, empty bins included, and are
    feasible because the cost of sorted points is a Monge array. For a function that somebody passed this is looked at, pair
    by pair: None if it is not so, since then the function is not convex and the order may not be the answer.
    """
    double = problem.to(torch.float64)
    x, y, a, b = double.cost.x[0, :, 0], double.cost.y[0, :, 0], double.a[0], double.b[0]
    rows, columns = x.argsort(stable=True), y.argsort(stable=True)
    n, m, total = len(a), len(b), a.sum()
    steps = torch.cat([a[rows].cumsum(0)[:-1] / total, b[columns].cumsum(0)[:-1] / b.sum()])
    order = steps.argsort(stable=True)
    down = order < n - 1  # a step down to the next row, else right to the next column
    zero = torch.zeros(1, dtype=torch.int64, device=a.device)
    i, j = (torch.cat([zero, moves.cumsum(0)]) for moves in (down, ~down))
    levels = torch.cat([steps.new_zeros(1), steps[order].clamp(max=1.0), steps.new_ones(1)])
    values, index = levels.diff() * total, torch.stack([rows[i], columns[j]])
    price = double.cost.entries((torch.zeros_like(i), *index))
    change = price.diff()
    f, g = (torch.cat([change.new_zeros(1), torch.where(moves, change, 0.0).cumsum(0)]) for moves in (down, ~down))
    f, g = f + price[0], g
    potentials = torch.empty_like(a).index_put_((index[0],), f), torch.empty_like(b).index_put_((index[1],), g)
    kept = (values > 0) & (a[index[0]] > 0) & (b[index[1]] > 0)  # what rounding leaves at an empty bin is no mass
    where = torch.cat([torch.zeros_like(i).unsqueeze(0), index])[:, kept]
    plan = torch.sparse_coo_tensor(where, values[kept], (1, n, m), check_invariants=False).coalesce()
    p = Potentials(potentials[0].unsqueeze(0), potentials[1].unsqueeze(0), a.new_zeros(1))
    if callable(problem.cost.metric) and not _is_dual_feasible(double.cost, p):
        return None
    return Outcome(p.to(problem.dtype), [Status.CONVERGED], [0], plan.to(problem.dtype))


def _is_dual_feasible(cost: Points, p: Potentials) -> bool:
    """Whether ``f + g <= C`` at every pair, to the rounding of sums as long as the staircase."""
    excess = p.f - cost.reduced_min(p.g, torch.ones_like(p.g), axis=-1)
    size = p.f.abs().amax() + p.g.abs().amax()
    return bool((excess <= sum(cost.shape[-2:]) * torch.finfo(p.f.dtype).eps * size).all())


def _is_curved(side: Marginal) -> bool:
    """True for a penalty that is neither bounds nor piecewise linear, so that no linear program has it."""
    return not side.is_hard and math.isinf(side.recession)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _tensor(x: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(x, device=like.device)


def _tighten(problem: Problem, p: Potentials) -> Potentials:
    """Dual-feasible potentials no worse than ``p``: each side answers the c-transform of the other, empty bins included.

    Where all are rounding, of the range of costs, 0 is tried too: against a value that is 0 they would be large.
    """
    found = _answered(problem, p)
    largest = torch.stack([p.f.abs().amax(-1), p.g.abs().amax(-1), p.lam.abs()]).amax(0)
    dust = largest <= _RESOLVED * problem.cost.between(problem.a > 0, problem.b > 0).range()
    if not dust.any():
        return found
    clean = _answered(problem, Potentials(torch.zeros_like(p.f), torch.zeros_like(p.g), torch.zeros_like(p.lam)))
    (value, _), (other, _) = (problem.dual_sides_and_scale(x) for x in (found, clean))
    better = dust & (other >= value)
    f, g = (torch.where(better.unsqueeze(-1), x, y) for x, y in ((clean.f, found.f), (clean.g, found.g)))
    return Potentials(f, g, torch.where(better, clean.lam, found.lam))


_RESOLVED = 2.0**-46


def _answered(problem: Problem, p: Potentials) -> Potentials:
    lam = p.lam.unsqueeze(-1)
    f = problem.rows.aprox(problem.cost.reduced_min(p.g + lam, problem.b, axis=-1), 0.0)
    f = _kept_at_kinks(problem.rows, p.f, f)
    ceiling = problem.cost.reduced_min(f + lam, problem.a, axis=-2)
    g = _kept_at_kinks(problem.columns, p.g, problem.columns.aprox(ceiling, 0.0))
    empty = problem.rows.aprox(problem.cost.reduced_min(g + lam, problem.b, axis=-1), 0.0)
    f = torch.where(problem.a > 0, f, empty)
    size = torch.maximum(*(torch.where(x.isfinite(), x, 0.0).abs().amax(-1, keepdim=True) for x in (f, g))) + lam.abs()
    return Potentials(
        _at_kinks(problem.rows, problem.a, f, size), _at_kinks(problem.columns, problem.b, g, size), p.lam
    )


def _kept_at_kinks(side: Marginal, given: Tensor, f: Tensor) -> Tensor:
    """Potentials exactly at the kinks at which the solver had them, which knows its variables, where they are next to them."""
    for kink in side.kinks:
        f = torch.where((given == kink) & ((f - kink).abs() <= _NEXT * (abs(kink) + given.abs())), kink, f)
    return f


_NEXT = 1e-9


def _at_kinks(side: Marginal, a: Tensor, f: Tensor, size: Tensor) -> Tensor:
    """Potentials exactly at the kink that rounding parts them from: derivatives ask on which side of it they are."""
    near = 8 * torch.finfo(f.dtype).eps * size
    for piece in side.pieces(a.cpu().numpy())[1]:
        if not piece.entropy and not np.any(piece.bend):
            kink = torch.as_tensor(-piece.sign * piece.price, device=f.device)
            f = torch.where((f - kink).abs() <= near, kink, f)
    return f


def _assignment(cost: np.ndarray, a: np.ndarray) -> _Answer:
    """Equal masses: a permutation (Birkhoff), its duals by shortest paths in the residual graph."""
    from scipy.optimize import linear_sum_assignment  # scipy's solvers cost more to import than all of this library

    try:
        rows, columns = linear_sum_assignment(cost)
    except ValueError:  # scipy's word for "cost matrix is infeasible"
        return np.zeros_like(cost), np.zeros_like(a), np.zeros_like(a), 0.0, Status.INFEASIBLE, 0
    plan = np.zeros_like(cost)
    plan[rows, columns] = a[0]
    matched = cost[rows, columns]
    g = np.zeros_like(a)
    for _ in range(len(a)):  # Bellman-Ford: no path is longer, and no negative cycle exists at the optimum
        lower = np.minimum(g, (cost - (matched - g[columns])[:, None]).min(0))
        if np.array_equal(lower, g):
            break
        g = lower
    return plan, matched - g[columns], g, 0.0, Status.CONVERGED, 0


def _network_simplex(cost: np.ndarray, a: np.ndarray, b: np.ndarray, max_steps: int) -> _Answer:
    import ot

    # What an empty bin costs is nobody's business, least of all the scale's.
    full, plan, f, g = np.ix_(a > 0, b > 0), np.zeros_like(cost), np.zeros_like(a), np.zeros_like(b)
    cost, a, b = np.ascontiguousarray(cost[full]), a[a > 0], b[b > 0]
    # Unit mass and costs from 0 to 1: what the simplex's own tolerances and big M expect.
    scale, base, unit = a.sum(), cost.min(), float(np.ptp(cost)) or 1.0
    scaled = (cost - base) / unit
    flow, log = ot.emd(a / scale, b / b.sum(), scaled, numItermax=max_steps, log=True, check_marginals=False)
    status = {1: Status.CONVERGED, 3: Status.MAX_STEPS}.get(log["result_code"], Status.STALLED)
    plan[full], f[full[0][:, 0]], g[full[1][0]] = flow * scale, unit * log["u"] + base, unit * log["v"]
    return plan, f, g, 0.0, status, 0


def _nearest(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every row sends its mass to its cheapest column of positive weight."""
    reachable = np.where(b > 0, cost, np.inf)
    plan = np.zeros_like(cost)
    plan[np.arange(len(a)), reachable.argmin(1)] = a
    return plan, reachable.min(1)


def _balanced(cost: np.ndarray, a: np.ndarray, b: np.ndarray, max_steps: int) -> tuple[_Answer, bool]:
    """A balanced problem whose last row and column are the outsides, by a shortlist of its arcs where that pays, and whether
    that proves itself; forbidden arcs are priced so that no cycle of four takes them.
    """
    barred = np.isinf(cost)
    low, high = float(cost.min()), float(cost[~barred].max())
    rows, columns = np.flatnonzero(a > 0), np.flatnonzero(b > 0)
    if len(rows) * len(columns) >= _LISTED:
        given = np.ascontiguousarray(cost[np.ix_(rows, columns)])
        wide = tuple(np.flatnonzero(kept == last) for kept, last in ((rows, len(a) - 1), (columns, len(b) - 1)))
        found = balanced(given, a[rows], b[columns], low, high, max_steps, wide=wide)
        if found is not None:
            plan, f, g = np.zeros_like(cost), np.zeros(len(a)), np.zeros(len(b))
            plan[rows[found.rows], columns[found.columns]], f[rows], g[columns] = found.flow, found.f, found.g
            return (plan, f, g, 0.0, Status.CONVERGED, found.steps), True
    priced = np.where(barred, high + 3 * max(high - low, abs(high), abs(low)), cost)
    return _network_simplex(priced, a, b, max_steps), False


def _linear_program(problem: Problem, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> _Answer:
    """``min <C, P> + prices`` with ``P 1 = base + sum sign x`` on both sides, the ``x`` as bounded columns of their own."""
    from scipy import sparse
    from scipy.optimize import linprog

    # HiGHS's tolerances are absolute; powers of two scale without rounding, so that a multiplier at rho is rho exactly
    amount = 2.0 ** math.floor(math.log2(max(a.sum(), b.sum())))
    a, b = a / amount, b / amount
    n, m = cost.shape
    i, j = np.nonzero(np.isfinite(cost) & (a[:, None] > 0) & (b[None, :] > 0))
    arcs = np.arange(len(i))
    incidence = sparse.csr_matrix((np.ones(2 * len(i)), (np.r_[i, n + j], np.r_[arcs, arcs])), shape=(n + m, len(i)))
    (base_r, pieces_r), (base_c, pieces_c) = problem.rows.pieces(a), problem.columns.pieces(b)
    pieces = [*((x, 0) for x in pieces_r), *((x, 1) for x in pieces_c)]
    blocks = [incidence, *(_place(x.sign, side, n, m) for x, side in pieces)]
    right = np.r_[base_r, base_c]
    prices = np.concatenate([cost[i, j], *(x.price for x, _ in pieces)])
    lower, upper = np.zeros(len(prices)), np.concatenate([np.full(len(i), np.inf), *(x.cap for x, _ in pieces)])
    matrix = sparse.hstack(blocks).tocsr()
    if problem.mass is not None:
        total = sparse.csr_matrix(np.r_[np.ones(len(i)), np.zeros(matrix.shape[1] - len(i))])
        matrix, right = sparse.vstack([matrix, total]).tocsr(), np.r_[right, number(problem.mass) / amount]
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    unit = 2.0 ** math.floor(math.log2(float(np.abs(prices).max()) or 1.0))
    result = linprog(
        prices / unit, A_eq=matrix, b_eq=right, bounds=np.c_[lower, upper], method="highs-ds", options=options
    )
    plan = np.zeros_like(cost)
    if result.x is None:
        status = {1: Status.MAX_STEPS, 2: Status.INFEASIBLE}.get(result.status, Status.STALLED)
        return plan, np.zeros(n), np.zeros(m), 0.0, status, int(result.nit)
    plan[i, j] = amount * result.x[arcs].clip(min=0.0)
    y = unit * result.eqlin.marginals
    lam = float(y[n + m]) if problem.mass is not None else 0.0
    return plan, y[:n], y[n : n + m], lam, Status.CONVERGED, int(result.nit)


def _place(sign: float, side: int, n: int, m: int) -> spmatrix:
    """``-sign x`` in the equations of one side, nothing in the other's."""
    from scipy import sparse

    own, other = (n, m) if side == 0 else (m, n)
    blocks = [-sign * sparse.identity(own), sparse.csr_matrix((other, own))]
    return sparse.vstack(blocks if side == 0 else blocks[::-1])
