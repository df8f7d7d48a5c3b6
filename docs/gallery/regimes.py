"""One pair of clouds, four problems: what fixed, soft, partial and free sides do to a plan.

python docs/gallery/regimes.py [folder]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from iotsolve import AT_MOST, FREE, KL, Problem, solve

REGIMES = {
    "balanced: all mass moves": {},
    "unbalanced: KL(0.5) on both sides": dict(rows=KL(0.5), columns=KL(0.5)),
    "partial: at most the weights, mass 0.7": dict(rows=AT_MOST, columns=AT_MOST, mass=0.7),
    "semi-relaxed: columns free": dict(columns=FREE),
}


def clouds() -> tuple[np.ndarray, np.ndarray]:
    """Two moons that fit but for a handful of points far away on either side."""
    rng = np.random.default_rng(1)
    angle = rng.uniform(0, np.pi, 34)
    x = np.c_[np.cos(angle), np.sin(angle)] + 0.06 * rng.standard_normal((34, 2))
    y = np.c_[np.cos(angle), np.sin(angle)] * 0.7 + [0.15, -0.15] + 0.06 * rng.standard_normal((34, 2))
    x[:6] = [2.0, -0.4] + 0.1 * rng.standard_normal((6, 2))
    y[-6:] = [-1.7, -0.4] + 0.1 * rng.standard_normal((6, 2))
    return x, y


def main(folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    x, y = clouds()
    cost = ((x[:, None] - y) ** 2).sum(-1)
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.2), sharex=True, sharey=True, layout="constrained")
    moved = {}
    for ax, (name, sides) in zip(axes.flat, REGIMES.items(), strict=True):
        solution = solve(Problem(cost, epsilon=0.01, **sides))
        assert solution.certificate.holds
        plan, moved[name] = solution.plan, float(solution.mass)
        for i, j in np.argwhere(plan > 0.05 / 34):
            ax.plot(*np.c_[x[i], y[j]], color="0.5", lw=1.2, alpha=min(1.0, 34 * plan[i, j]), zorder=0)
        for points, marginal, colour in ((x, solution.row_marginal, "C0"), (y, solution.column_marginal, "C1")):
            ax.scatter(*points.T, s=6, color="k", zorder=1)
            ax.scatter(*points.T, s=1400 * marginal, color=colour, alpha=0.75, zorder=2)
        ax.set_title(f"{name}\ntransport {float(solution.transport_cost):.3f}, mass {moved[name]:.2f}", fontsize=10)
        ax.set_aspect("equal")
        ax.set_xticks([])
        ax.set_yticks([])
    handles = [
        plt.Line2D([], [], marker="o", ls="", ms=9, color=c, label=n) for c, n in (("C0", "rows"), ("C1", "columns"))
    ]
    figure.legend(
        handles=handles, ncols=2, loc="outside lower center", title="area of a disc: mass in the plan", fontsize=9
    )
    figure.savefig(folder / "regimes.png", dpi=90)
    return moved


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
