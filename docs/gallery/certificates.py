"""How far from the optimum is an iterate? What a certificate says, and what the length of the last step says.

python docs/gallery/certificates.py [folder]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import logsumexp

from iotsolve import KL, Problem, Sinkhorn, certify, solve

RHO, EPSILON = 100.0, 0.002


def cost(n: int = 60) -> np.ndarray:
    """Squared distances between two clouds, one beside the other."""
    rng = np.random.default_rng(0)
    x, y = rng.random((n, 2)), rng.random((n, 2)) + np.array([0.3, 0.0])
    return ((x[:, None] - y) ** 2).sum(-1)


def bounds(problem: Problem, sweeps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of the optimal value after so many sweeps of Sinkhorn's algorithm."""
    hurried = (Sinkhorn(tolerance=1e-12, max_steps=int(k), annealing=None) for k in sweeps)
    found = [solve(problem, solver, throw=False).certificate for solver in hurried]
    return np.array([x.dual for x in found]), np.array([x.primal for x in found])


def textbook(problem: Problem, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The usual loop for soft sides, judged from outside: how far f moves in a sweep, and the certified gap after it."""
    c, a, b = problem.cost.dense().numpy(), problem.a.numpy(), problem.b.numpy()
    f, g, damped = np.zeros(len(a)), np.zeros(len(b)), RHO / (RHO + EPSILON)
    moved, gaps = np.zeros(count), np.zeros(count)
    for k in range(count):
        old, f = f, -damped * EPSILON * logsumexp((g - c) / EPSILON, axis=1, b=b)
        g = -damped * EPSILON * logsumexp((f[:, None] - c) / EPSILON, axis=0, b=a[:, None])
        certificate = certify(problem, f, g)
        moved[k], gaps[k] = abs(f - old).max(), certificate.primal - certificate.dual
    return moved, gaps


def main(folder: Path, count: int = 300) -> dict[str, np.ndarray | float]:
    folder.mkdir(parents=True, exist_ok=True)
    c, sweeps = cost(), np.unique(np.geomspace(1, count, 25).astype(int))
    balanced = Problem(c, epsilon=0.01)
    low, high = bounds(balanced, sweeps)
    value = float(solve(balanced).value)
    weights = np.full(len(c), 1 / len(c))
    soft = Problem(c, weights, 1.5 * weights, epsilon=EPSILON, rows=KL(RHO), columns=KL(RHO))
    moved, gaps = textbook(soft, count)
    answer = solve(soft)
    print(f"unbalanced: the loop ends {gaps[-1]:.3g} above its lower bound and moves by {moved[-1]:.1e} a sweep")
    print(answer.certificate)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    left.fill_between(sweeps, low, high, color="C0", alpha=0.25, label="certified: the value is in here")
    left.plot(sweeps, high, "C0.-", ms=4)
    left.plot(sweeps, low, "C0.-", ms=4)
    left.axhline(value, color="C3", lw=1, label="optimal value")
    left.set(
        xscale="log", xlabel="sweeps", ylabel="value, units of the cost", title="balanced: bounds at every iterate"
    )
    left.legend(fontsize=9)
    steps = np.arange(1, count + 1)
    right.loglog(steps, gaps, color="C0", label="certified gap")
    right.loglog(steps, moved, color="C1", label="change of the potentials in a sweep")
    right.axhline(float(answer.value), color="C3", lw=1, label="optimal value")
    right.set(xlabel="sweeps", ylabel="units of the cost", title=f"unbalanced, KL({RHO:g}): a small step is no proof")
    right.legend(fontsize=9)
    figure.savefig(folder / "certificates.png", dpi=100)
    return dict(low=low, high=high, value=value, moved=moved, gaps=gaps, soft=float(answer.value))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
