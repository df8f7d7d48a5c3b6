"""Time our solvers and losses beside their peers, in one run, at an accuracy the harness measures itself.

Each row is one piece of work: medians of several runs, interleaved so that a busy moment hits everybody, the ratio
peer / ours, and the accuracy of both recomputed in float64 from what they returned. Losses are shown like wins.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import ot
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional

from contrastive.losses import ClipLoss, InfoNCELoss
from iotsolve import FREE, KL, Problem, Sinkhorn, solve

OUT = Path("runs/bench")
REPEATS = 5


@dataclass(frozen=True)
class Row:
    work: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    ours_error: float
    peer_error: float


@dataclass(frozen=True)
class Case:
    """One piece of work: two callables that return what ``error`` judges."""

    work: str
    peer: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    error: Callable[[object], float]


def clouds(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared distances of two uniform clouds in the plane, largest 1, and two random histograms."""
    rng = np.random.default_rng(seed)
    x, y = rng.random((n, 2)), rng.random((n, 2))
    cost = np.square(x[:, None] - y[None]).sum(-1)
    a, b = rng.random(n), rng.random(n)
    return cost / cost.max(), a / a.sum(), b / b.sum()


def entropic(n: int, epsilon: float) -> Case:
    cost, a, b = clouds(n)
    tolerance = 1e-6

    def ours() -> np.ndarray:
        solution = solve(Problem(cost, a, b, epsilon=epsilon), Sinkhorn(tolerance=tolerance))
        assert solution.certificate.holds
        return solution.plan

    def theirs() -> np.ndarray:  # POT stops on an L2 error; this stop gives about the same L1 error
        return ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", stopThr=tolerance / 30, numItermax=100_000)

    return Case(
        f"balanced, n={n}, eps={epsilon:g}", "POT sinkhorn_log", ours, theirs, lambda p: marginal_error(p, a, b)
    )


def unbalanced(n: int, epsilon: float, rho: float) -> Case:
    cost, a, b = clouds(n)
    problem = Problem(cost, a, b, epsilon=epsilon, rows=KL(rho), columns=KL(rho))
    best = float(solve(problem, Sinkhorn(tolerance=1e-13)).value)

    def theirs() -> np.ndarray:
        options = dict(reg_type="kl", method="sinkhorn", numItermax=100_000, stopThr=1e-9)
        return ot.unbalanced.sinkhorn_unbalanced(a, b, cost, epsilon, rho, **options)

    def error(plan: np.ndarray) -> float:
        return (float(problem.primal(plan)) - best) / abs(best)

    work = f"unbalanced KL({rho:g}), n={n}, eps={epsilon:g}"
    return Case(work, "POT sinkhorn_unbalanced", lambda: solve(problem, Sinkhorn(tolerance=1e-6)).plan, theirs, error)


def semi_relaxed(n: int, epsilon: float) -> Case:
    cost, a, b = clouds(n)
    problem = Problem(cost, a, b, epsilon=epsilon, columns=FREE)

    def theirs() -> np.ndarray:
        scores = np.log(b) - cost / epsilon
        density = np.exp(scores - scores.max(1, keepdims=True))
        return a[:, None] * density / density.sum(1, keepdims=True)

    return Case(
        f"semi-relaxed, n={n}, eps={epsilon:g}",
        "NumPy softmax",
        lambda: solve(problem).plan,
        theirs,
        lambda p: float(np.abs(p.sum(1) - a).sum()),
    )


def exact(n: int, weighted: bool) -> Case:
    cost, a, b = clouds(n)
    if not weighted:
        a = b = np.full(n, 1 / n)

    def ours() -> np.ndarray:
        solution = solve(Problem(cost, a, b))
        assert solution.certificate.holds
        return solution.plan

    best = float(ot.emd2(a, b, cost))
    kind = "weighted" if weighted else "uniform"
    return Case(
        f"exact, {kind}, n={n}",
        "POT emd",
        ours,
        lambda: ot.emd(a, b, cost),
        lambda p: abs(float((cost * p).sum()) - best) / best,
    )


def loss(name: str, n: int, d: int = 128) -> Case:
    generator = torch.Generator().manual_seed(0)
    z0, z1 = (torch.randn(n, d, generator=generator, requires_grad=True) for _ in range(2))
    criterion = {"InfoNCE": InfoNCELoss(0.1), "CLIP": ClipLoss(0.1)}[name]
    labels = torch.arange(n)

    def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = functional.normalize(x, dim=1) @ functional.normalize(y, dim=1).T / 0.1
        one = functional.cross_entropy(scores, labels)
        return one if name == "InfoNCE" else (one + functional.cross_entropy(scores.T, labels)) / 2

    exactly = torch.autograd.grad(
        reference(*(doubles := [z.detach().double().requires_grad_() for z in (z0, z1)])), doubles
    )[0]

    def error(gradient: torch.Tensor) -> float:
        return float((gradient.double() - exactly).norm() / exactly.norm())

    return Case(
        f"{name} forward + backward, N={n}, D={d}",
        "torch cross_entropy",
        lambda: torch.autograd.grad(criterion(z0, z1), (z0, z1))[0],
        lambda: torch.autograd.grad(reference(z0, z1), (z0, z1))[0],
        error,
    )


def marginal_error(plan: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum())


CASES: list[Callable[[], Case]] = [
    *(lambda n=n, e=e: entropic(n, e) for n in (200, 500, 1000) for e in (0.1, 0.02)),
    *(lambda r=r: unbalanced(500, 0.05, r) for r in (0.1, 1.0, 10.0)),
    lambda: semi_relaxed(1000, 0.05),
    *(lambda w=w: exact(1000, w) for w in (False, True)),
    *(lambda k=k: loss(k, 1024) for k in ("InfoNCE", "CLIP")),
]


def measure(case: Case) -> Row:
    """Medians of interleaved runs after one of each to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    results: list[object] = [None, None]
    for repeat in range(REPEATS + 1):
        for k, work in enumerate((case.ours, case.theirs)):
            began = time.perf_counter()
            results[k] = work()
            if repeat:
                times[k].append(1e3 * (time.perf_counter() - began))
    ours, theirs = (statistics.median(t) for t in times)
    return Row(case.work, case.peer, ours, theirs, theirs / ours, *(case.error(r) for r in results))


def main() -> None:
    """Run every case, print the table and write runs/bench/results.json."""
    warnings.filterwarnings("ignore", category=UserWarning, module="ot")
    torch.set_num_threads(1)
    console = Console()
    console = console if console.is_terminal else Console(width=130)
    rows = [measure(make()) for make in track(CASES, description="benchmarks", console=console, transient=True)]
    table = Table("work", "peer", title=f"one thread, medians of {REPEATS}; ratio above 1: we are faster")
    for name in ("ours, ms", "peer, ms", "peer / ours", "our error", "peer error"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (
            f"{row.ours_ms:.1f}",
            f"{row.peer_ms:.1f}",
            f"{row.ratio:.2f}",
            f"{row.ours_error:.0e}",
            f"{row.peer_error:.0e}",
        )
        table.add_row(row.work, row.peer, *numbers)
    console.print(table)
    OUT.mkdir(parents=True, exist_ok=True)
    about = {"python": platform.python_version(), "torch": torch.__version__, "POT": ot.__version__, "threads": 1}
    (OUT / "results.json").write_text(json.dumps({"about": about, "rows": [asdict(r) for r in rows]}, indent=2) + "\n")
    console.print(f"Written: {OUT / 'results.json'}")


if __name__ == "__main__":
    main()
