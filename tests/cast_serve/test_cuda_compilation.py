"""NVRTC compiles the kernels for every architecture, without a GPU; the compiler's report says what they take."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cast_serve.kernels.cuda import nvrtc
from cast_serve.kernels.cuda.plan import Types
from cast_serve.kernels.cuda.small_m import VARIANTS
from cast_serve.kernels.cuda.source import linear_kernels, source

pytest.importorskip("cuda.bindings.nvrtc", reason="needs the extra 'gpu'")

ARCHITECTURES = ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"]
# mma.sp of 8-bit floats is one instruction on the first two, elsewhere the compiler makes it of conversions to 16 bits;
# the third has wgmma.sp
FP8 = ["sm_89", "sm_120", "sm_90a"]
CASES = [("Bf16", architecture) for architecture in ARCHITECTURES]
CASES += [("E4m3", architecture) for architecture in FP8]
CASES += [
    ("S8", "sm_80"),
    ("S8", "sm_90a"),
    ("Fp16", "sm_90a"),
    ("W8", "sm_80"),
    ("W8", "sm_90a"),
    ("F8", "sm_80"),
    ("F8", "sm_90a"),
    ("W4", "sm_80"),
    ("W4", "sm_90a"),
]


@pytest.mark.parametrize(("weight", "architecture"), CASES)
def test_kernels_fit_their_registers(weight: str, architecture: str) -> None:
    types = Types(weight, "Fp16" if weight in ("Fp16", "W4", "E4m3") else "Bf16")
    hopper = architecture == "sm_90a"
    compiled = nvrtc.compile_source(source(types, hopper=hopper), architecture)
    report = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        compiled.log,
        re.DOTALL,
    )
    spills = {name: numbers[:3] for name, *numbers in report}
    linear = linear_kernels(types, hopper)
    expected = {kernel.entry.name for kernel in linear} | {"quantize_rows" if weight in ("S8", "E4m3") else "expand"}
    assert set(spills) == expected
    assert all(numbers == ["0", "0", "0"] for numbers in spills.values()), spills
    registers = {name: int(numbers[3]) for name, *numbers in report}
    assert all(registers[kernel.entry.name] * kernel.entry.threads * kernel.blocks <= 65536 for kernel in linear)
    assert "wgmma.mma_async instructions are serialized" not in compiled.log
    assert compiled.code[:4] == b"\x7fELF"


def test_ptx_for_devices_newer_than_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvrtc.target((9, 0)) == "sm_90a"
    assert nvrtc.target((8, 0)) == "sm_80"
    newest = nvrtc.target((99, 0))
    assert re.fullmatch(r"compute_\d+", newest)
    ptx = nvrtc.compile_source(source(Types("Bf16", "Bf16"), VARIANTS[:1]), newest).code
    assert b"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32" in ptx


def test_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = 'extern "C" __global__ void nothing() {}'
    code = nvrtc.cached_code(text, "sm_90")
    assert [path.read_bytes() for path in nvrtc.cache_directory().iterdir()] == [code]
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cached_code(text, "sm_90") == code
    with pytest.raises(pytest.fail.Exception):
        nvrtc.cached_code(text, "sm_80")


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc.cached_code('extern "C" __global__ void nothing() {}', "sm_90")[:4] == b"\x7fELF"


def test_errors_of_the_source_are_shown() -> None:
    with pytest.raises(RuntimeError, match='identifier "nowhere" is undefined'):
        nvrtc.compile_source('extern "C" __global__ void f() { nowhere(); }', "sm_90")


def test_triton_compiles_its_kernels_too(tmp_path: Path) -> None:
    """For fewer architectures: Triton takes a second for each."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.cast_serve.compile_triton"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    spilled = json.loads(ran.stdout)
    assert len(spilled) == 3 * 2 * 5
    assert not any(spilled[name] for name in spilled if name.endswith(", 1 rows") or "dense" in name), spilled
    assert max(spilled.values()) < 100  # a few registers of 128 rows' sums
