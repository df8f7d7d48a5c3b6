"""Transport between clouds whose rows live on many processes.

On one machine with four processes:

    torchrun --nproc-per-node 4 docs/examples/sharded.py --rows 40000 --columns 10000

On two machines, the first of which is called node0, the same command on both:

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node0:29500 docs/examples/sharded.py
"""

import argparse
import datetime
import os
import time

import torch
import torch.distributed as dist

from iotsolve import KL, Points, Problem, solve
from iotsolve.distributed import Sharded, own_plan


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--columns", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=64)
    given = parser.parse_args()
    if "RANK" in os.environ:  # a rank that does not answer within this time is an error on all
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(minutes=5))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    # every rank makes or reads its own rows; all have the same columns
    rows = given.rows // world + (rank < given.rows % world)
    x = torch.rand(rows, given.dim, generator=torch.Generator().manual_seed(rank))
    y = torch.rand(given.columns, given.dim, generator=torch.Generator().manual_seed(10**6)) ** 1.3

    started = time.perf_counter()
    problem = Problem(Sharded(Points(x, y)), epsilon=0.01 * given.dim, columns=KL(0.1 * given.dim))
    solution = solve(problem)
    value, certificate = float(solution.value), solution.certificate  # made when asked for, together: every rank asks
    mine = own_plan(solution)  # shape (rows, columns): this rank's part, if it fits
    if rank == 0:
        print(f"{given.rows} x {given.columns} on {world} ranks: {solution.status.name} in {solution.steps} steps")
        print(f"value {value:.6f}, certified: {bool(certificate.holds)}, {time.perf_counter() - started:.1f} s")
        print(f"this rank's rows carry {float(mine.sum()):.4f} of the mass")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
