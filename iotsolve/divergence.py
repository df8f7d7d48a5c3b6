"""The debiased Sinkhorn divergence: a distance between weighted clouds, from three entropic problems."""

from __future__ import annotations

from typing import Any

from iotsolve.costs import Points
from iotsolve.interior import Interior
from iotsolve.kernels.uncompiled import uncompiled
from iotsolve.marginals import FIXED, KL, TV, ChiSquared, Marginal, Scalar
from iotsolve.problem import Problem
from iotsolve.sinkhorn import Sinkhorn
from iotsolve.solve import solve

__all__ = ["sinkhorn_divergence"]


@uncompiled
def sinkhorn_divergence(
    x: Any,
    y: Any,
    a: Any = None,
    b: Any = None,
    *,
    epsilon: Scalar,
    side: Marginal = FIXED,
    metric: str = "sqeuclidean",
    solver: Sinkhorn | Interior | None = None,
    throw: bool = True,
) -> Any:
    """``OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + eps / 2 (sum a - sum b)^2``, OT the entropic value.

    The two self-terms take away the entropic bias: the divergence is not negative and 0 only between equal clouds, which the
    value itself is not (Feydy et al., AISTATS 2019; unbalanced: Sejourne et al., arXiv 1910.12958).

    Args:
        x: points of the first cloud, shape ``(..., n, d)``, NumPy or torch.
        y: points of the second, shape ``(..., m, d)``.
        a: weights of the first, shape ``(..., n)``; uniform of total 1 by default.
        b: weights of the second, shape ``(..., m)``.
        epsilon: strength of the entropy, positive, in units of the cost.
        side: what both sides pay: ``FIXED``, ``KL(rho)``, ``TV(rho)`` or ``ChiSquared(rho)``.
        metric: of :class:`Points`: ``"sqeuclidean"``, ``"euclidean"`` or ``"cosine"``.
        solver: of the three problems, chosen by itself if not given. Each value is right to about the solver's tolerance,
            and so is their difference: not relative to itself.
        throw: as of :func:`solve`.

    Returns:
        Shape ``(...)``; NumPy in, NumPy out; differentiable in points, weights, epsilon and the penalty.

    Raises:
        ValueError: if epsilon is 0, or for a side or metric for which it is no divergence.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0], [1.0]])
        >>> float(sinkhorn_divergence(x, x, epsilon=0.1)), round(float(sinkhorn_divergence(x, x + 2.0, epsilon=0.1)), 9)
        (0.0, 4.0)
    """
    if not isinstance(side, KL | TV | ChiSquared) and side != FIXED:
        raise ValueError(
            f"side = {side}: the debiased divergence is known to be one for FIXED, KL(rho), TV(rho) and ChiSquared(rho). "
            "For other sides take the value of solve(...)."
        )
    if metric not in ("sqeuclidean", "euclidean", "cosine"):
        raise ValueError(
            f"metric = {metric!r}: must be sqeuclidean, euclidean or cosine, whose Gibbs kernels are positive."
        )

    def problem(x: Any, y: Any, a: Any, b: Any) -> Problem:
        made = Problem(Points(x, y, metric), a, b, epsilon=epsilon, rows=side, columns=side)
        if made.is_exact:
            raise ValueError(
                "epsilon = 0: there is no bias to take away; the value of solve(...) is the distance itself."
            )
        return made

    across, first, second = problem(x, y, a, b), problem(x, x, a, a), problem(y, y, b, b)
    value, own_x, own_y = (solve(p, solver, throw=throw).value for p in (across, first, second))
    excess = across.leave(epsilon * (across.a.sum(-1) - across.b.sum(-1)).square() / 2)
    return value - own_x / 2 - own_y / 2 + excess
