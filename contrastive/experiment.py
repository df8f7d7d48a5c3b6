"""Does the inner problem's constraint matter? Members of the family on Fashion-MNIST, in regimes where it might.

Named before anything was run: the primary metric is the accuracy of a logistic probe with 100 labels per class on the
flattened features before the head, averaged over three draws of labels (the penalty chosen on a part of the first),
on test images; each member's temperature is the one with the best mean on validation images, which are neither
trained on nor reported; what is compared are differences to InfoNCE, paired by seed. A seed fixes the weights, the
order and the views of all members alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from contrastive.config import TrainConfig
from contrastive.data import Dataset, load
from iotsolve.progress import bar

__all__ = ["STUDIES", "Study", "run", "write_page"]

SEEDS = (0, 1, 2, 3, 4)
_MEMBERS: dict[str, dict[str, Any]] = {
    "infonce": {},
    "ntxent": {},
    "clip": {},
    "global": {},
    "sinkhorn": {},
    "unbalanced": {"loss_options": {"rho": 0.1}},
}


@dataclass(frozen=True)
class Study:
    """What is compared where.

    Attributes:
        base: Settings that all runs share.
        side: Pixels of a side of the images.
        arms: Members of the family, each with a weight of the uniformity penalty; others are compared with InfoNCE without it.
        temperatures: Those each arm is trained at.
        regimes: What each changes in the settings.
    """

    base: TrainConfig
    side: int
    arms: tuple[tuple[str, float], ...]
    temperatures: tuple[float, ...]
    regimes: dict[str, dict[str, Any]]


_BASE = TrainConfig(data="fashion-mnist", train_size=4000, learning_rate=3e-3, dim=64, threads=1, log_every=1000)
STUDIES = {
    # all members at a size that a CPU trains in seconds
    "small": Study(
        dataclasses.replace(_BASE, epochs=5, batch_size=256),
        14,
        tuple(itertools.product(_MEMBERS, (0.0, 0.2))),
        (0.1, 0.2, 0.5),
        {
            "clean": {},
            "half of the pairs broken": {"broken": 0.5},
            "long tail 100:1": {"imbalance": 100.0},
            "embedding of 8": {"dim": 8},
        },
    ),
    # whole images and crops, under which training helps
    "crops": Study(
        dataclasses.replace(_BASE, epochs=10, batch_size=128, augmentation="photo"),
        28,
        (*itertools.product(("infonce", "sinkhorn"), (0.0, 0.2)), ("global", 0.0), ("unbalanced", 0.0)),
        (0.1, 0.2),
        {"clean": {}, "70 % of the pairs broken": {"broken": 0.7}, "long tail 100:1": {"imbalance": 100.0}},
    ),
}
_HELD = 2000  # images each for validation and test
_LABELS, _DRAWS = 100, 3


@dataclass(frozen=True)
class Result:
    """One run: where it stands in the design, and its scores."""

    regime: str
    member: str
    uniformity: float
    temperature: float
    seed: int
    validation: float
    test: float
    knn5: float
    loss: float
    seconds: float

    @property
    def name(self) -> str:
        return self.member + (" + uniformity" if self.uniformity else "")


@cache
def data(side: int) -> tuple[Dataset, Dataset]:
    """What is trained on, with validation images as its test part, and the same with test images there."""
    from torch.nn.functional import avg_pool2d

    whole, size = load("fashion-mnist"), _BASE.train_size
    images, test = (x[:most] for x, most in ((whole.train, size + _HELD), (whole.test, _HELD)))
    if side < images.shape[-1]:
        images, test = (avg_pool2d(x, images.shape[-1] // side) for x in (images, test))
    held, labels = slice(size, size + _HELD), whole.train_labels
    parts = images[:size], labels[:size]
    return (
        Dataset(*parts, images[held], labels[held], whole.name),
        Dataset(*parts, test, whole.test_labels[:_HELD], whole.name),
    )


def design(study: Study, *, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Where every run stands, the seeds outermost: what is stopped early is a whole design with fewer seeds."""
    seeds, regimes, arms, temperatures = SEEDS, list(study.regimes), study.arms, study.temperatures
    if quick:
        seeds, regimes, temperatures = SEEDS[:2], regimes[:1], temperatures[:1]
        arms = tuple(arm for arm in arms if arm[0] in ("infonce", "sinkhorn"))
    for seed, regime, (member, uniformity), temperature in itertools.product(seeds, regimes, arms, temperatures):
        yield dict(regime=regime, member=member, uniformity=uniformity, temperature=temperature, seed=seed)


