"""The main job on real data: solve transport in every regime, train with every loss, draw what happened.

runs/demo/plans.png        one digit carried to another in each regime
runs/demo/losses.png       training loss of every member of the family
runs/demo/coupling.png     the plan of one batch, before and after training
runs/demo/embedding.png    the test images, before and after training
runs/demo/summary.json     every number printed
runs/demo/training/        the runs themselves, rewritten each time
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from contrastive.data import Dataset, load
from contrastive.evaluate import evaluate
from contrastive.losses import NAMES
from contrastive.trainer import Run, TrainConfig, initial_encoder, train, write_atomically
from iotsolve import AT_MOST, FREE, KL, Problem, Solution, solve

PRIMARY = "probe@10"
METRICS = ("probe", PRIMARY, "knn5", "knn20")

REGIMES: dict[str, dict[str, Any]] = {
    "exact": dict(epsilon=0.0),
    "entropic": dict(epsilon=0.02),
    "semi-relaxed": dict(epsilon=0.02, columns=FREE),
    "unbalanced": dict(epsilon=0.02, rows=KL(0.1), columns=KL(0.1)),
    "partial, 70 %": dict(epsilon=0.0, rows=AT_MOST, columns=AT_MOST, mass=0.7),
}


def run(out: str | Path, *, epochs: int = 30, seeds: int = 3, losses: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """Run the demonstration and return its summary, which is also written to ``out/summary.json``.

    Args:
        out: directory for pictures, summary and runs; made if missing. A ``training`` folder of an earlier demonstration in it
            is replaced.
        epochs: passes over the training images per run.
        seeds: runs per loss, from seed 0.
        losses: names of the losses to train with.
    """
    from contrastive import plots  # matplotlib takes a second to import

    out, console, began = Path(out), _console(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    data = load("digits")

    console.print("[bold]1. Transport between handwritten digits[/bold]")
    transport, plans = solve_regimes(data)
    console.print(_transport_table(transport))
    plots.plans(out / "plans.png", *one_digit_each(data), {name: s.plan for name, s in plans.items()})

    console.print("\n[bold]2. Encoders trained with each loss[/bold]")
    console.print(
        f"{len(losses)} losses x {seeds} seeds, {epochs} epochs. Primary metric, chosen before the run: {PRIMARY}."
    )
    runs = _train_all(out / "training", losses, seeds, epochs)
    training = score(runs, data)
    console.print(_training_table(training, seeds))

    plots.losses(out / "losses.png", {name: [r.history for r in some] for name, some in runs.items()}, _batches(data))
    plots.couplings(out / "coupling.png", runs, data)
    shown = runs["sinkhorn" if "sinkhorn" in runs else losses[0]][0]
    plots.embeddings(out / "embedding.png", initial_encoder(shown.config, data), shown.encoder, data, shown.config.loss)

    summary = {
        "transport": transport,
        "training": training,
        "primary_metric": PRIMARY,
        "epochs": epochs,
        "seeds": list(range(seeds)),
        "seconds_per_run": {name: [round(r.seconds, 2) for r in some] for name, some in runs.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    console.print(f"\nWritten in {summary['seconds']:.0f} s:")
    for path in sorted(p for p in out.iterdir() if p.suffix in (".png", ".json")):
        console.print(f"  {path}")
    return summary


def _console() -> Console:
    """As wide as the terminal, and wide enough for the tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


# -- transport -------------------------------------------------------------------------------------------------------


