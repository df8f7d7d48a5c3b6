"""The `contrastive` command: train, evaluate, embed, report, experiment, demo.

What a command needs is imported in it: `--help` is immediate.
"""

import dataclasses
import errno
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from contrastive.config import TrainConfig, from_file

app = typer.Typer(
    help="Contrastive learning as inverse optimal transport.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every setting of a run; what is not given is None."""
    options = []
    for setting in dataclasses.fields(TrainConfig):
        default = "none" if setting.default is dataclasses.MISSING else setting.default
        kind = setting.type if setting.type in (int, float, bool) else str
        option = typer.Option(help=f"{setting.metadata['text']} Default: {default}.", show_default=False)
        options.append(
            inspect.Parameter(
                setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    command.__signature__ = inspect.Signature([*own, *options])
    command.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
    return command


@app.command()
@_with_settings
def train(
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    config: Annotated[Path | None, typer.Option(help="TOML file with settings; what is given here goes first.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved step.")] = False,
    **settings: Any,
) -> None:
    """Train an encoder; settings left out are those of --config, of the run that is resumed, or the defaults."""
    with _one_sentence():
        given = {name: value for name, value in settings.items() if value is not None}
        if "loss_options" in given:
            given["loss_options"] = _numbers(given["loss_options"])
        from contrastive import trainer

        if "data" in given:
            given["data"] = _absolute(given["data"])
        start = trainer.load_config(out) if resume else TrainConfig()
        known = from_file(config) if config is not None else {}
        if "data" in known:
            known["data"] = _absolute(known["data"])
        run = trainer.train(dataclasses.replace(start, **(known | given)), out, resume=resume)
        if int(os.environ.get("RANK", 0)) == 0:
            took = f"{run.epochs} epochs in {run.seconds:.1f} s, loss {run.history[-1]:.4f} at the last step."
            typer.echo(f"{out}: {took}\nNext: contrastive evaluate {out}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    layer: Annotated[
        str, typer.Option(help="embedding, which the loss saw, or features, before the head.")
    ] = "embedding",
    data: Annotated[str | None, typer.Option(help="Other data than the run's own.")] = None,
) -> None:
    """Score a run's embeddings beside its untrained encoder and raw inputs; writes evaluation.json in the run."""
    with _one_sentence():
        from contrastive import trainer
        from contrastive.evaluate import compare

        trained, given = _trained(run, data)
        rows = compare(trained.model, trainer.initial_model(trained.config, given), given, layer=layer)
        content = {"layer": layer, "data": given.name, "steps": trained.steps, "scores": rows}
        title = f"{run}: {trained.config.loss}, {trained.epochs} of {trained.config.epochs} epochs, {layer}"
        _print_table(rows, title)  # first: what took its time is seen where it cannot be written too
        trainer.write_atomically(run / "evaluation.json", (json.dumps(content, indent=2) + "\n").encode())


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    out: Annotated[Path, typer.Option(help="File to write, .npz or .safetensors.")],
    layer: Annotated[
        str, typer.Option(help="embedding, which the loss saw, or features, before the head.")
    ] = "embedding",
    data: Annotated[str | None, typer.Option(help="Other data than the run's own, of the same kind.")] = None,
) -> None:
    """Write a run's embeddings of its data, and for every row where it stood, its file, its class and its group."""
    with _one_sentence():
        from contrastive.evaluate import save_embeddings

        trained, given = _trained(run, data)
        shapes = save_embeddings(trained.model, given, out, layer=layer)
        typer.echo(f"{out}: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs.")],
    out: Annotated[Path, typer.Option(help="Page to write, .html or .md.")] = Path("report.html"),
) -> None:
    """One page about several runs: what differs, how they learned, how they scored."""
    with _one_sentence():
        from contrastive.report import write

        typer.echo(f"{out}: {write(runs, out)} runs")