def run(out: str | Path, name: str = "small", *, quick: bool = False, workers: int = 2) -> list[Result]:
    """Train and score every run of the design that is not in `out` yet, and return all.

    Args:
        out: Directory; one JSON file for each run in it. A design that was stopped goes on where it was.
        name: Of the study, one of `STUDIES`.
        quick: Two seeds, two members, one regime, one temperature.
        workers: Processes, each with one thread.

    Raises:
        ValueError: Fashion-MNIST is not there, or no such study.
    """
    from rich.console import Console
    from rich.progress import Progress

    if name not in STUDIES:
        raise ValueError(f"study {name!r} is not one of {', '.join(STUDIES)}.")
    study, out = STUDIES[name], Path(out)
    out.mkdir(parents=True, exist_ok=True)
    data(study.side)  # what is missing is said here, once
    places = list(design(study, quick=quick))
    left = [place for place in places if not _file(out, study, place).exists()]
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs", total=len(places), completed=len(places) - len(left))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for done in as_completed([pool.submit(_one, study, place, out) for place in left]):
                done.result()
                progress.advance(task)
    return [Result(**json.loads(_file(out, study, place).read_text())) for place in places]


def baselines(study: Study) -> dict[str, list[float]]:
    """The primary metric of what training has to beat: raw pixels, and untrained encoders by seed."""
    from threadpoolctl import threadpool_limits
    from torch import nn

    from contrastive import evaluate, trainer

    validation, test = data(study.side)
    with threadpool_limits(1), bar("baselines", len(SEEDS) + 1) as advance:
        models = (trainer.initial_model(dataclasses.replace(study.base, seed=seed), validation) for seed in SEEDS)
        untrained = []
        for model in models:
            untrained.append(_scores(evaluate.sides(model, "features")[0], validation, test)[0][1])
            advance("untrained encoder")
        return {"raw pixels": [_scores(nn.Flatten(), validation, test)[0][1]], "untrained encoder": untrained}


def _scores(encoder: Any, validation: Dataset, test: Dataset) -> tuple[np.ndarray, float]:
    """Accuracies of the probe on validation and test images, and of five neighbours on test images."""
    from contrastive import evaluate

    bank, labels = evaluate.embed(encoder, validation.train), validation.train_labels.numpy()
    parts = [(evaluate.embed(encoder, part.test), part.test_labels.numpy()) for part in (validation, test)]
    scores, penalty = np.zeros((_DRAWS, 2)), None
    for draw in range(_DRAWS):
        probe = evaluate.probing(bank, labels, per_class=_LABELS, seed=draw, penalty=penalty)
        scores[draw], penalty = [np.mean(probe.predict(x) == y) for x, y in parts], probe.penalty
    return scores.mean(0), evaluate.knn(bank, labels, *parts[1], k=5)


def _file(out: Path, study: Study, place: dict[str, Any]) -> Path:
    told = json.dumps([place, study.side, dataclasses.asdict(_config(study, place))], sort_keys=True)
    return out / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"


def _config(study: Study, place: dict[str, Any]) -> TrainConfig:
    given = {key: place[key] for key in ("uniformity", "temperature", "seed")}
    return dataclasses.replace(
        study.base, loss=place["member"], **_MEMBERS[place["member"]], **study.regimes[place["regime"]], **given
    )


def _one(study: Study, place: dict[str, Any], out: Path) -> None:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # or every process would keep all cores busy waiting for each other
        _trained_and_scored(study, place, out)


def _trained_and_scored(study: Study, place: dict[str, Any], out: Path) -> None:
    import torch

    from contrastive import evaluate, trainer

    torch.set_num_threads(1)
    file = _file(out, study, place)
    folder = file.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    validation, test = data(study.side)
    trained = trainer.train(_config(study, place), folder, data=validation, progress=False)
    (validated, tested), knn5 = _scores(evaluate.sides(trained.model, "features")[0], validation, test)
    result = Result(
        **place,
        validation=float(validated),
        test=float(tested),
        knn5=knn5,
        loss=float(np.mean(trained.history[-5:])),
        seconds=round(trained.seconds, 2),
    )
    trainer.write_atomically(file, json.dumps(dataclasses.asdict(result)).encode())
    shutil.rmtree(folder)


# -- the page ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A member in a regime at its temperature: its scores by seed, and its differences to InfoNCE."""

    name: str
    temperature: float
    test: np.ndarray
    knn5: np.ndarray
    difference: float
    half_width: float

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if not math.isfinite(self.half_width) or abs(self.difference) <= self.half_width:
            return "no difference"
        return "better" if self.difference > 0 else "worse"


