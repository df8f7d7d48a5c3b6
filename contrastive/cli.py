"""The `contrastive` command: train, evaluate, demo. What a command needs is imported in it: `--help` is immediate."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Contrastive learning as inverse optimal transport.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _setting(default: str, text: str):
    # no value here means "not given": a resumed run then takes the saved one
    return typer.Option(help=f"{text} Default: {default}.", show_default=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    data: Annotated[str | None, _setting("digits", "Data set.")] = None,
    loss: Annotated[
        str | None, _setting("infonce", "Loss: infonce, ntxent, clip, global, sinkhorn or unbalanced.")
    ] = None,
    epochs: Annotated[int | None, _setting("20", "Passes over the training images.")] = None,
    batch_size: Annotated[int | None, _setting("256", "Images in a batch.")] = None,
    learning_rate: Annotated[float | None, _setting("0.003", "Peak of the one-cycle schedule.")] = None,
    weight_decay: Annotated[float | None, _setting("0.01", "Decay of the encoder's weights.")] = None,
    temperature: Annotated[float | None, _setting("0.2", "Divides the cosine similarities.")] = None,
    uniformity: Annotated[float | None, _setting("0.0", "Weight of the uniformity penalty.")] = None,
    seed: Annotated[int | None, _setting("0", "Seed of the weights, the order and the augmentation.")] = None,
    dim: Annotated[int | None, _setting("64", "Length of an embedding.")] = None,
    threads: Annotated[int | None, _setting("1", "CPU threads.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished epoch.")] = False,
) -> None:
    """Train an encoder; settings left out are the defaults or, with --resume, those the run was started with."""
    settings = {
        "data": data,
        "loss": loss,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "temperature": temperature,
        "uniformity": uniformity,
        "seed": seed,
        "dim": dim,
        "threads": threads,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    with _one_sentence():
        from contrastive import trainer

        start = trainer.load_config(out) if resume else trainer.TrainConfig()
        run = trainer.train(dataclasses.replace(start, **given), out, resume=resume)
        typer.echo(f"{out}: {run.epochs} epochs in {run.seconds:.1f} s, loss {run.history[-1]:.4f} at the last step.")
        typer.echo(f"Next: contrastive evaluate {out}")


@app.command()
def evaluate(run: Annotated[Path, typer.Argument(help="Directory of a run.")]) -> None:
    """Score a run's embeddings beside its untrained encoder and raw pixels; writes evaluation.json in the run."""
    with _one_sentence():
        from contrastive import trainer
        from contrastive.data import load
        from contrastive.evaluate import compare

        trained = trainer.load_run(run)
        data = load(trained.config.data)
        rows = compare(trained.encoder, trainer.initial_encoder(trained.config, data), data)
        trainer.write_atomically(run / "evaluation.json", (json.dumps(rows, indent=2) + "\n").encode())
        title = f"{run}: {trained.config.loss}, {trained.epochs} of {trained.config.epochs} epochs"
        _print_table(rows, title)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Directory of the demonstration.")]) -> None:
    """Train and compare losses on the digits, and write the results with their pictures."""
    with _one_sentence():
        from contrastive.demo import run

        run(out)


def main() -> None:
    """Run the `contrastive` command."""
    app()


def _print_table(rows: dict[str, dict[str, float]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("accuracy, %", title=title, title_justify="left")
    for metric in next(iter(rows.values())):
        table.add_column(metric, justify="right")
    for name, scores in rows.items():
        table.add_row(name, *(f"{100 * score:.1f}" for score in scores.values()))
    Console().print(table)


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
    except (ValueError, OSError) as error:
        _fail(str(error), code=2)


def _fail(message: str, *, code: int) -> None:
    typer.echo(f"contrastive: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)
