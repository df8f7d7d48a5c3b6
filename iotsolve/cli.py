"""The `iotsolve` command: solve or estimate from files, verify a solver. What a command needs is imported in it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from iotsolve.inverse import Fit
    from iotsolve.marginals import Marginal
    from iotsolve.solution import Solution
    from iotsolve.testing import Report

__all__ = ["app", "find_solver", "main", "parse_side"]

SIDES = "fixed, free, at-most, between:lo,hi, kl:rho, tv:rho, chi2:rho or l2:rho"

app = typer.Typer(
    help="Certified optimal transport.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from iotsolve import __version__

        typer.echo(f"iotsolve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def solve(
    cost: Annotated[Path, typer.Argument(help="Matrix: .npy, .npz with one array, or .csv; inf is a forbidden arc.")],
    a: Annotated[Path | None, typer.Option(help="Weights of the rows; uniform of total 1 if left out.")] = None,
    b: Annotated[Path | None, typer.Option(help="Weights of the columns; uniform of total 1 if left out.")] = None,
    epsilon: Annotated[float, typer.Option(help="Strength of the entropy, in units of the cost; 0 is exact.")] = 0.0,
    rows: Annotated[str, typer.Option(help=f"Marginal of the rows: {SIDES}.")] = "fixed",
    columns: Annotated[str, typer.Option(help="Marginal of the columns, as for the rows.")] = "fixed",
    mass: Annotated[float | None, typer.Option(help="Total mass of the plan; else the marginals decide.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Relative error to stop at, if epsilon > 0: 1e-8.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Sinkhorn's sweeps alone, so many at most.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write plan, f, g, lam, value and status to this .npz file.")] = None,
    allow_unconverged: Annotated[
        bool, typer.Option("--allow-unconverged", help="Accept a result that did not converge.")
    ] = False,
) -> None:
    """Solve one problem in float64 and print its value and certificate.

    Exit code 0: solved. 1: not converged, nothing written. 2: bad input.
    """
    with _one_sentence():
        if out is not None:
            _check_writable(out)
        from iotsolve.problem import Problem
        from iotsolve.sinkhorn import Sinkhorn
        from iotsolve.solve import solve

        matrix = _read(cost)
        if matrix.ndim != 2:
            raise ValueError(f"{cost} holds an array of shape {matrix.shape}: a cost is one matrix, of two dimensions.")
        weights = [None if path is None else _vector(path) for path in (a, b)]
        sides = dict(rows=parse_side("rows", rows), columns=parse_side("columns", columns))
        problem = Problem(matrix, *weights, epsilon=epsilon, mass=mass, **sides)
        settings = {k: v for k, v in dict(tolerance=tolerance, max_steps=max_steps).items() if v is not None}
        if settings and problem.is_exact:
            raise ValueError(f"{' and '.join(settings)} with epsilon = 0: exact transport takes neither; leave it out.")
        if max_steps is None:
            solution = solve(problem, tolerance=tolerance, throw=False)
        else:
            solution = solve(problem, Sinkhorn(**settings), throw=False)
        accepted = bool(solution.converged) or allow_unconverged
        if accepted and out is not None:
            _write(out, solution)
        if not accepted:
            typer.echo(f"iotsolve: {solution.status.value}\n{solution.certificate}", err=True)
            raise typer.Exit(1)
        _print_table(solution)
        if not solution.converged:
            typer.echo(f"iotsolve: {solution.status.value}", err=True)


@app.command()
def invert(
    table: Annotated[Path, typer.Argument(help="A .csv with a header; one line per pair of places, or per couple.")],
    features: Annotated[
        str | None, typer.Option(help="Columns that explain the flow of a pair of places, with commas between them.")
    ] = None,
    flow: Annotated[str | None, typer.Option(help="Column of flows; flow if left out.")] = None,
    origin: Annotated[str | None, typer.Option(help="Column that says from where; origin if left out.")] = None,
    destination: Annotated[str | None, typer.Option(help="Column that says where to; destination if left out.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Column of labels whose pairs of places vary together.")] = None,
    row_traits: Annotated[
        str | None, typer.Option(help="Instead of features: columns with traits of one partner of each couple.")
    ] = None,
    column_traits: Annotated[str | None, typer.Option(help="Columns with traits of the other partner.")] = None,
    errors: Annotated[
        str | None,
        typer.Option(
            help="Standard errors: model, robust or clustered; by default clustered with a cluster, or robust."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write coefficients, errors and intervals to this .json file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the estimates into this .png file; needs matplotlib, of the extra iotsolve[train]."),
    ] = None,
) -> None:
    """Estimate what explains who goes where, or who is with whom.

    With --features a gravity equation: flows between places, with effects of origin and destination. With --row-traits and
    --column-traits the affinity between the traits of couples, and along how many dimensions they sort.

    Exit code 0: estimated. 1: not converged, or nothing that the data could tell; nothing written. 2: bad input.
    """
    with _one_sentence():
        if out is not None:
            _check_writable(out, ".json")
        if plot is not None:
            _check_writable(plot, ".png", option="--plot")
            if importlib.util.find_spec("matplotlib") is None:
                raise ValueError("--plot needs matplotlib, which is not installed: pip install 'iotsolve[train]'.")
        kind = ("robust" if cluster is None else "clustered") if errors is None else errors
        if kind not in ("model", "robust", "clustered") or (kind == "clustered") != (cluster is not None):
            raise ValueError(
                f"errors = {kind} {'without' if cluster is None else 'with'} a --cluster: must be model or robust without, or "
                "clustered with one."
            )
        places = {"flow": flow, "origin": origin, "destination": destination}
        if features is not None and row_traits is None and column_traits is None:
            named = {option: given or option for option, given in places.items()}
            found = _gravity(table, _listed("--features", features), **named, cluster=cluster)
        elif features is None and row_traits is not None and column_traits is not None:
            if given := [
                f"--{option}" for option, value in {**places, "cluster": cluster}.items() if value is not None
            ]:
                raise ValueError(
                    f"{', '.join(given)} with traits: a table of couples has none, each line is one couple."
                )
            sides = _listed("--row-traits", row_traits), _listed("--column-traits", column_traits)
            found = _affinity(table, *sides)
        else:
            raise ValueError(
                "give --features for flows between places, or --row-traits and --column-traits for couples."
            )
        fit, draw, more = found
        report = f"{fit.report(kind)}\nstandard errors: {kind}"
        told = fit.converged and fit.unseen.shape[1] < len(fit.names)
        if told:
            report += more(fit, kind)
        if told and out is not None:
            _write_text(out, _numbers(fit, kind))
        if told and plot is not None:
            partial = plot.with_name(f".{plot.name}.{os.getpid()}.tmp.png")
            draw(fit, kind).savefig(partial, dpi=110)
            partial.replace(plot)
    typer.echo("\n".join([report, *(f"\nnote: {message}" for message in fit.warnings)]))
    if not told:
        raise typer.Exit(1)


_Estimate = tuple["Fit", "Callable[[Fit, str], Figure]", "Callable[[Fit, str], str]"]


def _gravity(
    path: Path, features: list[str], *, flow: str, origin: str, destination: str, cluster: str | None
) -> _Estimate:
    """An estimate from a table of flows, how it is drawn, and what is added to its report."""
    from iotsolve.inverse import gravity

    if origin == destination or flow in features:
        twice = (
            f"{origin!r} is both origin and destination" if origin == destination else f"{flow!r} is to explain itself"
        )
        raise ValueError(f"{twice}: these are different columns.")
    labels = [origin, destination, *([] if cluster is None else [cluster])]
    columns, lines = _columns(path, numbers=[flow, *features], labels=labels)
    seen: dict[tuple[str, str], int] = {}
    for line, x, *pair in zip(lines, columns[flow], columns[origin], columns[destination], strict=True):
        if x < 0:
            raise ValueError(
                f"{path}, line {line}: the flow is {x:g}, but nothing flows less than 0. Is it a net flow?"
            )
        if (before := seen.setdefault((pair[0], pair[1]), line)) != line:
            raise ValueError(
                f"{path}, lines {before} and {line} are both from {pair[0]!r} to {pair[1]!r}: sum their flows."
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it again
        fit = gravity(columns, flow=flow, origin=origin, destination=destination, features=features, cluster=cluster)
    return fit, _draw_gravity, lambda *_: ""


def _affinity(path: Path, rows: list[str], columns: list[str]) -> _Estimate:
    """An estimate from a table of couples, each of whom is a type of its own; how it is drawn, and the dimensions of sorting."""
    import numpy as np

    from iotsolve.inverse import affinity

    if both := [name for name in rows if name in columns]:
        raise ValueError(f"{both[0]!r} is a trait of both sides: each partner has a column of their own.")
    table, lines = _columns(path, numbers=[*rows, *columns], labels=[])
    traits = (_Traits(names, np.stack([table[name] for name in names], 1)) for names in (rows, columns))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = affinity(*traits)
    except MemoryError:
        raise ValueError(
            f"{len(lines)} couples do not fit into memory, which holds all pairs: draw a sample."
        ) from None

    def sorting(fit: Fit, kind: str) -> str:
        found, each = fit.saliency(kind=kind), [""]
        for k, share in enumerate(found.shares):
            said = f"dimension {k + 1}: share {share:.3f}"
            if found.intervals is None:
                each.append(f"{said}, without an interval or a test, since the data do not tell all of the affinity")
                continue
            low, high = found.intervals[k]
            test = fit.rank_test(k, kind)
            each.append(
                f"{said} [{low:.3f}, {high:.3f}]; p = {test.p_value:.2g} that there "
                f"{'is none' if k == 0 else f'are only {k}' if k > 1 else 'is only 1'}"
            )
        return "\n" + "\n".join(each)

    return fit, lambda fit, kind: _draw_affinity(fit, kind, rows, columns), sorting


class _Traits:
    """Traits with their names, in the way of a data frame."""

    def __init__(self, columns: list[str], values: np.ndarray) -> None:
        self.columns, self.values, self.shape = columns, values, values.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values if dtype is None else self.values.astype(dtype)


def _listed(option: str, text: str) -> list[str]:
    """Names with commas between them."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len({*names}) < len(names):
        raise ValueError(f"{option} {text!r}: must name columns, each once, with commas between them.")
    return names