def rows(results: list[Result], regime: str) -> list[Row]:
    """Every member in a regime, InfoNCE first."""
    from scipy.stats import t as student

    cells: dict[tuple[str, float], list[Result]] = {}
    for result in sorted(results, key=lambda r: r.seed):
        if result.regime == regime:
            cells.setdefault((result.name, result.temperature), []).append(result)
    names = list(dict.fromkeys(name for name, _ in cells))
    best = {}
    for name in names:
        own = {temperature: cell for (other, temperature), cell in cells.items() if other == name}
        best[name] = max(own.items(), key=lambda item: np.mean([r.validation for r in item[1]]))
    reference = np.array([r.test for r in best["infonce"][1]])
    found = []
    for name in names:
        temperature, cell = best[name]
        test = np.array([r.test for r in cell])
        difference = test - reference
        n = len(difference)
        half = float(student.ppf(0.975, n - 1) * difference.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        found.append(Row(name, temperature, test, np.array([r.knn5 for r in cell]), float(difference.mean()), half))
    return found


def write_page(results: list[Result], page: str | Path, name: str = "small") -> None:
    """Put tables and a picture between the page's markers of a study; a page without markers is made.

    Args:
        results: What :func:`run` returned.
        page: A Markdown file; the picture goes into `_static` beside it.
        name: Of the study.
    """
    page = Path(page)
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text() if page.exists() else f"# The experiment\n\n{begin}\n{end}\n"
    if begin not in text or end not in text:
        raise ValueError(f"{page} has no lines '{begin}' and '{end}': put them where the tables should go.")
    picture = page.parent / "_static" / f"experiment-{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    _draw(results, picture)
    head, _, rest = text.partition(begin)
    _, _, foot = rest.partition(end)
    page.write_text(head + begin + "\n\n" + "\n".join(_tables(results, name)) + "\n\n" + end + foot)


def _tables(results: list[Result], name: str) -> Iterator[str]:
    regimes = list(dict.fromkeys(r.regime for r in results))
    seeds = len({r.seed for r in results})
    by_regime = {regime: rows(results, regime) for regime in regimes}
    intervals = sum(len(found) - 1 for found in by_regime.values())
    yield (
        f"{len(results)} runs, {seeds} seeds; a run took {np.median([r.seconds for r in results]):.1f} s to "
        "train (median, one CPU thread). "
        f"Of the {intervals} intervals below about {0.05 * intervals:.0f} would miss 0 by chance alone."
    )
    known = baselines(STUDIES[name])
    yield (
        "What training has to beat, by the same probe on the same test images: "
        + ", ".join(f"{who} {_percent(np.array(scores))} %" for who, scores in known.items())
        + "."
    )
    yield ""
    yield f"![Differences to InfoNCE with 95 % intervals, by regime](_static/experiment-{name}.png)"
    for regime, found in by_regime.items():
        yield f"\n#### {name.capitalize()}: {regime}\n"
        yield "| member | temperature | probe, 100 labels per class | 5 neighbours | difference to InfoNCE | |"
        yield "|---|---|---|---|---|---|"
        for row in found:
            mine = row.name == "infonce"
            difference = "" if mine else f"{100 * row.difference:+.2f} ± {100 * row.half_width:.2f}"
            yield (
                f"| {row.name} | {row.temperature:g} | {_percent(row.test)} | {_percent(row.knn5)} | {difference} | "
                f"{'' if mine else row.verdict} |"
            )
    yield f"\n#### {name.capitalize()}: all temperatures\n"
    yield "Probe on the test images, mean over seeds, %.\n"
    temperatures = sorted({r.temperature for r in results})
    yield "| regime | member | " + " | ".join(f"{t:g}" for t in temperatures) + " |"
    yield "|---|---|" + "---|" * len(temperatures)
    for regime in regimes:
        for arm in dict.fromkeys(r.name for r in results):
            means = [
                np.mean([r.test for r in results if (r.regime, r.name, r.temperature) == (regime, arm, t)])
                for t in temperatures
            ]
            yield f"| {regime} | {arm} | " + " | ".join(f"{100 * mean:.1f}" for mean in means) + " |"


def _percent(values: np.ndarray) -> str:
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"


def _draw(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    regimes = list(dict.fromkeys(r.regime for r in results))
    figure = Figure(figsize=(3.4 * len(regimes) + 1.6, 4.4), layout="constrained")
    axes = figure.subplots(1, len(regimes), squeeze=False, sharey=True)[0]
    colors = {"better": "#2a7f3f", "worse": "#c1121f", "no difference": "#6b7280"}
    for axis, regime in zip(axes, regimes, strict=True):
        found = rows(results, regime)[1:]
        for place, row in enumerate(found):
            axis.errorbar(
                100 * row.difference,
                place,
                xerr=100 * row.half_width,
                fmt="o",
                color=colors[row.verdict],
                capsize=3,
                markersize=4,
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(
            title=regime, yticks=range(len(found)), yticklabels=[row.name for row in found], xlabel="points of accuracy"
        )
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.suptitle("Probe with 100 labels per class: difference to InfoNCE, mean and 95 % interval over seeds")
    figure.savefig(path, dpi=110)
