"""How often the intervals of estimated coefficients contain the truth, in simulated samples; and the time beside pyfixest.

    python -m tests.benchmarks.coverage [--samples 2000] [--docs]

With ``--docs`` the page ``docs/coverage.md`` is written with its picture and numbers. Three designs share a planted affinity:
counts of independent matches between types, counts that vary more than those, and couples, each of whom is a type of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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
from scipy.stats import binom, binomtest

from iotsolve import inverse
from tests.benchmarks.measure import timed

ROOT = Path(__file__).parents[2]
THETA = np.array([[0.8, 0.2], [-0.1, 0.5]])
NAMES = tuple(f"theta[{i}, {j}]" for i, j in np.ndindex(THETA.shape))
LEVEL = 0.95
QUANTILE = statistics.NormalDist().inv_cdf(0.5 + LEVEL / 2)

# errors by the name they have on the page
KINDS: dict[str, dict[str, Any]] = {
    "model": dict(kind="model"),
    "robust": dict(kind="robust"),
    "robust, small sample": dict(kind="robust", small_sample=True),
}


@dataclass(frozen=True)
class Design:
    """A population of types, and samples of it.

    Attributes:
        name: of the design.
        types: number of types on each side.
        size: observations in a sample, or expected ones.
        estimate: the fit to a sample of this size, from the types' traits, their plan and a source of random numbers.
        about: what is sampled, for the page.
    """

    name: str
    types: int
    size: int
    estimate: Callable[[Design, np.random.Generator], inverse.Fit]
    about: str


@cache
def population(types: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Traits of both sides, shape ``(types, 2)``, and the plan of the planted affinity, which sums to 1."""
    rng = np.random.default_rng(types)
    x, y = rng.normal(size=(types, 2)), rng.normal(size=(types, 2))
    even = np.full(types, 1 / types)
    plan = inverse.InverseOT(inverse.Bilinear(x, y)).plan(THETA.ravel(), even, even)
    return x, y, plan / plan.sum()


def counts(design: Design, rng: np.random.Generator) -> inverse.Fit:
    x, y, plan = population(design.types)
    met = rng.multinomial(design.size, plan.ravel()).reshape(plan.shape)
    return inverse.InverseOT(inverse.Bilinear(x, y)).fit(inverse.Coupling(met))


def noisy(design: Design, rng: np.random.Generator) -> inverse.Fit:
    x, y, plan = population(design.types)
    met = rng.poisson(design.size * plan * rng.gamma(2.0, 0.5, plan.shape))
    return inverse.InverseOT(inverse.Bilinear(x, y)).fit(inverse.Coupling(met))


def couples(design: Design, rng: np.random.Generator) -> inverse.Fit:
    x, y, plan = population(design.types)
    i, j = np.divmod(rng.choice(plan.size, design.size, p=plan.ravel()), design.types)
    return inverse.InverseOT(inverse.Bilinear(x[i], y[j])).fit(inverse.Coupling(matched=True))


DESIGNS = (
    Design("counts", 20, 3000, counts, "independent matches"),
    Design(
        "noisy counts",
        40,
        12_000,
        noisy,
        "matches expected; every cell's mean is multiplied by a gamma number of mean 1 and variance 1/2",
    ),
    Design("couples", 60, 600, couples, "couples, each of whom is a type of its own, known by their traits alone"),
)


@dataclass(frozen=True)
class Covered:
    """What became of the intervals of one coefficient by one covariance.

    Attributes:
        design: its name.
        kind: of errors.
        coefficient: its name.
        truth: the coefficient that made the data.
        samples: number of them.
        failures: fits that did not converge; they count as misses.
        inside: share of samples whose interval contains the truth.
        interval: of that share, at 95 % (Wilson).
        bias: mean estimate less the truth.
        spread: standard deviation of the estimates.
        error: mean standard error.
        width: mean width of the intervals.
    """

    design: str
    kind: str
    coefficient: str
    truth: float
    samples: int
    failures: int
    inside: float
    interval: tuple[float, float]
    bias: float
    spread: float
    error: float
    width: float


def band(samples: int, share: float = 0.95) -> tuple[float, float]:
    """Where the share inside lies in ``share`` of all such studies if the intervals are right."""
    low, high = binom.interval(share, samples, LEVEL)
    return float(low) / samples, float(high) / samples


def one(design: Design, seed: int) -> np.ndarray:
    """Coefficients and their errors of every kind: shape ``(1 + kinds, K)``; NaN where nothing converged."""
    os.environ["OMP_NUM_THREADS"] = "1"
    fit = design.estimate(design, np.random.default_rng(1000 + seed))
    if not fit.converged:
        return np.full((1 + len(KINDS), THETA.size), np.nan)
    return np.stack([fit.coefficients, *(fit.errors(**kind) for kind in KINDS.values())])


def study(design: Design, samples: int, *, processes: int = 2) -> list[Covered]:
    """Samples of one design, estimated side by side."""
    with ProcessPoolExecutor(processes) as pool:
        done = pool.map(partial(one, design), range(samples), chunksize=8)
        found = np.stack(list(track(done, description=design.name, total=samples)))
    return covered(design.name, found)


