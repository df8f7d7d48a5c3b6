"""Prices behind an optimal schedule: all costs under which an observed transport plan is the cheapest.

    python docs/gallery/inverse_lp.py [folder]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from iotsolve import Problem, inverse, solve

TRUTH = np.array([1.0, 0.5, 0.25])  # per kilometre, per unit of toll, per share of night: the first sets the scale
NAMES = ("kilometre", "toll", "night")


def observed(n: int = 15, seed: int = 3) -> tuple[inverse.Features, np.ndarray]:
    """Loads between plants and customers, shipped as cheaply as can be under costs that nobody wrote down."""
    rng = np.random.default_rng(seed)
    plants, customers = rng.random((n, 2)), rng.random((n, 2))
    km = np.linalg.norm(plants[:, None] - customers, axis=-1)
    toll, night = rng.random((2, n, n))
    values = np.stack([-km, -toll, -night])
    supply, demand = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(n))
    plan = solve(Problem(-np.tensordot(TRUTH, values, 1), supply, demand)).plan
    return inverse.Features(dict(zip(NAMES, values, strict=True))), np.asarray(plan)


def main(folder: Path) -> inverse.ExactFit:
    features, plan = observed()
    given = dict(fixed={"kilometre": 1.0})
    margin = inverse.ExactInverse(features, **given).fit(inverse.Coupling(plan=plan))
    nearest = inverse.ExactInverse(features, inverse.Nearest([1.0, 0.0, 0.0]), **given).fit(
        inverse.Coupling(plan=plan)
    )
    for name, (low, high) in zip(margin.names, margin.bounds, strict=True):
        print(f"{name}: between {low:.4f} and {high:.4f}")

    # the same set by brute force: where on a grid is the plan optimal?
    (_, _), (low_b, high_b), (low_n, high_n) = margin.bounds
    toll = np.linspace(low_b - 0.3 * (high_b - low_b), high_b + 0.3 * (high_b - low_b), 61)
    night = np.linspace(low_n - 0.3 * (high_n - low_n), high_n + 0.3 * (high_n - low_n), 61)
    gap = np.zeros((61, 61))
    for i, y in enumerate(night):
        for j, x in enumerate(toll):
            cost = -features.apply(np.array([1.0, x, y]))
            best = solve(Problem(cost, plan.sum(1), plan.sum(0)))
            gap[i, j] = (cost * plan).sum() - float(best.value)

    figure, ax = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    ax.contourf(toll, night, gap, levels=[-1, 1e-9], colors=["C0"], alpha=0.25)
    lines = ax.contour(toll, night, gap, levels=[1e-4, 5e-4, 2e-3, 5e-3], colors="0.6", linewidths=0.8)
    ax.clabel(lines, fmt="%g", fontsize=8)
    ax.plot([low_b, high_b, high_b, low_b, low_b], [low_n, low_n, high_n, high_n, low_n], "--", color="C0",
            label="bounds of each coefficient")  # fmt: skip
    ax.plot(*TRUTH[1:], "*", ms=14, color="C3", label="truth")
    ax.plot(*margin.coefficients[1:], "o", color="k", label="largest margin")
    ax.plot(*nearest.coefficients[1:], "s", color="C2", label="nearest to 0")
    ax.set_xlabel("weight of the toll, in kilometres")
    ax.set_ylabel("weight of the night, in kilometres")
    ax.set_title("Under the shaded costs the observed plan is optimal;\ngrey: by how much it is not", fontsize=10)
    ax.legend(fontsize=9, loc="upper right")
    figure.savefig(folder / "inverse_lp.png", dpi=100)
    return margin


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
