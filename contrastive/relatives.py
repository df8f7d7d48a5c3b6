"""Relatives of the family that change the outer function, the weights of the negatives or the target, and little else."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from contrastive.family import Batch, Found, IOTLoss, Side, cross_entropy, log_ratio, log_total, settled, similar
from contrastive.targets import Entries, Matches
from iotsolve.costs import Dense, Points
from iotsolve.distributed import Alone
from iotsolve.exact import Exact
from iotsolve.kernels.bilinear import log_sums
from iotsolve.kernels.directions import normalised
from iotsolve.kernels.precision import product
from iotsolve.kernels.uncompiled import uncompiled
from iotsolve.marginals import FIXED, FREE, number
from iotsolve.problem import Problem, log_scaling
from iotsolve.solve import run
from iotsolve.solver import Status

__all__ = ["DCLLoss", "HardNegativeLoss", "MatchingGapLoss", "RINCELoss", "SwAVLoss", "balanced_assignment"]


class RINCELoss(IOTLoss):
    """Robust InfoNCE: noisy pairs weigh less the larger ``q`` is (Chuang et al., CVPR 2022).

    Mean over anchors of ``((lam tot)^q - pos^q) / q`` with ``pos = exp(cos / temperature)`` of the positive and ``tot`` the sum
    over all candidates. As ``q -> 0`` it becomes InfoNCE plus ``log lam``; at ``q = 1`` it is symmetric in Ghosh's sense. Its
    size grows like ``exp(q / temperature)``.

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.
        q: in (0, 1].
        lam: weight of the negatives against the positive, in (0, 1]; near 0.01 in the paper.

    Example:
        >>> RINCELoss(temperature=0.5, q=0.5, lam=1.0)(torch.eye(4), torch.eye(4))
        tensor(1.0098)
    """

    def __init__(self, temperature: float | Tensor = 0.5, *, q: float = 0.5, lam: float = 0.01, **options: Any) -> None:
        for name, value in (("q", q), ("lam", lam)):
            if not 0 < value <= 1:
                raise ValueError(
                    f"{name} = {value}: must be in (0, 1]; as q -> 0 the loss is InfoNCELoss plus log lam."
                )
        super().__init__(FIXED, FREE, temperature=temperature, **options)
        self.q, self.lam = q, lam

    def _terms(self, side: Side, found: Found, epsilon: Any) -> Tensor:
        largest = math.log(torch.finfo(found.s.dtype).max) - _ROOM
        if self.q / number(epsilon) > largest:
            raise ValueError(
                f"q / temperature = {self.q / number(epsilon):.3g}: exp of it leaves the range of {found.s.dtype}. Raise the "
                "temperature (0.5 in the paper) or lower q."
            )
        weights = side.batch.own(side.weights)
        total = log_total(side, torch.where(weights > 0, found.s, 0.0), epsilon)
        outer = torch.where(weights > 0, (self.q * (total + math.log(self.lam))).exp(), 0.0)
        return (weights * outer - _powers(side, self.q, epsilon)) / self.q


class DCLLoss(IOTLoss):
    """Decoupled contrastive learning: the positive is not in the denominator (Yeh et al., ECCV 2022).

    Mean over anchors of ``-cos / temperature`` of the positives plus ``log sum exp`` over the negatives, which lets a small batch
    learn from easy positives too. Not bounded below by 0.

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.

    Example:
        >>> DCLLoss(temperature=0.5, negatives="cross")(torch.eye(4), torch.eye(4))
        tensor(-0.9014)
    """

    def __init__(self, temperature: float | Tensor = 0.1, **options: Any) -> None:
        super().__init__(FIXED, FREE, temperature=temperature, negatives=options.pop("negatives", "all"), **options)

    _decoupled = True

    @property
    def is_cross_entropy(self) -> bool:
        return self._is_plain and type(self)._terms is DCLLoss._terms

    def _terms(self, side: Side, found: Found, epsilon: Any) -> Tensor:
        return cross_entropy(side, _over_negatives(side, epsilon), epsilon)


class HardNegativeLoss(IOTLoss):
    """Negatives weighted by a balanced plan between anchors and negatives: nearer ones count more (Jiang et al., 2023).

    Mean over anchors of ``-log(pos / (pos + K sum_j w_ij exp(cos_ij / temperature)))``, where ``w_ij``, with rows that sum to 1,
    is the detached entropic coupling of anchors and negatives at ``hardness`` and ``K`` their number. As ``hardness -> inf``
    it is InfoNCE.

    Args:
        temperature: see :class:`IOTLoss`, as are all other options but ``symmetric`` and ranks.
        hardness: epsilon of the coupling, in cosines: the smaller the harder.

    Example:
        >>> z = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 2])).float()
        >>> HardNegativeLoss(0.5, hardness=0.1)(z, z) > HardNegativeLoss(0.5, hardness=10.0)(z, z)
        tensor(True)
    """

    def __init__(self, temperature: float | Tensor = 0.5, *, hardness: float = 0.5, **options: Any) -> None:
        if not 0 < hardness < math.inf:
            raise ValueError(f"hardness = {hardness}: is an epsilon in cosines, so must be positive and finite.")
        for name in ("symmetric", "gather_distributed"):
            if options.get(name):
                raise ValueError(
                    f"{name} = True with HardNegativeLoss: its coupling is that of one process and one direction."
                )
        super().__init__(FIXED, FREE, temperature=temperature, **options)
        self.hardness = hardness

    def _terms(self, side: Side, found: Found, epsilon: Any) -> Tensor:
        batch, points = side.batch, side.batch.points
        barred = batch.matches.all_but_negatives(points)
        allowed = replace(points, barred=barred)._mask().logical_not() & (side.b > 0) & (side.a > 0)[:, None]
        other, seen = self._tilt(points, allowed), allowed.sum(1)
        x, y = points.x, points.y
        both = torch.cat([x / epsilon, x.detach() / self.hardness], 1)
        hard, _ = log_sums(both, torch.cat([y, y.detach()], 1), None, other, ~allowed)
        even, _ = log_sums(x.detach() / self.hardness, y.detach(), None, other, ~allowed)
        weights, has = side.a, (side.a > 0) & (seen > 0)
        negatives = torch.where(has, hard - even + seen.clamp(min=1).to(x.dtype).log(), -math.inf)
        positives = similar(side) / epsilon / torch.where(weights > 0, weights, 1.0)
        return torch.where(has, weights * (torch.logaddexp(positives, negatives) - positives), 0.0)

    def _tilt(self, points: Points, allowed: Tensor) -> Tensor:
        """``log b + g / hardness`` of the coupling of anchors and negatives: what its rows are a softmax of, beside the cost."""
        with torch.no_grad():
            cost = torch.where(allowed, 1.0 - product(points.x, points.y.mT), math.inf)
            a, b = (allowed.any(axis).to(cost.dtype) for axis in (1, 0))
            problem = Problem.unchecked(
                Dense(cost), a / a.sum(), b / b.sum(), epsilon=self.hardness, rows=FIXED, columns=FIXED, mass=None
            )
            outcome, impossible = settled(problem.flat(), self.solver)
            if outcome.status[0] is not Status.CONVERGED:
                warnings.warn(
                    f"the coupling of anchors and negatives did not converge ({outcome.status[0].name}): its weights are "
                    "not balanced. Classes of very unequal size admit no balanced coupling; raise hardness otherwise. "
                    f"{impossible}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return log_scaling(problem.b, outcome.potentials.g[0], self.hardness)


class MatchingGapLoss(IOTLoss):
    """What the pairs cost above the cheapest matching: ``<target, C> - OT`` (Piran et al., ICML 2024, for two views).

    Its derivative in the cost is ``target - plan``. It is in units of the cost, where the loss of the family is in nats: with
    ``epsilon > 0``, ``OT`` with its entropy, it is ``epsilon`` times :class:`SinkhornNCELoss` less ``epsilon log N``. It can be
    negative by as much.

    Args:
        epsilon: of the matching, in cosines; 0 is an exact assignment.
        options: see :class:`IOTLoss`.

    Example:
        >>> MatchingGapLoss(0.0)(torch.eye(4), torch.eye(4).flip(0)) > 0.99
        tensor(True)
    """

    def __init__(self, epsilon: float = 0.1, **options: Any) -> None:
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"epsilon = {epsilon}: must be 0, for an exact assignment, or positive and finite.")
        exact = epsilon == 0
        if exact and (options.get("uniformity") or options.get("gather_distributed")):
            raise ValueError(
                "epsilon = 0 with uniformity or gather_distributed: an assignment has no even negatives, and is found by one "
                "process. Use epsilon > 0."
            )
        super().__init__(FIXED, FIXED, temperature=1.0 if exact else epsilon, **options)
        self.exact = exact

    def _loss(self, batch: Batch, epsilon: Any) -> list[Tensor]:
        if not self.exact:
            return super()._loss(batch, epsilon)
        return [self._assigned(side) for side in self._sides(batch)]

    def _terms(self, side: Side, found: Found, epsilon: Any) -> Tensor:
        weights = side.batch.own(side.weights)
        r, _ = side.marginals()
        known = log_ratio(side, torch.zeros_like(found.other), epsilon) - torch.special.xlogy(r, weights)
        return epsilon * (super()._terms(side, found, epsilon) - known)

    def _assigned(self, side: Side) -> Tensor:
        """Anchor by anchor the cost of the pairs less that of the assignment's arcs."""
        with torch.no_grad():
            problem = side.problem(0.0, Dense(side.batch.points.dense())).detach()
            plan = Entries.of(run(problem.flat(), Exact()).plan[0])
        return (similar(replace(side, target=plan)) - similar(side)) * side.share


