"""The family: a contrastive loss is an inverse optimal-transport problem whose cost an encoder makes.

    C_ij = 1 - cos(z0_i, z1_j),   epsilon = temperature,   target = the positive pairs,
    loss = (primal(target) - optimal value) / temperature  [ + uniformity KL(Q | P) ]

How far the inner problem relaxes its marginals decides which loss it is (Shi, Zhang, Zhen, Fan, Yan, ICML 2023). Where the
sides are hard or free the first term is KL(target | P), the cross-entropy people know; with soft sides it adds what the
plan's marginals pay against the target's, which keeps the loss convex in the cost and its gradient ``target - P``.
"""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from iotsolve.gradient import Envelope, Implicit
from iotsolve.marginals import FIXED, FREE, KL, Marginal, number
from iotsolve.problem import Potentials, Problem
from iotsolve.sinkhorn import Sinkhorn
from iotsolve.solve import run
from iotsolve.solver import Status

__all__ = [
    "NAMES",
    "ClipLoss",
    "GlobalNCELoss",
    "IOTLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "SinkhornNCELoss",
    "UnbalancedNCELoss",
    "make",
]


class IOTLoss(nn.Module):
    """The contrastive loss of a pair of marginals; every other class of this module is a name for a point of this one.

    Args:
        rows: marginal object of the anchors ``z0``: FIXED, FREE, AT_MOST, Between, KL, TV from iotsolve.
        columns: marginal object of the candidates ``z1``.
        mass: total mass of the plan; 1 for two FREE or two soft sides, None where a side fixes it.
        temperature: ``epsilon`` of the inner problem, in cosines, positive; a float, or a tensor that may require grad.
        learn_temperature: make the temperature a parameter (its logarithm, started at ``temperature``, floored at 0.01).
        uniformity: weight ``>= 0`` of the penalty ``KL(Q | P)``, where Q spreads the plan's negatives evenly.
        negatives: ``"cross"``: candidates of ``z0_i`` are all of ``z1``; ``"all"``: both views stacked, oneself left out.
        symmetric: mean of the loss and of its mirror image with rows and columns exchanged.
        tolerance: relative marginal error of the inner solve. The loss errs by its square, the gradient by itself.
        max_steps: sweeps of the inner solve; if they do not suffice a RuntimeWarning says so.

    Raises:
        ValueError: on arguments out of range, and in ``forward`` on inputs that are no pair of ``(N, D)`` batches.

    Example:
        >>> z0, z1 = torch.eye(4), torch.eye(4)
        >>> IOTLoss(FIXED, FREE, temperature=0.5)(z0, z1)
        tensor(0.3408)
    """

    def __init__(
        self,
        rows: Marginal,
        columns: Marginal,
        mass: float | None = None,
        *,
        temperature: float | Tensor = 0.1,
        learn_temperature: bool = False,
        uniformity: float = 0.0,
        negatives: str = "cross",
        symmetric: bool = False,
        tolerance: float = 1e-4,
        max_steps: int = 200,
    ) -> None:
        super().__init__()
        _check_arguments(rows, columns, mass, temperature, uniformity, negatives)
        self.rows, self.columns, self.mass = rows, columns, mass
        self.uniformity, self.negatives, self.symmetric = uniformity, negatives, symmetric
        self.solver = Sinkhorn(tolerance=tolerance, max_steps=max_steps, annealing=None, stationary=uniformity > 0)
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.as_tensor(number(temperature)).log())
        elif isinstance(temperature, nn.Parameter):
            self.shared_temperature = temperature
        else:
            self.constant_temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """The ``epsilon`` in force."""
        if hasattr(self, "log_temperature"):
            return self.log_temperature.clamp(min=math.log(_COLDEST)).exp()
        return getattr(self, "shared_temperature", getattr(self, "constant_temperature", None))

    def forward(self, z0: Float[Tensor, "n d"], z1: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Mean loss over the anchors.

        Args:
            z0: representations of one view, shape ``(N, D)``; normalised here, so any length will do.
            z1: representations of the other; row i is the positive of ``z0``'s row i.

        Returns:
            A scalar, float32 for half-precision inputs and in the inputs' dtype otherwise.
        """
        with torch.autocast(device_type=z0.device.type, enabled=False):
            problem, target = self.problem(z0, z1)
            sides = [problem] if not self.symmetric else [problem, _swapped(problem)]
            losses = [self._one(side, target if side is problem else target.t().coalesce()) for side in sides]
            return torch.stack(losses).mean()

    def problem(self, z0: Tensor, z1: Tensor) -> tuple[Problem, Tensor]:
        """The inner problem, live in ``z0``, ``z1`` and the temperature, and the sparse target plan."""
        z0, z1 = _normalised(z0, z1)
        n, diagonal = len(z0), torch.arange(len(z0), device=z0.device)
        if self.negatives == "all":
            z0 = z1 = torch.cat([z0, z1])
            n, diagonal = 2 * n, torch.arange(2 * n, device=z0.device)
        cost = 1.0 - z0 @ z1.T
        partner = diagonal
        if self.negatives == "all":
            cost = cost.masked_fill(torch.eye(n, dtype=torch.bool, device=z0.device), math.inf)
            partner = (diagonal + n // 2) % n
        weights = torch.full((n,), 1.0 / n, dtype=cost.dtype, device=cost.device)
        total = 1.0 if self.mass is None else self.mass
        values = torch.full((n,), total / n, dtype=cost.dtype, device=cost.device)
        target = torch.sparse_coo_tensor(torch.stack([diagonal, partner]), values, (n, n), check_invariants=False)
        temperature = self.temperature
        epsilon = temperature.to(cost.dtype) if isinstance(temperature, Tensor) else temperature
        inner = Problem.unchecked(
            cost, weights, weights, epsilon=epsilon, rows=self.rows, columns=self.columns, mass=self.mass
        )
        return inner, target.coalesce()

    def coupling(self, z0: Tensor, z1: Tensor) -> Float[Tensor, "n m"]:
        """The plan the inner problem gives this batch, detached: what the loss compares with the positive pairs."""
        with torch.no_grad():
            problem, _ = self.problem(z0, z1)
            return problem.plan(self.potentials(problem))

    def potentials(self, problem: Problem) -> Potentials:
        """Solve the inner problem: the library's own loop, without validation or certificate."""
        with torch.no_grad():
            outcome = run(problem.detach().flat(), self.solver)
        if outcome.status[0] is not Status.CONVERGED:
            warnings.warn(
                f"the inner transport stopped after {outcome.steps[0]} steps above its tolerance {self.solver.tolerance:g} at "
                f"temperature {number(problem.epsilon):g} ({outcome.status[0].name}): the gradient is as wrong as "
                "the marginals are. Raise max_steps, the temperature or the tolerance, or check the representations for NaN.",
                RuntimeWarning,
                stacklevel=2,
            )
        p = outcome.potentials
        return Potentials(p.f[0], p.g[0], p.lam[0])

    def _one(self, problem: Problem, target: Tensor) -> Tensor:
        p = self.potentials(problem)
        loss = (problem.primal(target) - Envelope().value(problem, p, None)) / problem.epsilon
        if self.uniformity == 0:
            return loss
        return loss + self.uniformity * uniformity_penalty(problem, target, p)

    def extra_repr(self) -> str:
        return (
            f"rows={self.rows}, columns={self.columns}, mass={self.mass}, temperature={number(self.temperature):.4g}, "
            f"uniformity={self.uniformity}, negatives={self.negatives!r}, symmetric={self.symmetric}"
        )


_COLDEST = 0.01  # a learnable temperature stops here, as CLIP's does


def uniformity_penalty(problem: Problem, target: Tensor, p: Potentials) -> Tensor:
    """``KL(Q | P)``: Q keeps the plan's positives and replaces every negative by their mean (Shi et al., ICML 2023).

    With M the total mass of the negatives it is ``M (log mean P - mean log P)``, means over negatives only; masked arcs and
    positives are in neither. The gradient goes through the plan by the implicit function theorem.
    """
    negative = problem.cost.dense().detach().isfinite()
    negative[tuple(target.indices())] = False
    log_plan = problem.log_plan(Implicit().potentials(problem, p))
    count = negative.sum()
    log_mass = torch.logsumexp(torch.where(negative, log_plan, -math.inf), (0, 1))
    mean_log = torch.where(negative, log_plan, 0.0).sum() / count
    return log_mass.exp() * (log_mass - count.log() - mean_log)


class InfoNCELoss(IOTLoss):
    """U(a): rows FIXED, columns FREE; the plan is a row softmax and the loss InfoNCE, exactly (van den Oord et al., 2018).

    Example:
        >>> InfoNCELoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, *, uniformity: float = 0.0, learn_temperature: bool = False
    ) -> None:
        super().__init__(
            FIXED, FREE, temperature=temperature, uniformity=uniformity, learn_temperature=learn_temperature
        )


class NTXentLoss(IOTLoss):
    """InfoNCE on both views stacked, oneself left out: SimCLR's loss, exactly (Chen et al., ICML 2020).

    Example:
        >>> NTXentLoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.5944)
    """

    def __init__(
        self, temperature: float | Tensor = 0.5, *, uniformity: float = 0.0, learn_temperature: bool = False
    ) -> None:
        super().__init__(
            FIXED,
            FREE,
            temperature=temperature,
            uniformity=uniformity,
            learn_temperature=learn_temperature,
            negatives="all",
        )


class ClipLoss(IOTLoss):
    """Mean of InfoNCE from ``z0`` to ``z1`` and from ``z1`` to ``z0``: CLIP's loss, exactly (Radford et al., ICML 2021).

    Example:
        >>> ClipLoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(
        self, temperature: float | Tensor = 0.07, *, uniformity: float = 0.0, learn_temperature: bool = False
    ) -> None:
        super().__init__(
            FIXED,
            FREE,
            temperature=temperature,
            uniformity=uniformity,
            learn_temperature=learn_temperature,
            symmetric=True,
        )


