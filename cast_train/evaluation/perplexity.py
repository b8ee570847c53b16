"""Perplexity on windows of text, as plain transformers gives it, and agreement with a teacher on them."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cast_train.evaluation.agreement import CHUNK_LOGITS, divergence
from cast_train.hidden_states import last_hidden_state
from conversion.progress import track


@dataclass(frozen=True)
class TextScore:
    """What a model makes of some windows of text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood over each window's tokens but its first.
        tokens: how many tokens were predicted.
        context: tokens per window.
        kl: mean KL(teacher || model) over the same positions, in nats; None without a teacher.
        top1: part of these positions in which both prefer the same token; None without a teacher.
    """

    perplexity: float
    tokens: int
    context: int
    kl: float | None = None
    top1: float | None = None


@torch.no_grad()
def score_windows(
    model: PreTrainedModel,
    windows: torch.Tensor,
    teacher: PreTrainedModel | None = None,
    description: str = "perplexity",
) -> TextScore:
    """Score int64 `windows` [windows, context], one at a time.

    Log-probabilities are float32, summed in float64. Logits are the model's own forward pass's; the teacher's are made
    in chunks, so that only one tensor [context, vocab] exists.
    """
    training = model.training
    model.eval()
    context = windows.shape[1]
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    kl, same = torch.zeros_like(total), torch.zeros_like(total)
    for window in track(windows.to(model.device).unbind(), description):
        logits = model(window[None], use_cache=False).logits[0, :-1]
        total -= _log_likelihoods(logits, window[1:]).double().sum()
        if teacher is not None:
            hidden = last_hidden_state(teacher, window[None])[0, :-1]
            window_kl, window_same = divergence(logits, hidden, teacher.get_output_embeddings().weight)
            kl += window_kl.double().sum()
            same += window_same.sum()
    model.train(training)
    tokens = windows.shape[0] * (context - 1)
    return TextScore(
        perplexity=math.exp(total.item() / tokens),
        tokens=tokens,
        context=context,
        kl=None if teacher is None else kl.item() / tokens,
        top1=None if teacher is None else same.item() / tokens,
    )


def _log_likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [tokens] of `targets` [tokens] under `logits` [tokens, vocab]."""
    rows = max(1, CHUNK_LOGITS // logits.shape[1])
    return torch.cat(
        [
            part.float().log_softmax(1).gather(1, target[:, None])[:, 0]
            for part, target in zip(logits.split(rows), targets.split(rows), strict=True)
        ]
    )
