"""Interior point: any pair of sides at epsilon >= 0, where a linear program does not reach and first order stalls.

The plan *and* the marginals are variables, tied by ``P 1 = base + sum sign x``; a side describes its ``x`` by its ``pieces``.
One primal-dual predictor-corrector (Mehrotra, SIAM J. Optim. 2, 1992) keeps every variable positive, while entropy and
penalties enter by their own curvature: small epsilon, stiff rho and active bounds cost it nothing. Dense, float64, one
problem at a time: meant for sides of up to a thousand bins or so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iotsolve.marginals import Marginal, number
from iotsolve.problem import Potentials, Problem
from iotsolve.sinkhorn import Sinkhorn
from iotsolve.solver import Outcome, Status, iterate
from iotsolve.validation import check_steps, check_tolerance

__all__ = ["Interior", "interior_point"]

_Direction = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of x, z, v, w
_Multipliers = tuple[np.ndarray, np.ndarray, float]  # f, g, lam


@dataclass(frozen=True)
class Interior:
    """Primal-dual interior point for any pair of sides, with or without ``mass``, at ``epsilon >= 0``.

    At ``epsilon > 0`` sweeps from its potentials settle what is left, and judge it.

    Args:
        tolerance: as :class:`Sinkhorn`'s.
        max_steps: Newton steps; between 10 and 40 are usual.
        stationary: as :class:`Sinkhorn`'s.

    Raises:
        ValueError: on a tolerance or step count out of range.

    Example:
        >>> from iotsolve import KL, Problem, solve
        >>> solution = solve(Problem(np.array([[0.5, 1.0], [1.0, 0.5]]), rows=KL(1.0), columns=KL(1.0)), Interior())
        >>> solution.status.name, round(float(solution.value), 9)  # 2 (1 - exp(-1/4))
        ('CONVERGED', 0.442398434)
    """

    tolerance: float | None = None
    max_steps: int = 100
    stationary: bool = False

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        check_steps(self.max_steps, default=100)

    def _sweeps(self, count: int) -> Sinkhorn:
        return Sinkhorn(self.tolerance, count, None, self.stationary)

    def run(self, problem: Problem) -> Outcome:
        """Solve every problem of a flat batch, in float64 on the CPU whatever the dtype."""
        answers = [
            interior_point(problem.select(i).to(torch.float64), self.max_steps) for i in range(problem.batch_shape[0])
        ]
        like = problem.cost.dense()
        f, g, lam, plan = (
            torch.as_tensor(np.stack(x), device=like.device).to(problem.a.dtype)
            for x in zip(*(answer[:4] for answer in answers), strict=True)
        )
        p, steps, own = Potentials(f, g, lam), [answer[4] for answer in answers], [answer[5] for answer in answers]
        if problem.is_exact:  # judged by its certificate
            return Outcome(p, own, steps, plan)
        p = Potentials(problem.rows.project(f), problem.columns.project(g), lam)
        settled = iterate(problem, self._sweeps(_SETTLING), p)
        total = [newton + sweeps for newton, sweeps in zip(steps, settled.steps, strict=True)]
        pairs = zip(settled.status, own, strict=True)
        status = [Status.STALLED if x is Status.MAX_STEPS and y is not x else x for x, y in pairs]
        return Outcome(settled.potentials, status, total)


_SETTLING = 64  # sweeps: most problems need one
_ENOUGH = 1e-15  # error, total mass and cost range being 1, below which float64 has nothing to say
_CLOSE = 1e-9  # error from which steps without progress mean that rounding has the word
_PATIENCE = 4
_DUST = 1e-10  # share of the mass that may be dropped for a sparse plan
_REFINEMENTS = 3


def interior_point(
    problem: Problem, max_steps: int = 200
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, Status]:
    """Potentials, multiplier, plan, steps and status of one problem; potentials of a bin of weight 0 has potential 0.

    Rows are eliminated, and what is left is factored: of more columns than rows that have mass the problem is turned over.
    """
    if (problem.b > 0).sum() > (problem.a > 0).sum():
        turned = Problem.unchecked(
            problem.cost.dense().mT.contiguous(),
            problem.b,
            problem.a,
            epsilon=problem.epsilon,
            rows=problem.sides[1],
            columns=problem.sides[0],
            mass=problem.mass,
        )
        object.__setattr__(turned, "forgiven", problem.forgiven)
        g, f, lam, plan, steps, status = interior_point(turned, max_steps)
        return f, g, lam, np.ascontiguousarray(plan.T), steps, status
    cost = _numpy(problem.cost.dense())
    a, b = _reconciled(problem, _numpy(problem.a), _numpy(problem.b))
    f, g, plan = _stranded(problem.rows, problem.a), _stranded(problem.columns, problem.b), np.zeros_like(cost)
    with np.errstate(all="ignore"):  # a step that leaves the numbers is seen by its error, and not taken
        core = _Core(problem, cost, a, b)
        steps, status = core.run(max_steps)
    f[core.full[0]], g[core.full[1]] = core.f * core.unit, core.g * core.unit
    x = (
        core.plan.x
    )  # what lies below its multiplier is dust of the barrier; but where both vanish, x may still be needed
    carried = np.where((x > core.plan.z) | (x * x.size > _DUST), x, 0.0)
    plan[core.full[0][core.i], core.full[1][core.j]] = carried * core.amount
    return f, g, np.asarray(core.lam * core.unit), plan, steps, status


def _reconciled(problem: Problem, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights, with totals that meet where rounding keeps them apart: the dual would rise forever along the difference.

    By less than the rounding of what was given, which float32 weights have and float64, the arithmetic here, can tell.
    """
    if not float(problem.mismatch()) > 0:
        return a, b
    sides = [(w, *(number(x) for x in side.bounds)) for w, side in ((a, problem.rows), (b, problem.columns))]
    total = max(lo * w.sum() for w, lo, _ in sides) if problem.mass is None else number(problem.mass)

    def met(w: np.ndarray, lo: float, hi: float) -> np.ndarray:
        reach = float(np.clip(total, lo * w.sum(), hi * w.sum()))
        return w * (total / reach) if reach > 0 else w

    return tuple(met(*side) for side in sides)


