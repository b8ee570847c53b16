"""`python -m benchmarks.gpu.serving`: vLLM on this GPU, whichever is installed, with a model dense and packed.

A random 2:4 Llama, its weights dense, packed, and packed with int8 and fp8 values: tokens/s of greedy generation, and
how many prompts get the dense model's tokens. In 16 bits sums may be rounded otherwise, so not all have to.
"""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.random_models import random_models
from benchmarks.shapes import SHAPES
from conversion.pack import save_packed
from conversion.quantization.formats import FP8, INT8, Quantization

FORMS: dict[str, Callable[[Path, Path], object]] = {
    "packed bf16": lambda sparse, out: save_packed(sparse, out),
    "packed int8": lambda sparse, out: save_packed(sparse, out, quantization=Quantization(INT8, None)),
    "packed fp8": lambda sparse, out: save_packed(sparse, out, quantization=Quantization(FP8, None)),
}
DENSE = "dense bf16"
BATCHES = (1, 16)
TINY = SHAPES["tiny"] | {"hidden_size": 128, "max_position_embeddings": 256}
"""Attention has no kernels for smaller heads."""


def generate(model: Path, prompts: list[list[int]], tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """Tokens after each prompt, and seconds by batch size; in a process of its own, with all memory to itself."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    length = len(prompts[0]) + tokens
    llm = LLM(str(model), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=length, **options)
    found: dict[str, Any] = {"start_seconds": time.perf_counter() - start, "seconds": {}}
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for batch in BATCHES:
        for _ in range(2):  # the first time warms up
            start = time.perf_counter()
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts[:batch]], parameters, use_tqdm=False)
            found["seconds"][batch] = time.perf_counter() - start
    found["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    return found


def main(
    out: Annotated[Path, typer.Option("--json", help="Directory to write results to, and to make models in.")],
    shape: Annotated[str, typer.Option(help=f"Of the model: {', '.join(SHAPES)}.")] = "1b",
    tokens: Annotated[int, typer.Option(help="Generated after each prompt.", min=2)] = 128,
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal on the CPU, in miniature.")] = False,
) -> None:
    """Exit with 1 if a form fails."""
    config = TINY if tiny else SHAPES[shape]
    _, sparse = random_models(out / "models", config)
    prompts = np.random.default_rng(0).integers(0, config["vocab_size"], (BATCHES[-1], 64)).tolist()
    options: dict[str, Any] = {"gpu_memory_utilization": 0.6}
    if tiny:
        options = {"kv_cache_memory_bytes": 32 << 20, "enforce_eager": True}
    found: dict[str, Any] = {}
    for name in (DENSE, *FORMS):
        try:
            model = sparse if name == DENSE else out / "models" / name.replace(" ", "-")
            if not model.exists():
                FORMS[name](sparse, model)
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found[name] = process.submit(generate, model, prompts, tokens, options).result()
        except Exception as failure:  # vLLM has many; the other forms must still run
            found[name] = {"failure": f"{type(failure).__name__}: {failure}"[:2000]}
            print(f"{name}: failed, {found[name]['failure']}", flush=True)
            continue
        ours, dense = found[name].pop("tokens"), found[DENSE].get("first_tokens")
        found[name]["first_tokens"] = ours
        rates = {batch: batch * tokens / seconds for batch, seconds in found[name]["seconds"].items()}
        found[name]["tokens_per_s"] = rates
        if dense is not None:
            found[name]["same_as_dense"] = sum(a == b for a, b in zip(ours, dense, strict=True)) / len(ours)
        print(f"{name}: {rates} tokens/s, same as dense: {found[name].get('same_as_dense')}", flush=True)
        record = {"vllm": version("vllm"), "shape": shape, "prompts": BATCHES[-1], "tokens": tokens, "forms": found}
        (out / "serving.json").write_text(json.dumps(record, indent=1) + "\n")
    raise typer.Exit(1 if any("failure" in each for each in found.values()) else 0)


if __name__ == "__main__":
    typer.run(main)
