"""Triton kernels without a GPU: their arithmetic in the interpreter, their code by the compiler for an H100."""

import os
import re
import subprocess
import sys
from pathlib import Path

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
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 59


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


@pytest.mark.parametrize("half", [True, False], ids=["fp16", "fp32"])
@pytest.mark.parametrize("kernel", ["sums", "pull"])
def test_compiled_for_sm_90_without_spills(kernel, half, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iotsolve.kernels import streamed

    function = {"sums": streamed._sums_kernel, "pull": streamed._pull_kernel}[kernel]
    tiles = {"sums": streamed._SUMS, "pull": streamed._PULL}[kernel][half]
    constants = {"BARRED": 0, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "UPCAST": False}
    if kernel == "pull":
        constants |= {"OF_ROWS": True, "OF_COLUMNS": True, "WIDTH": tiles.width, "HALF": half}
    points = "*fp16" if half else "*fp32"
    integers = ("n", "m", "d", "k", "stride_i", "stride_j")
    signature = {
        name: "constexpr" if name in constants else "i32" if name in integers else "*fp32"
        for name in function.arg_names
    }
    signature |= {"X": points, "Y": points}
    sixteens = [k for k, name in enumerate(function.arg_names) if signature[name][0] == "*" or name == "d"]
    attrs = {(k,): [["tt.divisibility", 16]] for k in sixteens}
    source = ASTSource(function, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = made.asm["ptx"]
    assert ("wgmma" in code) == half  # full float32 products have no tensor core
    said = ptxas(code, tmp_path)
    assert re.search(r"0 bytes spill stores, 0 bytes spill loads", said), said
    assert made.metadata.shared <= 227 * 1024


def test_forced_where_it_cannot_be_is_an_error():
    from contrastive import InfoNCELoss

    with pytest.raises(ValueError, match="backend = 'triton' on cpu"):
        InfoNCELoss(0.1, backend="triton")(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"backend = 'cuda': must be one of auto, eager, triton"):
        InfoNCELoss(0.1, backend="cuda")
