"""Who moves where: flows between the states of the USA in 2012, explained by distance.

python docs/gallery/migration.py [folder]
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from iotsolve import inverse

DATA = Path(__file__).parents[2] / "tests" / "data" / "us_state_migration_2012.csv"


def main(folder: Path) -> tuple[inverse.Fit, dict[str, list[str]]]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(DATA, newline="") as file:
        lines = list(csv.DictReader(file))
    table = {name: np.array([line[name] for line in lines]) for name in ("origin", "dest")}
    table["movers"] = np.array([float(line["movers"]) for line in lines])
    table["km"] = np.array([float(line["km"]) for line in lines])
    table["log km"] = np.log(table["km"])

    # the score of a pair of states is theta_1 log km + theta_2 km; origins and destinations have effects of their own
    fit = inverse.gravity(
        table, flow="movers", origin="origin", destination="dest", features=["log km", "km"], cluster="origin"
    )
    errors = fit.errors("clustered")
    print(fit.report("clustered"))

    states, i = np.unique(table["origin"], return_inverse=True)
    j = np.searchsorted(states, table["dest"])
    fitted, seen = fit.plan[i, j] * table["movers"].sum() / fit.plan.sum(), table["movers"]
    surprise = (seen - fitted) / np.sqrt(fitted)

    figure, ax = plt.subplots(figsize=(6.2, 5.6), layout="constrained")
    positive = seen > 0
    ax.loglog(fitted[positive], seen[positive], ".", ms=4, alpha=0.35)
    none = fitted[~positive]
    ax.loglog(none, np.full(len(none), 0.6), "|", color="0.5", label=f"{len(none)} pairs without a mover")
    ends = np.array([fitted.min(), fitted.max()])
    ax.loglog(ends, ends, color="0.3", lw=1, label="fitted = observed")
    named: dict[frozenset[str], int] = {}  # of there and back the more surprising way
    for k in np.argsort(-abs(surprise)):
        named.setdefault(frozenset((table["origin"][k], table["dest"][k])), k)
    told: dict[str, list[str]] = {"more": [], "fewer": []}
    for more, pairs in zip((True, False), told.values(), strict=True):
        chosen = [k for k in named.values() if (surprise[k] > 0) == more][:4]
        for n, k in enumerate(sorted(chosen, key=lambda k: fitted[k])):
            pairs.append(f"{table['origin'][k]} → {table['dest'][k]}")
            ax.loglog(fitted[k], seen[k], "o", mfc="none", color="C3")
            ax.annotate(pairs[-1], (fitted[k], seen[k]), fontsize=8, color="C3",
                        xytext=(-30, 8 + 24 * (n % 2)) if more else (20, (-42, -42, -34, -14)[n]), textcoords="offset points",
                        ha="right" if more else "left", arrowprops=dict(arrowstyle="-", color="C3", lw=0.5))  # fmt: skip
    ax.set(xlim=(15, 4e5), ylim=(0.4, 4e5))
    ax.set_xlabel("movers that distance and the two states explain")
    ax.set_ylabel("movers observed")
    numbers = ", ".join(
        f"{name} {value:.4g} ± {1.96 * error:.2g}"
        for name, value, error in zip(fit.names, fit.coefficients, errors, strict=True)
    )
    ax.set_title(f"US migration 2012: {numbers}\n(95 %, clustered by origin)", fontsize=10)
    ax.legend(loc="lower right", fontsize=9)
    figure.savefig(folder / "migration.png", dpi=100)
    return fit, told


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
