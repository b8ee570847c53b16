"""Our engine as a candidate's runtime."""

import time
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.cpu.job import Speed
from benchmarks.cpu.runner import log_likelihood
from benchmarks.cpu.steps import Steps
from cast_serve.engine import Engine
from cast_serve.engine.types import SamplingParams
from cast_serve.kernels import isa

SCORED_AT_ONCE = 128
"""Tokens of a step that scores, as many as one of the engine computes."""


class EngineRunner:
    """Generates with `cast_serve.engine`, without the server around it."""

    weight_memory: int | None = None

    def __init__(self, onnx_dir: Path, threads: int, sequences: int) -> None:
        self._engine = Engine(onnx_dir, threads=threads, max_batch_size=sequences)
        self.about = f"cast_serve.engine, kernels for {isa()}, onnxruntime {onnxruntime.__version__}"

    def generate(self, prompts: list[list[int]], tokens: int) -> Speed:
        params = SamplingParams(max_tokens=tokens, temperature=0)
        self._engine.stats()
        start = time.perf_counter()
        generations = [self._engine.submit(prompt, params) for prompt in prompts]
        for generation in generations:
            next(generation)
        reading = time.perf_counter() - start
        self._engine.stats()
        for generation in generations:
            for _ in generation:
                pass
        seconds = time.perf_counter() - start
        return Speed(seconds, len(prompts) * tokens, reading, sum(self._engine.stats().batch_sizes))

    def close(self) -> None:
        self._engine.close()


def score(onnx_dir: Path, threads: int, windows: list[list[int]]) -> float:
    """Sum of the log-probabilities of each window's tokens but its first, through the graph that the engine runs."""
    steps = Steps(onnx_dir, threads, sequences=1, tokens=len(windows[0]))
    total = 0.0
    for window in windows:
        inputs, targets = np.array(window[:-1]), np.array(window[1:])
        for start in range(0, len(inputs), SCORED_AT_ONCE):
            logits = steps.run(inputs[None, start : start + SCORED_AT_ONCE], start)
            total += log_likelihood(logits, targets[start : start + SCORED_AT_ONCE])
    return total
