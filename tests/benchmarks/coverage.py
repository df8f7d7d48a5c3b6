"""How often the intervals of estimated coefficients contain the truth, in simulated samples; and the time beside pyfixest.

    python -m tests.benchmarks.coverage [--samples 2000] [--docs]

With ``--docs`` the page ``docs/coverage.md`` is written with its picture and numbers. Two designs: counts of a planted affinity
between types, and couples, each of whom is a type of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from iotsolve import inverse
from tests.benchmarks.measure import timed

ROOT = Path(__file__).parents[2]
THETA = np.array([[0.8, 0.2], [-0.1, 0.5]])
LEVEL = 0.95


@dataclass(frozen=True)
class Design:
    """A population of types, and samples of it.

    Attributes:
        name: of the design.
        types: number of types on each side.
        size: observations in a sample.
        couples: whether every observation is a pair of types of its own.
    """

    name: str
    types: int
    size: int
    couples: bool

    def fit(self, seed: int) -> inverse.Fit:
        """The estimate from one sample."""
        x, y, plan = _population(self.types)
        rng = np.random.default_rng(1000 + seed)
        if not self.couples:
            counts = rng.multinomial(self.size, plan.ravel()).reshape(plan.shape)
            return inverse.InverseOT(inverse.Bilinear(x, y)).fit(inverse.Coupling(counts))
        i, j = np.divmod(rng.choice(plan.size, self.size, p=plan.ravel()), self.types)
        return inverse.affinity(x[i], y[j])


@cache
def _population(types: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(types)
    x, y = rng.normal(size=(types, 2)), rng.normal(size=(types, 2))
    even = np.full(types, 1 / types)
    plan = inverse.InverseOT(inverse.Bilinear(x, y)).plan(THETA.ravel(), even, even)
    return x, y, plan / plan.sum()


DESIGNS = (Design("counts", 20, 3000, False), Design("couples", 60, 600, True))
KINDS = ("model", "robust")


@dataclass(frozen=True)
class Covered:
    """What became of the intervals of one coefficient by one covariance."""

    design: str
    kind: str
    coefficient: str
    truth: float
    samples: int
    inside: float
    bias: float
    spread: float
    error: float

    @property
    def band(self) -> tuple[float, float]:
        """Where the share would lie in 95 of 100 such studies if the intervals were right."""
        half = 1.96 * math.sqrt(LEVEL * (1 - LEVEL) / self.samples)
        return LEVEL - half, LEVEL + half


def one(design: Design, seed: int) -> np.ndarray:
    """Coefficients, and the two kinds of errors: shape ``(3, K)``; NaN where nothing converged."""
    os.environ["OMP_NUM_THREADS"] = "1"
    fit = design.fit(seed)
    if not fit.converged:
        return np.full((1 + len(KINDS), THETA.size), np.nan)
    return np.stack([fit.coefficients, *(fit.errors(kind) for kind in KINDS)])


def study(design: Design, samples: int, *, processes: int = 2) -> list[Covered]:
    """Samples of one design, estimated side by side."""
    with ProcessPoolExecutor(processes) as pool:
        done = pool.map(partial(one, design), range(samples), chunksize=8)
        found = np.stack(list(track(done, description=design.name, total=samples)))
    return covered(design.name, found)


def covered(name: str, found: np.ndarray) -> list[Covered]:
    """Shares, biases and sizes from estimates and errors, shape ``(samples, 1 + kinds, K)``; a failure is a miss."""
    truth, estimates = THETA.ravel(), found[:, 0]
    half = statistics.NormalDist().inv_cdf(0.5 + LEVEL / 2)
    made = []
    for k, kind in enumerate(KINDS, 1):
        inside = np.abs(estimates - truth) <= half * found[:, k]
        for c in range(THETA.size):
            made.append(
                Covered(
                    name,
                    kind,
                    f"theta[{c // 2}, {c % 2}]",
                    float(truth[c]),
                    len(found),
                    float(inside[:, c].mean()),
                    float(np.nanmean(estimates[:, c]) - truth[c]),
                    float(np.nanstd(estimates[:, c])),
                    float(np.nanmean(found[:, k, c])),
                )
            )
    return made


# -- beside pyfixest -----------------------------------------------------------------------------------------------------


def races() -> Iterator[dict[str, Any]]:
    """Milliseconds of a gravity equation with robust errors, ours and pyfixest's, warm; medians of interleaved runs."""
    import pandas as pd
    import pyfixest as pf

    def case(name: str, table: Any, columns: list[str]) -> dict[str, Any]:
        named = dict(flow="flow", origin="origin", destination="destination", features=columns)
        works: dict[str, Callable[[], Any]] = {
            "iotsolve": lambda: inverse.gravity(table, **named).errors("robust"),
            "pyfixest": lambda: pf.fepois(f"flow ~ {' + '.join(columns)} | origin + destination", table, vcov="hetero"),
        }
        walls: dict[str, list[float]] = {who: [] for who in works}
        for lap in range(9):
            for who, work in works.items():
                wall = timed(work)[1]
                if lap > 1:
                    walls[who].append(wall)
        return {"case": name} | {who: statistics.median(w) for who, w in walls.items()}

    table = pd.read_csv(ROOT / "tests" / "data" / "us_state_migration_2012.csv")
    table = table.rename(columns={"movers": "flow", "dest": "destination"}).assign(log_km=lambda t: np.log(t.km))
    yield case("migration between 51 states", table, ["log_km", "km"])
    for n in (51, 100, 200, 500):
        rng = np.random.default_rng(n)
        i, j = np.divmod(np.arange(n * n), n)
        x = rng.normal(size=(n * n, 3))
        mean = np.exp(rng.normal(size=n)[i] + rng.normal(size=n)[j] + x @ [0.5, -0.3, 0.1])
        flows = dict(origin=i, destination=j, flow=rng.poisson(mean).astype(float))
        names = [f"x{k}" for k in range(3)]
        table = pd.DataFrame(flows | dict(zip(names, x.T, strict=True)))
        yield case(f"simulated, {n} x {n}, three features", table, names)


