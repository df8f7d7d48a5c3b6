"""Contrastive losses, forward and backward, beside lightly, open_clip, pytorch-metric-learning and plain torch.

python -m tests.benchmarks.contrastive [--n 4096] [--d 128]
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from tests.benchmarks.measure import Entry, Row, peak_memory, timed

_SETTING = """
import warnings
warnings.simplefilter("ignore")
import torch
from torch.nn.functional import cross_entropy, normalize
torch.manual_seed(0)
n, d = {n}, {d}
base = torch.randn(n, d)
z0, z1 = ((base + torch.randn(n, d)).to({dtype}).requires_grad_() for _ in range(2))
labels = torch.arange(n)
def both(loss):
    return torch.autograd.grad(loss, (z0, z1))
"""
_PLAIN_CLIP = """
def work():
    scores = normalize(z0, dim=1) @ normalize(z1, dim=1).T / 0.1
    return both((cross_entropy(scores, labels) + cross_entropy(scores.T, labels)) / 2)
"""
_PLAIN_NTXENT = """
def work():
    z = torch.cat([normalize(z0, dim=1), normalize(z1, dim=1)])
    scores = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    return both(cross_entropy(scores, torch.cat([labels + n, labels])))
"""
_PLAIN_INFONCE = """
def work():
    return both(cross_entropy(normalize(z0, dim=1) @ normalize(z1, dim=1).T / 0.1, labels))
"""
_SWEEPS = """
def swept(scores, sweeps):
    kernel, v = scores.exp(), torch.ones(n, dtype=scores.dtype)
    for _ in range(sweeps):
        u = n / (kernel @ v)
        v = n / (kernel.T @ u)
    return u, v, u @ (kernel @ v) / n**2
"""
_PLAIN_UNROLLED = f"""{_SWEEPS}
def work():
    scores = normalize(z0, dim=1) @ normalize(z1, dim=1).T / 0.1
    u, v, mass = swept(scores, 10)
    return both(mass - (scores.diagonal() + u.log() + v.log()).mean())
"""


def _plain_balanced(temperature: float) -> str:
    """At convergence the derivative is that of a cross-entropy with a constant bias of the columns."""
    return f"""{_SWEEPS}
def work():
    scores = normalize(z0, dim=1) @ normalize(z1, dim=1).T / {temperature}
    with torch.no_grad():
        bias = swept(scores, 300)[1].log()
    return both(cross_entropy(scores + bias, labels))
