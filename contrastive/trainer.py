"""Train an encoder with a contrastive loss. A run is a directory that can be resumed, loaded and evaluated.

    config.json     the configuration
    last.ckpt       everything needed to go on: weights, optimiser, schedule, history; rewritten after each epoch
    metrics.csv     step, epoch, loss
    tensorboard/    the same and the learning rate, for `tensorboard --logdir`

Order of the data, augmentation and first weights are functions of the seed (and of the step), never of the loss:
runs that differ in `loss` alone see the same images in the same order from the same start.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contrastive.data import DATASETS, Images, augment, load
from contrastive.encoders import SmallCNN
from contrastive.losses import NAMES, make

CONFIG, CHECKPOINT, METRICS = "config.json", "last.ckpt", "metrics.csv"
CUSTOM = "custom"

_INTEGERS = {
    "epochs": (1, "it counts passes over the data"),
    "batch_size": (2, "an image alone in its batch has no negatives"),
    "seed": (0, "give any non-negative integer"),
    "dim": (1, "it is the length of an embedding"),
    "threads": (1, "one is fastest for small images"),
}
_POSITIVE = {
    "learning_rate": "with 0 nothing is learned and below 0 the loss is climbed; 1e-3 to 1e-2 suits small images",
    "temperature": "it divides the cosine similarities; 0.05 to 0.5 is usual",
}
_NOT_NEGATIVE = {
    "weight_decay": "below 0 the weights are driven to infinity; 0 turns it off",
    "uniformity": "below 0 it would reward uneven negatives; 0 turns it off",
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on.

    Args:
        data: Name of the data set, a key of `contrastive.data.DATASETS`.
        loss: Name of the loss, one of `contrastive.losses.NAMES`, or "custom" for a module given to `train`.
        epochs: Passes over the training images, at least 1. The learning rate's cycle is this long too.
        batch_size: Images in a batch, at least 2. What is left of an epoch after the last full batch is dropped: the
            loss depends on the number of negatives, so a short batch would be another loss.
        learning_rate: Peak of AdamW's one-cycle schedule, above 0.
        weight_decay: AdamW's decay of the encoder's weights, at least 0.
        temperature: Divides the cosine similarities, above 0: the eps of the transport problem.
        uniformity: Weight of the uniformity penalty, at least 0.
        seed: Non-negative integer, below 2**63.
        dim: Length of an embedding, at least 1.
        threads: CPU threads, at least 1. Another number may round sums differently.

    Raises:
        ValueError: A field breaks its rule; the message says which, why and what to do.
    """

    data: str = "digits"
    loss: str = "infonce"
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    temperature: float = 0.2
    uniformity: float = 0.0
    seed: int = 0
    dim: int = 64
    threads: int = 1

    def __post_init__(self) -> None:
        for name, (lowest, why) in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**63:
                raise ValueError(f"{name}={value!r} must be an integer of at least {lowest}: {why}.")
        for name, why in (_POSITIVE | _NOT_NEGATIVE).items():
            value, strict = getattr(self, name), name in _POSITIVE
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0 or (strict and value == 0):
                rule = "above 0" if strict else "of at least 0"
                raise ValueError(f"{name}={value!r} must be a finite number {rule}: {why}.")
        if self.data not in DATASETS:
            known = ", ".join(sorted(DATASETS))
            raise ValueError(f"data={self.data!r} is not a known data set: choose one of {known}.")
        if self.loss != CUSTOM and self.loss not in NAMES:
            known = ", ".join(NAMES)
            raise ValueError(f"loss={self.loss!r} is not a known loss: choose one of {known}; {CUSTOM} is your own.")


