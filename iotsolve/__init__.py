"""iotsolve: certified optimal transport and inverse optimal transport.

::

    from iotsolve import Problem, solve, FIXED, KL
    solution = solve(Problem(cost, a, b, epsilon=0.05, rows=FIXED, columns=KL(1.0)))
"""

from typing import TYPE_CHECKING, Any

from iotsolve.certificate import Certificate, certify
from iotsolve.costs import Dense, Points
from iotsolve.divergence import sinkhorn_divergence
from iotsolve.exact import Exact
from iotsolve.gradient import Envelope, Gradients, Implicit, Unroll
from iotsolve.interior import Interior
from iotsolve.marginals import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared
from iotsolve.newton import Newton
from iotsolve.problem import Potentials, Problem
from iotsolve.sinkhorn import Sinkhorn
from iotsolve.solution import Solution, SolveError
from iotsolve.solve import solve
from iotsolve.solver import Status

if TYPE_CHECKING:
    from iotsolve.inverse import inverse_loss

__version__ = "0.1.0"

__all__ = [
    "AT_MOST",
    "FIXED",
    "FREE",
    "KL",
    "L2",
    "TV",
    "Between",
    "Certificate",
    "ChiSquared",
    "Dense",
    "Envelope",
    "Exact",
    "Gradients",
    "Implicit",
    "Interior",
    "Newton",
    "Points",
    "Potentials",
    "Problem",
    "Sinkhorn",
    "Solution",
    "SolveError",
    "Status",
    "Unroll",
    "certify",
    "inverse_loss",
    "sinkhorn_divergence",
    "solve",
]


def __getattr__(name: str) -> Any:
    """What is read of inverse problems, which not everybody has, is imported when asked for."""
    if name not in ("inverse", "inverse_loss"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    inverse = import_module("iotsolve.inverse")
    return inverse if name == "inverse" else inverse.inverse_loss
