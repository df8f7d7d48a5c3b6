"""For tests, ours and yours: problems to draw (Hypothesis), answers to compare with (cvxpy), and laws to hold.

Needs the extra ``testing``: ``pip install iotsolve[testing]``. A solver of your own is tested so::

    from hypothesis import given
    from iotsolve import solve
    from iotsolve.testing import check_certificate, problems

    @given(problems(exact=False))
    def test_my_solver(problem):
        check_certificate(problem, solve(problem, MySolver(), throw=False))

Every problem drawn has an answer; what to do about one that a solver cannot reach is for its status to say.
"""

from iotsolve.testing.laws import check_certificate, check_duality, check_gradient, check_limits
from iotsolve.testing.references import Reference, reference
from iotsolve.testing.solvers import Answer, check_solver
from iotsolve.testing.strategies import costs, marginals, points, problems, weights
from iotsolve.testing.verification import REGIMES, Report, verify

__all__ = [
    "REGIMES",
    "Answer",
    "Reference",
    "Report",
    "check_certificate",
    "check_duality",
    "check_gradient",
    "check_limits",
    "check_solver",
    "costs",
    "marginals",
    "points",
    "problems",
    "reference",
    "verify",
    "weights",
]
