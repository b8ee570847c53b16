"""Perplexity on held-out text, the same number that plain transformers gives."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from conversion.atomic import write_text
from conversion.dense_model import context_length, dense_model
from conversion.errors import InputError
from conversion.packed_checkpoint import open_checkpoint
from conversion.progress import track
from conversion.text import read_documents

DEFAULT_CONTEXT = 1024


def evaluate(models: Sequence[Path], data: Path, context: int | None, tokens: int) -> dict[str, Any]:
    """Score every model directory, dense or packed, on the same windows of `data`; print and return the results.

    Args:
        models: directories of checkpoints.
        data: held-out text, see `conversion.text`.
        context: tokens per window; None takes 1024, or the shortest context of the models if that is shorter.
        tokens: most tokens of the text to score.

    Returns:
        {"models": {directory: {"perplexity", "tokens" (predicted), "context"}}, "data": path}

    Raises:
        InputError: a model is missing or damaged, its context is shorter than `context`, or the text is too short.
    """
    shortest = min((context_length(open_checkpoint(directory)), directory) for directory in models)
    if context is None:
        context = min(DEFAULT_CONTEXT, shortest[0])
    elif context > shortest[0]:
        raise InputError(f"{shortest[1]} has a context of {shortest[0]} tokens: use windows of at most that many")
    results: dict[str, Any] = {}
    table = Table("model", "perplexity", title=f"{data.name}: windows of {context} tokens")
    texts = list(read_documents([data]))
    for directory in models:
        model = dense_model(open_checkpoint(directory), torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        windows = heldout_windows(texts, tokenizer, context, tokens)
        value = perplexity(model, windows, description=directory.name)
        scored = windows.shape[0] * (windows.shape[1] - 1)
        results[str(directory)] = {"perplexity": value, "tokens": scored, "context": context}
        table.add_row(str(directory), f"{value:.2f}")
    Console().print(table)
    return {"models": results, "data": str(data)}


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write `results` as JSON, whole or not at all."""
    write_text(path, json.dumps(results, indent=2) + "\n")


def heldout_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int, tokens: int
) -> torch.Tensor:
    """Cut running text into windows to score: documents joined by a blank line, no BOS, no overlap.

    Returns:
        int64 token ids [windows, context]; as many whole windows as fit into the first `tokens` tokens.

    Raises:
        InputError: the text is shorter than one window.
    """
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    windows = min(len(ids), tokens) // context
    if windows == 0:
        raise InputError(
            f"the text has {min(len(ids), tokens)} tokens, less than one window of {context}: "
            "give more text or a smaller context"
        )
    return torch.tensor(ids[: windows * context]).view(windows, context)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, description: str = "perplexity") -> float:
    """Return exp of the mean negative log-likelihood over each window's tokens but its first.

    `windows` is int64 [windows, context]. Log-probabilities are float32, summed in float64, one window at a time.
    """
    training = model.training
    model.eval()
    total = 0.0
    for window in track(windows.unbind(), description):
        logits = model(window[None].to(model.device), use_cache=False).logits[0, :-1]
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        total -= log_probs.gather(1, window[1:, None].to(model.device)).double().sum().item()
    model.train(training)
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))
