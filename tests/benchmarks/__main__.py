"""Time our solvers beside their peers, in one run, at an accuracy that the harness measures itself.

``python -m tests.benchmarks`` runs everything (about an hour and a half), ``--quick`` the small sizes; results go to
``runs/bench/results.json``, and with ``--docs`` into the page in ``docs``. ``--only entropic,exact`` runs some groups anew and
leaves the others' results there as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import ot
import torch
from rich.console import Console
from rich.progress import Progress
from scipy.sparse import coo_array
from scipy.spatial.distance import cdist

from tests.benchmarks import cases, page, peers
from tests.benchmarks.measure import Entry, Row, Slow, peak_memory, race, remember, timed

OUT = Path("runs/bench")
PACKAGES = (
    "numpy",
    "scipy",
    "torch",
    "numba",
    "POT",
    "ott-jax",
    "jax",
    "geomloss",
    "pykeops",
    "regot",
    "mdot-tnt",
    "lapjv",
    "lapx",
    "ortools",
)


def as_dense(solution: Any) -> np.ndarray:
    """The plan of what ours or a peer returns."""
    plan = getattr(solution, "plan", solution)
    return plan.toarray() if hasattr(plan, "toarray") else np.asarray(plan)


def balanced_error(a: np.ndarray, b: np.ndarray) -> Callable[[Any], float]:
    def error(found: Any) -> float:
        plan = as_dense(found)
        rows, columns = np.abs(plan.sum(-1) - a).sum(-1), np.abs(plan.sum(-2) - b).sum(-1)
        return float(np.max(rows + columns))

    return error


# -- groups ------------------------------------------------------------------------------------------------------------


def entropic(quick: bool) -> Iterator[Callable[[], Row]]:
    slow: dict[tuple[str, float], Slow] = {}
    for accuracy in (1e-6, 1e-9):
        for n in (500,) if quick else (500, 2000, 5000):
            for kind in cases.EPSILONS:
                for epsilon in cases.EPSILONS[kind]:
                    case = cases.Entropic(kind, n, epsilon, accuracy)
                    yield partial(_entropic, case, slow.setdefault((kind, epsilon), {}))


def small(quick: bool) -> Iterator[Callable[[], Row]]:
    for kind in ("2d", "random"):
        for epsilon in cases.EPSILONS[kind]:
            slow: Slow = {}
            for n in (10, 30, 100):
                yield partial(_entropic, cases.Entropic(kind, n, epsilon, 1e-6), slow)


def _entropic(case: cases.Entropic, slow: Slow) -> Row:
    c, a, b = case.data()
    word = ", clusters" if case.kind == "clusters" else ", small" if case.n <= 100 else ""
    group = f"entropic{word}, to {case.accuracy:g}"
    return race(
        Row(group, case.name, case.accuracy),
        lambda: peers.ours(c, a, b, case.epsilon, case.accuracy),
        lambda solution: solution.plan,
        peers.ENTROPIC,
        lambda peer, threshold: peer.solve(c, a, b, case.epsilon, threshold),
        balanced_error(a, b),
        slow,
        _amount(case),
    )


def _amount(case: Any) -> float:
    """How much work it is, among problems of its kind: by its size, then by its accuracy."""
    return case.n - math.log10(getattr(case, "accuracy", 1.0))


def exact(quick: bool) -> Iterator[Callable[[], Row]]:
    for uniform in (True, False):
        slow: dict[str, Slow] = {}
        for n in (1000,) if quick else (1000, 2000, 4000):
            for kind in cases.KINDS:
                yield partial(_exact, cases.Exact(kind, n, uniform), slow.setdefault(kind, {}))


def _exact(case: cases.Exact, slow: Slow) -> Row:
    c, a, b = case.data()
    best = float(peers.ours_exact(c, a, b).certificate.dual)

    def error(found: Any) -> float:
        plan = coo_array(found)
        off = np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum()
        return float(max(off, float(c[plan.coords] @ plan.data) / best - 1))

    return race(
        Row("exact, equal weights" if case.uniform else "exact, random weights", case.name, 1e-9),
        lambda: peers.ours_exact(c, a, b),
        lambda solution: solution.plan,
        peers.EQUAL if case.uniform else peers.WEIGHTED,
        lambda peer, threshold: peer.solve(c, a, b),
        error,
        slow,
        _amount(case),
    )


def partial_exact(quick: bool) -> Iterator[Callable[[], Row]]:
    slow: dict[str, Slow] = {}
    for n in (500,) if quick else (500, 1000, 2000):
        for kind in cases.KINDS:
            yield partial(_partial_exact, cases.Partial(kind, n), slow.setdefault(kind, {}))


def _partial_exact(case: cases.Partial, slow: Slow) -> Row:
    c, a, b = case.data()
    best = float(peers.ours_partial(c, a, b, case.mass).certificate.dual)

    def error(found: Any) -> float:
        plan = coo_array(found)
        over = sum(np.maximum(plan.sum(axis) - w, 0.0).sum() for axis, w in ((1, a), (0, b)))
        return float(max(over, abs(plan.sum() - case.mass), float(c[plan.coords] @ plan.data) / best - 1))

    return race(
        Row("exact, partial", case.name, 1e-9),
        lambda: peers.ours_partial(c, a, b, case.mass),
        lambda solution: solution.plan,
        peers.PARTIAL,
        lambda peer, threshold: peer.solve(c, a, b, case.mass),
        error,
        slow,
        _amount(case),
    )


def unbalanced(quick: bool) -> Iterator[Callable[[], Row]]:
    for n in (500,) if quick else (500, 2000):
        for rho in (0.1, 1.0, 10.0):
            for epsilon in (0.1, 0.01):
                yield partial(_unbalanced, cases.Unbalanced(n, epsilon, rho))


def _unbalanced(case: cases.Unbalanced) -> Row:
    c, a, b = case.data()
    best = as_dense(peers.ours_unbalanced(c, a, b, case.epsilon, case.rho, 1e-12))
    return race(
        Row("unbalanced KL", case.name, case.accuracy),
        lambda: peers.ours_unbalanced(c, a, b, case.epsilon, case.rho, case.accuracy),
        lambda solution: solution.plan,
        peers.UNBALANCED,
        lambda peer, threshold: peer.solve(c, a, b, case.epsilon, case.rho, threshold),
        lambda found: float(np.abs(as_dense(found) - best).sum() / best.sum()),
        {},
    )


def many(quick: bool) -> Iterator[Callable[[], Row]]:
    for epsilon in (0.1, 0.01):
        yield partial(_many, cases.Many(epsilon))


def _many(case: cases.Many) -> Row:
    c, a, b = case.data()

    def ours() -> Any:
        from iotsolve import Problem, solve

        solution = solve(Problem(c, a, b, epsilon=case.epsilon), tolerance=case.accuracy)
        assert np.all(solution.certificate.holds)
        return solution

    return race(
        Row("many small problems", case.name, case.accuracy),
        ours,
        lambda solution: solution.plan,
        peers.MANY,
        lambda peer, threshold: peer.solve(c, a, b, case.epsilon, threshold),
        balanced_error(a, b),
        {},
    )


def many_exact(quick: bool) -> Iterator[Callable[[], Row]]:
    for n in (5, 20) if quick else (5, 20, 64):
        for weights in ("equal weights", "random weights", "partial"):
            yield partial(_many_exact, cases.ManyExact(n, weights))


def _many_exact(case: cases.ManyExact) -> Row:
    c, a, b = case.data()
    best = peers.ours_many(c, a, b, case.mass).certificate.dual

    def error(found: Any) -> float:
        """Largest of the batch: what is moved beyond the weights or not moved, and what it costs too much."""
        moved = found.sum((1, 2)) - (1.0 if case.mass is None else case.mass)
        over = sum(np.maximum(found.sum(axis) - w, 0.0).sum(1) for axis, w in ((2, a), (1, b)))
        return float(np.max([np.abs(moved), over, (found * c).sum((1, 2)) / best - 1]))

    return race(
        Row("exact, many small problems", case.name, 1e-9),
        lambda: peers.ours_many(c, a, b, case.mass),
        lambda solution: solution.plan,
        {None: peers.MANY_WEIGHTED, 0.6: peers.MANY_PARTIAL}[case.mass]
        if case.weights != "equal weights"
        else peers.MANY_EQUAL,
        lambda peer, threshold: peer.solve(c, a, b, case.mass),
        error,
        {},
    )


def points(quick: bool) -> Iterator[Callable[[], Row]]:
    for single in (True, False):
        for d in (3, 64):
            for epsilon in (0.1, 0.01, 0.001):
                slow: Slow = {}
                for n in (2000,) if quick else (2000, 10_000):
                    yield partial(_points, cases.Clouds(n, d, epsilon, single), slow)


def _points(case: cases.Clouds, slow: Slow) -> Row:
    x, y, epsilon = case.data()
    return race(
        Row(f"points, {'float32' if case.single else 'float64'}, to {case.accuracy:g}", case.name, case.accuracy),
        lambda: peers.ours_points(x, y, epsilon, case.accuracy),
        lambda solution: (solution.f, solution.g),
        peers.POINTS,
        lambda peer, threshold: peer.solve(x, y, epsilon, threshold),
        lambda found: marginal_error(x, y, epsilon, *found),
        slow,
        case.n,
    )


def marginal_error(x: np.ndarray, y: np.ndarray, epsilon: float, f: np.ndarray, g: np.ndarray) -> float:
    """L1 error of both marginals of the plan of potentials, in float64, a few rows at a time."""
    x, y, f, g = (np.asarray(z, np.float64) for z in (x, y, f, g))
    rows, columns = np.empty(len(x)), np.zeros(len(y))
    for k in range(0, len(x), 500):
        part = slice(k, k + 500)
        with np.errstate(over="ignore"):
            plan = np.exp((f[part, None] + g - cdist(x[part], y, "sqeuclidean")) / epsilon) / (len(x) * len(y))
        rows[part] = plan.sum(1)
        columns += plan.sum(0)
    return float(np.abs(rows - 1 / len(x)).sum() + np.abs(columns - 1 / len(y)).sum())


def gradients(quick: bool) -> Iterator[Callable[[], Row]]:
    for epsilon in (0.1, 0.05):
        yield partial(_gradient, 512 if quick else 2048, 128, epsilon)


_GRADIENT = """
import torch
from iotsolve import Problem, inverse_loss
torch.manual_seed(0)
n, d, eps = {n}, {d}, {epsilon}
x, y = (torch.nn.functional.normalize(torch.randn(n, d), dim=1) for _ in range(2))
target = torch.eye(n).to_sparse() / n