def _numbers(fit: Fit, kind: str) -> dict[str, Any]:
    """What is written: numbers that the data do not tell are null, for JSON knows no infinity."""
    import math

    numbers = zip(fit.names, fit.coefficients, fit.errors(kind), fit.confidence_intervals(0.95, kind), strict=True)
    found = {}
    for name, x, error, ends in numbers:
        known = math.isfinite(error)
        told = (
            {"standard_error": error, "interval": list(ends)} if known else {"standard_error": None, "interval": None}
        )
        found[name] = {"estimate": x, "identified": known, **told}
    return {
        "coefficients": found,
        "errors": kind,
        "log_likelihood": fit.log_likelihood,
        "observations": fit.observations,
        "separated": bool(fit.separated),
        "notes": fit.warnings,
    }


def _draw_gravity(fit: Fit, kind: str) -> Figure:
    """What a standard deviation of each feature does to a flow, with intervals; and flows observed against flows explained."""
    import numpy as np
    from matplotlib.figure import Figure

    table = fit.points[0].market.table
    listed = np.ones(table.plan.shape, bool) if table.allowed is None else table.allowed
    explained, observed = (table.unit * x[listed] for x in (fit.plan, table.plan))
    height = max(3.6, 1.4 + 0.32 * len(fit.names))
    figure = Figure(figsize=(10, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    spread = np.array([block[listed].std() for block in np.moveaxis(fit.features[0].block(slice(None)), -1, 0)])
    errors, rows = fit.errors(kind), np.arange(len(fit.names))
    known = np.isfinite(errors)
    spread, effects, errors = (x[known] for x in (spread, spread * fit.coefficients, errors))
    left.errorbar(effects, rows[known], xerr=1.96 * spread * errors, fmt="o", capsize=4)
    for k in rows[~known]:
        left.annotate(_unknown(fit, k), (0.0, k), ha="center", va="center", color="C3", backgroundcolor="w")
    left.axvline(0.0, color="0.5", lw=1, zorder=0)
    told = zip(fit.names, fit.coefficients, fit.endless, strict=True)
    left.set_yticks(rows, [f"{name}\n" + ("" if endless else f"{x:.4g} per unit") for name, x, endless in told])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel(f"change of log flow per standard deviation, 95 % ({kind})")
    shown = (observed > 0) & (explained > 0)
    if shown.any():
        right.loglog(explained[shown], observed[shown], ".", ms=4, alpha=0.5)
        ends = np.array([explained[shown].min(), explained[shown].max()])
        right.loglog(ends, ends, color="0.3", lw=1, label="explained = observed")
        right.legend(loc="upper left", fontsize=9)
        for axis in (right.xaxis, right.yaxis):
            axis.set_minor_formatter("")
    right.set_xlabel("flow explained")
    right.set_ylabel("flow observed")
    if not shown.all():
        right.set_title(f"without {int((~shown).sum())} of {len(shown)} pairs, where nothing flows", fontsize=9)
    _tell_separation(figure, fit)
    return figure


def _draw_affinity(fit: Fit, kind: str, rows: list[str], columns: list[str]) -> Figure:
    """The affinity matrix with its intervals, and the share of each dimension of sorting."""
    import numpy as np
    from matplotlib.figure import Figure

    (p, q), features = fit.matrix.shape, fit.features[0]
    # per standard deviations of both traits, so that colours can be compared whatever the units are
    scale = np.outer(features.x.std(0), features.y.std(0))
    values, errors = fit.matrix * scale, fit.errors(kind).reshape(p, q)
    errors = np.where(np.isfinite(errors), errors, 0.0) * scale + np.where(np.isfinite(errors), 0.0, np.inf)
    figure = Figure(figsize=(4.4 + 1.1 * max(q, 2) + 1.5, max(3.8, 1.6 + 0.7 * p)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(max(q, 2), 2.4))
    top = float(abs(values[np.isfinite(errors)]).max(initial=0.0)) or 1.0
    image = left.imshow(values, cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
    for i, j in np.ndindex(p, q):
        text = _unknown(fit, i * q + j).replace(" ", "\n")
        text = f"{values[i, j]:.2f}\n± {1.96 * errors[i, j]:.2f}" if np.isfinite(errors[i, j]) else text
        dark = abs(values[i, j]) > 0.6 * top
        left.text(j, i, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
    left.set_xticks(range(q), columns, rotation=30, ha="right")
    left.set_yticks(range(p), rows)
    left.set_title(f"affinity, traits in standard deviations, 95 % ({kind})", fontsize=10)
    figure.colorbar(image, ax=left)
    sorting = fit.saliency(kind=kind)
    off = None if sorting.intervals is None else abs(sorting.intervals.T - sorting.shares)
    right.bar(range(1, len(sorting.shares) + 1), sorting.shares, yerr=off, capsize=4, alpha=0.8)
    right.set_xticks(range(1, len(sorting.shares) + 1))
    told = "" if off is None else ", 95 %"
    right.set(xlabel="dimension of sorting", ylabel=f"share of the affinity{told}", ylim=(0, None))
    figure.get_layout_engine().set(wspace=0.06)
    _tell_separation(figure, fit)
    return figure


def _unknown(fit: Fit, k: int) -> str:
    return "no end" if fit.endless[k] else "not identified"


def _tell_separation(figure: Figure, fit: Fit) -> None:
    """A picture is passed on without the report, and an interval around 0 would be read as no effect."""
    if fit.separated:
        title = "separated data: a coefficient goes to infinity, and has no interval"
        figure.suptitle(title, color="C3", fontsize=10)


def _columns(path: Path, *, numbers: list[str], labels: list[str]) -> tuple[dict[str, Any], list[int]]:
    """Columns of a .csv with a header, and the line of the file each entry is on."""
    import csv

    import numpy as np

    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            lines = [(reader.line_num, line) for line in reader if line]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not in UTF-8: save it again as CSV in UTF-8.") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}. Is a quotation mark missing?") from None
    if len(lines) < 2:
        raise ValueError(f"{path} has no lines below its header.")
    (_, header), *lines = lines
    labels = [name for name in dict.fromkeys(labels) if name not in numbers]
    missing = [name for name in [*numbers, *labels] if name not in header]
    if missing:
        hint = ". Is there a header, with commas between its names?" if len(missing) > 1 else "."
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}: it has {', '.join(map(repr, header))}{hint}"
        )
    found: dict[str, Any] = {}
    for name in [*numbers, *labels]:
        if header.count(name) > 1:
            raise ValueError(
                f"{path} has {header.count(name)} columns {name!r}: which one is meant? Rename the others."
            )
        found[name] = []
    for number, line in lines:
        if len(line) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(line)} entries under {len(header)} names. Is an entry missing, or has one a comma "
                "and no quotation marks?"
            )
        entries = dict(zip(header, line, strict=True))
        for name in numbers:
            found[name].append(_number(f"{path}, line {number}, column {name!r}", entries[name]))
        for name in labels:
            label = entries[name]
            if not label or label != label.strip():
                raise ValueError(
                    f"{path}, line {number}, column {name!r}: {label!r} is blank, or has blanks at its end."
                )
            found[name].append(label)
    return found | {name: np.array(found[name]) for name in numbers}, [number for number, _ in lines]