def _stranded(side: Marginal, weights: Tensor) -> np.ndarray:
    """The potential of a bin with weight that nothing can reach; 0 at the others."""
    return _numpy(torch.where(weights > 0, side.aprox(torch.full_like(weights, math.inf), 0.0), 0.0))


class _Variables:
    """Separable variables ``0 < x < cap`` and their multipliers, ``z`` of 0 and ``w`` of the cap.

    They pay ``price x + entropy KL(x | reference) + bend x^2 / 2``; ``v = cap - x``.
    """

    def __init__(self, price, entropy=0.0, reference=1.0, bend=0.0, cap=math.inf) -> None:
        self.price, self.entropy, self.reference, self.bend = price, entropy, reference, bend
        cap = np.broadcast_to(cap, price.shape)
        self.capped = np.isfinite(cap)
        self.bounded = bool(self.capped.any())
        half = np.where(self.capped, cap, 2.0) / 2
        self.x = np.minimum(reference, half) if self.bounded else reference + 0.0 * price
        self.v = np.where(self.capped, 2 * half - self.x, 1.0)
        self.z = np.maximum(1.0, price + bend * self.x)
        self.w = np.where(self.capped, 1.0, 0.0)

    @property
    def count(self) -> int:
        return self.x.size + int(self.capped.sum())

    def products(self, direction: _Direction | None = None, step: float = 0.0) -> float:
        """``<x, z> + <v, w>``: the complementarity, also after a step."""
        if direction is None:
            return _dot(self.x, self.z) + _dot(self.v, self.w)
        x, z, v, w = (u + step * du for u, du in zip((self.x, self.z, self.v, self.w), direction, strict=True))
        return _dot(x, z) + _dot(v, w)

    def linearise(self, image: np.ndarray) -> None:
        """What a Newton step needs of this point: ``image`` is the constraints' multipliers seen from these variables."""
        entropic = self.entropy * np.log(self.x / self.reference) if self.entropy else 0.0
        self.residual = self.price + entropic + self.bend * self.x - image - self.z + self.w
        self.weight = 1.0 / ((self.entropy + self.z) / self.x + self.bend + self.w / self.v)
        self.aim(0.0, None)

    def aim(self, mu: float, affine: _Direction | None) -> None:
        """Aim at products ``mu``, with Mehrotra's correction by the affine step's second-order terms."""
        dx, dz, dv, dw = (0.0,) * 4 if affine is None else affine
        self.lower = self.x * self.z - mu + dx * dz
        self.upper = np.where(self.capped, self.v * self.w - mu + dv * dw, 0.0) if self.bounded else 0.0 * self.v
        curve = self.entropy * (dx / self.x) ** 2 / 2
        self.pull = curve - self.residual - self.lower / self.x + self.upper / self.v

    def direction(self, image: np.ndarray, fine: np.ndarray) -> _Direction:
        """The step that goes with a step ``image + fine`` of the multipliers."""
        dx = self.weight * ((image + self.pull) + fine)  # image and pull nearly cancel
        dz = -(self.lower + self.z * dx) / self.x
        if not self.bounded:
            return dx, dz, 0.0 * dx, 0.0 * dx
        dv = np.where(self.capped, -dx, 0.0)
        return dx, dz, dv, np.where(self.capped, -(self.upper + self.w * dv) / self.v, 0.0)

    def longest(self, direction: _Direction) -> float:
        """The step at which the first variable or multiplier would vanish."""
        dx, dz, dv, dw = direction
        below = min(_reach(self.x, dx), _reach(self.z, dz))
        return min(below, _reach(self.v, dv), _reach(self.w, dw)) if self.bounded else below

    def move(self, direction: _Direction, step: float) -> None:
        dx, dz, dv, dw = direction
        self.x, self.z = self.x + step * dx, self.z + step * dz
        self.v, self.w = self.v + step * dv, self.w + step * dw


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    """The scalar product, not by BLAS: NumPy's threads would be in the way of SciPy's, which factor."""
    return float(np.einsum("i,i->", x, y))


