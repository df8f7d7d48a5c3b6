"""Passes over the rows of a large matrix on as many threads as torch is set to use; none of them spins.

The rows are cut by the size of the matrix alone, and what the pieces add up is added in their order, so that a result does not
depend on how many threads there were. A forked process starts without the threads of its parent and makes its own.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, pairwise

import numpy as np
import torch

__all__ = ["PIECES", "allowed", "each_piece", "pieces", "summed", "torch_on"]

_SERIAL = 2**20  # entries that one thread reads before another one could start
PIECES = 8
_kept = threading.local()


def allowed() -> int:
    """How many threads a pass may take: as many as torch is set to use, or was before it was told to keep quiet."""
    return getattr(_kept, "count", None) or torch.get_num_threads()


class torch_on:
    """``with torch_on(threads)``: torch on so many threads; passes as before."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before, self.outer = torch.get_num_threads(), getattr(_kept, "count", None)
        _kept.count = self.outer or self.before
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
        _kept.count = self.outer


def pieces(rows: int, entries: int) -> list[tuple[int, int]]:
    """Where to cut ``rows`` rows with ``entries`` entries in all: at multiples of four."""
    if entries < _SERIAL:
        return [(0, rows)] if rows else []
    number = min(PIECES, max(1, rows // 4))
    cuts = [4 * (rows * k // (4 * number)) for k in range(number)] + [rows]
    return [(first, last) for first, last in pairwise(cuts) if first < last]


def each_piece(rows: int, entries: int, work: Callable[[int, int, int], None]) -> None:
    """``work(piece, first, last)`` for every piece, at the same time as far as there are threads."""
    parts = pieces(rows, entries)
    if len(parts) == 1:
        work(0, *parts[0])
        return
    helpers = min(allowed(), len(parts)) - 1
    if helpers < 1:
        for k, (first, last) in enumerate(parts):
            work(k, first, last)
        return
    turn = count()

    def take() -> None:
        while (k := next(turn)) < len(parts):
            work(k, *parts[k])

    _keep_apart()
    waiting = [_pool().submit(take) for _ in range(helpers)]
    take()
    for other in waiting:
        if not other.cancel():  # busy with other callers' passes, it has not begun, and nothing is left for it
            other.result()


_pools: dict[int, ThreadPoolExecutor] = {}  # of this process
_helpers: list[int] = []  # its threads, as the system knows them


def _pool() -> ThreadPoolExecutor:
    pid = os.getpid()
    if pid not in _pools:
        _pools.clear()
        _helpers.clear()
        _left_alone[:] = -1, 0
        most = max(1, (os.cpu_count() or 2) - 1)
        note = lambda: _helpers.append(threading.get_native_id())  # noqa: E731
        _pools[pid] = ThreadPoolExecutor(max_workers=most, thread_name_prefix="iotsolve", initializer=note)
    return _pools[pid]


def _processor() -> Callable[[], int] | None:
    try:
        return ctypes.CDLL(None).sched_getcpu if hasattr(os, "sched_setaffinity") else None
    except (OSError, AttributeError, TypeError):  # no such C library
        return None


_here, _left_alone = _processor(), [-1, 0]  # the processor that so many helpers stay away from


def _keep_apart() -> None:
    """Have the helpers woken on other processors than the caller's, where the system lets one choose.

    A thread that has slept is often woken on the processor of whoever woke it and stays there for tens of milliseconds, in which
    the two take turns while the other processor is idle.
    """
    if _here is None or _left_alone == [cpu := _here(), len(_helpers)]:
        return
    _left_alone[:] = cpu, len(_helpers)
    with suppress(OSError):  # one is gone, or the system does not let us
        if others := os.sched_getaffinity(0) - {cpu}:
            for helper in _helpers:
                os.sched_setaffinity(helper, others)


def summed(rows: int, columns: int, entries: int, work: Callable[[np.ndarray, int, int], None]) -> np.ndarray:
    """Column sums of a pass: every piece adds into an array of its own, and these are added in order."""
    parts = pieces(rows, entries)
    totals = np.zeros((len(parts), columns))
    each_piece(rows, entries, lambda k, first, last: work(totals[k], first, last))
    return totals[0] if len(parts) == 1 else totals.sum(0)