class SwAVLoss(IOTLoss):
    """Each view predicts the other's balanced assignment to prototypes: swapped prediction (Caron et al., NeurIPS 2020).

    The cross-entropy of the detached plan U(a, b) between a view and the prototypes, at ``epsilon``, from the row softmax U(a) of
    the other view at ``temperature``; the mean of both ways.

    Args:
        temperature: see :class:`IOTLoss`, as are ``learn_temperature``, ``uniformity``, ``reduction``, ``tolerance``, ``watch``.
        epsilon: of the assignment, in cosines.

    Example:
        >>> prototypes = torch.eye(4)
        >>> SwAVLoss(0.1)(torch.eye(4), torch.eye(4), prototypes)
        tensor(0.0001)
    """

    def __init__(self, temperature: float | Tensor = 0.1, *, epsilon: float = 0.05, **options: Any) -> None:
        known = {"learn_temperature", "uniformity", "reduction", "tolerance", "max_steps", "watch"}
        if set(options) - known:
            raise ValueError(f"{sorted(set(options) - known)}: SwAVLoss knows {', '.join(sorted(known))}.")
        super().__init__(FIXED, FREE, temperature=temperature, **options)
        _check_epsilon(epsilon)
        self.epsilon = epsilon

    @uncompiled
    def forward(self, z0: Tensor, z1: Tensor, prototypes: Tensor) -> Tensor:
        """The loss of two views, shape ``(N, D)``, and prototypes, shape ``(K, D)``, all normalised here."""
        if z0.shape != z1.shape or z0.dim() != 2 or prototypes.dim() != 2 or prototypes.shape[1] != z0.shape[1]:
            raise ValueError(
                f"views {tuple(z0.shape)} and {tuple(z1.shape)} with prototypes {tuple(prototypes.shape)}: must be (N, D) "
                "twice and (K, D)."
            )
        with torch.autocast(device_type=z0.device.type, enabled=False):
            dtype = torch.float64 if z0.dtype == torch.float64 else torch.float32
            x, y, c = (normalised(z.to(dtype)) for z in (z0, z1, prototypes))
            epsilon, batches = self.temperature, []
            epsilon = epsilon.to(dtype) if isinstance(epsilon, Tensor) else epsilon
            for z, other in ((x, y), (y, x)):
                plan = balanced_assignment(other, c, epsilon=self.epsilon, tolerance=self.solver.tolerance)
                found = Matches(Entries.of(plan), None, None, False)
                batches.append(Batch(Points(z, c, "sphere", backend=self.backend), found, None, Alone(), 1, False))
            losses = [self._loss(batch, epsilon) for batch in batches]
            if self.watch is not None:
                from contrastive.diagnostics import Diagnostics  # which looks at losses

                self.watch(Diagnostics(self, batches[0], epsilon))
            return self._reduced(losses, batches)

    def _terms(self, side: Side, found: Found, epsilon: Any) -> Tensor:
        return cross_entropy(side, found.s, epsilon)


