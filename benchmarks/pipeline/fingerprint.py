"""Tell whether a stage would see the same command and files as last time."""

import hashlib
import json
from pathlib import Path

from benchmarks.pipeline.stages import Stage


def fingerprint(stage: Stage) -> str:
    """A digest of the stage's command and of name, size and modification time of the files it reads.

    Only the files directly in a directory count: what is made from a model, its ONNX graph, lies deeper.
    """
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns) for entry in stage.inputs for path in _files(entry)
    ]
    return hashlib.sha256(json.dumps([stage.command, files]).encode()).hexdigest()


def _files(entry: Path) -> list[Path]:
    if entry.is_dir():
        return sorted(path for path in entry.iterdir() if path.is_file())
    return [entry] if entry.exists() else []
