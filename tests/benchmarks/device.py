"""Time the kernels and what is built on them on a GPU, beside their peers, with errors against float64.

``python -m tests.benchmarks.device --out runs/device`` on a machine with a GPU; ``--page runs/device/results.json`` anywhere
writes the tables into ``docs/gpu.md``. Peers that are not installed are left out; one that fails says so. Everything is compiled
first, by many processes side by side: flash-sinkhorn alone tries some thirty configurations of each of its kernels.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

DEVICE = "cuda"
TAU = 0.07
SIZES = [(8192, 128), (8192, 512), (32768, 128), (32768, 512), (131072, 128), (131072, 512)]
AIMS = {  # ms on an H100, set before anything was written: sums of both sides, InfoNCE, and 5, 10, 50 iterations of Sinkhorn
    (8192, 128): (0.05, 0.21, {5: 0.66, 10: 1.1, 50: 5.0}),
    (8192, 512): (0.14, 0.58, {5: 1.9, 10: 3.3, 50: 14}),
    (32768, 128): (0.71, 3.4, {5: 9.8, 10: 17, 50: 73}),
    (32768, 512): (2.2, 9.2, {5: 30, 10: 51, 50: 223}),
    (131072, 128): (11, 55, {5: 156, 10: 267, 50: 1158}),
    (131072, 512): (34, 147, {5: 480, 10: 822, 50: 3563}),
}
HALF = torch.float16


@dataclass
class Timed:
    """What somebody needed for a piece of work."""

    group: str
    n: int
    d: int
    who: str
    ms: float | None = None
    mib: float | None = None
    error: float | None = None
    same_bits: bool | None = None
    note: str = ""


def clouds(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs on the unit sphere, alike and not equal."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    x, noise = (functional.normalize(torch.randn(n, d, generator=draw, device=DEVICE), dim=1) for _ in range(2))
    return x.to(dtype), functional.normalize(x + noise, dim=1).to(dtype)


def clock(work: Callable[[], Any], *, most: float = 0.4) -> tuple[float, float]:
    """Median milliseconds, and the peak of the device's memory above what was held, in MiB."""
    work()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() - held
    times = []
    for _ in range(max(3, min(20, int(most / once)))):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return median(times), peak / 2**20


