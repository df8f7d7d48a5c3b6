"""How things are measured: interleaved medians, accuracy recomputed in float64, memory in processes of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tests.benchmarks.peers import Peer

_REST = 0.1  # seconds in which the threads of whoever ran before stop spinning (OpenBLAS waits a good 20 ms for more work)
PATIENCE = 3.0  # seconds a call may take before a peer is not asked for more, unless it is the best one


@dataclass
class Entry:
    """What somebody needed for a piece of work."""

    who: str
    ms: float | None = None
    cpu_ms: float | None = None
    error: float | None = None
    note: str = ""


@dataclass
class Row:
    """A piece of work: us first, then the peers."""

    group: str
    work: str
    accuracy: float
    entries: list[Entry] = field(default_factory=list)
    written_ms: float | None = None  # ours, with a dense float64 plan written out

    @property
    def ours(self) -> Entry:
        return self.entries[0]

    @property
    def best(self) -> Entry | None:
        """The fastest peer that was as accurate as asked."""
        reached = [e for e in self.entries[1:] if e.ms is not None and not e.note]
        return min(reached, key=lambda e: e.ms) if reached else None

    @property
    def ratio(self) -> float | None:
        best = self.best
        return None if best is None or self.ours.ms is None else best.ms / self.ours.ms

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "best": self.best.who if self.best else None}


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, wall and CPU milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


Slow = dict[str, tuple[float, str]]
"""By peer the work (as :func:`race` counts it) that took it too long, and the word for it."""


def race(
    row: Row,
    ours: Callable[[], Any],
    written: Callable[[Any], Any],
    peers: Sequence[Peer],
    call: Callable[[Peer, float], Any],
    error: Callable[[Any], float],
    slow: Slow,
    amount: float = 0.0,
) -> Row:
    """Fill a row: each peer's largest threshold that is accurate enough, then medians of interleaved runs.

    ``amount`` is how much work this is, among problems of its kind: who was slow is not asked about more.
    """
    row.entries.append(Entry("iotsolve"))
    works: list[Callable[[], Any]] = [ours, lambda: written(ours())]
    found = ours()
    row.ours.error = error(written(found))
    for peer in peers:
        entry = Entry(peer.name)
        row.entries.append(entry)
        threshold = _threshold(row, peer, entry, call, error, slow, amount)
        works.append(lambda p=peer, t=threshold: call(p, t) if t is not None else None)
    remember(row, slow, amount)
    best = row.best
    far = max(5 * best.ms if best else 0.0, 200.0)  # who is so far behind is not the best one, and was timed once
    entries = [row.ours, Entry("with its plan"), *row.entries[1:]]
    walls: list[list[float]] = [[] for _ in works]
    cpus: list[list[float]] = [[] for _ in works]
    for lap in range(7):
        for k, work in enumerate(works):
            known = entries[k].ms
            if (k > 1 and (known is None or known > far)) or (lap > 1 and max(walls[k]) > 1e3):
                continue
            time.sleep(_REST)
            quick = (known or 0.0) < 1e3 and (not walls[k] or min(walls[k]) < 50)
            for turn in range(4 if quick else 1):  # the first for nothing
                _, wall, cpu = timed(work)
                if turn or not quick:
                    walls[k].append(wall)
                    cpus[k].append(cpu)
    for entry, wall, cpu in zip(entries, walls, cpus, strict=True):
        if wall:
            entry.ms, entry.cpu_ms = statistics.median(wall), statistics.median(cpu)
    row.written_ms = entries[1].ms
    return row


FOR_LESS = " for less"


def remember(row: Row, slow: Slow, amount: float) -> None:
    """Who did not arrive in this row, or took too long, or ten times as long as the first peer, is not asked for more."""
    best = row.best
    for entry in row.entries[1:]:
        if entry.note.startswith(("stalls", "garbage")):
            slow.setdefault(entry.who, (amount, f"{entry.note.removesuffix(FOR_LESS)}{FOR_LESS}"))
        if entry.ms is None or entry is best or best is None or entry.ms < 200:
            continue
        if entry.ms > 1e3 * PATIENCE:
            slow.setdefault(entry.who, (amount, _not_asked(entry.ms)))
        elif entry.ms > 10 * best.ms:
            slow.setdefault(entry.who, (amount, f"not asked: {entry.ms / best.ms:.0f} times the first one's time{FOR_LESS}"))


def _threshold(
    row: Row,
    peer: Peer,
    entry: Entry,
    call: Callable[[Peer, float], Any],
    error: Callable[[Any], float],
    slow: Slow,
    amount: float,
) -> float | None:
    if not peer.installed:
        entry.note = "not installed"
        return None
    if peer.name in slow and amount > slow[peer.name][0]:
        entry.note = slow[peer.name][1]
        return None
    for share in peer.thresholds:
        threshold = share * row.accuracy
        try:
            found, wall, _ = timed(lambda t=threshold: call(peer, t))
            entry.error = error(found)
        except Exception as failure:  # a peer that fails is shown so
            entry.note = f"failed: {type(failure).__name__}"
            return None
        if entry.error <= 1.05 * row.accuracy:
            if wall < 1e3 * PATIENCE:  # what compiles has done so now
                wall = timed(lambda t=threshold: call(peer, t))[1]
            entry.ms = wall
            return threshold
        if wall > 1e3 * PATIENCE:
            slow.setdefault(peer.name, (amount, _not_asked(wall)))
            break
    garbage = not np.isfinite(entry.error) or entry.error > 0.1
    entry.note = f"{'garbage' if garbage else 'stalls'}: error {entry.error:.0e}"
    return None


def _not_asked(ms: float) -> str:
    return f"not asked: {ms / 1e3:.0f} s{FOR_LESS}"


def peak_memory(code: str, **numbers: Any) -> float:
    """By how many MiB a process grows at most while it runs the function ``work`` that the code makes."""
    program = f"""
import json, os, resource, sys
{code}
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
before = resident()
open("/proc/self/clear_refs", "w").write("5")
work()
peak = next(int(x.split()[1]) / 2**10 for x in open("/proc/self/status") if x.startswith("VmHWM"))
print(json.dumps(peak - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {k: str(v) for k, v in numbers.items()},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(json.loads(done.stdout.strip().splitlines()[-1]))
