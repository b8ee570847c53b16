"""Our engine as a candidate's runtime."""

import time
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.cpu.job import Speed
from benchmarks.cpu.runner import log_likelihood
from cast_serve.engine import Engine
from cast_serve.engine.kv_cache import BLOCK_TOKENS, CacheMemory, blocks_for
from cast_serve.engine.manifest import read_manifest
from cast_serve.engine.onnx_model import load_session
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
    manifest = read_manifest(onnx_dir)
    session = load_session(onnx_dir, threads)
    blocks = blocks_for(len(windows[0]))
    memory = CacheMemory(manifest.num_layers, blocks, manifest.kv_num_heads, manifest.head_dim)
    assert memory.arrays[0].shape[1] == BLOCK_TOKENS
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    names = [f"{which}_cache.{layer}" for layer in range(manifest.num_layers) for which in ("key", "value")]
    caches = {name: value(array) for name, array in zip(names, memory.arrays, strict=True)}
    table = np.arange(blocks, dtype=np.int32)[None]
    total = 0.0
    for window in windows:
        inputs, targets = np.array(window[:-1]), np.array(window[1:])
        for start in range(0, len(inputs), SCORED_AT_ONCE):
            part = inputs[start : start + SCORED_AT_ONCE]
            feeds = {
                "input_ids": part[None],
                "logits_rows": np.arange(len(part)),
                "block_table": table,
                "past_lens": np.array([start], np.int32),
                "cu_seqlens": np.array([0, len(part)], np.int32),
            }
            if "position_ids" in manifest.inputs:
                feeds["position_ids"] = np.arange(start, start + len(part))[None]
            given = {name: value(array) for name, array in feeds.items()}
            logits = session.run_with_ort_values(["logits"], given | caches)[0].numpy()[0]
            total += log_likelihood(logits, targets[start : start + SCORED_AT_ONCE])
    return total