def _times(w: np.ndarray, v: np.ndarray, *, back: bool = False) -> np.ndarray:
    """``W v``, or ``W' v``, by the BLAS that factors."""
    from scipy.linalg.blas import dgemv

    return dgemv(1.0, w.T, v, trans=not back)  # whose matrices have columns one after the other


def _two_sum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum and what rounding lost (Knuth)."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _reach(x: np.ndarray, dx: np.ndarray) -> float:
    falling = dx < 0
    return float((x[falling] / -dx[falling]).min(initial=math.inf))


class _Core:
    """One problem in units of its own: bins that something can reach only, total mass 1, cost range from 1 to 2."""

    def __init__(self, problem: Problem, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        allowed = np.isfinite(cost) & (a > 0)[:, None] & (b > 0)[None, :]
        self.full = np.flatnonzero(allowed.any(1)), np.flatnonzero(allowed.any(0))
        cost = cost[np.ix_(*self.full)]
        self.shape, (self.i, self.j) = cost.shape, np.nonzero(np.isfinite(cost))
        self.is_whole = self.i.size == cost.size  # then values of arcs are a matrix, row by row
        price = cost[self.i, self.j]
        self.amount = float(max(a.sum(), b.sum()) if problem.mass is None else number(problem.mass))
        spread = float(np.ptp(price) or np.abs(price).max()) if price.size else 0.0
        penalties = float(problem.magnitude(problem.a.new_zeros(()))) / self.amount  # and the entropy, if any
        # a power of two scales without rounding, so that a potential at a kink is there exactly
        self.unit = 2.0 ** math.floor(math.log2(spread or penalties or 1.0))
        self.mass = None if problem.mass is None else 1.0
        reference = a[self.full[0]][self.i] * b[self.full[1]][self.j] / self.amount
        self.plan = _Variables(price / self.unit, number(problem.epsilon) / self.unit, reference)
        sides = (problem.rows, a, self.full[0]), (problem.columns, b, self.full[1])
        self.sides = [self._side(*side) for side in sides]
        self.f, self.g, self.lam = np.zeros(self.shape[0]), np.zeros(self.shape[1]), 0.0

    def _side(
        self, side: Marginal, a: np.ndarray, full: np.ndarray
    ) -> tuple[np.ndarray, list[tuple[float, _Variables]]]:
        a, unit = a / self.amount, self.unit
        base, pieces = side.pieces(a)
        made = []
        for piece in pieces:
            bend = np.broadcast_to(piece.bend, a.shape)[full] / unit
            made.append(
                (piece.sign, _Variables(piece.price[full] / unit, piece.entropy / unit, a[full], bend, piece.cap[full]))
            )
        return base[full], made

    @property
    def blocks(self) -> list[_Variables]:
        return [self.plan, *(x for _, pieces in self.sides for _, x in pieces)]

    def run(self, max_steps: int) -> tuple[int, Status]:
        """Newton steps until nothing is gained; leaves the best point's potentials and plan."""
        if not self.i.size:
            return 0, Status.CONVERGED
        best, kept, age, steps, status = math.inf, None, 0, 0, Status.MAX_STEPS
        while steps < max_steps:
            steps += 1
            zero = (np.zeros_like(self.f), np.zeros_like(self.g), 0.0)
            for block, (image, _) in zip(self.blocks, self._images((self.f, self.g, self.lam), zero), strict=True):
                block.linearise(image)
            residuals, products = self._residuals(), sum(block.products() for block in self.blocks)
            error = products + sum(np.abs(r).sum() for r in residuals)
            error += sum(_dot(np.abs(block.residual), block.x) for block in self.blocks)
            age = 0 if error < 0.5 * best else age + 1
            if error < best:
                best, kept = error, (self._at_kinks(), self.lam, self.plan.x, self.plan.z)
            if best <= _ENOUGH or (age >= _PATIENCE and best <= _CLOSE) or not math.isfinite(error):
                status = Status.CONVERGED  # as far as rounding lets it: the certificate has the word
                break
            self._step(residuals, products)
        if kept is not None:
            (self.f, self.g), self.lam, self.plan.x, self.plan.z = kept
        return steps, status

    def _at_kinks(self) -> list[np.ndarray]:
        """The potentials, exactly at a kink where a variable of constant price is clearly inside its bounds."""
        found = []
        for potential, (_, pieces) in zip((self.f, self.g), self.sides, strict=True):
            for sign, x in pieces:
                if not x.entropy and not np.any(x.bend):
                    potential = np.where((x.x > x.z) & (x.v > x.w), -sign * x.price, potential)
            found.append(potential)
        return found

    def _step(self, residuals: list[np.ndarray], products: float) -> None:
        system, blocks = _Normal(self), self.blocks
        affine, *_ = self._directions(system, residuals)
        length = min(1.0, self._longest(affine))
        after = sum(block.products(d, length) for block, d in zip(blocks, affine, strict=True))
        mu = min(1.0, (after / products) ** 3) * products / sum(block.count for block in blocks)
        for block, d in zip(blocks, affine, strict=True):
            block.aim(mu, d)
        moves, df, dg, dlam = self._directions(system, residuals)
        length = min(1.0, 0.99 * self._longest(moves))
        for block, d in zip(blocks, moves, strict=True):
            block.move(d, length)
        self.f, self.g, self.lam = self.f + length * df, self.g + length * dg, self.lam + length * dlam

    def _images(self, coarse: _Multipliers, fine: _Multipliers) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The multipliers ``coarse + fine`` as every block sees them, in two parts, so that ``f + g`` loses no digits."""
        (f, g, lam), (f_fine, g_fine, lam_fine) = coarse, fine
        lifted, lost = _two_sum(f, np.full_like(f, lam))
        if self.is_whole:
            total, lost_too = _two_sum(lifted[:, None], g)
            yield total.ravel(), (lost_too + (f_fine + lam_fine + lost)[:, None] + g_fine).ravel()
        else:
            total, lost_too = _two_sum(lifted[self.i], g[self.j])
            yield total, lost_too + (f_fine + lam_fine + lost)[self.i] + g_fine[self.j]
        for x, x_fine, (_, pieces) in zip((f, g), (f_fine, g_fine), self.sides, strict=True):
            yield from ((-sign * x, -sign * x_fine) for sign, _ in pieces)

    def _residuals(self) -> list[np.ndarray]:
        row, column, total = self._balance([block.x for block in self.blocks])
        return [row - self.sides[0][0], column - self.sides[1][0], total if self.mass is None else total - self.mass]

    def _balance(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """``P 1 - sum sign x`` on both sides and ``sum P``, of values for all blocks."""
        plan, rest = values[0], iter(values[1:])
        found = []
        for side, (_, pieces) in enumerate(self.sides):
            total = self._sums(plan, side)
            for sign, _ in pieces:
                total = total - sign * next(rest)
            found.append(total)
        return [*found, np.asarray(0.0 if self.mass is None else plan.sum())]

    def _sums(self, values: np.ndarray, side: int) -> np.ndarray:
        if self.is_whole:
            return values.reshape(self.shape).sum(1 - side)
        return np.bincount((self.i, self.j)[side], values, self.shape[side])

    def _directions(self, system: _Normal, residuals: list[np.ndarray]):
        """Newton's step for all variables, refined until their sums add up: weights of all sizes meet in the equations."""
        coarse = fine = (np.zeros_like(self.f), np.zeros_like(self.g), 0.0)
        for round_ in range(_REFINEMENTS + 1):
            images = self._images(coarse, fine)
            moves = [block.direction(*image) for block, image in zip(self.blocks, images, strict=True)]
            if round_ == _REFINEMENTS:
                return moves, *(x + y for x, y in zip(coarse, fine, strict=True))
            change = self._balance([d[0] for d in moves])
            more = system.solve(*(-r - x for r, x in zip(residuals, change, strict=True)))
            if round_ == 0:
                coarse = more
            else:
                fine = tuple(x + y for x, y in zip(fine, more, strict=True))

    def _longest(self, moves: list[_Direction]) -> float:
        return min(block.longest(d) for block, d in zip(self.blocks, moves, strict=True))


class _Normal:
    """The normal equations ``[[R, W, r], [W', S, c], [r', c', sum W]]``, rows eliminated.

    Every diagonal is summed from positive terms instead of being the difference of two near ones, which is what makes
    the last digits arrive.
    """

    def __init__(self, core: _Core) -> None:
        from scipy.linalg import cho_factor
        from scipy.linalg.blas import dsyrk

        w = core.plan.weight.reshape(core.shape) if core.is_whole else np.zeros(core.shape)
        if not core.is_whole:
            w[core.i, core.j] = core.plan.weight
        spare = [sum((x.weight for _, x in pieces), np.zeros_like(base)) for base, pieces in core.sides]
        self.w, self.sums = w, w.sum(1)
        self.rows = self.sums + spare[0]
        share = spare[0] / self.rows
        self.border, corner = _times(w, share, back=True), _dot(self.sums, share)
        half = w / np.sqrt(self.rows)[:, None]
        links = np.triu(dsyrk(1.0, half.T), 1)
        links = links + links.T
        diagonal = links.sum(1) + spare[1] + self.border
        self.matrix = np.diag(diagonal) - links
        self.scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        unit = -links * np.outer(self.scale, self.scale)
        for nudge in (1e-15, 1e-13, 1e-11, 1e-8, 1e-4):  # a balanced problem is singular along (1, -1)
            np.fill_diagonal(unit, 1.0 + nudge)
            try:
                self.factor = cho_factor(unit, check_finite=False)
                break
            except np.linalg.LinAlgError:
                continue
        else:
            self.factor = cho_factor(np.eye(len(unit)))
        self.moves_mass = False
        if core.mass is not None:
            self.pivot = corner - _dot(self.border, self._columns(self.border))
            self.moves_mass = (
                self.pivot > 1e-15 * self.sums.sum()
            )  # else the sides fix it, and the multiplier is theirs

    def _columns(self, right: np.ndarray) -> np.ndarray:
        from scipy.linalg.lapack import dpotrs  # at this size half the time of cho_solve is its checks

        (factor, lower), x, residual = self.factor, np.zeros_like(right), right
        for _ in range(2):  # refined, since the factor was nudged
            x = x + self.scale * dpotrs(factor, self.scale * residual, lower=lower)[0]
            residual = right - _times(self.matrix, x)
        return x

    def solve(self, rows: np.ndarray, columns: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        u, lam = rows / self.rows, 0.0
        right = columns - _times(self.w, u, back=True)
        if self.moves_mass:
            missing = float(mass) - _dot(self.sums, u) - _dot(self.border, self._columns(right))
            lam = missing / self.pivot
        v = self._columns(right - lam * self.border)
        return u - (_times(self.w, v) + self.sums * lam) / self.rows, v, lam


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
