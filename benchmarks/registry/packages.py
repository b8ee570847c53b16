"""A package of a registry: pinned, hashed, licence noted; and how to get files out of it."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Literal

from conversion.errors import InputError

Registry = Literal["pypi", "npm", "debian"]

# Commands that put one package file into the current directory, without installing anything or being root
_DOWNLOAD: dict[Registry, Callable[["Package"], list[str]]] = {
    "pypi": lambda p: [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{p.name}=={p.version}"],
    "npm": lambda p: ["npm", "pack", "--silent", f"{p.name}@{p.version}"],
    "debian": lambda p: ["apt-get", "download", "--quiet", f"{p.name}={p.version}"],
}

# What mends a download that failed
_MEND: dict[Registry, str] = {
    "pypi": "check pip's package index",
    "npm": "check npm's registry",
    "debian": "refresh the package lists (apt-get update), or use a release that still has it",
}


@dataclass(frozen=True)
class Package:
    """One version of a package; `sha256` is of the file that its registry serves (.whl, .tgz or .deb)."""

    registry: Registry
    name: str
    version: str
    sha256: str
    licence: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.registry})"


def fetch(package: Package, directory: Path, *patterns: str) -> Path:
    """Download `package`, check it, and extract the files whose path matches one of `patterns` below `directory`.

    Returns `directory`. `*` in a pattern also matches slashes.

    Raises:
        InputError: the registry does not serve the package, its content is not the pinned one, or nothing matches.
    """
    with tempfile.TemporaryDirectory() as downloads:
        command = _DOWNLOAD[package.registry](package)
        try:
            done = subprocess.run(command, cwd=downloads, capture_output=True, text=True)
        except FileNotFoundError:
            raise InputError(f"{package} needs the command {command[0]}, which is not installed") from None
        archives = [path for path in Path(downloads).iterdir() if path.is_file()]
        if done.returncode or len(archives) != 1:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise InputError(f"{package} could not be downloaded ({reason}): {_MEND[package.registry]}")
        with archives[0].open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != package.sha256:
                raise InputError(f"{package} is not the file this project pinned: its SHA-256 differs")
        found = False
        for name, content in _members(archives[0]):
            if any(fnmatch(name, pattern) for pattern in patterns):
                target = directory / name
                if not target.resolve().is_relative_to(directory.resolve()):
                    raise InputError(f"{package} holds a file outside its own directory: {name}")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
                found = True
    if not found:
        raise InputError(f"{package} holds no file {' or '.join(patterns)}")
    return directory


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (path without a leading ./, content) of the regular files in a .whl, .tgz or .deb."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/"):
                    with wheel.open(name) as content:
                        yield name, content
    elif archive.suffix == ".deb":
        unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with (
            subprocess.Popen(unpack, stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as tar,
        ):
            yield from _tar_members(tar)
    else:
        with tarfile.open(archive) as tar:
            yield from _tar_members(tar)


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in tar:
        content = tar.extractfile(member) if member.isfile() else None
        if content is not None:
            yield member.name.removeprefix("./"), content
