"""What makes two handwritten digits alike: a metric learned from which digits were put together.

python docs/gallery/digits_metric.py [folder]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from iotsolve import inverse

TRAIN = 200


def main(folder: Path, dimensions: int = 20) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    pca = PCA(dimensions).fit(images[:TRAIN])
    z = pca.transform(images) / np.sqrt(pca.explained_variance_)  # nothing says yet which directions matter

    # somebody put the training digits together by what they show: a plan between the set and itself
    together = (labels[:TRAIN, None] == labels[None, :TRAIN]) & ~np.eye(TRAIN, dtype=bool)
    plan = together / together.sum()
    features = inverse.Mahalanobis(z[:TRAIN], z[:TRAIN])
    fit = inverse.InverseOT(features, penalty=inverse.Ridge(0.01)).fit(inverse.Coupling(plan=plan))
    values, vectors = np.linalg.eigh(fit.matrix)
    root = vectors * np.sqrt(np.maximum(values, 0.0))  # the part of the matrix that is a squared distance

    found = {}
    for name, points in (("before", z), ("learned", z @ root)):
        judge = KNeighborsClassifier(5).fit(points[:TRAIN], labels[:TRAIN])
        found[name] = float(judge.score(points[TRAIN:], labels[TRAIN:]))
    pixels = KNeighborsClassifier(5).fit(images[:TRAIN], labels[:TRAIN])
    found["raw pixels"] = float(pixels.score(images[TRAIN:], labels[TRAIN:]))
    print(f"5 nearest neighbours, {len(z) - TRAIN} digits held out: {found}")

    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained")
    shown = slice(TRAIN, TRAIN + 500)
    for ax, (name, points) in zip(axes, (("before", z), ("learned", z @ root)), strict=True):
        flat = PCA(2).fit(points[:TRAIN]).transform(points[shown])
        dots = ax.scatter(*flat.T, c=labels[shown], cmap="tab10", s=10)
        title = "whitened principal components" if name == "before" else "the metric learned from the plan"
        ax.set_title(f"{title}\n5 nearest neighbours: {100 * found[name]:.1f} % right", fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel("first two directions of largest variance, held-out digits")
    figure.legend(*dots.legend_elements(), title="digit", loc="outside right center")
    figure.savefig(folder / "digits_metric.png", dpi=90)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
