"""Which tiles are fastest for the kernels of ``iotsolve/kernels/streamed.py`` on the GPU at hand, whose table they belong in.

``python -m tests.benchmarks.tiles --out runs/tiles``: candidates are compiled by many processes side by side, and timed one
after the other, as one launch each, beside the tiles that the table has, whose results theirs have to equal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from iotsolve.kernels import halves, streamed
from tests.benchmarks import device

PASSES = {  # pass, as the table calls it, features, terms, and of what the tile is tried: rows, columns, depth, warps, stages
    ("sums", 128, 1): ((64, 128), (64, 128), (0,), (4, 8), (2, 3)),
    ("sums", 512, 1): ((128, 256), (128, 256), (64,), (4, 8), (3, 4)),
    ("sums", 64, 3): ((64, 128), (64, 128, 256), (64,), (4, 8), (3, 4)),
    ("both", 128, 1): ((64, 128), (64, 128), (0,), (4, 8), (2, 3)),
    ("both", 512, 1): ((64, 128), (128, 256), (64,), (4, 8), (3, 4)),
    ("pull", 128, 1): ((64, 128), (32, 64, 128), (0,), (4, 8), (2, 3, 4)),
    ("pull", 256, 1): ((64, 128), (32, 64), (0,), (4, 8), (2, 3)),
    ("pull", 512, 1): ((64,), (32, 64), (0,), (4, 8), (2, 3)),
    ("pull of three", 64, 3): ((64, 128), (64, 128), (64,), (4, 8), (3, 4)),
    ("pull of three", 128, 3): ((64, 128), (32, 64), (64,), (4, 8), (3, 4)),
    ("weights", 512, 1): ((128, 256), (128, 256), (64,), (4, 8), (3, 4)),
    ("weights", 512, 3): ((128, 256), (128, 256), (64,), (4, 8), (3, 4)),
}  # fmt: skip
SIZES = (8192, 32768)


@dataclass
class Tried:
    """What a tile took."""

    which: str
    n: int
    d: int
    terms: int
    tiles: dict[str, int]
    ms: float | None = None
    ratio: float | None = None
    """Of the time to that of the table's."""
    error: float | None = None
    """Relative difference of the result from the table's."""
    note: str = ""


def candidates(which: str, d: int, terms: int) -> Iterator[streamed._Tiles]:
    """The table's first, then what fits in the registers and the memory of a multiprocessor, for all that is known before."""
    width, features = halves._padded(d, terms)
    cloud = halves.Halved(torch.empty(0, features, device=device.DEVICE), torch.empty(0), width, terms, True, True)
    own = streamed._tiles(which, cloud, 0)
    yield own
    for rows, columns, depth, warps, stages in product(*PASSES[which, d, terms]):
        read = depth or features
        stored = 2 * (stages * (columns + rows * bool(depth)) * read + rows * read * (not depth))
        kept = rows * (columns * (1 + (which == "both")) + own.width) // (32 * warps)
        if stored > streamed._ROOM or kept > 220:
            continue
        for resident in {1, max(1, min(streamed._ROOM // stored, 16 // warps))}:
            tiles = replace(own, rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, resident=resident)
            if tiles != own:
                yield tiles


def work(which: str, n: int, d: int, terms: int) -> Callable[[], Tensor]:
    """A pass as losses and solvers ask for it, by the tiles that the table has when it is called."""
    precise = terms == 3
    x, y = (z.float() for z in device.clouds(n, d, torch.float32 if precise else torch.float16))
    x = x / device.TAU
    even, up = x.new_full((n,), -math.log(n)), x.new_full((n,), 1 / n)
    one, other = halves.halved(x, precise, True, True), halves.halved(y, precise, False, True)
    rows, columns = torch.empty(2, n, device=x.device)
    streamed._sums(one, other, even, even, None, rows, columns)
    vectors, parts = (even, even, rows, columns, up, up), (True, True)
    nothing, free = torch.zeros_like(even), streamed._Barred.of(None, False)
    if which == "sums":
        return lambda: streamed.soft_minimum(
            x, y, even, nothing, nothing, nothing, None, 1.0, turned=False, precise=precise, even=True
        )
    if which == "both":
        found = torch.empty(2, n, device=x.device)

        def both() -> Tensor:
            streamed._sums(one, other, even, even, None, *found, sure=True)
            return found

        return both
    if which == "weights":
        return lambda: streamed._wide_pull(one, other, (n, n, d), vectors, parts, (True, True), free)[0]
    return lambda: streamed._half_pull(one, other, (n, n, d), vectors, parts, False, free)[0].sum(0)


def with_tiles(which: str, features: int, tiles: streamed._Tiles) -> None:
    """The table with these for so many features, and otherwise as it was."""
    table = streamed._SMALL_TABLE if streamed._is_small(torch.device(device.DEVICE)) else streamed._TABLE
    key = next(most for most in table[which] if features <= most)
    table[which] = {most: tiles if most == key else known for most, known in table[which].items()}


def tried(k: int = 0, of: int = 1, *, timed: bool = True, seconds: float = math.inf) -> Iterator[Tried]:
    """Every ``of``-th candidate from the ``k``-th on, run once, or ``timed`` beside the table's."""
    begin = time.perf_counter()
    for which, d, terms in PASSES:
        features = halves._padded(d, terms)[1]
        found = list(candidates(which, d, terms))
        own = found[0]
        for n in SIZES:
            go, first, exact = work(which, n, d, terms), None, None
            for tiles in found[k::of]:
                if time.perf_counter() - begin > seconds:
                    return
                row = Tried(which, n, d, terms, asdict(tiles))
                with_tiles(which, features, tiles)
                try:
                    result = go().double()
                    if timed:
                        exact = result if exact is None else exact
                        row.error = device.relative(result, exact)
                        row.ms, _ = device.clock(device.replayed(go))
                        first = row.ms if first is None else first
                        row.ratio = row.ms / first
                except Exception as error:
                    row.note = f"{type(error).__name__}: {str(error)[:80]}"
                yield row
            with_tiles(which, features, own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiles"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="a half for compiling, and nothing new after")
    parser.add_argument("--compile", nargs=2, type=int, metavar=("K", "OF"), help="compile a part and end")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.compile is not None:
        list(tried(*given.compile, timed=False))
        return
    begin, jobs = time.perf_counter(), os.cpu_count() or 1
    words = [sys.executable, "-m", "tests.benchmarks.tiles", "--compile"]
    limit = None if given.seconds == math.inf else given.seconds / 2

    def compiled(k: int) -> None:
        try:
            subprocess.run([*words, str(k), str(jobs)], capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"part {k} of {jobs} took too long to compile", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compiled, range(jobs)))
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in tried(seconds=given.seconds - (time.perf_counter() - begin)):
        rows.append(row)
        print(row, flush=True)
        (given.out / "tiles.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    for which, n, d, terms in dict.fromkeys((row.which, row.n, row.d, row.terms) for row in rows):
        own = [row for row in rows if (row.which, row.n, row.d, row.terms) == (which, n, d, terms) and row.ms is not None]
        best = sorted(own, key=lambda row: row.ms)[:3]
        print(f"{which}, {n:,} x {d}, {terms} term(s): " + "; ".join(f"{row.ratio:.2f} {row.tiles}" for row in best))


if __name__ == "__main__":
    main()
