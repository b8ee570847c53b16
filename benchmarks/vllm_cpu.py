"""`python -m benchmarks.vllm_cpu`: vLLM on this CPU, serving a model dense and packed.

All candidates in one run, interleaved, with equal threads and the same prompts, greedy, compiled. Each turn is a
process of its own, in vLLM's environment (`make test-vllm` makes it); this one needs the project's.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cpu import measure, models, prompts, report
from benchmarks.cpu.candidates import Candidate
from benchmarks.cpu.job import Runtime
from benchmarks.cpu.models import Sources
from benchmarks.load.machine import available_cores, this_machine, warn_if_busy
from benchmarks.random_models import random_models
from benchmarks.shapes import SHAPES
from conversion.atomic import new_directory
from conversion.checkpoint import Checkpoint
from conversion.command import run
from conversion.errors import InputError
from conversion.pack import save_packed
from conversion.progress import shown_progress
from conversion.quantization.formats import INT8, Quantization
from conversion.quantization.quantize import quantize_dense
from conversion.shards import SINGLE, ShardWriter

RESULTS = Path(__file__).parent / "results"
ROWS = Quantization(INT8, None)


@dataclass(frozen=True)
class VllmCandidate(Candidate):
    """One form of the model, in vLLM."""

    @property
    def runtime(self) -> Runtime:
        return "vllm"


class Dense(VllmCandidate):
    """The dense model's own directory."""

    def path(self, sources: Sources) -> Path:
        return sources.dense


class Packed(VllmCandidate):
    """The 2:4 model packed with the values it has; vLLM rounds them to its dtype, as it does dense weights."""

    def path(self, sources: Sources) -> Path:
        return sources.work / "packed"


def _nothing(sources: Sources, out: Path) -> None: ...


def _packed(sources: Sources, out: Path) -> None:
    save_packed(sources.sparse, out)


def _packed_int8(embedding: Quantization | None) -> models.Make:
    return lambda sources, out: save_packed(sources.sparse, out, quantization=ROWS, embedding=embedding)


def dense_int8(sources: Sources, out: Path) -> None:
    """Round linears to int8, a scale for each row, activations to int8 token by token: vLLM's fast way on CPUs."""
    source = Checkpoint(sources.dense)
    tensors: dict[str, Any] = {}
    for name in source.names:
        if name in source.scope_set:
            stored, scale = quantize_dense(source.linear_weight(name), ROWS)
            tensors |= {name: stored, f"{name}_scale": scale}
        else:
            tensors[name] = source.tensor(name)
    layouts = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": number | {"strategy": "channel", "dynamic": False},
        "input_activations": number | {"strategy": "token", "dynamic": True},
    }
    config = source.config | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": ["lm_head"],
        }
    }
    with new_directory(out) as building:
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with ShardWriter(building / SINGLE, layouts) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)


CANDIDATES: list[Candidate] = [
    Dense("dense fp32", "dense", "fp32", _nothing, "float32"),
    Dense("dense bf16", "dense", "bf16", _nothing, "bfloat16"),
    VllmCandidate("dense int8", "dense", "int8", dense_int8, "bfloat16"),
    Packed("2:4 fp32", "2:4", "fp32", _packed, "float32"),
    Packed("2:4 bf16", "2:4", "bf16", _packed, "bfloat16"),
    VllmCandidate("2:4 int8", "2:4", "int8", _packed_int8(None), "bfloat16"),
    VllmCandidate("2:4 int8, int8 embedding", "2:4", "int8", _packed_int8(ROWS), "bfloat16"),
]


def main(
    work: Annotated[Path, typer.Option(help="Directory in which made models are kept for the next run.")],
    dense: Annotated[Path | None, typer.Option(help="The dense model, a Hugging Face directory.")] = None,
    sparse: Annotated[Path | None, typer.Option(help="Its 2:4 version, a plain Hugging Face directory.")] = None,
    random: Annotated[
        str | None, typer.Option(help=f"Instead of models: random weights in one of these shapes: {', '.join(SHAPES)}.")
    ] = None,
    python: Annotated[Path, typer.Option(help="Python of vLLM's environment.")] = Path(".venv-vllm/bin/python"),
    only: Annotated[list[str] | None, typer.Option(help="Only candidates of these names; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every candidate; default all cores.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each candidate.", min=1)] = 5,
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests at once; default 1 and 8.", min=1)] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated for each.", min=2)] = 64,
    prefill_tokens: Annotated[int, typer.Option(help="Tokens of the prompt whose reading is timed.", min=1)] = 512,
    out: Annotated[Path, typer.Option(help="Directory for the table, the JSON and the picture.")] = RESULTS,
) -> None:
    """Compare vLLM with itself: dense and 2:4. Keep the machine idle meanwhile."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not python.exists():
        raise InputError(f"{python} does not exist: 'make test-vllm' makes vLLM's environment, or name its --python")
    name = f"random-{random}"
    if random is not None:
        if dense or sparse:
            raise InputError("--random makes its own models: leave --dense and --sparse out")
        if random not in SHAPES:
            raise InputError(f"there is no shape '{random}': use one of {', '.join(SHAPES)}")
        dense, sparse = random_models(work, SHAPES[random] | {"max_position_embeddings": 2048})
    elif dense is None or sparse is None:
        raise InputError("give --dense and --sparse, or --random")
    else:
        name = dense.absolute().name
    candidates = [candidate for candidate in CANDIDATES if not only or candidate.name in only]
    sources = models.Sources(dense, sparse, (), work)
    models.check_work(sources)
    measure.make(candidates, sources, console.print)

    levels, threads = sorted(concurrency or [1, 8]), threads or available_cores()
    prompt_ids, long_prompt = prompts.prompts(dense, [], levels[-1], prompt_tokens, prefill_tokens)
    warn_if_busy(console)
    plan = measure.Plan(threads, prompt_ids, long_prompt, output_tokens, levels, str(python.absolute()))
    with shown_progress("measuring", rounds * len(candidates)) as advance:
        found, others = measure.measure(candidates, sources, plan, rounds, {}, advance)

    machine, now = this_machine(), datetime.now(UTC)
    stem = f"vllm-cpu-{name.lower()}-{now:%Y-%m-%d}"
    about = [
        f"{name} in vLLM on a CPU: dense and 2:4",
        f"{machine.cpu}, threads: {threads}, {now:%Y-%m-%d}. {found[0].turns[0].about}.",
        f"Medians of {rounds} rounds (lowest to highest) in which every candidate has a turn, in a process of its own. "
        f"Prompts of {prompt_tokens} random tokens, {output_tokens} tokens generated greedily for each, end to end "
        f"without a server; decoding only counts what comes after the last prompt is read. Prefill reads "
        f"{prefill_tokens} tokens. Weights resident is the memory that loading them took, embedding included; peak "
        "memory is the whole process's, compiler included. All weights are rounded to nearest; int8 candidates keep "
        f"what is not int8 in bfloat16. Others kept at most {others:.2f} cores busy during a turn.",
    ]
    record = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine.model_dump(),
        "model": name,
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "prefill_tokens": prefill_tokens,
        "other_cpu": others,
    }
    print(report.write(found, levels, about, record, out / stem))
    console.print(f"wrote {out / stem}.md, .json and .png")


if __name__ == "__main__":
    run(lambda: typer.run(main))
