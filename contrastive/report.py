"""One page about several runs: what differs between them, how they learned, how they scored."""

import base64
import dataclasses
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from contrastive.config import TrainConfig
from contrastive.evaluate import shown
from contrastive.trainer import CONFIG, FREE, METRICS, load_config, write_atomically

__all__ = ["write"]


def write(runs: list[Path], out: str | Path) -> int:
    """Write the page, and return how many runs are on it.

    Args:
        runs: Directories of runs. What is no run (a file that a shell's `runs/*` brought along) is passed over; a run
        that has not
            been evaluated is shown without scores.
        out: File to write: `.html`, which holds its picture, or `.md`, with the picture beside it.

    Raises:
        ValueError: The name ends otherwise, a path does not exist, or none of the directories is a run.
    """
    out = Path(out)
    if out.suffix not in (".html", ".md"):
        raise ValueError(f"out={out}: the name must end in .html or .md, which says what is written.")
    missing = [str(path) for path in map(Path, runs) if not path.exists()]
    if missing:
        raise ValueError(f"{', '.join(missing)} does not exist: give directories that `train` wrote to.")
    found = [path for path in map(Path, runs) if (path / CONFIG).is_file()]
    if not found:
        raise ValueError(
            f"none of {', '.join(map(str, runs))} is a run (has a {CONFIG}): give directories that `train` wrote to."
        )
    configs = {str(path): load_config(path) for path in found}
    scores = {str(path): _scores(path) for path in found}
    rows = _rows(configs, scores)
    picture = _picture({str(path): _metrics(path) for path in found})
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".md":
        write_atomically(out.with_suffix(".png"), picture)
        write_atomically(out, _markdown(rows, out.with_suffix(".png").name).encode())
    else:
        write_atomically(out, _html(rows, picture).encode())
    return len(found)


def _scores(path: Path) -> dict[str, dict[str, float]]:
    file = path / "evaluation.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())["scores"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): run `contrastive evaluate {path}` again.") from error


def _metrics(path: Path) -> dict[str, np.ndarray]:
    file = path / METRICS
    if not file.is_file():
        return {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="genfromtxt: Empty input file")
            table = np.genfromtxt(file, delimiter=",", names=True, ndmin=1)
        return {name: table[name] for name in ("step", "loss", "loss_minus_ln_n")}
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} cannot be read ({error}): it is damaged; restore it from a copy.") from error


def _rows(configs: dict[str, TrainConfig], scores: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """A header and a row for each run: the settings that differ, then what the trained encoder scored; baselines last."""
    fields = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in FREE]
    differing = [name for name in fields if len({str(getattr(c, name)) for c in configs.values()}) > 1] or [
        "data",
        "loss",
    ]
    metrics = list(dict.fromkeys(m for run in scores.values() for row in run.values() for m in row))
    table = [["run", *differing, *metrics]]
    for name, config in configs.items():
        trained = scores[name].get("trained", {})
        table.append(
            [name, *(str(getattr(config, field)) for field in differing), *(shown(m, trained.get(m)) for m in metrics)]
        )
    for name, run in scores.items():
        for baseline in ("untrained", "raw pixels", "raw inputs"):
            row = ["" for _ in differing]
            cells = [shown(m, run.get(baseline, {}).get(m)) for m in metrics]
            if baseline in run and not any(known[1 + len(differing) :] == cells for known in table):
                table.append([f"{baseline} ({name})", *row, *cells])
    return table


def _picture(metrics: dict[str, dict[str, np.ndarray]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, excess = figure.subplots(1, 2)
    for name, columns in metrics.items():
        if not columns:
            continue
        line = loss.plot(columns["step"], columns["loss"], linewidth=0.4, alpha=0.5)[0]
        width = max(1, len(columns["loss"]) // 50)
        if len(columns["loss"]) >= width:
            smooth = np.convolve(columns["loss"], np.ones(width) / width, "valid")
            middle = columns["step"][: len(smooth)] + (width - 1) / 2
            loss.plot(middle, smooth, color=line.get_color(), label=name)
        known = np.isfinite(columns["loss_minus_ln_n"])
        excess.plot(columns["step"][known], columns["loss_minus_ln_n"][known], color=line.get_color(), label=name)
    loss.set(xlabel="step", ylabel="loss (nats)", title="Loss, and its mean over a fiftieth of the run")
    excess.axhline(0, color="black", linewidth=0.8)
    excess.set(xlabel="step", ylabel="nats", title="Loss minus ln N: 0 is chance")
    if len(metrics) <= 20:
        excess.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _markdown(rows: list[list[str]], picture: str) -> str:
    head, *body = rows
    lines = [
        "# Runs",
        "",
        f"![Loss by step]({picture})",
        "",
        _line(head),
        _line(["---"] * len(head)),
        *map(_line, body),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html(rows: list[list[str]], picture: bytes) -> str:
    from jinja2 import Environment  # torch needs it too

    page: Any = Environment(autoescape=True).from_string(_PAGE)
    return page.render(head=rows[0], rows=rows[1:], picture=base64.b64encode(picture).decode())


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Runs</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1f2933 }
img { max-width: 100% }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d9dee3; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
</style>
<h1>Runs</h1>
<img alt="Loss by step" src="data:image/png;base64,{{ picture }}">
<table><thead><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table>
</html>
"""