def _number(where: str, text: str) -> float:
    """A finite number whose square is finite too."""
    try:
        x = float(text)
    except ValueError:
        x = float("nan")
    if not abs(x) < float("inf"):
        raise ValueError(
            f"{where} must hold a number, not {text!r}: without units, without separators of thousands, with a point. Fill in "
            "what is missing, or drop the line."
        )
    if x != 0 and not 1e-100 < abs(x) < 1e100:
        raise ValueError(f"{where}: {x:g} is out of proportion, its square is not to be had. Choose another unit.")
    return x


def _write_text(path: Path, content: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    import json

    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


@app.command()
def verify(
    solver: Annotated[
        str | None, typer.Option(help="Function to judge, as module:callable; this library if left out.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Problems drawn in each regime.")] = 50,
    regime: Annotated[list[str] | None, typer.Option(help="A regime to draw from, may be repeated; else all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws; without it every run draws the same.")] = None,
    tolerance: Annotated[float, typer.Option(help="Relative error allowed.")] = 1e-6,
) -> None:
    """Judge a solver on random problems, against a general convex solver and the laws of optimal transport.

    Exit code 0: every law holds. 1: some law is broken, and the smallest problem found is shown. 2: bad input.
    """
    with _one_sentence():
        judged = None if solver is None else find_solver(solver)
        report = _verify(judged, examples=examples, regimes=regime, seed=seed, tolerance=tolerance)
    _print_report(report)
    if not report.passed:
        raise typer.Exit(1)


def main() -> None:
    """Run the `iotsolve` command."""
    app()


def parse_side(name: str, text: str) -> Marginal:
    """The marginal object that a word of the command line stands for.

    Args:
        name: ``rows`` or ``columns``, for the message.
        text: ``fixed``, ``free``, ``at-most``, ``between:lo,hi``, ``kl:rho``, ``tv:rho``, ``chi2:rho`` or ``l2:rho``.

    Raises:
        ValueError: if it stands for none.

    Example:
        >>> parse_side("rows", "between:0.5,2")
        Between(lo=0.5, hi=2.0)
    """
    from iotsolve.marginals import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared

    word, colon, rest = text.strip().lower().partition(":")
    named = {"fixed": FIXED, "free": FREE, "at-most": AT_MOST}
    if word in named and not colon:
        return named[word]
    kinds = {"between": (Between, 2), "kl": (KL, 1), "tv": (TV, 1), "chi2": (ChiSquared, 1), "l2": (L2, 1)}
    try:
        kind, count = kinds[word]
        numbers = [float(x) for x in rest.split(",")]
        if len(numbers) != count:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"{name} = {text!r}: is no marginal. Write {SIDES}; lo, hi and rho are numbers.") from None
    return kind(*numbers)