def ours():
    leaf = x.clone().requires_grad_()
    inverse_loss(Problem(1 - leaf @ y.T, epsilon=eps), target).backward()
    return leaf.grad

def unrolled(steps=100):
    leaf = x.clone().requires_grad_()
    scores, log_n = (leaf @ y.T - 1) / eps, torch.log(torch.tensor(float(n)))
    g = torch.zeros(n)
    for _ in range(steps):
        f = -torch.logsumexp(scores + g, 1) - log_n
        g = -torch.logsumexp(scores + f[:, None], 0) - log_n
    log_plan = scores + f[:, None] + g
    (eps * (-log_plan.diagonal().mean())).backward()
    return leaf.grad
"""


def _gradient(n: int, d: int, epsilon: float) -> Row:
    made: dict[str, Any] = {}
    code = _GRADIENT.format(n=n, d=d, epsilon=epsilon)
    exec(code, made)
    row = Row("gradient of the inverse loss", f"n = {n}, d = {d}, eps = {epsilon:g}", 1e-3)
    first, second = made["ours"](), made["unrolled"]()
    error = float((first - second).norm() / second.norm())
    for who, work, repeats in (("iotsolve", made["ours"], 5), ("unrolled, 100 sweeps", made["unrolled"], 2)):
        runs = sorted(timed(work)[1:] for _ in range(repeats))
        name = "ours" if who == "iotsolve" else "unrolled"
        small = _GRADIENT.format(n=128, d=d, epsilon=epsilon)  # what a process imports and compiles once is not the work's
        memory = peak_memory(f"{small}\n{name}()\n{code}\nwork = {name}")
        row.entries.append(Entry(who, *runs[len(runs) // 2], error))
        row.entries[-1].memory = memory  # type: ignore[attr-defined]
    return row


GROUPS = {
    "small": small,
    "entropic": entropic,
    "exact": exact,
    "partial": partial_exact,
    "unbalanced": unbalanced,
    "many": many,
    "many-exact": many_exact,
    "points": points,
    "gradients": gradients,
}


# -- what is not a race ------------------------------------------------------------------------------------------------


def growth(quick: bool) -> list[dict[str, Any]]:
    """Seconds against n, ours and POT's, on one kind of cost."""
    found = []
    for n in (250, 500, 1000) if quick else (250, 500, 1000, 2000, 4000, 7000, 10_000):
        c = cases.cost("2d", n).astype(np.float32)
        u = cases.weights(n, 1, uniform=True)
        for label, epsilon in (("eps = 0.1", 0.1), ("eps = 0.01", 0.01), ("eps = 0", 0.0)):
            if epsilon == 0 and n > 5000:
                continue
            work = partial(_certified, c, epsilon) if epsilon else partial(peers.ours_exact, c.astype(float), u, u)
            work()
            found.append({"n": n, "who": "iotsolve", "work": label, "ms": min(timed(work)[1] for _ in range(2))})
            if n <= 4000:
                double = c.astype(float)
                theirs = (
                    partial(peers.ENTROPIC[0].solve, double, u, u, epsilon, 1e-6)
                    if epsilon
                    else partial(ot.emd, u, u, double)
                )
                found.append({"n": n, "who": "POT", "work": label, "ms": timed(theirs)[1]})
    return found


