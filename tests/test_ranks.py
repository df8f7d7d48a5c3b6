"""Many processes against one: losses, gradients and a step of SGD under torch.distributed (gloo), in float64."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import datetime, sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from contrastive import *
from iotsolve import FIXED, FREE, KL, Between, Implicit, Unroll

rank, world, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
if world > 1:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
TIGHT = dict(tolerance=1e-14, max_steps=5000)
N = 22
SIZES = {1: [22], 2: [9, 13], 4: [3, 8, 6, 5]}[world]
first = sum(SIZES[:rank])
mine = slice(first, first + SIZES[rank])
generator = torch.Generator().manual_seed(0)
images = torch.randn(2, N, 6, generator=generator)
ids = torch.randint(0, 15, (N,), generator=generator)
other_ids = torch.where(torch.rand(N, generator=generator) < 0.2, ids.roll(1), ids)

CASES = {
    "infonce": lambda **k: InfoNCELoss(0.2, **k),
    "clip": lambda **k: ClipLoss(0.2, learn_temperature=True, **k),
    "ntxent": lambda **k: NTXentLoss(0.2, learn_temperature=True, **k),
    "global": lambda **k: GlobalNCELoss(0.2, learn_temperature=True, **k),
    "sinkhorn": lambda **k: SinkhornNCELoss(0.3, learn_temperature=True, **TIGHT, **k),
    "both ways": lambda **k: IOTLoss(FIXED, KL(0.3), temperature=0.3, symmetric=True, learn_temperature=True, **TIGHT, **k),
    "unbalanced": lambda **k: UnbalancedNCELoss(0.3, rho=0.5, learn_temperature=True, **TIGHT, **k),
    "bounded": lambda **k: DoubleBoundedLoss(0.3, learn_temperature=True, **TIGHT, **k),
    "unroll": lambda **k: SinkhornNCELoss(0.3, learn_temperature=True, gradient=Unroll(4), **k),
    "implicit": lambda **k: SinkhornNCELoss(0.3, learn_temperature=True, gradient=Implicit(), **TIGHT, **k),
    "uniform sinkhorn": lambda **k: SinkhornNCELoss(0.3, learn_temperature=True, uniformity=0.3, **TIGHT, **k),
    "uniform unbalanced": lambda **k: UnbalancedNCELoss(0.3, rho=0.5, learn_temperature=True, uniformity=0.3, **TIGHT, **k),
    "outside": lambda **k: SinkhornNCELoss(0.3, learn_temperature=True, symmetric=True, **TIGHT, **k),
    "outside stacked": lambda **k: IOTLoss(FIXED, FIXED, temperature=0.3, negatives="all", **TIGHT, **k),
    "uniform": lambda **k: InfoNCELoss(0.3, learn_temperature=True, uniformity=0.3, **k),
    "uniform clip": lambda **k: ClipLoss(0.3, uniformity=0.3, **k),
    "uniform stacked": lambda **k: NTXentLoss(0.3, uniformity=0.3, **k),
    "supcon": lambda **k: SupConLoss(0.2, learn_temperature=True, **k),
    "clip ids": lambda **k: ClipLoss(0.2, learn_temperature=True, **k),
    "rince": lambda **k: RINCELoss(0.5, symmetric=True, **k),
    "dcl": lambda **k: DCLLoss(0.2, learn_temperature=True, **k),
    "gap": lambda **k: MatchingGapLoss(0.2, **TIGHT, **k),
    "sum": lambda **k: ClipLoss(0.2, reduction="sum", **k),
    "three": lambda **k: ClipLoss(0.2, **k),
}
saved = {}
for name, make in CASES.items():
    torch.manual_seed(1)
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)),
                           "loss": make(gather_distributed=True).double()})
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model
        def forward(self, x, y, **given):
            z = [self.parts["encoder"](x), self.parts["encoder"](y)]
            z = [*z, self.parts["encoder"](x + y)] if name == "three" else z
            return self.parts["loss"](*z, **given)
    whole = Whole()
    whole = DistributedDataParallel(whole) if world > 1 else whole
    given = {
        "supcon": {"labels": ids[mine]},
        "outside": {"labels": ids[mine]},
        "outside stacked": {"labels": ids[mine]},
        "clip ids": {"ids": (ids[mine], other_ids[mine])},
    }.get(name, {})
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
    value = whole(images[0, mine], images[1, mine], **given)
    value.backward()
    optimizer.step()
    saved[name] = (value.detach(), [p.detach().clone() for p in model.parameters()])

# anchors one by one are this rank's
z = [torch.randn(2, N, 5, generator=torch.Generator().manual_seed(5))[k, mine] for k in range(2)]
each = ClipLoss(0.2, reduction="none", gather_distributed=True)(*z)
saved["each"] = each
# and their gradients follow the solution: each rank's are those of the sum over all, times the ranks
live = [x.clone().requires_grad_() for x in z]
weights = torch.arange(N, dtype=torch.float64)[mine]
(SinkhornNCELoss(0.3, reduction="none", gather_distributed=True, **TIGHT)(*live) * weights).sum().backward()
saved["slopes of each"] = [x.grad / world for x in live]
# a parameter of the marginals belongs to all, as a temperature does
for how in (Implicit(), Unroll(3), None):
    rho = torch.tensor(0.4, requires_grad=True)
    options = {"gather_distributed": True} | ({} if how is None else {"gradient": how})
    options |= {} if isinstance(how, Unroll) else TIGHT
    IOTLoss(FIXED, KL(rho), temperature=0.3, symmetric=True, **options)(*z).backward()
    saved[f"rho {how}"] = rho.grad
# a solve too large for a matrix is spread over the ranks
from contrastive import family
kept, family._DENSE = family._DENSE, 0
saved["spread"] = SinkhornNCELoss(0.3, tolerance=1e-13, max_steps=5000, gather_distributed=True)(*z)
family._DENSE = kept
# queues are the same everywhere
queue = FeatureQueue(10, 5).double()
queue.update(z[1], ids=ids[mine], gather_distributed=True)
saved["queue"] = (queue.features, queue.ids, queue.fill)
saved["queued"] = InfoNCELoss(0.2, gather_distributed=True)(*z, ids=ids[mine], queue=queue)
bank = NTXentLoss(0.2, memory_bank_size=(30, 5), gather_distributed=True).double()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bank(*(x.clone().requires_grad_() for x in z))
saved["bank"] = bank(*z)
# masks and targets: of this rank's anchors against all candidates, some of which are positive to nobody and seen by few
order = torch.cat([torch.arange(v * N + sum(SIZES[:k]), v * N + sum(SIZES[: k + 1])) for k in range(world) for v in range(2)])
draw = torch.Generator().manual_seed(9)
for name, make, stacked in (
    ("sinkhorn", lambda: IOTLoss(FIXED, KL(0.3), temperature=0.3, learn_temperature=True, gather_distributed=True, **TIGHT), 0),
    ("mirrored", lambda: ClipLoss(0.3, learn_temperature=True, gather_distributed=True), 0),
    ("stacked", lambda: NTXentLoss(0.3, learn_temperature=True, gather_distributed=True), 1),
    ("decoupled", lambda: DCLLoss(0.3, learn_temperature=True, gather_distributed=True, negatives="cross"), 0),
    ("total", lambda: GlobalNCELoss(0.3, learn_temperature=True, gather_distributed=True), 0),
):
    n = 2 * N if stacked else N
    positive = torch.eye(n, dtype=torch.bool).roll(N if stacked else 0, 0) | (torch.rand(n, n, generator=draw) < 0.05)
    seen = torch.rand(n, n, generator=draw) < 0.6
    positive[:, 4] = positive[7] = seen[7] = False
    seen[:, 4] = torch.arange(n) == 0  # by one anchor of the first rank
    plan = torch.rand(n, n, generator=draw) * positive
    plan.fill_diagonal_(0.0 if stacked else 1.0)
    rows = slice(2 * mine.start, 2 * mine.stop) if stacked else mine

    def part(matrix):
        return matrix[order][:, order][rows] if stacked else matrix[rows]

    for what, given in (
        ("mask", {"positive_mask": part(positive), "negative_mask": part(seen)}),
        ("target", {"target": part(plan / plan.sum())}),
    ):
        loss, live = make().double(), [x.clone().requires_grad_() for x in z]
        value = loss(*live, **given)
        value.backward()
        slopes = [x.grad / world for x in live]
        saved[f"given {name} {what}"] = dict(value=value.detach(), slopes=slopes, t=loss.log_temperature.grad)
if world > 1:
    # errors arrive on every rank, and nobody waits
    other, few, labels = rank == 1, len(z[0]) - (rank == 1), torch.arange(len(z[0]))
    mask, apart = torch.ones(len(z[0]), N, dtype=torch.bool), FeatureQueue(10, 5).double()
    apart.update(z[1] + float(other))
    loss = InfoNCELoss(gather_distributed=True)
    BAD = {
        "error": lambda: loss(*(z if rank else [x[:, :4] for x in z])),
        "other rows": lambda: loss(z[0], z[1][:few]),
        "no rows": lambda: loss(*(x[: 0 if other else None] for x in z)),
        "short labels": lambda: loss(*z, labels=labels[:few]),
        "labels of one": lambda: loss(*z, labels=labels if other else None),
        "short mask": lambda: loss(*z, positive_mask=mask[:few]),
        "half a target": lambda: loss(*z, target=torch.full((len(z[0]), N), 0.5 / N / N)),
        "other temperature": lambda: loss(*z, logit_scale=10.0 + float(other)),
        "no temperature": lambda: loss(*z, logit_scale=0.0 if other else 10.0),
        "said twice": lambda: loss(*z, labels=labels, ids=labels if other else None),
        "one view": lambda: loss(*(z[:1] if other else z)),
        "no tensor": lambda: loss(*(x.numpy() if other else x for x in z)),
        "other queue": lambda: loss(*z, queue=apart),
        "ids": lambda: apart.update(z[0], ids=labels[:few], gather_distributed=True),
    }
    for what, make in BAD.items():
        try:
            make()
            saved[what] = "none"
        except ValueError as error:
            saved[what] = str(error)
if world == 4:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[rank % 2]
    saved["subgroup"] = SinkhornNCELoss(0.3, gather_distributed=True, process_group=group, **TIGHT)(*z)
    try:
        InfoNCELoss(gather_distributed=True, process_group=groups[1 - rank % 2])(*z)
        saved["stranger"] = "none"
    except ValueError as error:
        saved["stranger"] = str(error)
torch.save(saved, f"{out}/{world}-{rank}.pt")
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


def launch(world, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


def worlds(once, world):
    folder = once(f"losses{world}", lambda folder: launch(world, folder))
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def alone(once):
    return worlds(once, 1)[0]


@pytest.fixture(scope="module", params=[2, 4])
def many(request, once):
    return worlds(once, request.param)


def test_a_step_of_sgd_is_that_of_one_process(alone, many):
    for name in (n for n in alone if isinstance(alone[n], tuple) and n != "queue"):
        value, weights = alone[name]
        for rank in many:
            torch.testing.assert_close(rank[name][0], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
            for got, expected in zip(rank[name][1], weights, strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_every_rank_has_its_own_anchors(alone, many):
    halves = [rank["each"].chunk(2) for rank in many]
    got = torch.cat([torch.cat([half[k] for half in halves]) for k in range(2)])
    torch.testing.assert_close(got, alone["each"], rtol=1e-12, atol=1e-12)


def test_every_ranks_anchors_have_the_gradient_of_all(alone, many):
    for k, expected in enumerate(alone["slopes of each"]):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(torch.cat([rank["slopes of each"][k] for rank in many]), expected, rtol=1e-9, atol=1e-11)


def test_a_parameter_of_the_marginals_has_its_whole_derivative_on_every_rank(alone, many):
    names = [name for name in alone if name.startswith("rho ")]
    assert len(names) == 3
    for name in names:
        assert alone[name].abs() > 1e-4
        for rank in many:
            torch.testing.assert_close(rank[name], alone[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["spread", "queued", "bank"])
def test_values_are_those_of_one_process(alone, many, name):
    for rank in many:
        torch.testing.assert_close(rank[name].detach(), alone[name].detach(), rtol=1e-11, atol=1e-11)


def test_queues_are_the_same_everywhere(alone, many):
    for rank in many:
        for got, expected in zip(rank["queue"], alone["queue"], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["sinkhorn", "mirrored", "stacked", "decoupled", "total"])
def test_masks_and_targets_are_of_ones_own_anchors_against_all(alone, many, name):
    """With candidates that some rank's anchors do not see at all, and anchors without any."""
    sizes = {2: [9, 13], 4: [3, 8, 6, 5]}[len(many)]
    for what in ("mask", "target"):
        expected = alone[f"given {name} {what}"]
        assert expected["t"].abs() > 1e-4
        for k, rank in enumerate(many):
            found = rank[f"given {name} {what}"]
            mine = slice(sum(sizes[:k]), sum(sizes[: k + 1]))
            torch.testing.assert_close(found["value"], expected["value"], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found["t"], expected["t"], rtol=1e-9, atol=1e-10)
            for got, whole in zip(found["slopes"], expected["slopes"], strict=True):
                torch.testing.assert_close(got, whole[mine], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("error", "representations differ between ranks"),
        ("other rows", "row i of the one positive to row i of the other"),
        ("no rows", "there are no rows"),
        ("short labels", "labels have shape"),
        ("labels of one", "labels = 0, 1"),
        ("short mask", "must be a boolean tensor of shape"),
        ("half a target", "target has total 0.5 over the rows of all ranks"),
        ("other temperature", "temperature = 0.1, 0.0909"),
        ("no temperature", "did you pass its logarithm"),
        ("said twice", "labels and ids: each says what the positives are"),
        ("one view", "1 batch of representations"),
        ("no tensor", "representations have shapes"),
        ("other queue", "sum of its features = "),
        ("ids", "ids have shape"),
    ],
)
def test_what_one_rank_does_wrong_all_are_told(many, what, says):
    assert all(says in rank[what] for rank in many)


def test_a_subgroup_is_a_batch_of_its_own(many):
    if len(many) < 4:
        pytest.skip("two ranks have no subgroups")
    from contrastive import SinkhornNCELoss

    z = torch.randn(2, 22, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bounds = [0, 3, 11, 17, 22]
    for members in ((0, 2), (1, 3)):
        rows = torch.cat([torch.arange(bounds[r], bounds[r + 1]) for r in members])
        expected = SinkhornNCELoss(0.3, tolerance=1e-14, max_steps=5000)(z[0, rows], z[1, rows])
        for r in members:
            torch.testing.assert_close(many[r]["subgroup"], expected, rtol=1e-12, atol=1e-12)
            assert "does not contain this rank" in many[r]["stranger"]
