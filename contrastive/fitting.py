"""The loop. Importing it imports Lightning (seconds), so only `trainer.train` does.

A step is: views, embeddings, loss and its derivative in the embeddings, the encoder's derivative, the optimiser. The
loss sees the embeddings as leaves, so that the encoder may make them in parts: what one pass would keep for a large
batch is then made again, part by part, with the derivative that is known by now (GradCache, Gao et al., RepL4NLP
2021). The gradient is the same.
"""

import dataclasses
import io
import json
import logging
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from contrastive.batches import Batches, generator
from contrastive.config import TrainConfig
from contrastive.family import IOTLoss
from contrastive.queue import FeatureQueue
from contrastive.trainer import CHECKPOINT, CONFIG, METRICS, SPEED, description, read_checkpoint, write_atomically


def fit(
    config: TrainConfig, batches: Batches, model: nn.Module, criterion: nn.Module, out: Path, *, progress: bool
) -> None:
    """Train `model` in place, from the checkpoint in `out` where there is one, and leave the run in `out`."""
    with _quiet(), torch.random.fork_rng(devices=[]):
        fabric = _fabric(config)
        fabric.launch()
        if config.batch_size % fabric.world_size:
            raise ValueError(
                f"batch_size={config.batch_size} over {fabric.world_size} processes: it counts the pairs of all of them, "
                "so it must be a multiple of their number."
            )
        if fabric.is_global_zero:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / CONFIG, (json.dumps(dataclasses.asdict(config), indent=2) + "\n").encode())
        fabric.barrier()
        queue = FeatureQueue(config.queue, config.dim) if config.queue else None
        loop = _Loop(fabric, config, batches, _Parts(model, criterion, queue), out)
        loop.run(visible=progress and fabric.is_global_zero)
        fabric.barrier()


def _fabric(config: TrainConfig) -> Fabric:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda', and torch finds no GPU: is this torch a CPU build? device='auto' takes what there is."
        )
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.precision == "16" and not on_gpu:
        raise ValueError("precision='16' on a CPU, where half precision needs a GPU's loss scaling: use bf16, or 32.")
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if many else 1,
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)) if many else 1,
        strategy="ddp" if many else "auto",
        precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[config.precision],
    )


class _Parts(nn.Module):
    """What a checkpoint holds of modules."""

    def __init__(self, model: nn.Module, criterion: nn.Module, queue: FeatureQueue | None) -> None:
        super().__init__()
        self.model, self.criterion, self.queue = model, criterion, queue