@dataclass(frozen=True)
class Run:
    """A trained encoder and how it came about.

    Args:
        config: The configuration.
        encoder: The encoder after the last finished epoch, in evaluation mode.
        history: Loss of each step so far.
        epochs: Epochs finished; fewer than `config.epochs` where the run was stopped.
        seconds: Time spent in training, over all resumptions.
        out: The run's directory.
    """

    config: TrainConfig
    encoder: nn.Module
    history: tuple[float, ...]
    epochs: int
    seconds: float
    out: Path


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    criterion: nn.Module | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Train an encoder and leave the run in the directory `out`.

    Args:
        config: What to train, on what, for how long.
        out: Directory of the run; made if missing.
        criterion: Your own loss, called as `criterion(z0, z1)` on the embeddings (N, dim) of two views of the same N
            images, returning a scalar; its parameters are trained too. Goes with `loss="custom"`.
        resume: Go on from the last finished epoch in `out`. On the CPU the result is bit for bit that of a run never
            interrupted, unless a `criterion` of your own draws from torch's global random numbers.
        progress: Show a progress bar where stderr is a terminal.

    Returns:
        The finished run.

    Raises:
        ValueError: `out` holds a run already and `resume` is off, or holds none and it is on; the configuration is
            not the one the run was started with; a batch is larger than the data; loss and `criterion` disagree.
        FloatingPointError: The loss became NaN or infinite.
        KeyboardInterrupt: Training was interrupted; the message says how to resume.
    """
    out = Path(out)
    data = load(config.data)
    if config.batch_size > len(data.train):
        raise ValueError(
            f"batch_size={config.batch_size} exceeds the {len(data.train)} training images of {data.name!r}: no batch "
            "would ever be full; choose a smaller one."
        )
    criterion = _criterion(config, criterion)
    _check_directory(out, config, resume)
    from contrastive._lightning_module import fit  # Lightning takes seconds to import: only training pays

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / CONFIG, (json.dumps(dataclasses.asdict(config), indent=2) + "\n").encode())
    with _threads(config.threads):
        fit(config, data.train, initial_encoder(config, data), criterion, out, progress=progress)
    return load_run(out)


def load_run(out: str | Path) -> Run:
    """Return the run in the directory `out`, as of its last finished epoch.

    Raises:
        ValueError: `out` is not a run's directory, or a file in it is damaged.
    """
    out = Path(out)
    config, state = load_config(out), read_checkpoint(out)
    encoder = initial_encoder(config, load(config.data))
    prefix = "encoder."
    try:
        weights = {name: value for name, value in state["state_dict"].items() if name.startswith(prefix)}
        encoder.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
        history, seconds, epochs = tuple(state["history"]), state["seconds"], state["epochs_finished"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(_damaged(out / CHECKPOINT, error)) from error
    return Run(config, encoder.eval(), history, epochs, seconds, out)


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


def initial_encoder(config: TrainConfig, data: Images) -> nn.Module:
    """Return the untrained encoder of a run: the same weights for the same seed, whatever the loss."""
    channels, size = data.train.shape[1:3]
    with _seeded(config.seed, "encoder"):
        return SmallCNN(channels, size, dim=config.dim)


def views(config: TrainConfig, images: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return the two augmented views of the batch of one step.

    A step's batch is cut from its epoch's permutation, so any step can be had without the ones before it: nothing
    about the order has to be saved for a run to be resumed.

    Args:
        config: Only `seed` and `batch_size` matter.
        images: The training images, shape (N, channels, size, size).
        step: Step since the start of training, from 0.

    Returns:
        Two tensors of shape (batch_size, channels, size, size); row i of both comes from the same image.
    """
    epoch, place = divmod(step, steps_per_epoch(config, images))
    order = torch.randperm(len(images), generator=_generator(config.seed, "order", epoch))
    batch = images[order[place * config.batch_size :][: config.batch_size]]
    generator = _generator(config.seed, "augment", step)
    return augment(batch, generator), augment(batch, generator)


def steps_per_epoch(config: TrainConfig, images: Tensor) -> int:
    """Return the number of full batches in an epoch; the incomplete one is dropped."""
    return len(images) // config.batch_size


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path`; whoever is killed half-way leaves the old file, never half of the new one."""
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # or a power cut may rename before the content is on the disk
    fresh.replace(path)


def _check_directory(out: Path, config: TrainConfig, resume: bool) -> None:
    if resume:
        _check_same(config, load_config(out), out)
        if (out / CHECKPOINT).exists():
            load_run(out)  # a damaged checkpoint is reported here, before Lightning meets it
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: a run needs a directory; choose another.")
    if any((out / name).exists() for name in (CONFIG, CHECKPOINT)):
        raise ValueError(f"{out} already holds a run, which is kept: resume it, or choose another directory.")


def _check_same(config: TrainConfig, saved: TrainConfig, out: Path) -> None:
    for field in dataclasses.fields(TrainConfig):
        now, then = getattr(config, field.name), getattr(saved, field.name)
        if now != then:
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
        return criterion
    with _seeded(config.seed, "criterion"):
        return make(config.loss, temperature=config.temperature, uniformity=config.uniformity)


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120]
    return f"{path} cannot be read ({reason}): it is damaged or not ours; restore it from a copy or train again."


def _generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    key = np.random.SeedSequence([seed, index, *stream.encode()])
    return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))


@contextmanager
def _seeded(seed: int, stream: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(_generator(seed, stream).get_state())
        yield


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
