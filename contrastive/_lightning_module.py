"""The Lightning side of training. Importing it imports Lightning (seconds), so only `trainer.train` does."""

import io
import logging
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from contrastive.trainer import CHECKPOINT, METRICS, TrainConfig, steps_per_epoch, views, write_atomically


def fit(
    config: TrainConfig, images: Tensor, encoder: nn.Module, criterion: nn.Module, out: Path, *, progress: bool
) -> None:
    """Train `encoder` in place, from the checkpoint in `out` where there is one, and leave the run in `out`."""
    module = Pretraining(config, images, encoder, criterion)
    keeper = Keeper(out)
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=config.epochs,
            callbacks=[keeper, Bar(visible=progress)],
            plugins=[AtomicIO()],
            logger=TensorBoardLogger(out, name="tensorboard", version=""),
            log_every_n_steps=1,
            enable_checkpointing=False,  # the keeper does it: one file, replaced at each epoch
            enable_progress_bar=False,  # one bar for the run instead of one for each epoch
            enable_model_summary=False,
        )
        checkpoint = out / CHECKPOINT
        try:
            trainer.fit(module, range(module.steps), ckpt_path=checkpoint if checkpoint.exists() else None)
        except SystemExit:  # what Lightning makes of Ctrl-C
            if not keeper.interrupted:
                raise
    if keeper.interrupted:
        raise KeyboardInterrupt(
            f"training stopped after epoch {keeper.finished} of {config.epochs}; go on with resume=True in Python or "
            f"`contrastive train --resume --out {out}`"
        )


class Pretraining(lightning.LightningModule):
    """Encoder and loss; a batch is only its number, since `views` finds the images of any step."""

    def __init__(self, config: TrainConfig, images: Tensor, encoder: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.config, self.images = config, images
        self.encoder, self.criterion = encoder, criterion
        self.steps = steps_per_epoch(config, images)
        self.history: list[float] = []

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        pair = views(self.config, self.images, self.global_step)
        z0, z1 = self.encoder(torch.cat(pair)).chunk(2)
        loss = self.criterion(z0, z1)
        if not isinstance(loss, Tensor) or loss.ndim:
            kind = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the criterion returned {kind}, not a scalar tensor: average over the batch in it.")
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss became {loss.item()} at step {self.global_step} (epoch {self.global_step // self.steps}): "
                "training diverged; start a new run with a smaller learning_rate or a larger temperature."
            )
        self.history.append(loss.item())
        self.log_dict({"loss": loss.detach(), "learning_rate": self.lr_schedulers().get_last_lr()[0]})
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        # a loss's parameters are a temperature or the like: decay would pull it to a value nobody chose
        groups = [
            {"params": list(self.encoder.parameters())},
            {"params": list(self.criterion.parameters()), "weight_decay": 0.0},
        ]
        rate = self.config.learning_rate
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=rate, weight_decay=self.config.weight_decay
        )
        total = self.config.epochs * self.steps
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Keeper(lightning.Callback):
    """Keep the run's checkpoint and metrics.csv, and remember whether the user interrupted."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.finished = 0
        self.seconds = 0.0
        self.interrupted = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Pretraining) -> None:
        self.started = time.perf_counter() - self.seconds
        if trainer.global_step == 0:  # so that a run stopped in its first epoch can be resumed too
            trainer.save_checkpoint(self.out / CHECKPOINT)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Pretraining) -> None:
        self.finished = trainer.current_epoch + 1
        self.seconds = time.perf_counter() - self.started
        trainer.save_checkpoint(self.out / CHECKPOINT)
        rows = (f"{step},{step // pl_module.steps},{loss!r}\n" for step, loss in enumerate(pl_module.history))
        write_atomically(self.out / METRICS, ("step,epoch,loss\n" + "".join(rows)).encode())

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Pretraining, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint |= {"epochs_finished": self.finished, "seconds": self.seconds, "history": list(pl_module.history)}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Pretraining, checkpoint: dict[str, Any]
    ) -> None:
        self.finished, self.seconds = checkpoint["epochs_finished"], checkpoint["seconds"]
        pl_module.history = list(checkpoint["history"])

    def on_exception(self, trainer: lightning.Trainer, pl_module: Pretraining, exception: BaseException) -> None:
        self.interrupted = isinstance(exception, KeyboardInterrupt)


class AtomicIO(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all, and read without running pickled code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


class Bar(lightning.Callback):
    """One progress bar for the whole run, on stderr, where that is a terminal."""

    def __init__(self, *, visible: bool) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=not (visible and console.is_terminal))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Pretraining) -> None:
        total = pl_module.config.epochs * pl_module.steps
        self.task = self.progress.add_task("steps", total=total, completed=trainer.global_step, loss=float("nan"))
        self.progress.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Pretraining, outputs: Any, batch: int, batch_idx: int
    ) -> None:
        self.progress.update(self.task, completed=trainer.global_step, loss=pl_module.history[-1])

    def teardown(self, trainer: lightning.Trainer, pl_module: Pretraining, stage: str) -> None:
        self.progress.stop()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Pretraining, exception: BaseException) -> None:
        self.progress.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about itself, and undo what it does to Ctrl-C."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    ctrl_c = signal.getsignal(signal.SIGINT)
    log.setLevel(logging.WARNING)  # tips, hardware found, epochs reached
    try:
        with warnings.catch_warnings():
            # Lightning calls what newer torch has deprecated; nothing a user could change
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
            yield
    finally:
        log.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, ctrl_c)  # Lightning leaves it ignored after an interrupt in its setup