class _Loop:
    def __init__(self, fabric: Fabric, config: TrainConfig, batches: Batches, parts: _Parts, out: Path) -> None:
        self.fabric, self.config, self.batches, self.parts, self.out = fabric, config, batches, parts, out
        # a loss's parameters are a temperature or the like: decay would pull it to a value nobody chose
        groups = [
            {"params": list(parts.model.parameters())},
            {"params": list(parts.criterion.parameters()), "weight_decay": 0.0},
        ]
        plain = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(plain, config.learning_rate, total_steps=batches.total)
        parts.to(fabric.device)
        self.model = fabric.setup_module(parts.model)
        learned = any(p.requires_grad for p in parts.criterion.parameters())
        self.criterion = fabric.setup_module(parts.criterion) if learned and fabric.world_size > 1 else parts.criterion
        self.optimizer = fabric.setup_optimizers(plain)
        if (config.chunk or fabric.world_size > 1) and any(isinstance(m, _BatchNorm) for m in parts.model.modules()):
            warnings.warn(
                "the encoder has batch normalisation, which sees one part of a batch at a time (chunk, processes): the result "
                "is not that of the whole batch. Group normalisation does not look across it.",
                RuntimeWarning,
                stacklevel=2,
            )
        share = config.batch_size // fabric.world_size
        self.own = slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)
        self.step, self.seconds, self.history, self.looks = 0, 0.0, [], {}
        self.known = description(batches.data)
        self.resting = True  # between steps, where a checkpoint may be made
        parts.train()

    # -- the run -----------------------------------------------------------------------------------------------------------

    def run(self, *, visible: bool) -> None:
        """All steps that are left."""
        if (self.out / CHECKPOINT).exists():
            self._load(read_checkpoint(self.out))
        elif self.fabric.is_global_zero:
            self._save()  # so that a run stopped at its first step can be resumed too
        config, total = self.config, self.batches.total
        every = config.save_every or self.batches.per_epoch
        began = time.perf_counter() - self.seconds
        log = None
        try:
            with _asked_to_stop() as asked, _bar(total, self.step, visible) as show:
                log = _Log(self.out, self.step) if self.fabric.is_global_zero else None
                while self.step < total:
                    clock = _Clock()
                    stop = self._take(clock, asked)
                    self.seconds = time.perf_counter() - began
                    done = self.step == total
                    if self.fabric.is_global_zero:
                        if self.step % config.log_every == 0 or done:
                            log.write(self.step, clock, config.batch_size, self._numbers())
                        show(self.step, self._numbers(), config.batch_size / clock.total)
                        if done or stop or self.step % every == 0:
                            self._save()
                    if stop and not done:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            if self.resting and self.fabric.is_global_zero:
                self._save()
            raise KeyboardInterrupt(
                f"training stopped after step {self.step if self.resting else read_checkpoint(self.out)['step']} of {total}; go "
                f"on with resume=True in Python or `contrastive train --resume --out {self.out}`"
            ) from None
        finally:
            if log is not None:
                log.close()

    def _take(self, clock: "_Clock", asked: list[int]) -> bool:
        """One step; whether somebody asked any process to stop."""
        config, step = self.config, self.step
        torch.manual_seed(generator(config.seed, "step", step, self.fabric.global_rank).initial_seed())
        left, right = (x.to(self.fabric.device) for x in self.batches.views(step, self.own))
        clock.lap("data")
        whole = self.own.stop - self.own.start
        size = min(config.chunk or whole, whole)
        parts = list(zip(left.split(size), right.split(size), strict=True))
        z0, z1, recall = self._embed(parts)
        clock.lap("encoder")
        loss = self._loss(z0, z1, step)
        self.fabric.backward(loss)
        share = torch.stack(
            [loss.detach().double().to(self.fabric.device), loss.new_tensor(float(bool(asked))).double()]
        )
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(share)
            share /= self.fabric.world_size
        value, stop = share.tolist()
        if not math.isfinite(value):
            why = (
                "training diverged; start a new run with a smaller learning_rate or a larger temperature."
                if step or bool(z0.isfinite().all() & z1.isfinite().all())
                else "before anything was learned the encoder made embeddings that are not finite; look for it there."
            )
            raise FloatingPointError(
                f"the loss became {value} at step {step} (epoch {step // self.batches.per_epoch}): {why}"
            )
        clock.lap("loss")
        recall()
        clock.lap("encoder")
        self.resting = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.parts.queue is not None:
            given = self.batches.labels(step, self.own)
            known = next(iter(given.values()), None)
            self.parts.queue.update(z1.detach(), known, gather_distributed=self.fabric.world_size > 1)
        self.history.append(value)
        self.step += 1
        self.resting = True
        clock.lap("optimizer")
        return stop > 0

    def _embed(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Any]:
        """Embeddings as leaves, and what carries their derivatives on to the encoder."""
        if len(parts) == 1:
            made = self.model(*parts[0])
            leaves = [z.detach().float().requires_grad_() for z in made]
            return *leaves, lambda: self._pass_on(made, leaves, slice(None))
        states, made = [], []
        with torch.no_grad():
            for part in parts:
                states.append(_random_state(self.fabric.device))
                made.append(self.model(*part))
        leaves = [torch.cat(side).float().requires_grad_() for side in zip(*made, strict=True)]
        after = _random_state(self.fabric.device)

        def again() -> None:
            start = 0
            for k, (part, state) in enumerate(zip(parts, states, strict=True)):
                _set_random_state(state, self.fabric.device)  # so that dropout drops the same
                stop = start + len(part[0])
                with self.fabric.no_backward_sync(self.model, enabled=k + 1 < len(parts)):
                    self._pass_on(self.model(*part), leaves, slice(start, stop))
                start = stop
            _set_random_state(after, self.fabric.device)

        return *leaves, again

    def _pass_on(self, made: tuple[Tensor, Tensor], leaves: list[Tensor], part: slice) -> None:
        """The loss's derivative in some embeddings, to the encoder: by a scalar that has it, which may be scaled again."""
        scale = self._scaler.get_scale() if self._scaler else 1.0
        self.fabric.backward(sum((z * (leaf.grad[part] / scale)).sum() for z, leaf in zip(made, leaves, strict=True)))

    def _loss(self, z0: Tensor, z1: Tensor, step: int) -> Tensor:
        if z0.ndim != 2 or z0.shape != z1.shape:
            raise ValueError(
                f"the encoder made {tuple(z0.shape)} and {tuple(z1.shape)} of a batch: (N, dim) on both sides is needed."
            )
        criterion, own = self.criterion, self.parts.criterion
        if not isinstance(own, IOTLoss):
            loss = criterion(z0, z1)
            self._check(loss)
            return loss
        seen: list[Any] = []
        looking = (step + 1) % self.config.log_every == 0 or step + 1 == self.batches.total
        own.watch = seen.append if looking else None
        given: dict[str, Any] = {name: x.to(z0.device) for name, x in self.batches.labels(step, self.own).items()}
        if self.parts.queue is not None:
            given["queue"] = self.parts.queue
        loss = criterion(z0, z1, **given)
        own.watch = None
        if seen:
            self.looks[step] = float(seen[0].chance), float(seen[0].marginal_error)
        return loss

    def _check(self, loss: Any) -> None:
        if not isinstance(loss, Tensor) or loss.ndim:
            kind = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the criterion returned {kind}, not a scalar tensor: average over the batch in it.")

    def _numbers(self) -> dict[str, float]:
        """What a log says of the last step."""
        step = self.step - 1
        numbers = {"loss": self.history[step], "learning_rate": self.schedule.get_last_lr()[0]}
        if self.looks:
            chance, off = self.looks[max(self.looks)]
            numbers |= {"loss_minus_ln_n": numbers["loss"] - chance, "marginal_error": off}
        return numbers

    # -- what is kept ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "step": self.step,
            "epochs_finished": self.step // self.batches.per_epoch,
            "seconds": self.seconds,
            "data": self.known,
            "history": list(self.history),
            "looks": dict(self.looks),
            "state_dict": self.parts.state_dict(),
            "optimizer_states": [self.optimizer.optimizer.state_dict()],
            "lr_schedulers": [self.schedule.state_dict()],
            "precision": self._scaler.state_dict() if self._scaler else {},
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.out / CHECKPOINT, buffer.getvalue())
        rows = []
        for step, loss in enumerate(self.history):
            chance, off = self.looks.get(step, (math.nan, math.nan))
            more = f"{loss - chance!r},{off!r}" if math.isfinite(chance) else ","
            rows.append(f"{step},{step // self.batches.per_epoch},{loss!r},{more}\n")
        write_atomically(
            self.out / METRICS, ("step,epoch,loss,loss_minus_ln_n,marginal_error\n" + "".join(rows)).encode()
        )

    def _load(self, state: dict[str, Any]) -> None:
        self.parts.load_state_dict(state["state_dict"])
        self.optimizer.optimizer.load_state_dict(state["optimizer_states"][0])
        self.schedule.load_state_dict(state["lr_schedulers"][0])
        if self._scaler and state["precision"]:
            self._scaler.load_state_dict(state["precision"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.looks = list(state["history"]), dict(state["looks"])

    @property
    def _scaler(self) -> Any:
        return getattr(self.fabric._precision, "scaler", None)


class _Clock:
    """Where the time of a step goes. On a GPU a part is charged with what it waits for, which others may have asked for."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[name] = self.parts.get(name, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return sum(self.parts.values())


class _Log:
    """TensorBoard, and how fast it goes as CSV."""

    PARTS = ("data", "encoder", "loss", "optimizer")

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / SPEED
        rows = self.path.read_text(errors="replace").splitlines()[1:] if self.path.exists() else []
        before = [row for row in rows if (number := row.split(",")[0]).isdigit() and int(number) <= step]  # others come again
        write_atomically(self.path, "\n".join([f"step,pairs_per_second,{','.join(self.PARTS)}", *before, ""]).encode())
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, clock: _Clock, size: int, numbers: dict[str, float]) -> None:
        shares = {part: clock.parts[part] / clock.total for part in self.PARTS}
        speed = size / clock.total
        for name, value in (numbers | {"pairs_per_second": speed}).items():
            self.board.add_scalar(name, value, step)
        for part, share in shares.items():
            self.board.add_scalar(f"share_of_time/{part}", share, step)
        with self.path.open("a") as file:
            file.write(f"{step},{speed:.1f},{','.join(f'{share:.3f}' for share in shares.values())}\n")

    def close(self) -> None:
        self.board.close()


@contextmanager
def _bar(total: int, step: int, visible: bool) -> Iterator[Any]:
    """One progress bar for the whole run, on stderr, where that is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (visible and console.is_terminal)) as progress:
        task = progress.add_task("", total=total, completed=step)

        def show(step: int, numbers: dict[str, float], speed: float) -> None:
            words = f"loss {numbers['loss']:.4f}"
            if "loss_minus_ln_n" in numbers:
                words += f" (ln N {numbers['loss_minus_ln_n']:+.2f}), marginals off {numbers['marginal_error']:.0e}"
            progress.update(task, completed=step, description=f"{words}, {speed:.0f} pairs/s")

        yield show


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Ctrl-C, and what a cluster sends before it kills: the step is finished and saved. A second one does not wait."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about itself."""
    logs = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch", "lightning")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
