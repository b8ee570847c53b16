"""A study: one dense model, one training corpus, one way to evaluate. A cell of it is one method at one budget."""

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.variants import DENSE, Variant
from cast_train.config import Preset, TrainConfig
from cast_train.evaluation.evaluate import evaluate, versions
from cast_train.evaluation.zero_shot import Tasks
from cast_train.oneshot.directory import prune_directory
from cast_train.run import FREE_SETTINGS, source_hash
from cast_train.self_data import SELF
from cast_train.training import train
from conversion.atomic import write_text
from conversion.errors import InputError
from conversion.text import open_sources

_ONE_SHOT_SETTINGS = ("calibration_tokens", "batch_tokens", "block_length", "seed")


@dataclass(frozen=True)
class Cell:
    """One run: `tokens` is None for what is not trained."""

    variant: Variant
    tokens: int | None
    config: TrainConfig

    @property
    def label(self) -> str:
        return self.variant.name if self.tokens is None else f"{self.variant.name} at {self.tokens:,} tokens"


@dataclass(frozen=True)
class Study:
    """What all cells share.

    Attributes:
        model: the dense model's directory.
        data: training text, as for `cast train`.
        heldout: texts to score; with the first, agreement with the dense model is measured too.
        work: where runs, and records of finished cells, lie.
        context, eval_tokens: windows of held-out text, see `evaluate`.
        tasks: zero-shot tasks; None leaves them out.
        preset: settings that runs start from.
        changes: settings for all variants, and by a variant's name for that one.
        keep_models: leave the trained models in `work` (each is as large as the dense one).
    """

    model: Path
    data: tuple[str, ...]
    heldout: tuple[Path, ...]
    work: Path
    context: int | None = None
    eval_tokens: int = 50_176
    tasks: Tasks | None = None
    preset: Preset = "quick"
    changes: dict[str, Any] = field(default_factory=dict)
    own_changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    keep_models: bool = False

    def cell(self, variant: Variant, tokens: int | None = None, **more: Any) -> Cell:
        """The cell of a variant; `more` are settings that go before the study's."""
        changes = self.changes | self.own_changes.get(variant.name, {}) | more
        if not variant.trained:
            changes = {name: value for name, value in changes.items() if name in _ONE_SHOT_SETTINGS}
        return Cell(variant, tokens, variant.config(self.preset, tokens, changes))

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell that was run before with the same model, texts, tasks and settings."""
        path = self._directory(cell) / "record.json"
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and evaluate a cell, going on where an earlier call was interrupted; return its record.

        A method that fails, by a loss that is no longer finite say, gets a record that says so, and is tried again by
        the next call.
        """
        record: dict[str, Any] = {
            "variant": cell.variant.name,
            "method": cell.variant.method,
            "tokens": cell.tokens,
            "config": _settings(cell),
        }
        directory = self._directory(cell)
        directory.mkdir(parents=True, exist_ok=True)
        out = self.model if cell.variant.method == DENSE else directory / "model"
        try:
            if not out.exists():
                record["training"] = self._make(cell, out)
                write_text(directory / "training.json", json.dumps(record["training"], indent=1) + "\n")
            elif (directory / "training.json").exists():
                record["training"] = json.loads((directory / "training.json").read_text())
        except InputError as error:
            return record | {"failed": str(error)}
        start = time.monotonic()
        record["texts"] = {}
        for number, text in enumerate(self.heldout):
            found = evaluate(
                [out],
                text,
                self.context,
                self.eval_tokens,
                teacher=self.model if number == 0 and out != self.model else None,
                tasks=self.tasks if number == 0 else None,
            )
            (scores,) = found["models"].values()
            if "zero_shot" in scores:
                record["zero_shot"] = scores.pop("zero_shot")
            record["texts"][text.name] = scores
            record["device"] = found["device"]
        record |= {"evaluation_seconds": time.monotonic() - start, "versions": versions()}
        write_text(directory / "record.json", json.dumps(record, indent=1) + "\n")
        if out != self.model and not self.keep_models:
            shutil.rmtree(out)
        _free_memory()
        return record

    def _make(self, cell: Cell, out: Path) -> dict[str, Any]:
        start = time.monotonic()
        if not cell.variant.trained:
            prune_directory(self.model, self.data, out, cell.variant.method, cell.config)
            return {"seconds": time.monotonic() - start}
        # force: a budget that decay cannot cover is what a comparison at equal tokens has to show
        summary = train(
            self.model, self.data, out, cell.config, resume=True, force=True, kept_starts=self.work / "starts"
        )
        _free_memory()
        names = ("seconds", "trained_tokens", "text_tokens", "decay", "momentum", "budget", "before_cut", "after_cut")
        return {name: summary[name] for name in names if name in summary}

    def _directory(self, cell: Cell) -> Path:
        identity = {
            "model": self._model_hash,
            "data": [] if cell.variant.method == DENSE else self._data_hashes,
            "heldout": self._heldout_hashes,
            "context": self.context,
            "eval_tokens": self.eval_tokens,
            "tasks": self._tasks_identity,
            "method": cell.variant.method,
            "config": {k: v for k, v in _settings(cell).items() if k not in FREE_SETTINGS},
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        tokens = "" if cell.tokens is None else f"-{cell.tokens}"
        return self.work / f"{cell.variant.name}{tokens}-{digest}"

    @cached_property
    def _model_hash(self) -> str:
        return source_hash(self.model)

    @cached_property
    def _data_hashes(self) -> list[str]:
        sampled = [entry for entry in self.data if entry.partition(":")[0] == SELF]
        texts = [entry for entry in self.data if entry not in sampled]
        return sampled + [source.fingerprint() for entry in texts for source in open_sources(entry)]

    @cached_property
    def _heldout_hashes(self) -> list[str]:
        return [source.fingerprint() for text in self.heldout for source in open_sources(str(text))]

    @cached_property
    def _tasks_identity(self) -> Any:
        if self.tasks is None:
            return None
        files = [] if self.tasks.directory is None else sorted(self.tasks.directory.rglob("*"))
        sizes = [(path.name, path.stat().st_size) for path in files if path.is_file() and path.suffix != ".pyc"]
        return [list(self.tasks.names), self.tasks.limit, sizes]


def plan(study: Study, variants: Sequence[Variant], budgets: Sequence[int]) -> list[Cell]:
    """Cells in the order in which they are run: what needs no training, then budget by budget."""
    once = [study.cell(variant) for variant in variants if not variant.trained]
    trained = [study.cell(variant, tokens) for tokens in sorted(budgets) for variant in variants if variant.trained]
    return once + trained


def _settings(cell: Cell) -> dict[str, Any]:
    """What of a cell's config its method uses."""
    settings = cell.config.model_dump(mode="json")
    if cell.variant.trained:
        return settings
    return {name: settings[name] for name in (() if cell.variant.method == DENSE else _ONE_SHOT_SETTINGS)}


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
