"""Builds the native parts: libcast24.so always, the torch extension where torch is installed.

Everything else about the package is in pyproject.toml. Objects are kept in build/cast24, so that a rebuild
compiles only what changed.
"""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("cast_serve/kernels/csrc")
OBJECTS = Path("build/cast24")

# No -march: the library must run on any CPU, so only the files that are chosen at run time get their instruction set.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
# GCC's generic schedule costs 2 % at small batches, on Zen 4 too; its AVX-512 header warns about itself.
AVX512_TUNING = ["-mtune=skylake-avx512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# Written in the compiler's vectors, which have no fused multiply-add of their own.
COMPILERS_VECTORS = {"elementwise.cpp": ["-ffp-contract=fast"], "paged_attention.cpp": ["-ffp-contract=fast"]}
FILE_FLAGS = {
    "x86_64": {
        "avx2.cpp": ["-mavx2", "-mfma"],
        "avx512.cpp": [*AVX512, *AVX512_TUNING],
        "avx512bf16.cpp": [*AVX512, "-mavx512vbmi", "-mavx512bf16", *AVX512_TUNING],
        "avx512wide.cpp": [*AVX512, *AVX512_TUNING],
        "avx512vnni.cpp": [*AVX512, "-mavx512vnni", "-mavx512vbmi", *AVX512_TUNING],
    },
    "aarch64": {"neondot.cpp": ["-march=armv8.2-a+dotprod"]},
}
MACHINE = os.uname().machine


def flags_of(source: Path, machine: str) -> list[str]:
    """Flags that a source has for itself on a machine (`uname -m`)."""
    return COMPILERS_VECTORS.get(source.name, []) + FILE_FLAGS.get(machine, {}).get(source.name, [])


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"error: no C++ compiler ('{command[0]}'): install one (Debian, Ubuntu: apt install g++) or set CXX"
        )
    return command


def compile_sources(sources: list[Path], flags: list[str]) -> list[str]:
    """Compile each source that is newer than its object, or whose flags or any header changed."""
    newest_header = max(header.stat().st_mtime for header in [*CSRC.rglob("*.h"), Path(__file__)])

    def compile_one(source: Path) -> str:
        target = OBJECTS / source.relative_to(CSRC).with_suffix(".o")
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            target.parent.mkdir(parents=True, exist_ok=True)
            own = flags_of(source, MACHINE)
            subprocess.run([*compiler(), *FLAGS, *flags, *own, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


class BuildNative(build_ext):
    """Links plain shared libraries: neither of them is a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        os.chdir(ROOT)
        flags, link = [], ["-ldl"]
        if ext.name.endswith("_torch"):
            from torch.utils.cpp_extension import include_paths, library_paths

            # 2.10: the oldest stable ABI with parallel_for.
            flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-isystem{path}" for path in include_paths())]
            kernels = Path(self.get_ext_fullpath("cast_serve.kernels.libcast24")).parent
            link += [f"-L{path}" for path in [*library_paths(), kernels]]
            link += ["-ltorch_cpu", "-lc10", "-l:libcast24.so", "-Wl,-rpath,$ORIGIN"]
        objects = compile_sources([Path(source) for source in ext.sources], flags)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*compiler(), "-shared", "-o", str(output), *objects, *link, "-Wl,--no-undefined"], check=True)


def sources(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in (CSRC / folder).glob("*.cpp"))


if __name__ == "__main__":
    os.chdir(ROOT)
    extensions = [Extension("cast_serve.kernels.libcast24", sources("", "ort"))]
    if find_spec("torch"):
        extensions.append(Extension("cast_serve.kernels._torch", sources("torch")))

    setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative})
