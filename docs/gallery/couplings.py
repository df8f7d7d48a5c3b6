"""What contrastive losses believe of a batch in which some pairs are wrong: row softmax, Sinkhorn, unbalanced.

python docs/gallery/couplings.py [folder]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits

from contrastive import InfoNCELoss, SinkhornNCELoss, UnbalancedNCELoss

WRONG = 6  # pairs, the last of the batch, whose second view is noise
LOSSES = {
    "InfoNCE: row softmax": InfoNCELoss(0.1),
    "Sinkhorn: both sides fixed": SinkhornNCELoss(0.1),
    "unbalanced: both sides KL(0.1)": UnbalancedNCELoss(0.1, rho=0.1),
}


def views(each: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Two noisy looks at some digits of every class, in order of their class, then those whose second look is lost."""
    images, labels = load_digits(return_X_y=True)
    images, mean = images / 16, images.mean(0) / 16
    rng = np.random.default_rng(0)
    sound = np.concatenate([rng.choice(np.flatnonzero(labels == digit), each, replace=False) for digit in range(10)])
    chosen = np.r_[sound, rng.choice(len(images), WRONG, replace=False)]
    first, second = (images[chosen] - mean + 0.15 * rng.standard_normal((len(chosen), 64)) for _ in range(2))
    second[-WRONG:] = rng.random((WRONG, 64)) - mean
    return torch.as_tensor(first), torch.as_tensor(second)


def main(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    first, second = views()
    n = len(first)
    found = {name: n * loss.coupling(first, second).numpy() for name, loss in LOSSES.items()}

    figure, axes = plt.subplots(2, 3, figsize=(9.6, 4.9), height_ratios=(3, 1), sharex=True, sharey="row",
                                layout="constrained")  # fmt: skip
    for (heat, bars), (name, plan) in zip(axes.T, found.items(), strict=True):
        image = heat.imshow(plan, cmap="magma_r", norm=LogNorm(1e-3, 1, clip=True), aspect="auto")
        heat.axhline(n - WRONG - 0.5, color="C0", lw=1)
        heat.axvline(n - WRONG - 0.5, color="C0", lw=1)
        heat.set_title(name, fontsize=10)
        columns = plan.sum(0)
        bars.bar(np.arange(n), columns, width=1.0, color=np.where(np.arange(n) < n - WRONG, "0.55", "C0"))
        bars.axhline(1.0, color="0.2", lw=0.8, ls=":")
        bars.set_xlabel("second view, by class; wrong pairs blue", fontsize=9)
        given = plan[-WRONG:].sum(1).mean(), columns[-WRONG:].mean()
        print(f"{name}: mass of a wrong pair's first view {given[0]:.2f}, of its second {given[1]:.2f}")
    axes[0, 0].set_ylabel("first view, by class")
    axes[1, 0].set_ylabel("mass of\na column")
    figure.colorbar(image, ax=axes[0, :].tolist(), pad=0.01, label="n P", extend="both")
    figure.savefig(folder / "couplings.png", dpi=100)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
