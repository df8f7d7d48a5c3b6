"""Triton kernels without a GPU: their arithmetic in the interpreter, their code by the compiler for an H100."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_the_kernels_in_the_interpreter():
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-x",
        "-p",
        "no:cacheprovider",
        str(HERE / "interpreted.py"),
    ]
    place = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=place, capture_output=True, text=True, cwd=HERE.parent, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 158


def ptxas(code, folder):
    """What NVIDIA's assembler, the newest of those that come with Triton, says of a kernel."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    tool = max(tools.glob("ptxas*"), key=lambda path: len(path.name))
    (folder / "kernel.ptx").write_text(code)
    words = [tool, "-v", "--gpu-name=sm_90a", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


CASES = [  # pass, features of all products, terms (of one, points are about as large as each other), what is barred
    *(("sums", features, 1, 0) for features in (16, 128, 256, 512)),
    *(("both", features, 1, 0) for features in (128, 256, 512)),
    *(("pull", features, 1, 0) for features in (128, 256, 512, 1024)),
    *(("pull", features, 3, 0) for features in (256, 384, 1536)),
    *(("sums", features, 3, 0) for features in (256, 384)),
    *(("both", features, 3, 0) for features in (256, 384)),
    *((kernel, 128, 1, barred) for kernel in ("sums", "both", "pull") for barred in (1, 2, 3)),
    *(("weights", *case) for case in ((512, 1, 0), (1536, 3, 0), (512, 1, 1), (512, 1, 2), (1536, 3, 3))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_for_sm_90_without_spills(case, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    made = compiled(case, 90)
    code = made.asm["ptx"]
    assert "wgmma" in code
    said = ptxas(code, tmp_path)
    assert re.search(r"0 bytes spill stores, 0 bytes spill loads", said), said
    assert made.metadata.shared <= 227 * 1024


SMALL = [
    *((kernel, features, 1, 0) for kernel in ("sums", "both", "pull", "weights") for features in (128, 512)),
    *((kernel, features, 3, 0) for kernel in ("sums", "both", "pull", "weights") for features in (96, 1536)),
    *((kernel, 256, 1, barred) for kernel in ("sums", "pull") for barred in (1, 2)),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_tiles_of_smaller_devices_fit(case, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from iotsolve.kernels import streamed

    monkeypatch.setattr(streamed, "_is_small", lambda device: True)
    assert compiled(case, 89).metadata.shared <= 99 * 1024


def compiled(case, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iotsolve.kernels import streamed, tiled

    kernel, features, terms, barred = case
    function = getattr(tiled, f"{kernel}_kernel")
    cloud = SimpleNamespace(features=features, even=terms == 1, numbers=torch.empty(0))
    tiles = streamed._tiles("pull of three" if (kernel, terms) == ("pull", 3) else kernel, cloud, barred)
    depth = tiles.depth or features
    constants = {
        "D": features,
        "DEPTH": depth,
        "EVEN": terms == 1,
        "BARRED": barred,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
    }
    if kernel == "sums":
        few = features == 128  # whose potentials are read as they are, and many
        constants |= {"DOUBTED": False, "RAW": few, "AT": few, "WHOLE": few}
    if kernel == "weights":
        constants |= {"OF_ROWS": True, "OF_COLUMNS": True, "TERMS": terms}
    if kernel == "pull":
        each = features // terms if terms == 1 or features > 256 else 64
        width = min(tiles.width, each & -each)
        constants |= {"OF_ROWS": True, "OF_COLUMNS": True, "SPREAD": False, "TERMS": terms, "WIDTH": width}
        constants["OWN"] = depth == features == width
    types = dict.fromkeys(("X", "Y", "HIGH", "LOW"), "*fp16") | dict.fromkeys(("ENDS", "DOUBT"), "*i32")
    types["B"] = ["*fp16", "*u8", "*i64", "*i64"][barred]
    types["epsilon"] = "fp32"
    integers = ("n", "m", "d", "k", "stride_i", "stride_j", "share", "high_n", "high_m", "per_row", "per_column")
    integers += ("high_half", "low_half", "top", "left", "width")
    signature = {
        name: "constexpr" if name in constants else "i32" if name in integers else types.get(name, "*fp32")
        for name in function.arg_names
    }
    even = ("d", "share", "high_n", "high_m", "per_row", "per_column", "high_half", "low_half", "top", "left", "width")
    sixteens = [k for k, name in enumerate(function.arg_names) if signature[name][0] == "*" or name in even]
    source = ASTSource(
        function, signature, constexprs=constants, attrs={(k,): [["tt.divisibility", 16]] for k in sixteens}
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=tiles.options)


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("name", ["_directions_kernel", "_turn_kernel", "_halve_kernel"])
def test_directions_compile_without_spills(name, terms, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iotsolve.kernels import halves

    function = getattr(halves, name)
    constants = {"LIVE": False, "PART": halves._WIDEST, "ROWS": halves._TURNED}
    if name == "_turn_kernel":
        constants |= {"BOTH": True, "OF_X": True}
    elif name == "_halve_kernel":
        del constants["LIVE"]
        constants |= {"D": 256 * terms, "WIDTH": 128, "TERMS": terms, "FIRST": True, "EVEN": False}
    else:
        constants |= {"D": 128 * terms, "WIDTH": 128, "TERMS": terms}
    points = "*fp16" if terms == 1 else "*fp32"
    types = {"EPSILON": "fp32", "X": points, "Y": points}
    types |= {"OUT_X": "*fp16", "OUT_Y": "*fp16"} if name == "_directions_kernel" else {"OUT_X": points, "OUT_Y": points}
    types |= {"OUT": "*fp16"} if name == "_halve_kernel" else {}
    signature = {
        each: "constexpr" if each in constants else "i32" if each.islower() else types.get(each, "*fp32")
        for each in function.arg_names
    }
    made = triton.compile(ASTSource(function, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
    assert re.search(r"0 bytes spill stores, 0 bytes spill loads", ptxas(made.asm["ptx"], tmp_path))


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((4, 4), "fp32"), ((64, 64), "fp32"), ((128, 128), "fp32"), ((4, 4), "fp64"), ((64, 64), "fp64")],
    ids=str,
)
def test_the_kernel_of_small_problems_stays_in_registers(size, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iotsolve.kernels import batched

    function, entries = batched._relax_kernel, size[0] * size[1]
    constants = {"TRANSLATES": True, "ROWS": size[0], "COLUMNS": size[1]}
    integers = ("n", "m", "stride", "most")
    signature = {
        name: "constexpr" if name in constants else "i32" if name in integers else f"*{dtype}"
        for name in function.arg_names
    }
    signature["STEPS"] = "*i32"
    warps = batched._warps(entries, 8 if dtype == "fp64" else 4)
    made = triton.compile(
        ASTSource(function, signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    said = ptxas(made.asm["ptx"], tmp_path)
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= 128, said  # a number or two beside the matrix


@pytest.mark.parametrize("window, size", [(1, 16), (15, 16), (31, 16), (15, 1)])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("name", ["_remember_kernel", "_solve_kernel", "_back_kernel", "_follow_kernel"])
def test_mixing_compiles_without_spills(name, dtype, window, size, tmp_path, monkeypatch):
    """For sizes that are multiples of 16, and for the size that is told the compiler, 1."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iotsolve.kernels import mixed

    function, width = getattr(mixed, name), triton.next_power_of_2(window + 1)
    constants = {"GROWTH": 16.0, "FALLEN": 0.81, "PATIENCE": 4, "RIDGE": 1e-10, "CHUNK": mixed._CHUNK}
    constants |= {"WINDOW": window, "WIDTH": width, "BLOCK": mixed._BLOCK} | ({"n": 1} if size == 1 else {})
    constants = {each: value for each, value in constants.items() if each in function.arg_names}
    types = {"n": "i32", "PLACE": "*i64", "SUMS": "*fp64", "GRAM": "*fp64", "NOTES": "*fp64"}
    signature = {
        each: "constexpr" if each in constants else types.get(each, f"*{dtype}") for each in function.arg_names
    }
    sixteens = [k for k, each in enumerate(function.arg_names) if signature[each] != "constexpr"]
    source = ASTSource(
        function, signature, constexprs=constants, attrs={(k,): [["tt.divisibility", 16]] for k in sixteens}
    )
    options = {"num_warps": 1 if name == "_solve_kernel" else 4 if name == "_follow_kernel" else mixed._warps(width)}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert re.search(r"0 bytes spill stores, 0 bytes spill loads", said := ptxas(made.asm["ptx"], tmp_path)), said
    assert "atom" not in made.asm["ptx"]


def test_forced_where_it_cannot_be_is_an_error():
    from contrastive import InfoNCELoss

    with pytest.raises(ValueError, match="backend = 'triton' on cpu"):
        InfoNCELoss(0.1, backend="triton")(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"backend = 'cuda': must be one of auto, eager, triton"):
        InfoNCELoss(0.1, backend="cuda")


@pytest.fixture
def fresh():
    """Nothing is remembered of earlier tries, or for later ones."""
    from iotsolve.kernels import backends

    for remembered in (backends._trusted, backends._warn_once):
        remembered.cache_clear()
    yield backends
    for remembered in (backends._trusted, backends._warn_once):
        remembered.cache_clear()


def on(device, dtype=torch.float32):
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_auto_takes_what_it_can_trust_and_warns_once(fresh, monkeypatch):
    kernels, gpu = ModuleType("kernels"), on("cuda")
    monkeypatch.setattr(fresh, "_module", lambda: kernels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fresh.chosen("auto", on("cpu"), lambda *_: True) is None
        assert fresh.chosen("auto", on("cuda", torch.float64), lambda *_: True) is None
        assert fresh.chosen("eager", gpu, lambda *_: True) is None
        assert fresh.chosen("auto", on("cuda"), lambda *_: True) is kernels
        assert fresh.chosen("triton", on("cuda"), lambda *_: False) is kernels

    def broken(*_):
        raise OSError("no driver")

    for wrong, words in ((lambda *_: False, "disagreed with torch"), (broken, "no driver")):
        with pytest.warns(RuntimeWarning, match=words):
            assert fresh.chosen("auto", gpu, wrong) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fresh.chosen("auto", gpu, wrong) is None


def test_without_triton_auto_warns_and_force_raises(fresh, monkeypatch):
    def missing():
        raise ImportError("no module named triton")

    monkeypatch.setattr(fresh, "_module", missing)
    with pytest.warns(RuntimeWarning, match="Triton cannot be imported"):
        assert fresh.chosen("auto", on("cuda"), lambda *_: True) is None
    with pytest.raises(ValueError, match="Triton cannot be imported"):
        fresh.chosen("triton", on("cuda"), lambda *_: True)
    with pytest.raises(ValueError, match="float64 asks for more"):
        fresh.chosen("triton", on("cuda", torch.float64), lambda *_: True)


def test_what_is_recorded_has_been_run_before(monkeypatch):
    """Steps of the problems that are left too, whose number of steps ends between two checks: what a first step remembers would
    be memory that a recording which fails has never written.
    """
    from iotsolve import Dense, Problem, Sinkhorn, solver

    class Place(str):
        type = "cuda"  # as the loop asks for it

    known = []

    def recorded(problem, method, _):
        known.append(set(problem.__dict__["known_logs"]))
        return lambda state: method.step(problem, state, problem.epsilon)

    monkeypatch.setattr(Dense, "device", property(lambda self: Place("cpu")))
    monkeypatch.setattr(Dense, "is_compiled", property(lambda self: False))
    monkeypatch.setattr(solver, "_recorded", recorded)
    cost = torch.rand(3, 12, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem(cost * torch.tensor([1.0, 40.0, 200.0])[:, None, None], epsilon=0.5)
    with torch.no_grad():
        for most in range(16, 34):
            solver.iterate(problem, Sinkhorn(tolerance=1e-13, max_steps=most))
    assert known and all(axes == {-1, -2} for axes in known)


def test_a_step_that_cannot_be_recorded_is_taken_as_it_is(monkeypatch):
    """It may have to wait for the device, which a recording forbids."""
    from iotsolve import Problem, Sinkhorn, solver

    problem = Problem(torch.rand(5, 6, generator=torch.Generator().manual_seed(0)), epsilon=0.5).flat()
    method = Sinkhorn(annealing=None)
    state = method.init(problem, None)

    def refused(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(solver, "Replayed", refused)
    found = solver._recorded(problem, method, state)(state)
    assert torch.equal(found.potentials.f, method.step(problem, state, problem.epsilon).potentials.f)
