"""Train an encoder with a contrastive loss. A run is a directory that can be resumed, loaded and evaluated.

    config.json     the configuration
    last.ckpt       everything needed to go on: weights, optimiser, schedule, queue, history; tensors and numbers only
    metrics.csv     step, epoch, loss, loss minus ln N, marginal error
    speed.csv       step, pairs per second, share of a step's time that each part takes
    tensorboard/    the same, for `tensorboard --logdir`

Order of the data, augmentation and first weights are functions of the seed (and of the step), never of the loss:
runs that differ in `loss` alone see the same inputs in the same order from the same start.
"""

import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

try:
    import fcntl
except ImportError:  # of Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

import torch
from torch import nn

from contrastive import encoders
from contrastive.arguments import check_queued
from contrastive.batches import Batches, generator
from contrastive.config import CUSTOM, TrainConfig
from contrastive.data import Dataset, load
from contrastive.losses import make

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "METRICS",
    "Run",
    "TrainConfig",
    "data_of",
    "initial_model",
    "load_config",
    "load_run",
    "train",
]

CONFIG, CHECKPOINT, METRICS, SPEED = "config.json", "last.ckpt", "metrics.csv", "speed.csv"


@dataclass(frozen=True)
class Run:
    """A trained model and how it came about.

    Args:
        config: The configuration.
        model: What makes the embeddings of both sides of a pair, as of the last saved step, in evaluation mode.
        history: Loss of each step so far.
        steps: Steps taken; fewer than the whole where the run was stopped.
        epochs: Epochs finished.
        seconds: Time spent in training, over all resumptions.
        out: The run's directory.
    """

    config: TrainConfig
    model: nn.Module
    history: tuple[float, ...]
    steps: int
    epochs: int
    seconds: float
    out: Path

    @property
    def encoder(self) -> nn.Module:
        """The encoder; that of the left side where there are two."""
        return self.model.sides[0]


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    criterion: nn.Module | None = None,
    data: Dataset | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Train an encoder and leave the run in the directory `out`.

    Started by torchrun it trains on all its processes, each with its part of every batch; the result is that of one process, to
    the rounding of sums.

    Args:
        config: What to train, on what, for how long.
        out: Directory of the run; made if missing.
        criterion: Your own loss, called as `criterion(z0, z1)` on the embeddings (N, dim) of two views of the same N
            images, returning a scalar; its parameters are trained too. Goes with `loss="custom"`.
        data: Data of your own; None loads `config.data`.
        resume: Go on from the last saved step in `out`. On the CPU the result is bit for bit that of a run never interrupted.
        progress: Show a progress bar where stderr is a terminal.

    Returns:
        The finished run.

    Raises:
        ValueError: `out` holds a run already and `resume` is off, or holds none and it is on; another process trains it; the
            configuration is not the one the run was started with; a batch is larger than the data; loss and `criterion` disagree.
        FloatingPointError: The loss became NaN or infinite.
        KeyboardInterrupt: Training was interrupted; the message says how to resume.
        OSError: The disk is full; the last checkpoint is whole.
    """
    out = Path(out)
    data = data_of(config) if data is None else data
    batches = Batches(config, data)
    criterion = _criterion(config, criterion)
    _check_directory(out, config, resume, data)
    model = initial_model(config, data)
    from contrastive.fitting import fit  # Lightning takes seconds to import: only training pays

    with _threads(config.threads), _alone(out):
        if not resume and not int(os.environ.get("RANK", "0")):
            _check_directory(out, config, resume, data)  # another may have begun and ended since
        fit(config, batches, model, criterion, out, progress=progress)
    return load_run(out, data=data)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from training the run in `out`, until this one is done or dead; its own ranks are one."""
    if fcntl is None or int(os.environ.get("RANK", "0")):
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    directory = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"the run in {out} is being trained by another process: wait for it, or stop it first."
            ) from error
        except OSError:  # a file system that has no locks keeps nobody out
            pass
        yield
    finally:
        os.close(directory)


def data_of(config: TrainConfig) -> Dataset:
    """The data of a run, cut to `train_size`."""
    data = load(config.data, image_size=config.image_size)
    return data.first(config.train_size) if config.train_size else data