def find_solver(text: str) -> Callable[..., Any]:
    """The function that ``module:callable`` names; modules are also looked for where the command is run.

    Args:
        text: such as ``package.module:function``.

    Raises:
        ValueError: if there is none, or its module does not import.

    Example:
        >>> find_solver("math:sqrt")(4.0)
        2.0
    """
    module, colon, name = text.strip().partition(":")
    if not (module and colon and name):
        raise ValueError(f"--solver {text!r}: write module:callable, such as mypackage.transport:solve.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise ValueError(f"--solver {text!r}: {module} has no {name}. Is it spelt so, and at the top level?") from None
    except Exception as error:  # a stranger's module may raise anything when it is imported
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"--solver {text!r}: {module} cannot be imported ({why}). Is it installed, or here?"
        ) from error
    if not callable(found):
        raise ValueError(f"--solver {text!r}: {name} is of type {type(found).__name__}, which cannot be called.")
    return found


def _verify(solver: Callable[..., Any] | None, *, examples: int, regimes: list[str] | None, **options: Any) -> Report:
    """`iotsolve.testing.verify` with a bar for each regime on stderr."""
    try:
        from iotsolve.testing import REGIMES, verify
    except ModuleNotFoundError as missing:
        raise ValueError(
            f"verify needs {missing.name}, which is not installed: pip install 'iotsolve[testing]'."
        ) from missing
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=examples)
            bars.update(tasks[name], completed=done)

        return verify(solver, examples=examples, regimes=regimes or list(REGIMES), progress=show, **options)


