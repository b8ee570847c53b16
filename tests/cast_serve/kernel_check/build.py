"""Compiling kernel_check.cpp with the kernel library's sources, each with the flags that setup.py gives it."""

import importlib.util
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "cast_serve" / "kernels" / "csrc"
SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")


def build(folder: Path, flags: Sequence[str] = (), machine: str | None = None) -> Path:
    """Compile into `folder`, with `flags` added to setup.py's, and return the program.

    Args:
        machine: what the compiler that CXX names compiles for, where it is not this one.
    """
    setup = setup_script()

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        own = setup.flags_of(source, machine or setup.MACHINE)
        command = [*setup.compiler(), *setup.FLAGS, *flags, *own, f"-I{CSRC}", "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return str(target)

    sources = [Path(__file__).with_name("kernel_check.cpp"), *CSRC.glob("*.cpp"), CSRC / "ort" / "paged_attention.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "kernel_check"
    subprocess.run([*setup.compiler(), *flags, *objects, "-pthread", "-o", program], check=True)
    return program


def setup_script() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("cast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