def one_digit_each(data: Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first training 3 and the first 8, shape (8, 8), as histograms of ink of total 1; most pixels are empty."""
    first = {label: int((data.train_labels == label).nonzero()[0]) for label in (3, 8)}
    images = (data.train[first[label], 0].double().numpy() for label in (3, 8))
    source, target = (image / image.sum() for image in images)
    return source, target


def pixel_cost(size: int) -> NDArray[np.float64]:
    """Squared distance between the pixels of a square image, shape (size^2, size^2), largest entry 1."""
    place = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    cost = np.square(place[:, None] - place[None]).sum(-1).astype(float)
    return cost / cost.max()


def solve_regimes(data: Dataset) -> tuple[list[dict[str, Any]], dict[str, Solution]]:
    """Solve two problems in each regime: one digit to another (histograms), and all 3s to all 8s (points).

    Returns:
        One row of numbers per problem and regime, and the solutions of the first problem by regime.
    """
    source, target = one_digit_each(data)
    threes, eights = (data.train[data.train_labels == label].flatten(1).double().numpy() for label in (3, 8))
    between = np.square(threes[:, None] - eights[None]).sum(-1)
    problems = {
        "one 3 to one 8": (pixel_cost(len(source)), source.ravel(), target.ravel()),
        f"{len(threes)} 3s to {len(eights)} 8s": (between / between.max(), None, None),
    }
    for cost, a, b in problems.values():  # the first solve imports, and on a fresh machine compiles, what later ones find
        for options in REGIMES.values():
            solve(Problem(cost, a, b, **options))
    rows, first = [], {}
    for title, (cost, a, b) in problems.items():
        for regime, options in REGIMES.items():
            began = time.perf_counter()
            solution = solve(Problem(cost, a, b, **options))
            seconds = time.perf_counter() - began
            rows.append({"problem": title, "regime": regime} | _numbers(solution, seconds))
            first.setdefault(regime, solution)
    return rows, first


def _numbers(solution: Solution, seconds: float) -> dict[str, Any]:
    certificate = solution.certificate
    return {
        "value": float(solution.value),
        "transport_cost": float(solution.transport_cost),
        "mass": float(solution.mass),
        "gap": float(certificate.gap),
        "row_violation": float(certificate.row_violation),
        "column_violation": float(certificate.column_violation),
        "certified": bool(certificate.holds),
        "steps": int(solution.steps),
        "milliseconds": round(1e3 * seconds, 2),
    }


def _transport_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("problem", "regime")
    for name in ("value", "mass", "gap", "row error", "column error", "steps", "ms"):
        table.add_column(name, justify="right")
    table.add_column("certified")
    previous = None
    for row in rows:
        table.add_row(
            row["problem"] if row["problem"] != previous else "",
            row["regime"],
            f"{row['value']:.6f}",
            f"{row['mass']:.3f}",
            *(f"{row[k]:.0e}" for k in ("gap", "row_violation", "column_violation")),
            str(row["steps"]),
            f"{row['milliseconds']:.1f}",
            "yes" if row["certified"] else "NO",
            end_section=row["regime"] == list(REGIMES)[-1],
        )
        previous = row["problem"]
    return table


# -- training --------------------------------------------------------------------------------------------------------


def score(runs: dict[str, list[Run]], data: Dataset) -> dict[str, dict[str, list[float]]]:
    """Accuracies by name of the loss (or baseline) and metric, one per seed; raw pixels have no seed."""
    from torch import nn

    some = next(iter(runs.values()))
    untrained = [initial_encoder(r.config, data) for r in some]
    encoders = {name: [r.encoder for r in trained] for name, trained in runs.items()}
    rows = {"raw pixels": [nn.Flatten()], "untrained encoder": untrained} | encoders
    scores = {name: [evaluate(encoder, data) for encoder in row] for name, row in rows.items()}
    return {name: {m: [s[m] for s in row] for m in METRICS} for name, row in scores.items()}


def _train_all(out: Path, losses: tuple[str, ...], seeds: int, epochs: int) -> dict[str, list[Run]]:
    shutil.rmtree(out, ignore_errors=True)
    runs: dict[str, list[Run]] = {name: [] for name in losses}
    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("training", total=seeds * len(losses))
        for seed in range(seeds):
            for name in losses:
                progress.update(task, description=f"{name}, seed {seed}")
                config = TrainConfig(loss=name, seed=seed, epochs=epochs)
                runs[name].append(train(config, out / f"{name}-{seed}", progress=False))
                progress.advance(task)
    return runs


def _batches(data: Dataset) -> int:
    return len(data.train) // TrainConfig().batch_size


def _training_table(scores: dict[str, dict[str, list[float]]], seeds: int) -> Table:
    table = Table(
        "accuracy on other writers, %", caption=f"mean ± standard deviation over {seeds} seeds; * primary metric"
    )
    for metric in METRICS:
        table.add_column(metric + (" *" if metric == PRIMARY else ""), justify="right")
    for name, row in scores.items():
        table.add_row(name, *(_mean(row[m]) for m in METRICS), end_section=name == "untrained encoder")
    return table


def _mean(values: list[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else "      "
    return f"{100 * np.mean(values):.1f}{spread}"
