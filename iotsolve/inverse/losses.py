"""Losses of a cost against an observed plan."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from iotsolve.problem import Problem
from iotsolve.sinkhorn import Sinkhorn
from iotsolve.solve import solve

__all__ = ["inverse_loss"]


def inverse_loss(problem: Problem, target: Any, solver: Sinkhorn | None = None) -> Any:
    """Fenchel-Young loss ``problem.primal(target) - value``: how far ``target`` is from being the optimal plan.

    Non-negative, zero exactly if the target is optimal, convex in the cost, with gradient ``target - plan`` in it (Blondel,
    Martins, Niculae, JMLR 2020); no unrolling. For FIXED and FREE sides it is ``epsilon KL(target | plan)``.

    Args:
        problem: its cost (or what makes it) may require grad; ``epsilon > 0`` or exact.
        target: observed plan, shape ``(..., n, m)``, that satisfies the hard sides; dense, or sparse COO without a batch.
        solver: as for :func:`iotsolve.solve`.

    Returns:
        Shape ``(...)``, cost units; differentiable where the problem's tensors are.

    Raises:
        ValueError: if the target violates a hard side, ``mass`` or a forbidden arc, where the loss would be infinite.

    Example:
        >>> cost = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        >>> loss = inverse_loss(Problem(cost, epsilon=1.0), torch.eye(2, dtype=torch.float64) / 2)
        >>> loss.backward()
        >>> cost.grad
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]], dtype=torch.float64)
    """
    solution = solve(problem, solver)
    primal = problem.primal(target)
    known = primal.detach().isfinite() if isinstance(primal, torch.Tensor) else np.isfinite(primal)
    if not known.all():
        raise ValueError(
            "target is not a plan of this problem: it is negative, violates a hard side or mass, or uses a forbidden arc "
            f"(primal = {math.inf}). Give the problem the target's own marginals as a and b, or relax a side with KL(rho)."
        )
    return primal - solution.value
