"""Run records for the scaling law, from evaluations of finished runs or written by hand."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cast_train.scaling_law import RunRecord
from conversion.errors import InputError
from conversion.hub import local_model
from conversion.shards import Shards


@dataclass
class RunRecords:
    """What files of records hold.

    Attributes:
        runs: of sparse models.
        dense: held-out loss of the dense model of each size (parameters), where one was given.
    """

    runs: list[RunRecord] = field(default_factory=list)
    dense: dict[float, float] = field(default_factory=dict)


class _Record(BaseModel):
    """One entry of a file of plain records; without tokens it is a dense model to be matched."""

    model_config = ConfigDict(extra="ignore")

    name: str
    parameters: float = Field(gt=0)
    tokens: float | None = Field(None, gt=0)
    perplexity: float = Field(gt=1)


def read_records(paths: Sequence[Path], method: str = "cast") -> RunRecords:
    """Read records from JSON files of either kind.

    The output of `cast eval --json`: its models that `cast train` made by `method` are runs, the models these were made
    from are dense, others are left out. Or a list of {"name", "parameters", "tokens", "perplexity"}, where a dense
    model has no tokens.

    Raises:
        InputError: a file is neither, evaluations are of different text or context, or a model is gone.
    """
    found = RunRecords()
    texts: dict[tuple[Any, ...], Path] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"{path} is no JSON file: give outputs of `cast eval --json`") from None
        try:
            if isinstance(content, list):
                _add_plain(found, [_Record.model_validate(entry) for entry in content])
            else:
                for text in _add_evaluated(found, content["models"], method):
                    texts.setdefault((content["data"], *text), path)
        except (ValidationError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{path} holds no perplexities of models: give outputs of `cast eval --json`, or a list of records "
                "with name, parameters, tokens and perplexity"
            ) from None
    if len(texts) > 1:
        (first, one), (second, other) = list(texts.items())[:2]
        raise InputError(
            f"losses on different text cannot be fitted together: {one} has {first}, {other} has {second} (data, "
            "context, tokens); evaluate all models alike"
        )
    if not found.runs:
        raise InputError(f"no run of method {method} is in these files: evaluate models that `cast train` made")
    return found


def _add_plain(found: RunRecords, records: list[_Record]) -> None:
    for record in records:
        loss = math.log(record.perplexity)
        if record.tokens is None:
            found.dense[record.parameters] = loss
        else:
            run = RunRecord(name=record.name, parameters=record.parameters, tokens=record.tokens, loss=loss)
            found.runs.append(run)


def _add_evaluated(found: RunRecords, models: dict[str, dict[str, Any]], method: str) -> set[tuple[int, int]]:
    """Add what one evaluation holds; return (context, tokens) of its models."""
    sources = set()
    for name, result in models.items():
        training = Path(name) / "training.json"
        if not training.is_file():
            continue
        summary = json.loads(training.read_text(encoding="utf-8"))
        if summary.get("method", "cast") == method:
            loss = math.log(result["perplexity"])
            run = RunRecord(name=name, parameters=_parameters(name), tokens=summary["trained_tokens"], loss=loss)
            found.runs.append(run)
            sources.add(Path(summary["source"]).resolve())
    for name, result in models.items():
        if Path(name).resolve() in sources:
            found.dense[_parameters(name)] = math.log(result["perplexity"])
    return {(result["context"], result["tokens"]) for result in models.values()}


def _parameters(directory: str) -> float:
    """Numbers in a model's weight files, which hold tied weights once."""
    return float(sum(math.prod(info.shape) for info in Shards(local_model(directory)).infos.values()))