def _certified(c: np.ndarray, epsilon: float) -> Any:
    from iotsolve import Problem, solve

    solution = solve(Problem(c, epsilon=epsilon))
    assert solution.certificate.holds
    return solution


_COLD = """
import time
begin = time.perf_counter()
import numpy as np
from iotsolve import Problem, solve
imported = time.perf_counter()
small = np.random.default_rng(0).random((20, 20))
solve(Problem(small, epsilon=0.1)).certificate
first = time.perf_counter()
large = np.random.default_rng(0).random((1000, 1000))
solve(Problem(large, epsilon=0.1), tolerance=1e-6).certificate
second = time.perf_counter()
solve(Problem(large)).certificate
print(imported - begin, first - imported, second - first, time.perf_counter() - second)
"""


def cold() -> dict[str, list[float]]:
    """Seconds to import, to a first small answer, to a first large one, to a first exact one; without and with a cache."""
    import tempfile

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("compiled", "from the cache"):
            env = os.environ | {"NUMBA_CACHE_DIR": folder}
            done = subprocess.run([sys.executable, "-c", _COLD], capture_output=True, text=True, env=env, check=True)
            found[name] = [float(x) for x in done.stdout.split()]
    return found


def memory(quick: bool) -> dict[str, float]:
    """Peak growth in copies of the cost, float32 input, n = 10,000: solve and certificate."""
    n = 2000 if quick else 10_000
    code = f"""
import numpy as np
from iotsolve import Problem, solve
rng = np.random.default_rng(0)
solve(Problem(rng.random((300, 300), dtype=np.float32), epsilon=0.1)).certificate
x, y = rng.random(({n}, 2), dtype=np.float32), rng.random(({n}, 2), dtype=np.float32)
c = (x[:, :1] - y[:, 0]) ** 2
c += (x[:, 1:] - y[:, 1]) ** 2
def work():
    assert solve(Problem(c, epsilon=0.05)).certificate.holds
"""
    return {"n": n, "copies beside the cost": peak_memory(code) / (n * n * 4 / 2**20)}