def _print_report(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="laws of optimal transport", title_justify="left")
    for name, justify in (("regime", "left"), ("problems", "right"), ("answered", "right"), ("verdict", "left")):
        table.add_column(name, justify=justify)
    for regime in report.regimes:
        table.add_row(regime.name, str(regime.examples), str(regime.converged), regime.verdict)
    Console().print(table, markup=False)
    for regime in report.regimes:
        if regime.failure is not None:
            typer.echo(f"\n{regime.name}: the smallest failing problem found\n{regime.failure}")


def _read(path: Path) -> np.ndarray:
    """The one array of a file, as float64."""
    import numpy as np

    kind = path.suffix.lower()
    if kind not in (".npy", ".npz", ".csv"):
        raise ValueError(f"{path} ends in {kind or 'nothing'}: can read .npy, .npz with one array, and .csv.")
    try:
        array = _read_csv(path) if kind == ".csv" else np.load(path, allow_pickle=False)
        names = getattr(array, "files", None)  # of an .npz
        if names is not None:
            with array as archive:
                array = archive[names[0]] if len(names) == 1 else None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        why = str(error).rstrip(".") if kind == ".csv" else "it is damaged, or not what its name says"
        raise ValueError(f"{path} cannot be read as numbers: {why}.") from error
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into memory.") from error
    if array is None:
        raise ValueError(f"{path} holds {len(names)} arrays ({', '.join(names)}): it must hold one.")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{path} holds {array.dtype}: it must hold real numbers.")
    return array.astype(np.float64)


