"""vLLM in the process of a test."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

PROMPTS = [[5, 17, 3, 88, 41, 2, 60, 8, 93, 55], [9, 33, 12, 71], [300], list(range(20, 60)), [7] * 30]


@contextlib.contextmanager
def engine(directory: Path, **options: Any) -> Iterator[LLM]:
    """An engine on `directory`, in float32 and eager unless `options` say otherwise."""
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
    llm = None
    try:
        llm = LLM(
            str(directory),
            skip_tokenizer_init=True,
            kv_cache_memory_bytes=32 << 20,
            disable_log_stats=True,
            **defaults | options,  # type: ignore[arg-type]
        )
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def greedy(llm: LLM, prompts: list[list[int]] = PROMPTS, count: int = 12) -> list[list[int]]:
    """The most likely `count` tokens after each prompt, all prompts at once."""
    parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def tokens(directory: Path, **options: Any) -> list[list[int]]:
    with engine(directory, **options) as llm:
        return greedy(llm)
