"""llama.cpp as a candidate's runtime: its own batches of several sequences, through llama-cpp-python's C interface."""

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.cpu.job import Speed
from benchmarks.cpu.llama_cpp_log import silence
from benchmarks.cpu.runner import log_likelihood

BATCH_TOKENS = 512
"""Tokens that llama.cpp computes at once, its default (n_ubatch)."""


class LlamaCppRunner:
    """A GGUF file in one context, whose sequences are decoded together. Defaults but for threads and sizes."""

    weight_memory: int | None = None

    def __init__(self, file: Path, threads: int, sequences: int, tokens: int) -> None:
        """`tokens` is the most that one sequence holds."""
        silence()
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-tokens // 256) * 256
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens for {file}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        features = " ".join(llama_cpp.llama_print_system_info().decode().split())
        self.about = f"llama-cpp-python {version('llama-cpp-python')}, {features}"

    def generate(self, prompts: list[list[int]], tokens: int) -> Speed:
        start = time.perf_counter()
        self._forget()
        latest = self._read(prompts)
        reading = time.perf_counter() - start
        for position in range(len(prompts[0]), len(prompts[0]) + tokens - 1):
            rows = self._decode([(token, position, i, True) for i, token in enumerate(latest)])
            latest = [int(self._logits(row).argmax()) for row in rows]
        seconds = time.perf_counter() - start
        return Speed(seconds, len(prompts) * tokens, reading, len(prompts) * (tokens - 1))

    def score(self, windows: list[list[int]]) -> float:
        """Sum of the log-probabilities of each window's tokens but its first."""
        total = 0.0
        for window in windows:
            self._forget()
            for start in range(0, len(window) - 1, BATCH_TOKENS):
                targets = np.array(window[start + 1 : start + 1 + BATCH_TOKENS])
                given = [(window[i], i, 0, True) for i in range(start, start + len(targets))]
                total += log_likelihood(np.stack([self._logits(row) for row in self._decode(given)]), targets)
        return total

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _read(self, prompts: list[list[int]]) -> list[int]:
        """Compute the prompts, as many tokens at once as llama.cpp takes; return the token after each."""
        given = [
            (token, position, i, position == len(prompt) - 1)
            for i, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        latest = []
        for start in range(0, len(given), BATCH_TOKENS):
            rows = self._decode(given[start : start + BATCH_TOKENS])
            latest += [int(self._logits(row).argmax()) for row in rows]
        return latest

    def _decode(self, given: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, wanted) each; return which of them have logits."""
        batch = self._batch
        batch.n_tokens = len(given)
        for i, (token, position, sequence, wanted) in enumerate(given):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama.cpp could not compute a batch of {len(given)} tokens (code {code})")
        return [i for i, (_, _, _, wanted) in enumerate(given) if wanted]

    def _logits(self, row: int) -> np.ndarray:
        """Logits [V] of a token of the last batch; a view."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, row), (self._vocabulary,))
