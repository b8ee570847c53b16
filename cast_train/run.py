"""The identity of a run: what must not change between its start and its continuation."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.atomic import room_for
from conversion.errors import InputError

FREE_SETTINGS = ("save_steps", "log_steps", "fsdp", "gradient_checkpointing", "compile")
"""Settings that do not touch the result."""


@dataclass
class Run:
    """A run's directory: run.json (identity and measured facts), metrics.jsonl and the checkpoints.

    Attributes:
        directory: where they lie; holds nothing of this run before `begin`.
        identity: what must be the same after a resume.
        facts: what was measured at the start, and is not measured again; empty before `begin`.
        begun: whether `begin` was called, now or before a resume.
    """

    directory: Path
    identity: dict[str, Any]
    facts: dict[str, Any]
    begun: bool = False

    @classmethod
    def find(cls, directory: Path, identity: dict[str, Any], *, resume: bool) -> "Run":
        """Return the unfinished run in `directory`, or a new one that has not begun.

        Raises:
            InputError: a run is there already and `resume` is off, or it is another one (every difference is named).
        """
        identity = json.loads(json.dumps(identity))  # as it will be read back
        path = directory / "run.json"
        if not path.is_file():
            return cls(directory, identity, {})
        if not resume:
            raise InputError(f"{directory} holds an unfinished run: continue it with --resume, or remove it")
        saved = json.loads(path.read_text())
        differences = [
            f"{name} was {before}, is {now}"
            for name, before, now in _differences(saved["identity"], identity)
            if name.removeprefix("config.") not in FREE_SETTINGS
        ]
        if differences:
            raise InputError(
                f"cannot resume {directory}, it is another run ({'; '.join(differences)}): give the same settings, or "
                "remove it to start over"
            )
        return cls(directory, identity, saved["facts"], begun=True)

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    def begin(self, **facts: Any) -> None:
        """Write the run down, with the facts. InputError, and nothing written, if the disk is full."""
        self.facts = json.loads(json.dumps(facts))
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f"run.json.{os.getpid()}"  # every process of a distributed run writes it
        try:
            with room_for(self.directory / "run.json"):
                partial.write_text(json.dumps({"identity": self.identity, "facts": self.facts}, indent=1) + "\n")
            partial.rename(self.directory / "run.json")
        finally:
            partial.unlink(missing_ok=True)
        self.begun = True

    def remove(self) -> None:
        """Delete the directory; killed on the way, it is gone all the same by its name."""
        old = Path(tempfile.mkdtemp(prefix=f".{self.directory.name}.old.", dir=self.directory.parent))
        self.directory.rename(old / self.directory.name)
        shutil.rmtree(old)


def _differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted(before.keys() | now.keys()):
            found += _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if before == now else [(name, before, now)]


def source_hash(directory: Path) -> str:
    """Hash a model directory's weights and config."""
    digest = hashlib.sha256()
    for path in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