def _read_csv(path: Path) -> np.ndarray:
    import numpy as np

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="loadtxt: input contained no data")
        table = np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")
    if table.size == 0:
        raise ValueError("it is empty")
    return table


def _vector(path: Path) -> np.ndarray:
    """Weights: a vector, or a matrix of a single row or column."""
    array = _read(path)
    if array.ndim != 1 and sum(size != 1 for size in array.shape) > 1:
        raise ValueError(f"{path} holds an array of shape {array.shape}: weights are one row or one column of numbers.")
    return array.reshape(-1)


def _check_writable(out: Path, suffix: str = ".npz", *, option: str = "--out") -> None:
    """Before the work, not after it."""
    folder = out.parent
    if out.suffix.lower() != suffix:
        kind = {".npz": "a NumPy archive", ".json": "JSON", ".png": "a picture in PNG"}[suffix]
        raise ValueError(f"{option} {out}: the file written is {kind}, so its name must end in {suffix}.")
    if not folder.is_dir():
        raise ValueError(f"{option} {out}: {folder} is no directory; make it first.")
    if out.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a directory" if out.is_dir() else "permission is missing"
        raise ValueError(f"{option} {out}: cannot be written there; {why}.")


def _write(out: Path, solution: Solution) -> None:
    """Replace the file at once: whoever is stopped half-way leaves the old one, never half of a new one."""
    import numpy as np

    names = {"plan": "plan", "f": "f", "g": "g", "lam": "mass_multiplier", "value": "value"}
    arrays = {name: getattr(solution, source) for name, source in names.items()}
    fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("wb") as file:
            np.savez_compressed(file, **arrays, status=solution.status.name)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)


def _print_table(solution: Solution) -> None:
    from rich.console import Console
    from rich.table import Table

    certificate, (n, m) = solution.certificate, solution.problem.shape
    table = Table(title=f"{n} x {m}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("value", f"{solution.value:.12g}"),
        ("transport cost", f"{solution.transport_cost:.12g}"),
        ("mass", f"{solution.mass:.12g}"),
        ("status", solution.status.name),
        ("steps", str(solution.steps)),
        ("certificate", "holds" if certificate.holds else "DOES NOT HOLD"),
        ("  optimal value >=", f"{certificate.dual:.12g}"),
        ("  optimal value <=", f"{certificate.primal:.12g}"),
        ("  gap", f"{certificate.gap:.1e}"),
        ("  violation of rows", f"{certificate.row_violation:.1e}"),
        ("  violation of columns", f"{certificate.column_violation:.1e}"),
        ("  violation of mass", f"{certificate.mass_violation:.1e}"),
    ):
        table.add_row(name, value)
    Console().print(table)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Say what a user can cause in one line on stderr, with exit code 2."""
    try:
        yield
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except ValueError as error:
        _fail(str(error))


def _fail(message: str) -> None:
    typer.echo(f"iotsolve: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)
