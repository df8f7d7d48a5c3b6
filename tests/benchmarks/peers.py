"""Ourselves and our peers, each as a function of the data and of how hard to try.

A peer has stopping rules of its own, so the harness tries ever smaller thresholds until what comes back is as accurate as asked,
and times that. What is not installed is left out and said so; nothing of a peer is copied here.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Work = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """``solve(cost, a, b, ..., threshold)`` gives a plan, dense or sparse, or the problem's own result for us."""

    name: str
    needs: tuple[str, ...]
    solve: Work
    thresholds: tuple[float, ...] = (1.0, 0.1, 0.01)
    """As shares of the accuracy asked for."""

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


_STEPS = 20_000  # no peer may take more: what needs them is not its problem


def ours(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, threshold: float) -> Any:
    """Problem, solution and certificate; the plan stays unmade until somebody looks at it."""
    from iotsolve import Problem, solve

    solution = solve(Problem(cost, a, b, epsilon=epsilon), tolerance=threshold)
    assert solution.certificate.holds
    return solution


def _pot(method: str, dtype: str = "float64") -> Work:
    def solve(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, threshold: float) -> np.ndarray:
        import ot

        given = (np.asarray(x, dtype) for x in (a, b, cost))
        if dtype == "float32":
            import torch

            given = (torch.from_numpy(x) for x in given)
        options = dict(stopThr=threshold, numItermax=_STEPS if len(a) < 1000 else 2000, warn=False, method=method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(ot.sinkhorn(*given, epsilon, **options), np.float64)

    return solve


def _ott(*, lse: bool, anderson: int) -> Work:
    made: dict[str, Any] = {}

    def solve(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, threshold: float) -> np.ndarray:
        import jax

        jax.config.update("jax_enable_x64", True)
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import acceleration, sinkhorn

        if "run" not in made:
            mixing = {"anderson": acceleration.AndersonAcceleration(memory=anderson)} if anderson else {}

            def run(cost: Any, a: Any, b: Any, epsilon: Any, threshold: Any) -> Any:
                solver = sinkhorn.Sinkhorn(
                    lse_mode=lse, threshold=threshold, max_iterations=_STEPS, inner_iterations=5, **mixing
                )
                geom = geometry.Geometry(cost_matrix=cost, epsilon=epsilon)
                return solver(linear_problem.LinearProblem(geom, a, b)).matrix

            made["run"] = jax.jit(run)
        return np.asarray(made["run"](cost, a, b, epsilon, threshold))

    return solve


def _geomloss(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, threshold: float) -> np.ndarray:
    """It has no stopping rule but the number of iterations."""
    import torch
    from geomloss import ot

    given = (torch.from_numpy(x) for x in (cost, a, b))
    c, a, b = given
    return ot.solve(c, reg=epsilon, a=a, b=b, max_iter=min(1000, round(1 / threshold))).plan.numpy()


def _regot(name: str) -> Work:
    def solve(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, threshold: float) -> np.ndarray:
        import regot

        most = 2000 if len(a) < 1000 else 100

        return getattr(regot, name)(np.asfortranarray(cost), a, b, epsilon, tol=threshold, max_iter=most).plan

    return solve


def _mdot(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, threshold: float) -> np.ndarray:
    """Smooths the weights by the temperature, whatever the threshold."""
    import torch
    from mdot_tnt.mdot import mdot

    given = [torch.from_numpy(x) for x in (a, b, cost)]
    u, v, *_ = mdot(*given, 1 / epsilon)
    return torch.exp(u[:, None] + v[None, :] - given[2] / epsilon).numpy()


ENTROPIC = (
    Peer("POT", ("ot",), _pot("sinkhorn")),
    Peer("POT, float32 in torch", ("ot",), _pot("sinkhorn", "float32"), (1.0, 0.1)),
    Peer("POT, stabilised", ("ot",), _pot("sinkhorn_stabilized")),
    Peer("OTT-JAX", ("ott",), _ott(lse=True, anderson=0)),
    Peer("OTT-JAX, Anderson", ("ott",), _ott(lse=True, anderson=5)),
    Peer("OTT-JAX, kernel", ("ott",), _ott(lse=False, anderson=0)),
    Peer("GeomLoss", ("geomloss",), _geomloss, (1.0,)),
    Peer("regot, SPLR", ("regot",), _regot("sinkhorn_splr")),
    Peer("regot, L-BFGS", ("regot",), _regot("sinkhorn_lbfgs_dual")),
    Peer("regot, SSNS", ("regot",), _regot("sinkhorn_ssns")),
    Peer("mdot-tnt", ("mdot_tnt",), _mdot, (1.0,)),
)


# -- without entropy ---------------------------------------------------------------------------------------------------


def ours_exact(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    from iotsolve import Problem, solve

    solution = solve(Problem(cost, a, b))
    assert solution.certificate.holds
    return solution


def ours_partial(cost: np.ndarray, a: np.ndarray, b: np.ndarray, mass: float) -> Any:
    from iotsolve import AT_MOST, Problem, solve

    solution = solve(Problem(cost, a, b, rows=AT_MOST, columns=AT_MOST, mass=mass))
    assert solution.certificate.holds
    return solution


def _permutation(columns: np.ndarray) -> Any:
    from scipy.sparse import coo_array

    n = len(columns)
    return coo_array((np.full(n, 1 / n), (np.arange(n), columns)), shape=(n, n))


def _scipy(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    from scipy.optimize import linear_sum_assignment

    return _permutation(linear_sum_assignment(cost)[1])


def _lapjv(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    import lapjv

    return _permutation(lapjv.lapjv(cost)[0])


def _lapx(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    import lap

    return _permutation(lap.lapjv(cost)[1])


def _emd(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    import ot

    return ot.emd(a, b, cost, numItermax=10**8)


def _ortools(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    """Integer costs, to nine digits of the range."""
    from ortools.graph.python import linear_sum_assignment

    n, solver = len(a), linear_sum_assignment.SimpleLinearSumAssignment()
    rows, columns = np.divmod(np.arange(n * n, dtype=np.int32), n)
    solver.add_arcs_with_cost(rows, columns, np.round(cost.ravel() * 1e9).astype(np.int64))
    solver.solve()
    return _permutation(np.array([solver.right_mate(i) for i in range(n)]))


def _highs(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    """The linear program as it stands, by its dual simplex."""
    from scipy import sparse
    from scipy.optimize import linprog

    n, m = cost.shape
    rows, columns = np.divmod(np.arange(n * m), m)
    ends = np.stack([rows, n + columns], 1).ravel(), np.repeat(np.arange(n * m), 2)
    incidence = sparse.csc_array((np.ones(2 * n * m), ends), shape=(n + m, n * m))
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(cost.ravel(), A_eq=incidence, b_eq=np.r_[a, b], method="highs-ds", options=options)
    return found.x.reshape(n, m)


EQUAL = (
    Peer("scipy", ("scipy",), _scipy),
    Peer("lapjv", ("lapjv",), _lapjv),
    Peer("lapx", ("lap",), _lapx),
    Peer("POT, emd", ("ot",), _emd),
    Peer("ortools", ("ortools",), _ortools),
    Peer("HiGHS", ("scipy",), _highs),
)


def _partial(cost: np.ndarray, a: np.ndarray, b: np.ndarray, mass: float) -> Any:
    import ot

    return ot.partial.partial_wasserstein(a, b, cost, m=mass, numItermax=10**8)


def _highs_partial(cost: np.ndarray, a: np.ndarray, b: np.ndarray, mass: float) -> Any:
    """The linear program as it stands, by its dual simplex."""
    from scipy import sparse
    from scipy.optimize import linprog

    n, m = cost.shape
    rows, columns = np.divmod(np.arange(n * m), m)
    ends = np.stack([rows, n + columns], 1).ravel(), np.repeat(np.arange(n * m), 2)
    most = sparse.csc_array((np.ones(2 * n * m), ends), shape=(n + m, n * m))
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    total = np.ones((1, n * m))
    found = linprog(
        cost.ravel(), A_ub=most, b_ub=np.r_[a, b], A_eq=total, b_eq=[mass], method="highs-ds", options=options
    )
    return found.x.reshape(n, m)


PARTIAL = (Peer("POT, partial_wasserstein", ("ot",), _partial), Peer("HiGHS", ("scipy",), _highs_partial))
WEIGHTED = (Peer("POT, emd", ("ot",), _emd), Peer("HiGHS", ("scipy",), _highs))


def ours_many(cost: np.ndarray, a: np.ndarray, b: np.ndarray, mass: float | None) -> Any:
    from iotsolve import AT_MOST, Problem, solve

    sides = {} if mass is None else {"rows": AT_MOST, "columns": AT_MOST, "mass": mass}
    solution = solve(Problem(cost, a, b, **sides))
    assert np.all(solution.certificate.holds)
    return solution


def in_a_loop(one: Work) -> Work:
    def solve(cost: np.ndarray, a: np.ndarray, b: np.ndarray, mass: float | None) -> np.ndarray:
        rest = () if mass is None else (mass,)
        found = (one(*each, *rest) for each in zip(cost, a, b, strict=True))
        return np.stack([plan if isinstance(plan, np.ndarray) else plan.toarray() for plan in found])

    return solve


MANY_EQUAL = (Peer("scipy, in a loop", ("scipy",), in_a_loop(_scipy)), Peer("POT, emd in a loop", ("ot",), in_a_loop(_emd)))
MANY_WEIGHTED = (Peer("POT, emd in a loop", ("ot",), in_a_loop(_emd)),)
MANY_PARTIAL = (Peer("POT, partial_wasserstein in a loop", ("ot",), in_a_loop(_partial)),)


# -- unbalanced, and many at once --------------------------------------------------------------------------------------


def ours_unbalanced(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, rho: float, threshold: float
) -> Any:
    from iotsolve import KL, Problem, solve

    solution = solve(Problem(cost, a, b, epsilon=epsilon, rows=KL(rho), columns=KL(rho)), tolerance=threshold)
    assert solution.certificate.holds
    return solution


def _pot_unbalanced(method: str) -> Work:
    def solve(
        cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, rho: float, threshold: float
    ) -> np.ndarray:
        import ot

        options = dict(method=method, reg_type="kl", stopThr=threshold, numItermax=_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ot.unbalanced.sinkhorn_unbalanced(a, b, cost, epsilon, rho, **options)

    return solve


UNBALANCED = (
    Peer("POT", ("ot",), _pot_unbalanced("sinkhorn"), (1.0, 0.1, 0.01, 1e-3)),
    Peer("POT, translation invariant", ("ot",), _pot_unbalanced("sinkhorn_translation_invariant"), (1.0, 0.1, 0.01)),
    Peer("POT, stabilised", ("ot",), _pot_unbalanced("sinkhorn_stabilized"), (1.0, 0.1, 0.01)),
)


def _pot_loop(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, threshold: float) -> np.ndarray:
    one = _pot("sinkhorn")
    return np.stack([one(c, a, b, epsilon, threshold) for c in cost])


def _pot_batch(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, threshold: float) -> np.ndarray:
    import torch
    from ot.batch import solve_batch

    return np.asarray(solve_batch(torch.from_numpy(cost), epsilon, max_iter=5000, tol=threshold).plan)


MANY = (
    Peer("POT, in a loop", ("ot",), _pot_loop),
    Peer("POT, batch in torch", ("ot",), _pot_batch, (1.0, 0.1)),
)


# -- points, whose costs nobody holds ----------------------------------------------------------------------------------

_SWEEPS = 400  # of points nobody may take more: each is ten to a hundred times as dear as one of a matrix
Pair = tuple[np.ndarray, np.ndarray]
"""Potentials, of which the plan between equal weights is ``exp((f + g - C) / epsilon) / (n m)``."""


def ours_points(x: np.ndarray, y: np.ndarray, epsilon: float, threshold: float) -> Any:
    from iotsolve import Points, Problem, solve

    solution = solve(Problem(Points(x, y), epsilon=epsilon), tolerance=threshold)
    assert solution.certificate.holds
    return solution


def _geomloss_points(x: np.ndarray, y: np.ndarray, epsilon: float, threshold: float) -> Pair:
    """In KeOps; it has no stopping rule but the number of iterations."""
    import torch
    from geomloss import ot

    most = min(100, round(0.01 / threshold))
    found = ot.solve_sample(torch.from_numpy(x), torch.from_numpy(y), reg=epsilon, max_iter=most)
    return found.potential_a.numpy(), found.potential_b.numpy()


def _keops(x: np.ndarray, y: np.ndarray, epsilon: float, threshold: float) -> Pair:
    """Sweeps as its users write them, until the marginals are as near as asked."""
    import torch
    from pykeops.torch import LazyTensor

    x, y = (torch.from_numpy(z) for z in (x, y))
    lazy = -((LazyTensor(x[:, None]) - LazyTensor(y[None])) ** 2).sum(-1) / epsilon
    f, g = torch.zeros(len(x), 1, dtype=x.dtype), torch.zeros(len(y), 1, dtype=x.dtype)
    log_n, log_m = float(np.log(len(x))), float(np.log(len(y)))
    for _ in range(_SWEEPS):
        fresh = log_m - (lazy + LazyTensor(g[None])).logsumexp(1)
        off = float((torch.expm1(f - fresh)).abs().mean())
        f = fresh
        if off < threshold:
            break
        g = log_n - (lazy + LazyTensor(f[:, None])).logsumexp(0)[:, None].reshape(-1, 1)
    return epsilon * f[:, 0].numpy(), epsilon * g[:, 0].numpy()


def _ott_points(batch: int | None) -> Work:
    made: dict[str, Any] = {}

    def solve(x: np.ndarray, y: np.ndarray, epsilon: float, threshold: float) -> Pair:
        import jax

        jax.config.update("jax_enable_x64", True)
        from ott.geometry import pointcloud
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn

        if "run" not in made:

            def run(x: Any, y: Any, epsilon: Any, threshold: Any) -> Any:
                solver = sinkhorn.Sinkhorn(threshold=threshold, max_iterations=_SWEEPS, inner_iterations=5)
                geom = pointcloud.PointCloud(x, y, epsilon=epsilon, batch_size=batch)
                found = solver(linear_problem.LinearProblem(geom))
                return found.f, found.g

            made["run"] = jax.jit(run)
        f, g = made["run"](x, y, epsilon, threshold)
        n, m = len(x), len(y)
        return np.asarray(f) + epsilon * np.log(n), np.asarray(g) + epsilon * np.log(m)

    return solve


def _pot_points(x: np.ndarray, y: np.ndarray, epsilon: float, threshold: float) -> Pair:
    import ot

    options = dict(isLazy=True, batchSize=1000, numIterMax=_SWEEPS, stopThr=threshold, warn=False, log=True)
    f, g, _ = ot.bregman.empirical_sinkhorn(x, y, epsilon, **options)
    return epsilon * (f + np.log(len(x))), epsilon * (g + np.log(len(y)))


POINTS = (
    Peer("KeOps", ("pykeops",), _keops),
    Peer("GeomLoss", ("geomloss", "pykeops"), _geomloss_points, (1.0,)),
    Peer("OTT-JAX, in batches", ("ott",), _ott_points(1024)),
    Peer("OTT-JAX, at once", ("ott",), _ott_points(None)),
    Peer("POT, lazy", ("ot",), _pot_points),
)
