"""A model in vLLM on a CPU, in the process that asks. Runs in vLLM's own environment."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.vllm_environment import ENVIRONMENT

# Nothing but the answer on standard output.
os.environ |= ENVIRONMENT | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}

import vllm
from vllm import LLM, SamplingParams
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from benchmarks.cpu.job import Job, Speed

KV_CACHE_BYTES = 256 << 20


def anonymous_memory() -> int:
    """Bytes resident that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class VllmRunner:
    """Compiled, without the cache of prefixes that prompts given twice would profit from."""

    def __init__(self, job: Job) -> None:
        self.weight_memory: int | None = None
        load = CPUModelRunner.load_model

        def weighed(runner: Any, *arguments: Any, **named: Any) -> None:
            before = anonymous_memory()
            load(runner, *arguments, **named)
            self.weight_memory = anonymous_memory() - before

        CPUModelRunner.load_model = weighed
        self._llm = LLM(
            job.model,
            dtype=job.dtype,
            max_model_len=max(len(job.prompts[0]) + job.output_tokens, len(job.long_prompt) + 1),
            max_num_seqs=max(job.concurrency),
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        self._requests = 0
        self.about = f"vLLM {vllm.__version__} on the CPU, compiled"

    def generate(self, prompts: list[list[int]], tokens: int) -> Speed:
        engine = self._llm.llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        clock: Callable[[], float] = time.perf_counter
        start = clock()
        for prompt in prompts:
            engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, parameters)
            self._requests += 1
        counts: dict[str, int] = {}
        reading_seconds, read = 0.0, 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if not reading_seconds and len(counts) == len(prompts):
                reading_seconds, read = clock() - start, sum(counts.values())
        total = sum(counts.values())
        return Speed(clock() - start, total, reading_seconds, total - read)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
