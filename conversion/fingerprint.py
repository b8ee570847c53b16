"""Telling whether a model directory is still the one that something was made from."""

import hashlib
from pathlib import Path

from conversion.errors import InputError

_SMALL = ("*.json", "*.jinja", "*.txt", "*.model")  # config, index, chat template, tokenizer
_LONGEST_HEADER = 100_000_000  # safetensors' own limit; a damaged length is found by whoever reads the weights


def source_fingerprint(directory: str | Path) -> str:
    """SHA-256 over a model directory's small files, and each shard's name, size, time of change and header.

    Reads no weights, so that a server can ask at every start; copying a directory changes it, which costs one export.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} holds no config.json: give the path of a model directory")
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SMALL for path in directory.glob(pattern)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))
    return digest.hexdigest()