def covered(name: str, found: np.ndarray) -> list[Covered]:
    """Shares, biases and sizes from estimates and errors, shape ``(samples, 1 + kinds, K)``; a failure is a miss."""
    made, samples = [], len(found)
    for k, kind in enumerate(KINDS, 1):
        for c, (coefficient, truth) in enumerate(zip(NAMES, THETA.ravel().tolist(), strict=True)):
            estimates, errors = found[:, 0, c], found[:, k, c]
            inside = int((np.abs(estimates - truth) <= QUANTILE * errors).sum())
            share = binomtest(inside, samples).proportion_ci(method="wilson")
            made.append(
                Covered(
                    design=name,
                    kind=kind,
                    coefficient=coefficient,
                    truth=truth,
                    samples=samples,
                    failures=int(np.isnan(estimates).sum()),
                    inside=inside / samples,
                    interval=(float(share.low), float(share.high)),
                    bias=float(np.nanmean(estimates) - truth),
                    spread=float(np.nanstd(estimates, ddof=1)),
                    error=float(np.nanmean(errors)),
                    width=float(2 * QUANTILE * np.nanmean(errors)),
                )
            )
    return made


def shortfall(types: int) -> np.ndarray:
    """By what factor robust errors of independent matches are expected to be too small, shape ``(K,)``.

    A fitted mean takes part of its own cell's deviation with it: the expected square of a residual is ``mu (1 - h)``, with ``h``
    the leverage, the diagonal of the projection on coefficients and effects weighted by ``mu``. Averages of ``h`` are (K + n + m
    - 1) / (n m), whatever the number of matches. From a column for every effect, so that it shares nothing with the estimate.
    """
    x, y, plan = population(types)
    i, j = np.divmod(np.arange(plan.size), types)
    traits = (x[i, :, None] * y[j, None, :]).reshape(plan.size, -1)
    root = np.sqrt(plan.ravel())[:, None]
    places, _ = np.linalg.qr(root * np.hstack([np.eye(types)[i], np.eye(types)[j, 1:]]))
    rest = root * traits
    rest -= places @ (places.T @ rest)
    own, _ = np.linalg.qr(rest)
    leverage = (places**2).sum(1) + (own**2).sum(1)
    bread = np.linalg.inv(rest.T @ rest)
    expected = bread @ (rest.T * (1 - leverage)) @ rest @ bread
    return np.sqrt(np.diag(expected) / np.diag(bread))


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
    low, high = band(samples)
    short = shortfall(DESIGNS[0].types)
    shares = [2 * statistics.NormalDist().cdf(QUANTILE * s) - 1 for s in short]
    lines = [
        "# Intervals that cover",
        "",
        f"Of {samples:,} simulated samples, the share whose 95 % interval contains the coefficient that made the data. If the "
        f"intervals are right the share lies between {low:.3f} and {high:.3f} in 95 of 100 such studies. A fit that does not "
        "converge counts as a miss. Written by `python -m tests.benchmarks.coverage --docs`.",
        "",
        "```{image} _static/coverage.png",
        ":alt: Shares of intervals that contain the truth, by design, coefficient and errors",
        "```",
        "",
        "- **Model errors** are right where matches are independent, and far too small where they are not: the noisy counts.",
        "- **Robust errors** are right for couples, each of whom is a type of its own. In a table of counts they are too small: "
        "the effects of rows and columns take part of every cell's deviation with them. For independent matches that share "
        "follows from the plan alone and does not fall with their number; for the counts here errors are expected to be "
        + ", ".join(f"{s:.3f}" for s in short)
        + " times as large as they should be, and shares to be "
        + ", ".join(f"{s:.3f}" for s in shares)
        + ". The more rows and columns, the less it is; noise in the cells makes it more.",
        "- **With `small_sample=True`** it is made good on average, not for every coefficient.",
    ]
    for design in DESIGNS:
        own = [c for c in found if c.design == design.name]
        lines += [
            "",
            f"## {design.name.capitalize()}",
            "",
            f"{design.size:,} {design.about}. {design.types} types on each side; {own[0].failures} of {samples:,} fits did not "
            "converge.",
            "",
            "| errors | coefficient | truth | share inside | its 95 % interval | bias | deviation | mean error | mean width |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for c in own:
            shown = f"{c.bias:+.4f} | {c.spread:.4f} | {c.error:.4f} | {c.width:.4f}"
            between = f"{c.interval[0]:.3f} to {c.interval[1]:.3f}"
            lines.append(f"| {c.kind} | {c.coefficient} | {c.truth:g} | {c.inside:.3f} | {between} | {shown} |")
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

    figure, axes = plt.subplots(1, len(DESIGNS), figsize=(10.5, 3.8), sharey=True, layout="constrained")
    for ax, design in zip(axes, DESIGNS, strict=True):
        own = [c for c in found if c.design == design.name]
        ax.axvspan(*band(own[0].samples), color="0.9", label="right intervals, 95 of 100 studies")
        ax.axvline(LEVEL, color="0.6", lw=1)
        for k, (kind, marker) in enumerate(zip(KINDS, "osD", strict=True)):
            here = [c for c in own if c.kind == kind]
            shares = np.array([c.inside for c in here])
            reach = np.abs(np.array([c.interval for c in here]).T - shares)
            height = np.arange(len(here)) + 0.22 * (k - 1)
            ax.errorbar(shares, height, xerr=reach, fmt=marker, ms=5, lw=1.2, label=f"{kind} errors")
        ax.set_yticks(range(len(NAMES)), NAMES)
        ax.set_title(f"{design.name}: {design.size:,} of {design.types} x {design.types} types", fontsize=10)
        ax.set_xlim(min(0.9, *(c.interval[0] - 0.02 for c in own)), 1.0)
    axes[0].invert_yaxis()
    axes[1].set_xlabel("share of 95 % intervals that contain the truth, with an interval of its own")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, fontsize=9, loc="outside lower center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
