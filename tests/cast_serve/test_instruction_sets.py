"""What must hold for CPUs other than this one: no instruction outside its own path, no undefined behaviour."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cast_serve import kernels
from cast_serve.engine import Engine
from cast_serve.engine.types import SamplingParams
from tests.cast_serve.kernel_check.build import SANITIZE, build, setup_script
from tests.cast_serve.tiny_llama import Tiny

OWN_PATH = ("avx2.cpp", "avx512.cpp", "avx512bf16.cpp", "avx512vnni.cpp", "avx512wide.cpp")
"""Files whose functions are called only after the CPU was asked; MARKED ones have such functions, marked by name."""

MARKED = ("elementwise.cpp", "paged_attention.cpp")


@pytest.mark.slow
def test_kernels_are_right_under_sanitizers(tmp_path: Path) -> None:
    result = subprocess.run([build(tmp_path, SANITIZE)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert re.search(r"^portable: \d+ results are right$", result.stdout, re.MULTILINE)
    assert f"{kernels.isa()}: " in result.stdout


ARM = "aarch64-linux-gnu-g++"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(ARM) and shutil.which("qemu-aarch64-static")), reason=f"no {ARM} or no emulator")
def test_kernels_are_right_on_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the dot product of ARMv8.2, and on a CPU that lacks it."""
    monkeypatch.setenv("CXX", f"{ARM} -static")
    program = build(tmp_path, machine="aarch64")
    for cpu, isas in (("max", {"neondot", "neon", "portable"}), ("cortex-a53", {"neon", "portable"})):
        result = subprocess.run(["qemu-aarch64-static", "-cpu", cpu, program], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert set(re.findall(r"^(\w+): \d+ results are right$", result.stdout, re.MULTILINE)) == isas


def test_the_engine_runs_on_every_instruction_set(isa: str, tiny: Tiny) -> None:
    engine = Engine(tiny.onnx)
    try:
        prompt = [5, 17, 3, 60, 8]
        events = list(engine.submit(prompt, SamplingParams(12, temperature=0, stop_token_ids=frozenset({2}))))
        assert engine.info.kernel == isa
    finally:
        engine.close()
    assert [event.token_id for event in events if event.token_id != 2] == tiny.greedy(prompt, 12)


def functions_by_file(library: Path) -> dict[str, str]:
    """Of every local function, the source file that the symbol table puts it in; of every other one, ''."""
    table = subprocess.run(["readelf", "-sW", library], capture_output=True, text=True, check=True).stdout
    files, current = {}, ""
    for line in table.partition("'.symtab'")[2].splitlines():
        parts = line.split()
        if len(parts) >= 8 and parts[3] == "FILE":
            current = parts[7]
        elif len(parts) >= 8 and parts[3] in ("FUNC", "IFUNC") and parts[6] != "UND":
            files[parts[7]] = current if parts[4] == "LOCAL" else ""
    return files


def functions_with_vectors_beyond_sse(library: Path) -> set[str]:
    """Names of the functions with an instruction of AVX, FMA or AVX-512: all of theirs begin with v, or k for masks."""
    code = subprocess.run(
        ["objdump", "-d", "-w", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    found, current = set(), ""
    for line in code.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.+)>:", line):
            current = header[1]
        elif re.match(r"\s+[0-9a-f]+:\s+(\{\w+\} )?(v[a-z]|k(mov|or|and|xor|not|shift|add|test|unpck))", line):
            found.add(current)
    return found


@pytest.mark.skipif(setup_script().MACHINE != "x86_64", reason="not x86")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_no_avx_instruction_is_outside_the_files_compiled_for_it() -> None:
    library = kernels.library_path()
    files = functions_by_file(library)
    vectors = functions_with_vectors_beyond_sse(library)
    strays = {
        name: files.get(name, "")
        for name in vectors
        if files.get(name, "") not in OWN_PATH and not re.search(r"\d+(run|norm|silu)_avx(2|512)", name)
    }
    assert not strays  # a global function here may be an inline one that the linker has merged into every path
    assert {files.get(name) for name in vectors} >= {*OWN_PATH, *MARKED}  # the search finds what there is


@pytest.mark.skipif(setup_script().MACHINE != "x86_64", reason="not x86")
@pytest.mark.parametrize("file", OWN_PATH)
def test_files_with_instructions_of_their_own_share_no_function(file: str, tmp_path: Path) -> None:
    """A weak function is one that the linker may take for every file that has it: the classic way to SIGILL."""
    setup = setup_script()
    target = tmp_path / "object.o"
    # O1: inlining would hide a shared function here, but not in another compiler's build
    command = [
        *setup.compiler(),
        *setup.FLAGS,
        "-O1",
        *setup.flags_of(Path(file), "x86_64"),
        "-c",
        setup.ROOT / setup.CSRC / file,
    ]
    subprocess.run([*command, "-o", target], check=True)
    symbols = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout
    assert not [line for line in symbols.splitlines() if re.match(r"[0-9a-f]* *[TWViu] ", line)]


def test_only_files_chosen_at_run_time_have_instruction_set_flags() -> None:
    setup = setup_script()
    assert not [flag for flag in setup.FLAGS if flag.startswith("-m")]
    assert set(setup.FILE_FLAGS["x86_64"]) == set(OWN_PATH)
    assert set(setup.FILE_FLAGS["aarch64"]) == {"neondot.cpp"}
    assert not [flag for flags in setup.COMPILERS_VECTORS.values() for flag in flags if flag.startswith("-m")]
    assert not [flag for flags in setup.FILE_FLAGS["x86_64"].values() for flag in flags if flag.startswith("-march")]
