"""Time the semi-relaxed estimate beside gradient descent through a forward problem that is solved again at every step.

``python -m tests.benchmarks.inverse`` prints a table (minutes). The data are an exact plan of planted coefficients, so that all
of an error is the method's. The columns' weights are uniform, where models with and without them in the entropy are one.
``bioiot`` (Adam, an accelerated fixed point and implicit differentiation) takes part if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from iotsolve import KL, inverse

RATIOS = (1.0, 50.0, 500.0)  # rho / epsilon


@dataclass(frozen=True)
class Case:
    """Planted coefficients and the plan they make, rows fixed, columns at ``rho KL``, epsilon 1."""

    values: np.ndarray
    theta: np.ndarray
    a: np.ndarray
    b: np.ndarray
    plan: np.ndarray
    rho: float

    @classmethod
    def of(cls, ratio: float, n: int, count: int, seed: int = 0) -> Case:
        rng = np.random.default_rng(seed)
        values, theta = rng.standard_normal((count, n, n)), rng.uniform(-1.0, 1.0, count)
        a, b = rng.dirichlet(np.full(n, 5.0)), np.full(n, 1 / n)
        model = inverse.InverseOT(inverse.Features(values), columns=KL(ratio))
        return cls(values, theta, a, b, model.plan(theta, a, b), ratio)


@dataclass(frozen=True)
class Entry:
    """What somebody needed, and how far the coefficients are from the planted ones."""

    ratio: float
    who: str
    seconds: float
    error: float
    steps: int | None


def ours(case: Case) -> tuple[np.ndarray, int]:
    model = inverse.InverseOT(inverse.Features(case.values), columns=KL(case.rho))
    fit = model.fit(inverse.Coupling(plan=case.plan, a=case.a, b=case.b))
    assert fit.converged
    return fit.coefficients, fit.steps


def unrolled(
    case: Case, *, sweeps: int = 100, rate: float = 1e-2, steps: int = 1000, tolerance: float = 1e-6
) -> tuple[np.ndarray, int]:
    """Adam on the cross entropy of the plan, differentiated through all sweeps of the logarithmic Sinkhorn iteration."""
    values, a, b, plan = (torch.as_tensor(x) for x in (case.values, case.a, case.b, case.plan))
    theta = torch.zeros(len(case.theta), dtype=torch.float64, requires_grad=True)
    adam, damping = torch.optim.Adam([theta], lr=rate), case.rho / (case.rho + 1.0)
    for step in range(1, steps + 1):
        score = torch.tensordot(theta, values, 1)
        g = torch.zeros_like(b)
        for _ in range(sweeps):
            f = -torch.logsumexp(score + g + b.log(), 1)
            g = -damping * torch.logsumexp(score + f[:, None] + a.log()[:, None], 0)
        logs = score + g + b.log()
        logs = logs - torch.logsumexp(logs, 1, keepdim=True) + a.log()[:, None]
        loss = -(plan * logs).sum()
        adam.zero_grad()
        loss.backward()
        if float(theta.grad.abs().max()) <= tolerance or step == steps:
            break
        adam.step()
    return theta.detach().numpy(), step


def bioiot(case: Case, *, rate: float = 1e-2, steps: int = 1000) -> tuple[np.ndarray, int]:
    from bioiot.fitting import fit_once

    features, rows = np.moveaxis(case.values, 0, -1), case.plan / case.a[:, None]
    options = dict(mu=case.rho, lam=0.0, eps=1.0, epochs=steps, lr=rate, two_stage=False)
    with contextlib.redirect_stdout(io.StringIO()):  # a line for every forward problem that did not converge
        found = fit_once([features], [case.a], [case.b], [rows], **options)
    return found[2].numpy(), steps


PEERS: dict[str, Callable[[Case], tuple[np.ndarray, int]]] = {"Adam, unrolled Sinkhorn": unrolled, "bioiot": bioiot}


def timed(case: Case, work: Callable[[Case], tuple[np.ndarray, int]], repeats: int) -> tuple[float, float, int]:
    """Median seconds, largest error of a coefficient, steps."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        theta, steps = work(case)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), float(abs(theta - case.theta).max()), steps


def rows(n: int = 50, count: int = 5) -> Iterator[Entry]:
    """Every price of the columns, ours first."""
    for ratio in RATIOS:
        case = Case.of(ratio, n, count)
        ours(case)  # kernels are compiled once
        yield Entry(ratio, "iotsolve", *timed(case, ours, 5))
        for who, work in PEERS.items():
            try:
                yield Entry(ratio, who, *timed(case, work, 1))
            except ModuleNotFoundError:
                continue


def shown(entries: list[Entry]) -> Table:
    table = Table("rho / epsilon", "who", "seconds", "times ours", "error", "steps")
    mine: dict[float, Any] = {entry.ratio: entry.seconds for entry in entries if entry.who == "iotsolve"}
    for e in entries:
        table.add_row(
            f"{e.ratio:g}",
            e.who,
            f"{e.seconds:.4g}",
            f"{e.seconds / mine[e.ratio]:,.0f}",
            f"{e.error:.1e}",
            str(e.steps),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=50, help="rows, and columns")
    parser.add_argument("--features", type=int, default=5)
    given = parser.parse_args()
    Console().print(shown(list(rows(given.n, given.features))))


if __name__ == "__main__":
    main()