def _check_epsilon(epsilon: Any) -> None:
    if isinstance(epsilon, bool) or not isinstance(epsilon, float | int) or not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon!r}: must be a positive number, in cosines; 0.05 is usual.")


def balanced_assignment(z: Tensor, prototypes: Tensor, *, epsilon: float = 0.05, tolerance: float = 1e-4) -> Tensor:
    """The balanced entropic plan between representations and prototypes, detached: rows sum to 1 / N, columns to 1 / K.

    Args:
        z: shape ``(N, D)``, normalised here.
        prototypes: shape ``(K, D)``.
        epsilon: in cosines.
        tolerance: relative marginal error.

    Returns:
        Shape ``(N, K)``, total 1: what ``target=`` of a loss takes.

    Example:
        >>> balanced_assignment(torch.eye(2), torch.eye(2), epsilon=0.1).round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    _check_epsilon(epsilon)
    if z.dim() != 2 or prototypes.dim() != 2 or prototypes.shape[1] != z.shape[1]:
        raise ValueError(
            f"z {tuple(z.shape)} with prototypes {tuple(prototypes.shape)}: must be (N, D) and (K, D) with the same D."
        )
    with torch.no_grad():
        x, y = (normalised(w) for w in (z, prototypes))
        a, b = (w.new_full((len(w),), 1.0 / len(w)) for w in (x, y))
        cost = Dense(Points(x, y, "sphere").dense())
        problem = Problem.unchecked(cost, a, b, epsilon=epsilon, rows=FIXED, columns=FIXED, mass=None).flat()
        outcome = run(problem, None, tolerance=tolerance)
        if outcome.status[0] is not Status.CONVERGED:
            warnings.warn(
                f"the balanced assignment did not converge ({outcome.status[0].name}): raise epsilon or the tolerance, or check "
                "the representations for NaN.",
                RuntimeWarning,
                stacklevel=2,
            )
        return problem.plan(outcome.potentials)[0]


_ROOM = 8.0  # below the largest exponent whose exponential a dtype holds: for the sum over a batch


def _over_negatives(side: Side, epsilon: Any) -> Tensor:
    """The soft-minima of this rank's anchors over their negatives."""
    batch, ranks = side.batch, side.batch.ranks
    points = replace(batch.points, barred=batch.matches.all_but_negatives(batch.points))
    log_weights = side.other_weights.log()
    if side.by_rows:
        return points.soft_minima(None, log_weights, epsilon)[0]
    t = points.soft_minima(batch.own(log_weights), None, epsilon)[1]
    return batch.own(ranks.softmin(t, epsilon))


def _powers(side: Side, q: float, epsilon: Any) -> Tensor:
    """``sum_j Q_ij exp(q cos_ij / epsilon)`` for every anchor of this rank, Q the target."""
    target, points = side.target, side.batch.points
    i, j = target.index
    powers = target.values * (q * (points.x[i] * points.y[j]).sum(1) / epsilon).exp()
    if side.by_rows:
        return target.sums(powers, 0)
    return side.batch.own(side.batch.ranks.sum(target.sums(powers, 1)))
