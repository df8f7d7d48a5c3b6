"""Which room may import which, and what `import iotsolve` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Upstream first. A room imports from the lines above its own.
ORDER = (
    ("kernels", "progress", "watch"),
    ("marginals",),
    ("costs",),
    ("distributed",),
    ("support",),
    ("validation",),
    ("problem",),
    ("solver",),
    ("mixing", "plans"),
    ("sinkhorn",),
    ("accelerated",),
    ("direct",),
    ("newton", "interior", "outsides", "shortlisted"),
    ("exact",),
    ("gradient", "certificate"),
    ("solution",),
    ("solve",),
    ("divergence", "inverse"),
    ("testing",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, line in enumerate(ORDER) for room in line}
HEAVY = ("ot", "cvxpy", "lightning", "pytorch_lightning", "matplotlib", "sklearn", "hypothesis", "pandas")


def imported(source, *, for_types_too=False):
    """Names of the modules a source text imports, wherever in it, except for the eyes of a type checker alone."""
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in for_types and not for_types_too:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(room, source):
    """What a room of this name must not import and does."""
    for name in imported(source, for_types_too=True):
        if name.split(".")[0] == "contrastive":
            yield name
    for name in imported(source):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "iotsolve" or other == room:
            continue
        if room == "cli" and other not in RANK:  # the command line is a user: it imports the package as everybody does
            continue
        if RANK.get(other, len(ORDER)) >= RANK[room]:
            yield name


def rooms():
    for path in sorted((ROOT / "iotsolve").rglob("*.py")):
        room = path.relative_to(ROOT / "iotsolve").parts[0].removesuffix(".py")
        if room != "__init__":
            yield pytest.param(room, path, id=str(path.relative_to(ROOT)))


@pytest.mark.parametrize("room, path", rooms())
def test_a_room_imports_only_what_is_upstream(room, path):
    assert room in RANK, f"{room} has no place in the order: give it one in ORDER"
    assert not list(violations(room, path.read_text()))


@pytest.mark.parametrize(
    "room, source",
    [
        ("problem", "from iotsolve.solve import solve"),
        ("problem", "import iotsolve.solver"),
        ("sinkhorn", "from iotsolve.exact import Exact"),
        ("solver", "def f():\n    from iotsolve.gradient import Envelope"),
        ("marginals", "from iotsolve import KL"),
        ("marginals", "import iotsolve"),
        ("solve", "import contrastive"),
        ("solve", "if TYPE_CHECKING:\n    from contrastive.losses import IOTLoss"),
        ("inverse", "from iotsolve.testing import problems"),
    ],
)
def test_the_checker_catches_a_violation(room, source):
    assert list(violations(room, source))


@pytest.mark.parametrize(
    "room, source",
    [
        ("solve", "import torch\nfrom iotsolve.sinkhorn import Sinkhorn"),
        ("validation", "if TYPE_CHECKING:\n    from iotsolve.problem import Problem"),
        ("inverse", "from iotsolve.inverse.losses import inverse_loss"),
    ],
)
def test_the_checker_lets_the_allowed_pass(room, source):
    assert not list(violations(room, source))


def test_the_oracle_shares_no_code_with_what_it_judges():
    """It reads a problem's data and the names of its marginals, and calls nothing of them."""
    source = (ROOT / "iotsolve" / "testing" / "references.py").read_text()
    used = {name for name in imported(source) if name.startswith("iotsolve")}
    assert used <= {
        "iotsolve.problem.Problem",
        *(f"iotsolve.marginals.{x}" for x in ("KL", "L2", "TV", "Between", "ChiSquared", "Marginal")),
    }
    called = {n.func.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and hasattr(n.func, "attr")}
    ours = {
        "plan",
        "primal",
        "dual",
        "log_plan",
        "violations",
        "conjugate",
        "divergence",
        "aprox",
        "allowed",
        "response",
    }
    assert not called & ours


def test_the_package_does_not_import_its_test_kit_or_its_command_line():
    names = list(imported((ROOT / "iotsolve" / "__init__.py").read_text()))
    assert not any(name.startswith(("iotsolve.testing", "iotsolve.cli")) for name in names)


def python(*arguments):
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=True)
    return result.stdout + result.stderr


def loaded_by(statement):
    return set(python("-c", f"{statement}; import sys; print(*sorted(sys.modules))").split())


def test_import_loads_no_heavy_package():
    assert not loaded_by("import iotsolve") & set(HEAVY)


def test_the_check_of_loaded_packages_can_fail():
    assert "hypothesis" in loaded_by("import iotsolve.testing")


def seconds_to_import(package):
    """The processor's seconds, to which other load adds little, without those of torch, which everybody has paid for."""
    clock = "time.process_time()"
    return float(python("-c", f"import time, torch; begin = {clock}; import {package}; print({clock} - begin)"))


def test_import_costs_at_most_three_tenths_of_a_second_beyond_torch():
    assert any(seconds_to_import("iotsolve") <= 0.3 for _ in range(5))