class GlobalNCELoss(IOTLoss):
    """U(1): both sides FREE, total mass 1; one softmax over all pairs (Shi et al., ICML 2023).

    Example:
        >>> GlobalNCELoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, *, uniformity: float = 0.0, learn_temperature: bool = False
    ) -> None:
        super().__init__(
            FREE, FREE, 1.0, temperature=temperature, uniformity=uniformity, learn_temperature=learn_temperature
        )


class SinkhornNCELoss(IOTLoss):
    """U(a, b): both sides FIXED; the plan is a balanced coupling (Shi et al., ICML 2023).

    Example:
        >>> SinkhornNCELoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        uniformity: float = 0.0,
        learn_temperature: bool = False,
        tolerance: float = 1e-4,
        max_steps: int = 200,
    ) -> None:
        super().__init__(
            FIXED,
            FIXED,
            temperature=temperature,
            uniformity=uniformity,
            learn_temperature=learn_temperature,
            tolerance=tolerance,
            max_steps=max_steps,
        )


class UnbalancedNCELoss(IOTLoss):
    """Both sides pay ``rho KL`` for departing from uniform: between U(1) (``rho -> 0``) and U(a, b) (``rho -> inf``).

    Args:
        temperature: see :class:`IOTLoss`.
        rho: price of a departing marginal, in cosines, positive.
        mass: total mass of the plan; None leaves it to the sides.

    Example:
        >>> UnbalancedNCELoss(temperature=0.5, rho=0.3)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        rho: float = 1.0,
        mass: float | None = 1.0,
        uniformity: float = 0.0,
        learn_temperature: bool = False,
        tolerance: float = 1e-4,
        max_steps: int = 200,
    ) -> None:
        super().__init__(
            KL(rho),
            KL(rho),
            mass,
            temperature=temperature,
            uniformity=uniformity,
            learn_temperature=learn_temperature,
            tolerance=tolerance,
            max_steps=max_steps,
        )


_LOSSES = {
    "infonce": InfoNCELoss,
    "ntxent": NTXentLoss,
    "clip": ClipLoss,
    "global": GlobalNCELoss,
    "sinkhorn": SinkhornNCELoss,
    "unbalanced": UnbalancedNCELoss,
}
NAMES = tuple(_LOSSES)


def make(name: str, *, temperature: float | Tensor = 0.2, uniformity: float = 0.0) -> IOTLoss:
    """A loss by the name the command line uses.

    Raises:
        ValueError: if there is no such loss; the message lists those there are.

    Example:
        >>> type(make("sinkhorn")).__name__
        'SinkhornNCELoss'
    """
    if name not in _LOSSES:
        raise ValueError(f"loss = {name!r}: there is no such loss. Known: {', '.join(NAMES)}.")
    return _LOSSES[name](temperature=temperature, uniformity=uniformity)


def _check_arguments(
    rows: Marginal,
    columns: Marginal,
    mass: float | None,
    temperature: float | Tensor,
    uniformity: float,
    negatives: str,
) -> None:
    for name, side in (("rows", rows), ("columns", columns)):
        if not isinstance(side, Marginal):
            raise ValueError(
                f"{name} = {side!r}: must be a marginal object from iotsolve, such as FIXED, FREE or KL(1.0)."
            )
    if not number(temperature) > 0 or not math.isfinite(number(temperature)):
        raise ValueError(f"temperature = {number(temperature)}: must be positive and finite; 0.05 to 0.5 is usual.")
    if not 0 <= uniformity < math.inf:
        raise ValueError(
            f"uniformity = {uniformity}: is the weight of a penalty, so must be >= 0; 0.2 is usual, 0 switches it off."
        )
    if mass is not None and not 0 < mass < math.inf:
        raise ValueError(f"mass = {mass}: must be positive and finite, or None; the weights of each side total 1.")
    if mass is None and rows.is_free and columns.is_free:
        raise ValueError(
            "rows and columns are both FREE: nothing then ties the plan's total mass. Pass mass=1.0, which is U(1)."
        )
    total = 1.0 if mass is None else mass
    for name, side in (("rows", rows), ("columns", columns)):
        lo, hi = (number(x) for x in side.bounds)
        if not lo <= total <= hi:
            raise ValueError(
                f"mass = {total} with {name} = {side}: the positive pairs then violate that side and the loss would be infinite. "
                "Choose a mass inside the side's bounds, or a soft side."
            )
    if negatives not in ("cross", "all"):
        raise ValueError(
            f"negatives = {negatives!r}: must be 'cross' (the other view) or 'all' (both views, oneself left out)."
        )


def _normalised(z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    if z0.dim() != 2 or z0.shape != z1.shape or len(z0) < 2:
        raise ValueError(
            f"representations have shapes {tuple(z0.shape)} and {tuple(z1.shape)}: both must be (N, D) with the same "
            "N >= 2, row i of the one positive to row i of the other. Flatten feature maps, and drop an incomplete last "
            "batch of one."
        )
    dtype = torch.float64 if torch.float64 in (z0.dtype, z1.dtype) else torch.float32
    return functional.normalize(z0.to(dtype), dim=1), functional.normalize(z1.to(dtype), dim=1)


def _swapped(problem: Problem) -> Problem:
    """The same cost with the marginal objects exchanged, seen from the other side."""
    return Problem.unchecked(
        problem.cost.dense().T,
        problem.b,
        problem.a,
        epsilon=problem.epsilon,
        rows=problem.sides[0],
        columns=problem.sides[1],
        mass=problem.mass,
    )
