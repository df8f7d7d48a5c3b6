"""The laws again on what a device runs: sweeps, second order, certificates and derivatives in torch, nothing compiled."""

import numpy as np
import pytest
from test_closed_forms import (
    test_one_bin_against_one_is_a_number_found_by_bisection,
    test_potentials_at_empty_bins_are_feasible_and_tight,
    test_stiff_semi_relaxed_problems_satisfy_their_optimality_conditions,
)
from test_duality import test_converged_implies_that_the_certificate_holds_at_weights_of_any_total
from test_gradients import (
    test_a_batch_is_differentiated_like_its_problems,
    test_forbidden_arcs_have_derivative_zero_and_never_nan,
    test_implicit_differentiates_the_value_like_envelope,
)
from test_small_epsilon import (
    test_a_mass_beyond_the_range_of_floats_is_a_status_and_spoils_no_other_problem,
    test_an_uneven_batch_takes_the_steps_and_gives_the_numbers_of_its_problems,
)
from test_symmetries import test_a_batch_equals_a_loop
from test_values import test_entropic_value_and_plan_agree_with_cvxpy

from iotsolve import Dense, Points, Problem, solve
from iotsolve.kernels import passes, scaling

__all__ = [
    "test_a_batch_equals_a_loop",
    "test_a_batch_is_differentiated_like_its_problems",
    "test_a_mass_beyond_the_range_of_floats_is_a_status_and_spoils_no_other_problem",
    "test_an_uneven_batch_takes_the_steps_and_gives_the_numbers_of_its_problems",
    "test_converged_implies_that_the_certificate_holds_at_weights_of_any_total",
    "test_entropic_value_and_plan_agree_with_cvxpy",
    "test_forbidden_arcs_have_derivative_zero_and_never_nan",
    "test_implicit_differentiates_the_value_like_envelope",
    "test_one_bin_against_one_is_a_number_found_by_bisection",
    "test_potentials_at_empty_bins_are_feasible_and_tight",
    "test_stiff_semi_relaxed_problems_satisfy_their_optimality_conditions",
]


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled():
    with pytest.MonkeyPatch.context() as patch:
        for cost in (Dense, Points):
            patch.setattr(cost, "is_compiled", property(lambda self: False))
        yield


def test_no_compiled_pass_is_asked(monkeypatch):
    def refuse(*given):
        raise AssertionError("a compiled pass")

    for module in (passes, scaling):
        for name in module.__all__:
            if callable(getattr(module, name)):
                monkeypatch.setattr(module, name, refuse)
    x = np.random.default_rng(0).random((60, 2))
    for cost in (((x[:, None] - x[None]) ** 2).sum(-1), Points(x, x)):
        assert solve(Problem(cost, epsilon=0.01)).certificate.holds
