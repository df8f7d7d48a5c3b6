"""Who marries whom: the affinity between traits of couples, and along how many dimensions they sort.

python docs/gallery/marriage.py [folder]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from iotsolve import Problem, inverse, solve

TRAITS = ("education", "height", "health", "risk taken")
PLANTED = np.array(  # rows: his traits, columns: hers
    [[0.9, 0.0, 0.2, 0.0], [0.0, 0.4, 0.0, 0.0], [0.15, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, -0.2]]
)


def couples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A market in equilibrium, and the traits of couples drawn from it."""
    rng = np.random.default_rng(seed)
    men, women = rng.standard_normal((400, 4)), rng.standard_normal((400, 4))
    plan = solve(Problem(-men @ PLANTED @ women.T, epsilon=1.0)).plan
    drawn = rng.choice(plan.size, size=count, p=plan.ravel() / plan.sum())
    i, j = np.divmod(drawn, 400)
    return men[i], women[j]


def main(folder: Path, count: int = 1000) -> inverse.Fit:
    folder.mkdir(parents=True, exist_ok=True)
    men, women = couples(count)
    fit = inverse.affinity(men, women)  # every couple is a type of its own
    errors, sorting = fit.errors("robust").reshape(4, 4), fit.saliency()
    print(fit.report("robust"))
    tests = {rank: fit.rank_test(rank).p_value for rank in (1, 2, 3)}
    print("p-values of fewer dimensions:", {rank: f"{p:.2g}" for rank, p in tests.items()})

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), width_ratios=(1.25, 1), layout="constrained")
    image = left.imshow(fit.matrix, cmap="RdBu", vmin=-1, vmax=1)
    for i in range(4):
        for j in range(4):
            dark = abs(fit.matrix[i, j]) > 0.6
            left.text(j, i, f"{fit.matrix[i, j]:.2f}\n± {1.96 * errors[i, j]:.2f}", ha="center", va="center",
                      fontsize=9, color="w" if dark else "k")  # fmt: skip
    left.set_xticks(range(4), TRAITS, rotation=20)
    left.set_yticks(range(4), TRAITS)
    left.set_xlabel("hers")
    left.set_ylabel("his")
    left.set_title(f"affinity from {count:,} couples, 95 %")
    figure.colorbar(image, ax=left, shrink=0.8)
    k = np.arange(4)
    off = np.abs(sorting.intervals.T - sorting.shares)
    right.bar(k, sorting.shares, yerr=off, capsize=4, color="C0", alpha=0.8, label="estimated, 95 %")
    truth = np.linalg.svd(PLANTED, compute_uv=False)
    right.plot(k, truth / truth.sum(), "D", color="C3", label="planted")
    right.set_xticks(k, [f"{n + 1}." for n in k])
    right.set_xlabel("dimension of sorting")
    right.set_ylabel("share of the affinity")
    right.set_title(f"saliency; fewer dimensions: p = {tests[3]:.1g}")
    right.legend()
    figure.savefig(folder / "marriage.png", dpi=100)
    return fit


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
