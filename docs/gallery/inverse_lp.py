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


def rivals(features: inverse.Features, plan: np.ndarray, toll: np.ndarray, night: np.ndarray) -> np.ndarray:
    """The same set without the inverse: whatever plan is optimal for another cost must not be cheaper under the true one."""
    found = []
    for x in toll:
        for y in night:
            other = solve(Problem(-features.apply(np.array([1.0, x, y])), plan.sum(1), plan.sum(0))).plan
            found.append(features.adjoint(other - plan))  # times coefficients: by how much the other is cheaper
    found = np.unique(np.round(found, 12), axis=0)
    return found[abs(found).max(1) > 0]


def main(folder: Path) -> tuple[inverse.ExactFit, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    features, plan = observed()
    seen, given = inverse.Coupling(plan=plan), dict(fixed={"kilometre": 1.0})
    margin = inverse.ExactInverse(features, **given).fit(seen)
    nearest = inverse.ExactInverse(features, inverse.Nearest([1.0, 0.0, 0.0]), **given).fit(seen)
    for name, (low, high) in zip(margin.names, margin.bounds, strict=True):
        print(f"{name}: between {low:.4f} and {high:.4f}")

    (_, _), (low_b, high_b), (low_n, high_n) = margin.bounds
    wide = ((low - 0.3 * (high - low), high + 0.3 * (high - low)) for low, high in margin.bounds[1:])
    toll, night = (np.linspace(*ends, 301) for ends in wide)
    cuts = rivals(features, plan, toll[::12], night[::12])
    on_grid = np.stack(np.broadcast_arrays(1.0, *np.meshgrid(toll, night)), -1)
    gap = (on_grid @ cuts.T).max(-1)  # what the observed plan costs more than the best of them; below 0 it is the best

    figure, ax = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    ax.contourf(toll, night, gap, levels=[gap.min() - 1, 0], colors=["C0"], alpha=0.25)
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
    figure.legend(fontsize=9, ncols=4, loc="outside lower center")
    figure.savefig(folder / "inverse_lp.png", dpi=100)
    return margin, cuts


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