"""


def _ours(loss: str) -> str:
    return f"from contrastive import *\nfrom iotsolve import Unroll\nloss = {loss}\ndef work():\n    return both(loss(z0, z1))\n"


_LIGHTLY = """
from tests.comparisons import module
loss = module("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=0.5)
def work():
    return both(loss(z0, z1))
"""
_OPEN_CLIP = """
from tests.comparisons import module
loss = module("open_clip.loss").ClipLoss()
def work():
    return both(loss(normalize(z0, dim=1), normalize(z1, dim=1), torch.tensor(10.0)))
"""
_METRIC = """
from pytorch_metric_learning.losses import NTXentLoss
loss = NTXentLoss(temperature=0.5)
def work():
    return both(loss(torch.cat([z0, z1]), labels.repeat(2)))
"""

# what is worked out, in float64 by whom, and who takes part: name, package, code
WORKS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "NT-Xent",
        _PLAIN_NTXENT,
        (
            ("iotsolve", "contrastive", _ours("NTXentLoss(0.5)")),
            ("lightly", "lightly", _LIGHTLY),
            ("pytorch-metric-learning", "pytorch_metric_learning", _METRIC),
            ("torch cross_entropy", "torch", _PLAIN_NTXENT),
        ),
    ),
    (
        "CLIP",
        _PLAIN_CLIP,
        (
            ("iotsolve", "contrastive", _ours("ClipLoss(0.1)")),
            ("open_clip", "open_clip", _OPEN_CLIP),
            ("torch cross_entropy", "torch", _PLAIN_CLIP),
        ),
    ),
    (
        "InfoNCE",
        _PLAIN_INFONCE,
        (
            ("iotsolve", "contrastive", _ours("InfoNCELoss(0.1)")),
            ("torch cross_entropy", "torch", _PLAIN_INFONCE),
        ),
    ),
    (
        "U(a, b), beside our InfoNCE",
        _plain_balanced(0.1),
        (
            ("iotsolve", "contrastive", _ours("SinkhornNCELoss(0.1)")),
            ("InfoNCE", "contrastive", _ours("InfoNCELoss(0.1)")),
        ),
    ),
    (
        "U(a, b) at temperature .05, beside our InfoNCE",
        _plain_balanced(0.05),
        (
            ("iotsolve", "contrastive", _ours("SinkhornNCELoss(0.05)")),
            ("InfoNCE", "contrastive", _ours("InfoNCELoss(0.05)")),
        ),
    ),
    (
        "U(a, b) of ten unrolled sweeps, beside our InfoNCE",
        _PLAIN_UNROLLED,
        (
            ("iotsolve", "contrastive", _ours("SinkhornNCELoss(0.1, gradient=Unroll(10))")),
            ("torch autograd", "torch", _PLAIN_UNROLLED),
            ("InfoNCE", "contrastive", _ours("InfoNCELoss(0.1)")),
        ),
    ),
)


def rows(n: int, d: int, *, laps: int = 7) -> Iterator[Row]:
    """Milliseconds, medians of interleaved runs; the gradient's error against float64; the growth of a process of its own."""
    for what, exact, takers in WORKS:
        row = Row("losses, forward and backward", f"{what}, N = {n}, D = {d}", 1e-4)
        setting = _SETTING.format(n=n, d=d, dtype="torch.float32")
        reference = _run(_SETTING.format(n=n, d=d, dtype="torch.float64") + exact)[0]
        works = []
        for who, package, code in takers:
            entry = Entry(who)
            row.entries.append(entry)
            if importlib.util.find_spec(package) is None:
                entry.note = "not installed"
                works.append(None)
                continue
            made: dict[str, Any] = {}
            exec(setting + code, made)
            try:
                found, wall, _ = timed(made["work"])
            except RuntimeError as failure:  # of memory
                asked = re.search(r"allocate (\d+) bytes", str(failure))
                entry.note = f"fails: asks for {int(asked[1]) / 2**30:.0f} GiB" if asked else "fails"
                works.append(None)
                continue
            works.append(made["work"])
            if who != "InfoNCE":  # another loss, there for its time
                entry.error = float((found[0].double() - reference).norm() / reference.norm())
            entry.note = "" if wall < 60e3 else "not timed: a minute"
            entry.memory = peak_memory(setting + code)  # type: ignore[attr-defined]
        walls: list[list[float]] = [[] for _ in works]
        for _ in range(laps):
            for k, work in enumerate(works):
                if work is not None and not row.entries[k].note and not (walls[k] and walls[k][-1] > 8e3):
                    walls[k].append(timed(work)[1])
        for entry, wall in zip(row.entries, walls, strict=True):
            entry.ms = statistics.median(wall) if wall else None
        yield row


def _run(code: str) -> Any:
    made: dict[str, Any] = {}
    exec(code, made)
    return made["work"]()


def table(found: list[Row], d: int) -> str:
    """What was found, as the guide shows it."""
    lines = [
        f"{platform()}; torch {torch.__version__}, {torch.get_num_threads()} threads, float32, D = {d}. Milliseconds are medians "
        "of interleaved runs, memory is the growth of a process that does nothing else, the error is the gradient's against "
        "float64.",
        "",
        "| loss | | ms | MiB | error | time / ours | memory / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        for entry in row.entries:
            memory = getattr(entry, "memory", None)
            ratios = ("", "")
            if entry is not row.ours and entry.ms is not None:
                ratios = f"{entry.ms / row.ours.ms:.2g}", f"{memory / row.ours.memory:.2g}"  # type: ignore[attr-defined]
            ms = entry.note or f"{entry.ms:.0f}"
            error = "" if entry.error is None else f"{entry.error:.0e}"
            shown = row.work.rsplit(", D", 1)[0] if entry is row.ours else ""
            held = "" if memory is None else f"{memory:.0f}"
            lines.append(f"| {shown} | {entry.who} | {ms} | {held} | {error} | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines)


def platform() -> str:
    """The processor, as the machine calls it."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return names[0] if names else "a processor without a name"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/contrastive.md")
    given = parser.parse_args()
    made = table(list(track(rows(given.n, given.d), total=len(WORKS), description="losses")), given.d)
    print(made)
    if given.docs:
        page = Path(__file__).parents[2] / "docs" / "contrastive.md"
        text = page.read_text()
        before, after = text.split(_BEGIN)[0], text.split(_END)[1]
        page.write_text(f"{before}{_BEGIN}\n\n{made}\n\n{_END}{after}")


_BEGIN, _END = "<!-- losses: begin -->", "<!-- losses: end -->"


if __name__ == "__main__":
    main()
