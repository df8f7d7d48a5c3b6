"""Pictures of plans, losses, couplings and embeddings. Nothing here computes what is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from contrastive.data import Dataset, augment
from contrastive.evaluate import embed
from contrastive.losses import make

if TYPE_CHECKING:
    from contrastive.trainer import Run

__all__ = ["couplings", "embeddings", "losses", "plans"]

_INK, _SOURCE, _TARGET = "#1b4965", "#c1121f", "#1d70b8"


def plans(path: Path, source: NDArray, target: NDArray, by_regime: Mapping[str, NDArray]) -> None:
    """Each plan twice: as a heat map over the pixels that hold ink, and as lines from source to target pixels."""
    rows, columns = (np.flatnonzero(image) for image in (source, target))
    figure, axes = _figure(2, len(by_regime), width=3.0, height=3.1)
    top = max(plan.max() for plan in by_regime.values())
    for k, (name, plan) in enumerate(by_regime.items()):
        heat, lines = axes[0, k], axes[1, k]
        shown = plan[np.ix_(rows, columns)]
        norm = LogNorm(top * 1e-4, top)
        image = heat.imshow(
            np.maximum(shown, top * 1e-4), cmap="magma_r", norm=norm, aspect="auto", interpolation="nearest"
        )
        heat.set(title=name, xticks=[], yticks=[], xlabel="pixels of the 8", ylabel="pixels of the 3" if k == 0 else "")
        _draw_lines(lines, plan, source, target)
    bar = figure.colorbar(image, ax=axes[0, :].tolist(), shrink=0.8, pad=0.01)
    bar.set_label("mass of the arc (log scale)")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncol=4, frameon=False)
    figure.savefig(path, dpi=110)


def _draw_lines(axis: Axes, plan: NDArray, source: NDArray, target: NDArray) -> None:
    size = len(source)
    place = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)[:, ::-1]
    top = max(source.max(), target.max())
    i, j = np.nonzero(plan > 0.01 * top)
    axis.add_collection(
        LineCollection(np.stack([place[i], place[j]], 1), linewidths=4.0 * plan[i, j] / top, colors=_INK, alpha=0.6)
    )
    axis.scatter(*place.T, s=1600 * plan.diagonal(), color=_INK, alpha=0.35, linewidths=0, label="mass that stays")
    for marginal, color, label, marker in (
        (source.ravel(), _SOURCE, "ink of the 3", "o"),
        (target.ravel(), _TARGET, "ink of the 8", "s"),
    ):
        axis.scatter(
            *place.T, s=1600 * marginal, facecolor="none", edgecolor=color, marker=marker, label=label, linewidths=1.2
        )
    axis.plot([], [], color=_INK, label="mass that moves")
    axis.set(xlim=(-0.7, size - 0.3), ylim=(size - 0.3, -0.7), xticks=[], yticks=[], aspect="equal")


def losses(path: Path, histories: Mapping[str, Sequence[Sequence[float]]], steps_per_epoch: int) -> None:
    """Training loss by epoch: mean over the seeds, with the range between them shaded."""
    figure, axes = _figure(1, 1, width=7.0, height=4.2)
    axis = axes[0, 0]
    for name, curves in histories.items():
        curves = np.asarray(curves)
        epochs = curves[:, : curves.shape[1] // steps_per_epoch * steps_per_epoch]
        epochs = epochs.reshape(len(curves), -1, steps_per_epoch).mean(-1)
        x = np.arange(1, epochs.shape[1] + 1)
        line = axis.plot(x, epochs.mean(0), label=name)[0]
        axis.fill_between(x, epochs.min(0), epochs.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel="epoch", ylabel="loss (nats per anchor)", title="Training loss: mean and range over seeds")
    axis.legend(frameon=False, ncol=2)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def couplings(path: Path, runs: Mapping[str, Sequence[Run]], data: Dataset, *, count: int = 200) -> None:
    """``n P`` of one batch sorted by class, before (top) and after (bottom) training, all on one logarithmic scale."""
    from contrastive.trainer import initial_encoder

    names = [name for name in ("infonce", "global", "sinkhorn", "unbalanced") if name in runs] or list(runs)
    order = torch.argsort(data.train_labels[:count], stable=True)
    images, labels = data.train[:count][order], data.train_labels[:count][order]
    generator = torch.Generator().manual_seed(0)
    pair = augment(images, generator), augment(images, generator)
    figure, axes = _figure(2, len(names), width=2.9, height=2.9)
    norm = LogNorm(1e-3, 1.0)
    for k, name in enumerate(names):
        trained = runs[name][0]
        criterion = make(name, temperature=trained.config.temperature)
        for row, encoder in enumerate((initial_encoder(trained.config, data), trained.encoder)):
            with torch.no_grad():
                plan = criterion.coupling(*(encoder.eval()(view) for view in pair)).numpy() * count
            axis = axes[row, k]
            image = axis.imshow(np.clip(plan, 1e-3, 1.0), cmap="magma_r", norm=norm, interpolation="nearest")
            _mark_classes(axis, labels.numpy())
            if row == 0:
                axis.set_title(name)
            if k == 0:
                axis.set_ylabel(("before", "after")[row] + " training")
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.7, pad=0.01)
    bar.set_label("n P: share of the anchor's mass (log scale)")
    figure.suptitle(f"Coupling of two views of {count} digits, sorted by class")
    figure.savefig(path, dpi=110)


def _mark_classes(axis: Axes, labels: NDArray) -> None:
    edges = np.flatnonzero(np.diff(labels)) + 0.5
    for edge in edges:
        axis.axhline(edge, color="white", linewidth=0.5)
        axis.axvline(edge, color="white", linewidth=0.5)
    middle = (np.r_[-0.5, edges] + np.r_[edges, len(labels) - 0.5]) / 2
    axis.set_xticks(middle, np.unique(labels), fontsize=7)
    axis.set_yticks(middle, np.unique(labels), fontsize=7)
    axis.tick_params(length=0)


def embeddings(path: Path, before: nn.Module, after: nn.Module, data: Dataset, loss: str) -> None:
    """First two principal components of the normalised test embeddings, coloured by class."""
    figure, axes = _figure(1, 2, width=4.6, height=4.4)
    labels = data.test_labels.numpy()
    for axis, (title, encoder) in zip(
        axes[0], (("before training", before), (f"after training ({loss})", after)), strict=True
    ):
        features = embed(encoder, data.test)
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
        features = features - features.mean(0)
        _, scale, basis = np.linalg.svd(features, full_matrices=False)
        shares = scale[:2] ** 2 / (scale**2).sum()
        plane = features @ basis[:2].T
        for digit in range(10):
            mine = plane[labels == digit]
            axis.scatter(
                *mine.T, s=9, color=matplotlib.colormaps["tab10"](digit), label=str(digit), alpha=0.7, linewidths=0
            )
        axis.set(
            title=title,
            xticks=[],
            yticks=[],
            xlabel=f"component 1 ({shares[0]:.0%})",
            ylabel=f"component 2 ({shares[1]:.0%})",
        )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=10, frameon=False, markerscale=2
    )
    figure.suptitle("Test images in the embedding: PCA, no label used")
    figure.savefig(path, dpi=110)


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, NDArray]:
    """A figure outside pyplot: no window system is asked for, and nothing stays open."""
    figure = Figure(figsize=(width * columns + 0.8, height * rows + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
