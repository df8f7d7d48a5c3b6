"""The `iotsolve` command: solve a problem kept in files, verify a solver. What a command needs is imported in it."""

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

    from iotsolve.marginals import Marginal
    from iotsolve.solution import Solution
    from iotsolve.testing import Report

__all__ = ["app", "find_solver", "main", "parse_side"]

SIDES = "fixed, free, at-most, between:lo,hi, kl:rho or tv:rho"

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
    max_steps: Annotated[int | None, typer.Option(help="Sweeps at most, if epsilon > 0: 10000.")] = None,
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
        solution = solve(problem, Sinkhorn(**settings) if settings else None, throw=False)
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
    table: Annotated[Path, typer.Argument(help="A .csv with a header and one line per pair of places.")],
    features: Annotated[str, typer.Option(help="Columns that explain the flow, with commas between them.")],
    flow: Annotated[str, typer.Option(help="Column of flows.")] = "flow",
    origin: Annotated[str, typer.Option(help="Column that says from where.")] = "origin",
    destination: Annotated[str, typer.Option(help="Column that says where to.")] = "destination",
    cluster: Annotated[str | None, typer.Option(help="Column of labels whose lines vary together.")] = None,
    errors: Annotated[str, typer.Option(help="Standard errors: model, robust or clustered.")] = "robust",
    out: Annotated[
        Path | None, typer.Option(help="Write coefficients, errors and intervals to this .json file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw coefficients and fitted against observed flows into this .png file.")
    ] = None,
) -> None:
    """Estimate what explains flows between places: a gravity equation, with effects of origin and destination.

    Exit code 0: estimated. 1: not converged, nothing written. 2: bad input.
    """
    with _one_sentence():
        if out is not None:
            _check_writable(out, ".json")
        if plot is not None:
            _check_writable(plot, ".png")
            if importlib.util.find_spec("matplotlib") is None:
                raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib.")
        from iotsolve.inverse import gravity

        if errors not in ("model", "robust", "clustered") or (errors == "clustered") != (cluster is not None):
            raise ValueError(f"errors = {errors}: must be model, robust, or with a cluster clustered.")
        names = [name.strip() for name in features.split(",") if name.strip()]
        columns = _columns(table, numbers=[flow, *names])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says it again
            fit = gravity(columns, flow=flow, origin=origin, destination=destination, features=names, cluster=cluster)
        report = fit.report(errors)
        if fit.converged and out is not None:
            intervals = fit.confidence_intervals(0.95, errors)
            numbers = zip(fit.names, fit.coefficients, fit.errors(errors), intervals, strict=True)
            found = {
                name: {"estimate": x, "standard_error": error, "interval": list(ends)}
                for name, x, error, ends in numbers
            }
            _write_text(out, {"coefficients": found, "errors": errors, "log_likelihood": fit.log_likelihood})
        if fit.converged and plot is not None:
            _draw_gravity(fit, errors, plot)
    typer.echo("\n".join([report, *(f"\nnote: {message}" for message in fit.warnings)]))
    if not fit.converged:
        raise typer.Exit(1)


def _draw_gravity(fit: Any, errors: str, path: Path) -> None:
    """Estimates with their intervals, each in its own standard errors from 0, and what was observed against what is explained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    sizes, table = fit.errors(errors), fit.points[0].market.table
    listed = np.ones(table.plan.shape, bool) if table.allowed is None else table.allowed
    explained, observed = (table.unit * x[listed] for x in (fit.plan, table.plan))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, max(3.6, 1.2 + 0.32 * len(sizes))), width_ratios=(1, 1.1), layout="constrained"
    )
    rows = np.arange(len(sizes))
    told = np.isfinite(sizes) & (sizes > 0)
    scaled = np.divide(fit.coefficients, sizes, out=np.zeros(len(sizes)), where=told)
    left.errorbar(scaled[told], rows[told], xerr=1.96, fmt="o", capsize=4)
    left.axvline(0.0, color="0.5", lw=1)
    left.set_yticks(rows, [f"{name}  {x:.4g}" for name, x in zip(fit.names, fit.coefficients, strict=True)])
    left.invert_yaxis()
    left.set_xlabel(f"estimate and 95 % interval, in standard errors ({errors})")
    positive = (observed > 0) & (explained > 0)
    right.loglog(explained[positive], observed[positive], ".", ms=4, alpha=0.4)
    ends = np.array([explained[positive].min(), explained[positive].max()])
    right.loglog(ends, ends, color="0.3", lw=1)
    right.set_xlabel("flow explained")
    right.set_ylabel("flow observed")
    right.set_title(f"{int((observed == 0).sum())} pairs without a flow are not shown", fontsize=9)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


def _columns(path: Path, *, numbers: list[str]) -> dict[str, np.ndarray]:
    """The columns of a .csv with a header; those named as numbers, the others as text."""
    import csv

    import numpy as np

    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    if not lines:
        raise ValueError(f"{path} has no lines below its header.")
    found: dict[str, np.ndarray] = {}
    for name in lines[0]:
        values = [line[name] for line in lines]
        if name not in numbers:
            found[name] = np.array(values, dtype=str)
            continue
        try:
            found[name] = np.array([float(x) for x in values])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: column {name!r} must hold a number in every line ({error}).") from error
    return found


def _write_text(path: Path, content: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    import json

    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
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
        text: ``fixed``, ``free``, ``at-most``, ``between:lo,hi``, ``kl:rho`` or ``tv:rho``.

    Raises:
        ValueError: if it stands for none.

    Example:
        >>> parse_side("rows", "between:0.5,2")
        Between(lo=0.5, hi=2.0)
    """
    from iotsolve.marginals import AT_MOST, FIXED, FREE, KL, TV, Between

    word, colon, rest = text.strip().lower().partition(":")
    named = {"fixed": FIXED, "free": FREE, "at-most": AT_MOST}
    if word in named and not colon:
        return named[word]
    kinds = {"between": (Between, 2), "kl": (KL, 1), "tv": (TV, 1)}
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


def _check_writable(out: Path, suffix: str = ".npz") -> None:
    """Before the work, not after it."""
    folder = out.parent
    if out.suffix.lower() != suffix:
        kind = "a NumPy archive" if suffix == ".npz" else "JSON"
        raise ValueError(f"--out {out}: the file written is {kind}, so its name must end in {suffix}.")
    if not folder.is_dir():
        raise ValueError(f"--out {out}: {folder} is no directory; make it first.")
    if out.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a directory" if out.is_dir() else "permission is missing"
        raise ValueError(f"--out {out}: cannot be written there; {why}.")


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
