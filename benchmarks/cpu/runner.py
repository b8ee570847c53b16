"""What a worker needs of a runtime."""

from typing import Protocol

import numpy as np

from benchmarks.cpu.job import Speed


class Runner(Protocol):
    """A loaded model."""

    about: str
    weight_memory: int | None

    def generate(self, prompts: list[list[int]], tokens: int) -> Speed:
        """Generate `tokens` tokens for each prompt, all at once, the most likely one each time."""

    def close(self) -> None:
        """Give threads and memory back."""


def log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum of the natural log-probabilities of `targets` [T] under `logits` [T, V], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(targets)), targets]
    return float((chosen - np.log(np.exp(shifted).sum(axis=1))).sum())
