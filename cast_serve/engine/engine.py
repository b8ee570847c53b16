"""The engine: one thread that steps a model over all requests, and the surface that a server uses."""

import logging
import threading
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np

from cast_serve.engine import sampler
from cast_serve.engine.cores import usable_cores
from cast_serve.engine.generation import EngineError, Generation
from cast_serve.engine.kv_cache import BLOCK_TOKENS, BlockAllocator
from cast_serve.engine.onnx_model import OnnxModel
from cast_serve.engine.sampler import Sampler
from cast_serve.engine.scheduler import Chunk, Scheduler, Sequence
from cast_serve.engine.types import EngineStats, FinishReason, ModelInfo, SamplingParams
from conversion.errors import InputError

# Tokens of one step. More makes prefill a little faster and stalls the sequences that are decoding for longer.
STEP_TOKENS = 128
_BATCH_SIZES_KEPT = 100_000
# Without work for so long, the cache's memory goes back to the system; faulting it in again costs about 1 ms a request.
IDLE_RELEASE_S = 0.5


logger = logging.getLogger(__name__)


class Engine:
    """Generates for many requests at once from an ONNX model directory (see conversion.onnx.export).

    Args:
        onnx_dir: the directory; InputError if it is missing, damaged or not what its manifest says.
        max_batch_size: most sequences computed at once; others wait.
        kv_cache_tokens: capacity of the key-value cache; by default max_batch_size * min(context, 2048). Memory becomes
            resident as it is used, and is given back when there is nothing to do. A capacity below the model's context
            becomes the context.
        threads: threads of the computation; by default one for each core that the process may use.

    All methods may be called from any thread.

    Attributes:
        info: what is loaded.
        failure: why the engine has stopped for good, without having been closed; None while it runs.
    """

    info: ModelInfo
    failure: str | None = None

    def __init__(
        self,
        onnx_dir: Path,
        *,
        max_batch_size: int = 8,
        kv_cache_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {max_batch_size}")
        if kv_cache_tokens is not None and kv_cache_tokens < BLOCK_TOKENS:
            raise InputError(f"the key-value cache must hold at least {BLOCK_TOKENS} tokens, not {kv_cache_tokens}")
        if threads is not None and threads < 1:
            raise InputError(f"the number of threads must be at least 1, not {threads}")
        step_tokens = max(STEP_TOKENS, max_batch_size)
        self._model = OnnxModel(
            Path(onnx_dir),
            max_batch_size=max_batch_size,
            step_tokens=step_tokens,
            kv_cache_tokens=kv_cache_tokens,
            threads=threads or usable_cores(),
        )
        self.info = self._model.info
        self._allocator = BlockAllocator(self._model.blocks)
        self._scheduler = Scheduler(self._allocator, max_batch_size, step_tokens)
        self._batch_sizes: deque[int] = deque(maxlen=_BATCH_SIZES_KEPT)
        self._submitted: deque[Sequence] = deque()
        self._cancelled = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> Generation:
        """Queue a prompt; its tokens come from the returned Generation.

        Raises:
            InputError: an empty prompt, one that leaves no room in the context, a token outside the vocabulary, or a
                sampling parameter out of range.
            EngineError: the engine is closed, or has failed.
        """
        sampler.check(params)
        context, vocabulary = self.info.context_length, self.info.vocab_size
        if not prompt_ids:
            raise InputError("the prompt has no tokens: give at least one")
        if len(prompt_ids) >= context:
            raise InputError(f"the prompt has {len(prompt_ids)} tokens, but the context holds {context}: shorten it")
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocabulary:
            raise InputError(f"token ids must lie in 0..{vocabulary - 1}")
        sequence = Sequence(list(prompt_ids), params, Generation(self._on_cancel), Sampler(params))
        with self._changed:
            if self._closing:
                raise EngineError(self.failure or "the engine is closed")
            self._submitted.append(sequence)
            self._changed.notify()
        return sequence.generation

    def stats(self) -> EngineStats:
        """A snapshot; its `batch_sizes` are those since the previous call."""
        with self._changed:
            batch_sizes = [self._batch_sizes.popleft() for _ in range(len(self._batch_sizes))]
            used = self._allocator.total - self._allocator.free
            return EngineStats(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting) + len(self._submitted),
                kv_tokens_used=used * BLOCK_TOKENS,
                kv_tokens_total=self._allocator.total * BLOCK_TOKENS,
                batch_sizes=batch_sizes,
            )

    def close(self) -> None:
        """Stop after the current step; unfinished generations raise EngineError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _on_cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify()

    def _run(self) -> None:
        """The engine's thread. No request may wait for a thread that is gone."""
        try:
            self._loop()
        except Exception as error:
            logger.exception("the engine has stopped")
            with self._changed:
                self._closing, self.failure = True, f"the engine has stopped: {type(error).__name__}: {error}"
                for sequence in [*self._unfinished(), *self._submitted]:
                    sequence.generation.fail(self.failure)

    def _loop(self) -> None:
        """The scheduler is touched here only, under the lock because `stats` reads it."""
        while True:
            with self._changed:
                idle_for: float | None = IDLE_RELEASE_S
                while not (self._closing or self._cancelled or self._submitted or self._unfinished()):
                    if not self._changed.wait(idle_for):
                        self._model.release_caches()
                        idle_for = None
                self._scheduler.waiting.extend(self._submitted)
                self._submitted.clear()
                if self._closing:
                    self._fail(self._unfinished(), "the engine was closed")
                    return
                self._drop_cancelled()
                chunks = self._scheduler.schedule()
            if chunks:
                self._step(chunks)

    def _step(self, chunks: list[Chunk]) -> None:
        try:
            logits_RV = self._model.run(chunks)
        except Exception as error:
            with self._changed:
                self._fail([chunk.sequence for chunk in chunks], f"the model failed: {error}")
            return
        self._batch_sizes.append(len(chunks))
        row = 0
        for chunk in chunks:
            last = chunk.last
            chunk.sequence.computed += chunk.tokens
            if last:
                self._next_token(chunk.sequence, logits_RV[row])
                row += 1

    def _next_token(self, sequence: Sequence, logits_V: np.ndarray) -> None:
        try:
            event = sequence.sampler(logits_V)
        except Exception as error:
            with self._changed:
                self._fail([sequence], f"no token could be chosen: {error}")
            return
        sequence.tokens.append(event.token_id)
        reason = self._finish_reason(sequence)
        if reason is not None:
            with self._changed:
                self._scheduler.remove(sequence)
            event = replace(event, finish_reason=reason)
        sequence.generation.put(event)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.tokens[-1] in sequence.params.stop_token_ids:
            return "stop"
        if sequence.generated >= sequence.params.max_tokens or len(sequence.tokens) >= self.info.context_length:
            return "length"
        return None

    def _unfinished(self) -> list[Sequence]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    def _drop_cancelled(self) -> None:
        if self._cancelled:
            self._cancelled = False
            for sequence in self._unfinished():
                if sequence.generation.cancelled:
                    self._scheduler.remove(sequence)

    def _fail(self, sequences: list[Sequence], message: str) -> None:
        for sequence in sequences:
            self._scheduler.remove(sequence)
            sequence.generation.fail(message)
