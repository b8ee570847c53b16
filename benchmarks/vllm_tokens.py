"""`python -m benchmarks.vllm_tokens DENSE PACKED`: whether vLLM says the same with a packed model as with a dense one.

Runs in vLLM's environment (`make vllm`). Greedy tokens after many prompts, one at a time and sixteen at once, eager and
compiled, in float32; each engine is a process of its own.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.vllm_environment import ENVIRONMENT
from conversion.command import run
from conversion.errors import InputError
from conversion.model_config import read_config
from conversion.text import read_documents

BATCHES = (1, 16)
CHARACTERS = 120
"""Of a prompt."""


def generate(model: Path, mode: str, prompts: list[str], tokens: int) -> dict[int, list[list[int]]]:
    """Token ids after each prompt, by batch size. Reads the environment's settings, so it needs a new process."""
    os.environ |= ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=mode == "eager",
        max_model_len=min(512, read_config(model).get("max_position_embeddings", 512)),
        max_num_seqs=BATCHES[-1],
        kv_cache_memory_bytes=600 << 20,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    found = {}
    for batch in BATCHES:
        outputs = [
            output
            for first in range(0, len(prompts), batch)
            for output in llm.generate(prompts[first : first + batch], parameters, use_tqdm=False)
        ]
        found[batch] = [list(output.outputs[0].token_ids) for output in outputs]
    return found


def main(
    dense: Annotated[Path, typer.Argument(help="The 2:4 model stored dense, as `cast train` leaves it.")],
    packed: Annotated[Path, typer.Argument(help="The same model packed, not quantized.")],
    text: Annotated[Path, typer.Option(help="Text whose documents begin the prompts.")],
    prompts: Annotated[int, typer.Option(help="How many.", min=1)] = 50,
    tokens: Annotated[int, typer.Option(help="Generated after each.", min=1)] = 32,
    mode: Annotated[list[str] | None, typer.Option(help="eager or compiled; default both.")] = None,
) -> None:
    """Exit with 1 if a single token differs."""
    texts = [document[:CHARACTERS] for document in islice(read_documents([text]), prompts)]
    if len(texts) < prompts:
        raise InputError(f"{text} has {len(texts)} documents, and {prompts} prompts are asked for: give more text")
    same = True
    for each in mode or ["eager", "compiled"]:
        found = []
        for model in (dense, packed):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found.append(process.submit(generate, model, each, texts, tokens).result())
        for batch in BATCHES:
            equal = sum(a == b for a, b in zip(found[0][batch], found[1][batch], strict=True))
            print(f"{each}, batch {batch}: {equal} of {prompts} prompts with the same {tokens} tokens", flush=True)
            same = same and equal == prompts
    raise typer.Exit(0 if same else 1)


if __name__ == "__main__":
    run(lambda: typer.run(main))