def replayed(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one launch, which leaves out what a CPU needs to ask for it."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def exact_infonce(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE both ways of directions, and its derivatives in them, in float64, by blocks and plain torch."""
    x, y = (functional.normalize(z.double(), dim=1) for z in (x, y))
    n = len(x)
    parts = list(torch.arange(n, device=x.device).split(max(1, 2**28 // n)))
    rows, columns = x.new_empty(n), x.new_full((n,), -math.inf)
    for part in parts:
        block = x[part] @ y.mT / TAU
        rows[part] = block.logsumexp(1)
        columns = torch.logaddexp(columns, block.logsumexp(0))
    loss = (rows.mean() + columns.mean()) / 2 - (x * y).sum(1).mean() / TAU
    gx, gy = -y / n, -x / n
    for part in parts:
        block = x[part] @ y.mT / TAU
        weights = ((block - rows[part, None]).exp_() + (block - columns).exp_()) / (2 * n)
        gx[part] += weights @ y
        gy += weights.mT @ x[part]
    return loss, gx / TAU, gy / TAU


# -- who ----------------------------------------------------------------------------------------------------------------


def dense_infonce(x: Tensor, y: Tensor) -> Tensor:
    x, y = functional.normalize(x, dim=1), functional.normalize(y, dim=1)
    logits = (x @ y.mT).float() / TAU
    labels = torch.arange(len(x), device=x.device)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.mT, labels)) / 2


def memeff_infonce() -> Callable[[Tensor, Tensor], Tensor]:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=TAU, stable=False)


def keops_infonce(x: Tensor, y: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor

    x, y = functional.normalize(x, dim=1), functional.normalize(y, dim=1)
    s = (LazyTensor(x[:, None, :]) * LazyTensor(y[None, :, :])).sum(-1) / TAU
    return (s.logsumexp(1).mean() + s.logsumexp(0).mean()) / 2 - (x * y).sum(1).mean() / TAU


def our_infonce(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    from contrastive import ClipLoss

    return ClipLoss(TAU, **options)


def infonce(n: int, d: int, only: tuple[str, ...] = ("",)) -> Iterator[Timed]:
    """Forward and backward, from vectors in their precision to their derivatives, the normalisation included."""
    group = "InfoNCE both ways, with derivatives"
    who: dict[str, tuple[torch.dtype, Callable[[], Callable[[Tensor, Tensor], Tensor]]]] = {
        "iotsolve, fp16": (HALF, our_infonce),
        "iotsolve, fp32": (torch.float32, our_infonce),
        "memeff, fp16": (HALF, memeff_infonce),
        "memeff, fp32": (torch.float32, memeff_infonce),
    }
    if n <= 32768:
        who["dense torch, fp16"] = HALF, lambda: dense_infonce
        who["dense torch, fp32"] = torch.float32, lambda: dense_infonce
    yield from infonce_of({name: how for name, how in who.items() if name.startswith(only)}, n, d)
    if "KeOps".startswith(only) and n <= 8192 and d <= 128:
        yield alone("keops", group, "KeOps, fp32", n, d)


def alone(what: str, group: str, name: str, n: int, d: int) -> Timed:
    """A peer in a process of its own, which it may take down; then once more, its code compiled another way."""
    for how in (what, f"{what} by nvcc"):
        words = [sys.executable, "-m", "tests.benchmarks.device", "--alone", how, str(n), str(d)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            row = Timed(**json.loads(done.stdout.splitlines()[-1]))
            return replace(row, note=row.note or how.removeprefix(what).strip())
    last = done.stderr.strip()[-80:]
    return Timed(group, n, d, name, note=f"ended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else last)


def keops_by_nvcc() -> None:
    """KeOps' own source, compiled by a process: its call of NVRTC has ended processes under CUDA 13."""
    from keopscore.binders.nvrtc.Gpu_link_compile import Gpu_link_compile
    from keopscore.utils.gpu_utils import custom_cuda_include_fp16_path

    def generate_code(self: Any) -> None:
        self.get_code()
        self.write_code()
        arch = "-arch=sm_{}{}".format(*torch.cuda.get_device_capability(self.device_id))
        into = Path(self.low_level_code_file.decode())
        made = into.with_suffix(".made")
        words = ["nvcc", "-cubin", arch, f"-I{custom_cuda_include_fp16_path()}", "-o", str(made), self.gencode_file]
        subprocess.run(words, check=True, capture_output=True)
        code = made.read_bytes()
        into.write_bytes(len(code).to_bytes(8, "little") + code)  # as its loader reads it
        self.tagI, self.dim = self.red_formula.tagI, self.red_formula.dim

    Gpu_link_compile.generate_code = generate_code


def infonce_of(who: dict[str, tuple[torch.dtype, Callable[[], Callable]]], n: int, d: int) -> Iterator[Timed]:
    group = "InfoNCE both ways, with derivatives"
    exact = {dtype: exact_infonce(*clouds(n, d, dtype)) for dtype in {dtype for dtype, _ in who.values()}}
    for name, (dtype, make) in who.items():
        found = Timed(group, n, d, name)
        try:
            x, y = (z.requires_grad_() for z in clouds(n, d, dtype))
            loss = make()

            def work(x: Tensor = x, y: Tensor = y, loss: Callable = loss) -> tuple[Tensor, ...]:
                return torch.autograd.grad(loss(x, y), (x, y))

            first, second = work(), work()
            tangents = [_tangent(g, z) for g, z in zip(exact[dtype][1:], (x, y), strict=True)]
            found.error = max(relative(_tangent(g, z), t) for g, z, t in zip(first, (x, y), tangents, strict=True))
            found.same_bits = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            found.ms, found.mib = clock(work)
        except Exception as error:
            found.note = f"{type(error).__name__}: {str(error)[:80]}"
        yield found


def _tangent(g: Tensor, z: Tensor) -> Tensor:
    """The part of a derivative that a direction can follow."""
    g, z = g.double(), z.detach().double()
    z = z / z.norm(dim=1, keepdim=True)
    return g - (g * z).sum(1, keepdim=True) * z


def passes(n: int, d: int) -> Iterator[Timed]:
    """The kernels alone, from halved unit vectors, as losses call them, each piece of work as one launch."""
    from iotsolve.kernels import halves, streamed

    for terms in (1, 3):
        precise, name = terms == 3, "iotsolve's kernels, fp32" if terms == 3 else "iotsolve's kernels, fp16"
        x, y = (z.float() for z in clouds(n, d, torch.float32 if precise else HALF))
        x = x / TAU
        even = x.new_full((n,), -math.log(n))
        up = x.new_full((n,), 1 / n)
        halved = halves.halved(x, precise, True, True), halves.halved(y, precise, False, True)

        def sums(halved: tuple = halved, even: Tensor = even) -> tuple[Tensor, Tensor]:
            found = torch.empty(2, len(even), device=even.device)
            streamed._sums(*halved, even, even, None, *found, sure=True)
            return tuple(found)

        found = sums()
        pull = functools.partial(
            streamed.pull,
            x,
            y,
            even,
            even,
            None,
            found,
            (up, up),
            (True, True, False, False),
            precise=precise,
            even=True,
        )
        ms, mib = clock(replayed(sums))
        yield Timed("sums of rows and of columns", n, d, name, ms, mib, same_bits=_alike(sums(), sums()))
        ms, mib = clock(replayed(lambda sums=sums, pull=pull: (sums(), pull())))
        yield Timed("the same, and derivatives", n, d, name, ms, mib, same_bits=_alike(pull(), pull()))
        if precise:
            continue
        for count in (5, 10, 50):
            work = functools.partial(_sinkhorn, x, y, even, up, count)
            ms, mib = clock(replayed(work), most=0.5)
            yield Timed(f"Sinkhorn, {count} iterations, with derivatives", n, d, name, ms, mib)


def _sinkhorn(x: Tensor, y: Tensor, even: Tensor, up: Tensor, count: int) -> None:
    """As a solver asks for it, and the derivative of the rows' soft-minima."""
    from iotsolve.kernels import streamed

    nothing, how = torch.zeros_like(even), {"precise": False, "even": True}
    f = g = nothing
    for _ in range(count):
        f = streamed.soft_minimum(x, y, even, g, nothing, nothing, None, 1.0, turned=False, **how)
        g = streamed.soft_minimum(x, y, even, f, nothing, nothing, None, 1.0, turned=True, **how)
    columns = even + g
    s, _ = streamed.log_sums(x, y, None, columns, None, **how)
    streamed.pull(x, y, None, columns, None, (s, None), (up, None), (True, True, False, False), **how)


def _alike(once: tuple[Tensor | None, ...], again: tuple[Tensor | None, ...]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(once, again, strict=True))


def transport(n: int, d: int, only: tuple[str, ...] = ("",)) -> Iterator[Timed]:
    """Balanced squared Euclidean transport, its value and derivative, at as many iterations as take ours to 1e-4."""
    from iotsolve import Points, Problem, Sinkhorn, solve

    draw = torch.Generator(DEVICE).manual_seed(1)
    x, y = (torch.rand(n, d, generator=draw, device=DEVICE) * s for s in (1.0, 0.9))
    epsilon = 0.1 * d / 6
    group = "entropic transport, with the derivative"
    fine = solve(Problem(Points(x.double(), y.double()), epsilon=epsilon), Sinkhorn(tolerance=1e-9, annealing=None))
    exact = _gradient(x, y, fine.f, fine.g, epsilon)

    def ours(precise: bool = True) -> Tensor:
        z = x.clone().requires_grad_()
        problem = Problem(Points(z, y, precise=precise), epsilon=epsilon)
        return torch.autograd.grad(solve(problem, Sinkhorn(tolerance=1e-4, annealing=None), throw=precise).value, z)[0]

    steps = solve(Problem(Points(x, y), epsilon=epsilon), Sinkhorn(tolerance=1e-4, annealing=None)).steps

    def flash(**options: Any) -> Callable[[], Tensor]:
        from flash_sinkhorn import SamplesLoss

        loss = SamplesLoss(
            "sinkhorn", backend="alternating", eps=epsilon, n_iters=steps, use_epsilon_scaling=False, **options
        )

        def work() -> Tensor:
            z = x.clone().requires_grad_()
            return torch.autograd.grad(loss(z, y), z)[0]

        return work

    def dense() -> Tensor:
        cost = torch.cdist(x, y).square() / epsilon
        level = math.log(n)
        f = g = x.new_zeros(n)
        for _ in range(steps):
            f = level - torch.logsumexp(g - cost, 1)
            g = level - torch.logsumexp(f[:, None] - cost, 0)
        plan = (f[:, None] + g - cost).exp() / n**2
        return 2 * (plan.sum(1, keepdim=True) * x - plan @ y)

    who: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "iotsolve, fp32": lambda: ours,
        "iotsolve, 11 bits": lambda: functools.partial(ours, False),
        "flash-sinkhorn, tf32": lambda: flash(allow_tf32=True),
        "flash-sinkhorn, fp32": lambda: flash(allow_tf32=False),
    }
    if n <= 32768:
        who["dense torch, fp32"] = lambda: dense
    for name, make in who.items():
        if not name.startswith(only):
            continue
        found = Timed(group, n, d, name, note=f"{steps} iterations")
        try:
            work = make()
            first, second = work(), work()
            found.error, found.same_bits = relative(first, exact), torch.equal(first, second)
            found.ms, found.mib = clock(work)
        except Exception as error:
            found.note = f"{type(error).__name__}: {str(error)[:80]}"
        yield found


def _gradient(x: Tensor, y: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """Of the value in x, by float64 potentials, in blocks and plain torch."""
    x, y = x.double(), y.double()
    found = torch.empty_like(x)
    for part in torch.arange(len(x), device=x.device).split(max(1, 2**27 // len(y))):
        plan = ((f[part, None] + g - torch.cdist(x[part], y).square()) / epsilon).exp() / (len(x) * len(y))
        found[part] = 2 * (plan.sum(1, keepdim=True) * x[part] - plan @ y)
    return found


def members(n: int, d: int) -> Iterator[Timed]:
    """Losses of other kinds than the pairs' InfoNCE, from float16 embeddings, with derivatives."""
    from contrastive import DCLLoss, InfoNCELoss, NTXentLoss, SinkhornNCELoss, UnbalancedNCELoss

    for kind in (InfoNCELoss, NTXentLoss, DCLLoss, SinkhornNCELoss, UnbalancedNCELoss):
        x, y = (z.requires_grad_() for z in clouds(n, d, HALF))
        loss = kind(TAU)

        def work(x: Tensor = x, y: Tensor = y, loss: Callable = loss) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(x, y), (x, y))

        ms, mib = clock(work, most=0.3)
        bits = all(torch.equal(a, b) for a, b in zip(work(), work(), strict=True))
        yield Timed("other losses, with derivatives, fp16", n, d, f"iotsolve, {kind.__name__}", ms, mib, same_bits=bits)


def many(count: int, n: int) -> Iterator[Timed]:
    """Many small problems at once, to the default tolerance, beside as many sweeps of a batch in torch as the slowest takes."""
    from iotsolve import Problem, certify, solve

    draw = torch.Generator(DEVICE).manual_seed(0)
    cost = torch.rand(count, n, n, generator=draw, device=DEVICE)
    epsilon, group = 0.05, f"{count:,} matrices of random costs, epsilon .05"
    problem = Problem(cost, epsilon=epsilon)
    found = solve(problem)
    steps = int(found.steps.max())

    def sweeps() -> tuple[Tensor, Tensor]:
        level, scaled = math.log(n), cost / epsilon
        f = g = cost.new_zeros(count, n)
        for _ in range(steps):
            f = level - torch.logsumexp(g[:, None] - scaled, 2)
            g = level - torch.logsumexp(f[..., None] - scaled, 1)
        return f * epsilon, g * epsilon

    for name, work in (("iotsolve, fp32", lambda: solve(problem)), ("dense torch, fp32", sweeps)):
        ms, mib = clock(work, most=0.5)
        result = work()
        f, g = result if isinstance(result, tuple) else (result.f, result.g)
        error = float(np.abs(certify(problem, f, g).relative_gap).max())
        yield Timed(group, n, n, name, ms, mib, error, note=f"{int(np.median(found.steps))} sweeps, {steps} of the slowest")


def large() -> Iterator[Timed]:
    """What takes two cores minutes: 100,000 points, to the default tolerance, certified."""
    from iotsolve import FIXED, KL, Points, Problem, solve

    n, d = 100_000, 64
    draw = torch.Generator(DEVICE).manual_seed(0)
    x, y = (torch.randn(n, d, generator=draw, device=DEVICE) for _ in range(2))
    epsilon = 0.01 * float(Points(x, y).range())
    for name, side in (("balanced", FIXED), ("KL, rho ten times epsilon", KL(10 * epsilon))):
        held = []

        def work(side: Any = side, held: list = held) -> None:
            solution = solve(Problem(Points(x, y), epsilon=epsilon, rows=side, columns=side))
            held[:] = [solution]

        ms, mib = clock(work, most=0.1)
        begin = time.perf_counter()
        certificate = held[0].certificate
        holds = bool(certificate.holds)
        torch.cuda.synchronize()
        note = f"{held[0].status.name} in {held[0].steps} sweeps; certificate {time.perf_counter() - begin:.2f} s, holds: {holds}"
        gap = float(certificate.relative_gap)
        yield Timed("100,000 points in 64 dimensions", n, d, name, ms, mib, gap, note=note)


FLASH = 6  # processes that share flash-sinkhorn's configurations


def warm(seconds: float) -> None:
    """What :func:`run` would compile one after the other, by processes side by side; one that takes too long is ended."""
    sizes = [f"{n} {d}" for n, d in SIZES]
    flash = [f"flash {k} {tf32}" for tf32 in (0, 1) for k in range(FLASH)]
    tasks = [*flash, *(f"{kind} {size}" for kind in ("passes", "infonce") for size in sizes)]
    tasks += ["members", "transport", "many", "large"]

    def one(task: str) -> None:
        words = [sys.executable, "-m", "tests.benchmarks.device", "--warm", task]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
            said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            said = ["took too long"]
        print(f"compiled: {task}", *said, flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, tasks))


def warm_one(task: str) -> None:
    """The work of one process of :func:`warm`: everything once, and nothing timed."""
    global clock, replayed, exact_infonce, _gradient
    clock, replayed = (lambda work, **_: (work(), (0.0, 0.0))[1]), (lambda work: work)
    exact_infonce = lambda x, y: (x.sum(), x.double(), y.double())  # noqa: E731 - of which only the error is made
    _gradient = lambda x, *_: x.double()  # noqa: E731
    what, *sizes = task.split()
    n, d, *_ = *map(int, sizes), 0, 0
    if what == "flash":
        from flash_sinkhorn import SamplesLoss
        from triton.runtime.autotuner import Autotuner

        every = Autotuner.prune_configs
        Autotuner.prune_configs = lambda self, kwargs: (found := list(every(self, kwargs)))[n::FLASH] or found[:1]
        x, y = (torch.rand(8192, 64, device=DEVICE) for _ in range(2))
        loss = SamplesLoss("sinkhorn", backend="alternating", eps=1.0, n_iters=2, use_epsilon_scaling=False, allow_tf32=bool(d))
        torch.autograd.grad(loss(x.requires_grad_(), y), x)
        return
    work = {
        "passes": lambda: passes(n, d),
        "infonce": lambda: infonce(n, d, only=("iotsolve", "memeff")),
        "members": lambda: members(8192, 128),
        "transport": lambda: (row for size in (8192, 32768) for row in transport(size, 64, only=("iotsolve",))),
        "many": lambda: (row for size in (16, 64, 128) for row in many(1000, size)),
        "large": large,
    }
    list(work[what]())


def run(out: Path, *, seconds: float) -> dict[str, Any]:
    """Everything, the small sizes first, as far as the time goes."""
    import triton

    out.mkdir(parents=True, exist_ok=True)
    known = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    rows: list[Timed] = []
    begin = time.perf_counter()
    of_sizes = [functools.partial(kind, *size) for size in SIZES for kind in (passes, infonce)]
    of_fewer = [functools.partial(members, 8192, 128), functools.partial(transport, 8192, 64)]
    of_fewer += [functools.partial(many, 1000, n) for n in (16, 64, 128)] + [large]
    work = [*of_sizes[:4], *of_fewer, *of_sizes[4:10], functools.partial(transport, 32768, 64), *of_sizes[10:]]
    for each in work:
        if time.perf_counter() - begin > seconds:
            break
        try:
            for row in each():
                rows.append(row)
                print(row, f"{time.perf_counter() - begin:.0f} s", flush=True)
        except Exception as error:
            print(each, f"{type(error).__name__}: {str(error)[:300]}", flush=True)
        (out / "results.json").write_text(json.dumps({"about": known, "rows": [asdict(row) for row in rows]}, indent=1))
        torch.cuda.empty_cache()
    return json.loads((out / "results.json").read_text())


# -- the page -------------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    known, rows = results["about"], results["rows"]
    text = [f"{known['device']}, torch {known['torch']}, Triton {known['triton']}.", ""]
    text += ["### Kernels alone, and what was aimed at", "", *_kernels(rows)]
    for group in dict.fromkeys(row["group"] for row in rows if "kernels" not in row["who"]):
        own = [row for row in rows if row["group"] == group]
        text += ["", f"### {group[0].upper()}{group[1:]}", ""]
        text += ["| n | d | who | ms | memory, MiB | error | same bits twice | |", "|---|---|---|---|---|---|---|---|"]
        for row in own:
            ms, mib = ("" if row[key] is None else f"{row[key]:,.{places}f}" for key, places in (("ms", 2), ("mib", 0)))
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            bits = {None: "", True: "yes", False: "no"}[row["same_bits"]]
            text.append(
                f"| {row['n']:,} | {row['d']} | {row['who']} | {ms} | {mib} | {error} | {bits} | {row['note']} |"
            )
    return "\n".join(text)


def _kernels(rows: list[dict[str, Any]]) -> Iterator[str]:
    found = {(row["group"], row["n"], row["d"], row["who"]): row["ms"] for row in rows}
    yield (
        "Milliseconds, with the aim behind. float32 is two float16 numbers for each and three products for one; the aims are "
        "for one.\n"
    )
    yield "| n | d | sums, fp16 | fp32 | with derivatives, fp16 | fp32 | Sinkhorn, 5 | 10 | 50 iterations, fp16 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for n, d in dict.fromkeys((row["n"], row["d"]) for row in rows if "kernels" in row["who"]):
        one, two, many = AIMS[n, d]

        def cell(group: str, aim: float | None, who: str = "fp16", n: int = n, d: int = d) -> str:
            ms = found.get((group, n, d, f"iotsolve's kernels, {who}"))
            return "" if ms is None else f"{ms:.3g}" + (f" / {aim:g}" if aim else "")

        cells = [cell("sums of rows and of columns", one), cell("sums of rows and of columns", None, "fp32")]
        cells += [cell("the same, and derivatives", two), cell("the same, and derivatives", None, "fp32")]
        cells += [cell(f"Sinkhorn, {count} iterations, with derivatives", many[count]) for count in (5, 10, 50)]
        yield f"| {n:,} | {d} | " + " | ".join(cells) + " |"


def write_page(results: Path, page: Path) -> None:
    from tests.benchmarks.page import BEGIN, END

    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, foot = rest.partition(END)
    page.write_text(head + BEGIN + "\n\n" + tables(json.loads(results.read_text())) + "\n\n" + END + foot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/device"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing new after so long")
    parser.add_argument("--page", type=Path, help="results.json to be written into docs/gpu.md, instead of a run")
    parser.add_argument("--warm", metavar="TASK", help="compile one piece and end: what a run asks of processes of its own")
    parser.add_argument("--alone", nargs=3, metavar=("WHO", "N", "D"), help="KeOps, its row on the last line")
    given = parser.parse_args()
    if given.alone is not None:
        if given.alone[0] == "keops by nvcc":
            keops_by_nvcc()
        (row,) = infonce_of({"KeOps, fp32": (torch.float32, lambda: keops_infonce)}, *map(int, given.alone[1:]))
        print(json.dumps(asdict(row)))
        return
    if given.page is not None:
        write_page(given.page, Path("docs/gpu.md"))
        return
    warnings.simplefilter("ignore")
    if given.warm is not None:
        warm_one(given.warm)
        return
    begin = time.perf_counter()
    warm(min(60.0, given.seconds / 3))
    run(given.out, seconds=given.seconds - (time.perf_counter() - begin))


if __name__ == "__main__":
    main()