@app.command()
def experiment(
    out: Annotated[Path, typer.Option(help="Directory of the experiment; what is finished in it is not done again.")],
    study: Annotated[
        str, typer.Option(help="small: all members, 14 x 14 pixels; crops: some, whole images.")
    ] = "small",
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds and few images, to see it work.")] = False,
    page: Annotated[Path | None, typer.Option(help="Write the page, with its picture beside it.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Compare the members of the family on Fashion-MNIST, as the documentation's page about it does."""
    with _one_sentence():
        from contrastive.experiment import run, write_page

        results = run(out, study, quick=quick, workers=workers)
        if page is not None:
            write_page(results, page, study)
        typer.echo(f"{out}: {len(results)} runs" + (f", {page}" if page else ""))


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Directory of the demonstration.")]) -> None:
    """Train and compare losses on the digits, and write the results with their pictures."""
    with _one_sentence():
        from contrastive.demo import run

        run(out)


def main() -> None:
    """Run the `contrastive` command."""
    app()


def _trained(run: Path, name: str | None) -> tuple[Any, Any]:
    """A run and the data to use it on: its own, which must not have changed, or others."""
    from contrastive import trainer
    from contrastive.data import load

    config = trainer.load_config(run)
    if name is not None:
        data = load(name, image_size=config.image_size)
    else:
        data = trainer.data_of(config)
        trainer.check_unchanged(data, run)
    return trainer.load_run(run, data=data), data


def _absolute(name: str) -> str:
    """The paths in a name of data, so that a run finds them from anywhere; what is no path is left."""
    from contrastive.data import DATASETS

    if not isinstance(name, str) or name in DATASETS:  # of a file: the setting's rule says what it must be
        return name
    parts = [Path(part.strip()) for part in name.split(",")]
    return ",".join(str(part.absolute()) for part in parts) if all(part.exists() for part in parts) else name


def _numbers(text: str) -> dict[str, float]:
    """`rho=0.1,mass=1` as a dictionary; whole numbers stay whole."""
    found: dict[str, float] = {}
    try:
        for name, value in (part.split("=") for part in text.split(",") if part):
            if name.strip() in found:
                raise ValueError
            found[name.strip()] = int(value) if value.strip().isdigit() else float(value)
    except ValueError:
        raise ValueError(f"loss_options={text!r} must be names with numbers, each name once, as rho=0.1,mass=1.") from None
    return found


def _print_table(rows: dict[str, dict[str, float]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from contrastive.evaluate import shown

    table = Table("", title=title, title_justify="left")
    for name in rows:
        table.add_column(name, justify="right")
    metrics = dict.fromkeys(metric for scores in rows.values() for metric in scores)
    for metric in metrics:
        table.add_row(metric, *(shown(metric, scores.get(metric)) for scores in rows.values()))
    Console().print(table)


_MEMORY = "out of memory|allocate memory|Storage size calculation overflowed"  # torch's words: on a CPU it has no type for it


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Say what a user can cause in one line on stderr; exit code 2 for bad input, 1 for divergence, 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "interrupted", code=130)
    except FloatingPointError as error:
        _fail(str(error), code=1)
    except ModuleNotFoundError as error:
        _fail(f"{error}: most likely the training extra is missing; pip install 'iotsolve[train]'.", code=2)
    except OSError as error:
        what = error.strerror or str(error)  # of our own it is a whole sentence, with the file in it
        if what == os.strerror(errno.ENOSPC):
            where = f" for {error.filename}" if error.filename else ""
            _fail(f"no space left on the disk{where}: make room and run it again.", code=2)
        _fail(f"{error.filename}: {what}" if error.filename else what, code=2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(_MEMORY, str(error)):
            raise
        what = str(error).partition("\n")[0][:200]
        _fail(
            f"there is not enough memory ({what}): show the encoder fewer pairs at once with --chunk, or choose a smaller "
            "--batch-size, --dim, --queue, --image-size or set of data.",
            code=2,
        )
    except ValueError as error:
        _fail(str(error), code=2)


def _fail(message: str, *, code: int) -> None:
    typer.echo(f"contrastive: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)