# -- the page --------------------------------------------------------------------------------------------------------------


def page(found: list[Covered], raced: list[dict[str, Any]]) -> str:
    samples = found[0].samples
    low, high = found[0].band
    lines = [
        "# Intervals that cover",
        "",
        f"Of {samples:,} simulated samples, the share whose 95 % interval contains the coefficient that made the data. If the "
        f"intervals are right the share lies between {low:.3f} and {high:.3f} in 95 of 100 such studies. Written by "
        "`python -m tests.benchmarks.coverage --docs`.",
        "",
        f"*Counts*: {DESIGNS[0].size:,} matches between {DESIGNS[0].types} types on each side. *Couples*: {DESIGNS[1].size} "
        "couples, each of whom is a type of its own, so that nothing is known of them but their traits.",
        "",
        "```{image} _static/coverage.png",
        ":alt: Shares of intervals that contain the truth, by design, coefficient and covariance",
        "```",
        "",
        "| design | errors | coefficient | truth | share inside | bias | standard deviation | mean standard error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in found:
        shown = f"{c.inside:.3f} | {c.bias:+.4f} | {c.spread:.4f} | {c.error:.4f}"
        lines.append(f"| {c.design} | {c.kind} | {c.coefficient} | {c.truth:g} | {shown} |")
    if raced:
        lines += [
            "",
            "## Beside pyfixest",
            "",
            "A gravity equation with effects of origin and destination and robust standard errors, from a data frame to the "
            "errors, warm, on the machine of [Performance](performance.md). The numbers agree: coefficients to 1e-8, standard "
            "errors to 1e-4.",
            "",
            "| table | ours, ms | pyfixest, ms | theirs / ours |",
            "|---|---|---|---|",
        ]
        for r in raced:
            lines.append(
                f"| {r['case']} | {r['iotsolve']:.1f} | {r['pyfixest']:.1f} | {r['pyfixest'] / r['iotsolve']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def draw(found: list[Covered], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DESIGNS), figsize=(8.4, 3.6), sharex=True, layout="constrained")
    for ax, design in zip(axes, DESIGNS, strict=True):
        own = [c for c in found if c.design == design.name]
        ax.axvspan(*own[0].band, color="0.9", label="right intervals, 95 of 100 studies")
        ax.axvline(LEVEL, color="0.6", lw=1)
        names = [c.coefficient for c in own if c.kind == KINDS[0]]
        for k, (kind, marker) in enumerate(zip(KINDS, "os", strict=True)):
            shares = [c.inside for c in own if c.kind == kind]
            ax.plot(shares, np.arange(len(names)) + 0.15 * (k - 0.5), marker, label=f"{kind} errors")
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_title(f"{design.name}: {design.size:,} of {design.types} x {design.types} types")
        ax.set_xlabel("share of 95 % intervals that contain the truth")
        ax.set_xlim(0.9, 1.0)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, fontsize=9, loc="outside lower center")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--docs", action="store_true", help="write docs/coverage.md, its picture and its numbers")
    given = parser.parse_args()
    found = [c for design in DESIGNS for c in study(design, given.samples)]
    raced = list(races()) if importlib.util.find_spec("pyfixest") and importlib.util.find_spec("pandas") else []
    text = page(found, raced)
    print(text)
    if given.docs:
        (ROOT / "docs" / "coverage.md").write_text(text)
        draw(found, ROOT / "docs" / "_static" / "coverage.png")
        numbers = {"coverage": [asdict(c) for c in found], "beside pyfixest": raced}
        (ROOT / "docs" / "_static" / "coverage.json").write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