def iteration() -> list[dict[str, float]]:
    """One iteration of ours, of which every entry of the kernel is read once, beside reading it and doing nothing."""
    from iotsolve.kernels import passes

    found = []
    for n in (500, 2000, 5000):
        kernel = np.random.default_rng(0).random((1, n, n), dtype=np.float32)
        v, w = np.ones((1, n)), np.ones((1, n))
        passes.product(kernel, v, w, as_given=False)
        flat = torch.from_numpy(kernel)
        ours = min(timed(lambda k=kernel, v=v, w=w: passes.product(k, v, w, as_given=False))[1] for _ in range(30))
        read = min(timed(lambda x=flat: x.sum())[1] for _ in range(30))
        two = torch.from_numpy(kernel[0]), torch.ones(n)
        gemv = min(timed(lambda k=two[0], v=two[1]: k.T @ (k @ v))[1] for _ in range(30))
        found.append({"n": n, "ours": ours, "read": read, "two products in torch": gemv})
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="small sizes only")
    options.add_argument("--only", default=",".join((*GROUPS, "growth", "cold", "memory", "iteration")))
    options.add_argument("--resume", action="store_true", help="keep the rows that an interrupted run has left")
    options.add_argument("--docs", action="store_true", help="write the page and its plots into docs")
    given = options.parse_args()
    wanted = given.only.split(",")
    warnings.filterwarnings("ignore")
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    works = [work for name, group in GROUPS.items() if name in wanted for work in group(given.quick)]
    OUT.mkdir(parents=True, exist_ok=True)
    target = OUT / "results.json"
    results: dict[str, Any] = {"about": about() | {"quick": given.quick}, "rows": []}
    if target.exists() and (kept := json.loads(target.read_text()))["about"] == results["about"]:
        results = kept  # on the same machine, with the same versions, at the same sizes
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("benchmarks", total=len(works) + 4)
        for work in works:
            if given.resume and (old := _known(results, work)):
                if len(work.args) == 2:
                    remember(old, work.args[1], _amount(work.args[0]))
                bar.advance(task)
                continue
            row = work()
            found = row.as_json() | {"memory": {e.who: getattr(e, "memory", None) for e in row.entries}}
            others = [x for x in results["rows"] if (x["group"], x["work"]) != (row.group, row.work)]
            results["rows"] = [*others, found]
            ratio = f"{row.ratio:6.2f}" if row.ratio else "      "
            console.print(
                f"{ratio}  {row.group}: {row.work}: {page.entries_line(results['rows'][-1])}", highlight=False
            )
            target.write_text(json.dumps(results, indent=1))
            bar.advance(task)
        for name, extra in (
            ("growth", lambda: growth(given.quick)),
            ("cold", cold),
            ("memory", lambda: memory(given.quick)),
            ("iteration", iteration),
        ):
            if name in wanted:
                results[name] = extra()
                console.print(name, results[name], highlight=False)
            bar.advance(task)
    target.write_text(json.dumps(results, indent=1))
    console.print(page.summary(results), highlight=False)
    console.print(f"Written: {target}")
    if given.docs:
        page.write(results, Path("docs"))
        console.print("Written: docs/performance.md")


def _known(results: dict[str, Any], work: Any) -> Row | None:
    """What an earlier run has found for a piece of work."""
    for row in results["rows"]:
        case = work.args[0]
        if getattr(case, "name", None) == row["work"] and getattr(case, "accuracy", row["accuracy"]) == row["accuracy"]:
            entries = [Entry(**x) for x in row["entries"]]
            return Row(row["group"], row["work"], row["accuracy"], entries, row["written_ms"])
    return None


def about() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    return {"python": platform.python_version(), "cpu": model, "threads": torch.get_num_threads(), "versions": versions}


if __name__ == "__main__":
    main()