def load_run(out: str | Path, *, data: Dataset | None = None) -> Run:
    """Return the run in the directory `out`, as of its last checkpoint.

    Args:
        out: The run's directory.
        data: Its data, if they were given to `train`, or others of the same kind.

    Raises:
        ValueError: `out` is not a run's directory, a file in it is damaged, or its data have changed since.
    """
    out = Path(out)
    config, state = load_config(out), read_checkpoint(out)
    if data is None:
        data = data_of(config)
        check_unchanged(data, out)
    known = state.get("data") if isinstance(state, dict) else None
    if known and (shapes := _shapes(data)) != known["shapes"]:
        raise ValueError(
            f"the run in {out} was trained on inputs of shape {known['shapes']}, left and right, and {data.name!r} has {shapes}: "
            "give data of the same kind."
        )
    model = initial_model(config, data)
    try:
        weights = {name: value for name, value in state["state_dict"].items() if name.startswith("model.")}
        model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
        numbers = tuple(state["history"]), state["step"], state["epochs_finished"], state["seconds"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(_damaged(out / CHECKPOINT, error)) from error
    return Run(config, model.eval(), *numbers, out)


def load_config(out: str | Path) -> TrainConfig:
    """Return the configuration of the run in the directory `out`.

    Raises:
        ValueError: `out` is not a run's directory, or its config.json is damaged.
    """
    path = Path(out) / CONFIG
    if not path.is_file():
        what = "has no " + CONFIG if path.parent.is_dir() else "does not exist"
        raise ValueError(f"{path.parent} is not a run: it {what}; give the directory that `train` wrote to.")
    try:
        return TrainConfig(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(_damaged(path, error)) from error


def read_checkpoint(out: Path) -> dict[str, Any]:
    """Return the checkpoint of the run in `out`: plain numbers and tensors, no pickled code is run.

    Raises:
        ValueError: There is no checkpoint, or it cannot be read.
    """
    path = out / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"{out} has no {CHECKPOINT}: the run was stopped before it began; start it again with resume.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(_damaged(path, error)) from error


def initial_model(config: TrainConfig, data: Dataset) -> nn.Module:
    """Return the untrained model of a run: the same weights for the same seed, whatever the loss."""
    with _seeded(config.seed, "encoder"):
        return encoders.of(data, config.encoder, config.dim)


def initial_encoder(config: TrainConfig, data: Dataset) -> nn.Module:
    """Return the untrained encoder of a run; that of the left side where there are two."""
    return initial_model(config, data).sides[0]


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path`; whoever is killed half-way leaves the old file, never half of the new one."""
    fresh = path.with_name(path.name + ".tmp")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may rename before the content is on the disk
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = "what it held before is kept" if path.exists() else "nothing was written"
        raise OSError(
            error.errno,
            f"no space left for {path} ({len(content) / 2**20:.1f} MiB): {kept}; make room and run it again",
        ) from error


def _check_directory(out: Path, config: TrainConfig, resume: bool, data: Dataset) -> None:
    if resume:
        _check_same(config, load_config(out), out)
        if (out / CHECKPOINT).exists():
            load_run(out, data=data)  # a damaged checkpoint is reported here, before anything is trained
            check_unchanged(data, out)
        elif (out / METRICS).exists():  # which is begun after the first checkpoint
            raise ValueError(
                f"{out} has a {METRICS} and no {CHECKPOINT}, which was there: going on would be starting anew, over what is left "
                "of the run. Put it back, or choose another directory."
            )
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: a run needs a directory; choose another.")
    if any((out / name).exists() for name in (CONFIG, CHECKPOINT)):
        raise ValueError(f"{out} already holds a run, which is kept: resume it, or choose another directory.")


def description(data: Dataset) -> dict[str, Any]:
    """What a checkpoint says of the data."""
    return {"fingerprint": data.fingerprint, "shapes": _shapes(data)}


def _shapes(data: Dataset) -> list[list[int]]:
    return [list(x.shape[1:]) for x in (data.train, data.train_partners) if x is not None]


def check_unchanged(data: Dataset, out: Path) -> None:
    """Refuse data that are not those of the run in `out`, with a `ValueError` that says what to do."""
    state = read_checkpoint(out)
    known = state.get("data") if isinstance(state, dict) else None
    if known and known["fingerprint"] != data.fingerprint:
        raise ValueError(
            f"{data.name!r} is not what the run in {out} was started with (an input, a label or the split differs): resume and "
            "score it with the data it had, or name the data, as in --data, to score it on what is there now."
        )


FREE = ("threads", "device", "save_every", "log_every")  # what a resumed run may do otherwise


def _check_same(config: TrainConfig, saved: TrainConfig, out: Path) -> None:
    for field in dataclasses.fields(TrainConfig):
        now, then = getattr(config, field.name), getattr(saved, field.name)
        if now != then and field.name not in FREE:
            raise ValueError(
                f"{field.name}={now!r} differs from {field.name}={then!r}, with which the run in {out} was started: a "
                f"resumed run must end as if never interrupted; leave {field.name} as it was, or start a new run."
            )


def _criterion(config: TrainConfig, criterion: nn.Module | None) -> nn.Module:
    if (criterion is not None) != (config.loss == CUSTOM):
        given = "no criterion=" if criterion is None else "a criterion="
        raise ValueError(
            f"loss={config.loss!r} with {given}: a loss of your own goes with loss={CUSTOM!r}, so that the record of "
            "the run is true; give both or neither."
        )
    if criterion is not None:
        if config.queue:
            raise ValueError(
                f"queue={config.queue} with a criterion of your own, which is called with two embeddings only: leave it 0."
            )
        return criterion
    options: dict[str, Any] = dict(config.loss_options)
    if config.learn_temperature:
        options["learn_temperature"] = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        options["gather_distributed"] = True
    with _seeded(config.seed, "criterion"):
        criterion = make(config.loss, temperature=config.temperature, uniformity=config.uniformity, **options)
    if config.queue:
        check_queued(criterion.columns)  # before anything is written that would be in the way of the next try
    return criterion


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    if isinstance(error, UnpicklingError):  # torch's page about its flag weights_only
        reason = "no file of tensors and numbers"
    return f"{path} cannot be read ({reason}): it is damaged or not ours; restore it from a copy or train again."


@contextmanager
def _seeded(seed: int, stream: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator(seed, stream).get_state())
        yield


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
