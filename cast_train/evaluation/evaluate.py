"""Several models on the same text and tasks, side by side."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cast_train.dataset import check_vocabulary
from cast_train.evaluation.perplexity import score_windows
from cast_train.evaluation.windows import heldout_windows
from cast_train.evaluation.zero_shot import Tasks, zero_shot
from conversion.atomic import write_text
from conversion.dense_model import context_length, dense_model
from conversion.errors import InputError
from conversion.hub import local_model, model_name
from conversion.packed_checkpoint import open_checkpoint
from conversion.text import read_documents
from conversion.tokenizer import load_tokenizer

DEFAULT_CONTEXT = 1024
DEFAULT_TOKENS = 50_176


def evaluate(
    models: Sequence[Path],
    data: Path | None = None,
    context: int | None = None,
    tokens: int = DEFAULT_TOKENS,
    *,
    teacher: Path | None = None,
    tasks: Tasks | None = None,
) -> dict[str, Any]:
    """Score every model directory, dense or packed, in float32, on the accelerator if there is one.

    Args:
        models: directories of checkpoints, or hub ids.
        data: held-out text, see `conversion.text`; every model gets the same windows of it.
        context: tokens per window; None takes 1024, or the shortest context of the models if that is shorter.
        tokens: most tokens of the text to score.
        teacher: the dense model to compare each model's distributions with on these windows.
        tasks: zero-shot tasks to run.

    Returns:
        {"models": {directory: {"perplexity", "tokens" (predicted), "context", "kl", "top1", "zero_shot"}}, "data",
        "teacher", "tasks", "device", "versions"}; what was not asked for is left out.

    Raises:
        InputError: a model is missing or damaged, its context is shorter than `context`, the text is too short, the
            teacher has other tokens, or see `zero_shot`.
    """
    if data is None and tasks is None:
        raise InputError("nothing to evaluate: give held-out text (--data), zero-shot tasks (--tasks), or both")
    if teacher is not None and data is None:
        raise InputError("agreement with a teacher is measured on text: give --data")
    texts = None if data is None else read_documents([data])
    if texts is not None:
        texts, again = tee(texts)  # what one model's tokens need is read, and kept for the next
        next(again, None)  # no such text: said before models are loaded
        context = window_length([*models, *([] if teacher is None else [teacher])], context)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    teacher_model = None if teacher is None else _load(teacher, device)
    results: dict[str, Any] = {}
    for directory in models:
        model, tokenizer = _load(directory, device)
        result: dict[str, Any] = {}
        if texts is not None and context is not None:
            texts, again = tee(texts)
            windows = heldout_windows(again, tokenizer, context, tokens)
            check_vocabulary(int(windows.max()), model.config.vocab_size, directory)
            if teacher_model is not None:
                texts, again = tee(texts)
                others = heldout_windows(again, teacher_model[1], context, tokens)
                if model.config.vocab_size != teacher_model[0].config.vocab_size or not torch.equal(windows, others):
                    raise InputError(f"{teacher} has other tokens than {directory}: give the dense model it came from")
            score = score_windows(model, windows, teacher_model and teacher_model[0], model_name(directory))
            result |= {name: value for name, value in asdict(score).items() if value is not None}
        if tasks is not None:
            result["zero_shot"] = zero_shot(model, tokenizer, tasks)
        results[str(directory)] = result
    asked: dict[str, Any] = {"data": data, "teacher": teacher}
    found = {"models": results} | {name: str(path) for name, path in asked.items() if path is not None}
    if tasks is not None:
        found["tasks"] = {
            "directory": None if tasks.directory is None else str(tasks.directory),
            "limit": tasks.limit,
            "few_shot": 0,
        }
    return found | {"device": _device_name(device), "versions": versions()}


def print_results(results: dict[str, Any]) -> None:
    """Print what `evaluate` returned: a table of the text, a row for each model; one of tasks, a column for each."""
    scores: dict[str, dict[str, Any]] = results["models"]
    first = next(iter(scores.values()))
    if "perplexity" in first:
        title = f"{results['data']}: {first['tokens']:,} tokens in windows of {first['context']}"
        table = Table("model", "perplexity", title=title)
        for heading in ("KL to teacher", "same first choice") if "kl" in first else ():
            table.add_column(heading)
        for directory, score in scores.items():
            agreement = [f"{score['kl']:.4f}", f"{score['top1']:.2%}"] if "kl" in score else []
            table.add_row(directory, f"{score['perplexity']:.2f}", *agreement)
        Console().print(table)
    if "zero_shot" in first:
        table = Table("task", "items", *map(model_name, scores), title="zero-shot accuracy")
        for task, found in first["zero_shot"]["tasks"].items():
            accuracies = (score["zero_shot"]["tasks"][task]["acc"] for score in scores.values())
            table.add_row(task, str(found["items"]), *(f"{accuracy:.2%}" for accuracy in accuracies))
        table.add_row("mean", "", *(f"{score['zero_shot']['mean']:.2%}" for score in scores.values()))
        Console().print(table)


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write `results` as JSON, whole or not at all."""
    write_text(path, json.dumps(results, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of everything that the numbers may depend on."""
    found = {}
    for name in ("cast-serve", "torch", "transformers", "tokenizers", "lm-eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _load(directory: Path, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    directory = local_model(directory)
    model: Any = dense_model(open_checkpoint(directory), torch.float32)
    return model.to(device), load_tokenizer(directory)


def window_length(models: Sequence[Path], context: int | None) -> int:
    """Tokens per window: `context`, or 1024, or the shortest context of the models; InputError if that is exceeded."""
    shortest = min((context_length(open_checkpoint(local_model(model))), model) for model in models)
    if context is None:
        return min(DEFAULT_CONTEXT, shortest[0])
    if context > shortest[0]:
        raise InputError(f"{shortest[1]} has a context of {shortest[0]} tokens: use windows of at most that many")
    return context


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
