"""`python -m benchmarks.cpu.step_profile`: why 2:4 is as fast as it is: a decoding step by parts, beside its bounds.

Int8 in our kernels, dense and 2:4, from the work directory of `benchmarks.cpu`. Each turn is a process of its own, and
measures the speed of memory and of the kernels in a cache as well, since those drift.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.cpu.candidates import chosen
from benchmarks.cpu.models import Sources
from benchmarks.cpu.step_times import PARTS, StepTimes, step_times
from benchmarks.load.machine import available_cores, this_machine, warn_if_busy
from benchmarks.markdown import markdown_table
from conversion.atomic import write_text
from conversion.command import run
from conversion.errors import InputError
from conversion.progress import shown_progress

RESULTS = Path(__file__).parents[1] / "results"
DENSE, SPARSE = "dense int8, int8 embedding", "2:4 int8, int8 embedding"


def middle(turns: Sequence[StepTimes]) -> StepTimes:
    """Medians over turns."""

    def over(which: str) -> dict[str, float]:
        return {part: median(getattr(turn, which)[part] for turn in turns) for part in getattr(turns[0], which)}

    return StepTimes(over("measured"), over("memory"), over("arithmetic"))


def table(batch: int, dense: StepTimes, sparse: StepTimes) -> str:
    """Milliseconds of a step by part, dense and 2:4, and what memory and arithmetic alone would take."""
    rows = []
    for part in PARTS:
        bounds = [_bounds(times, part) for times in (dense, sparse)]
        rows.append([part, _ms(dense.measured[part]), bounds[0], _ms(sparse.measured[part]), bounds[1]])
        rows[-1].append(f"{dense.measured[part] / sparse.measured[part]:.2f}")
    for name, seconds in (
        ("a step", [sum(times.measured.values()) for times in (dense, sparse)]),
        ("the bound of its weights", [sum(times.bound.values()) for times in (dense, sparse)]),
    ):
        rows.append([name, _ms(seconds[0]), "", _ms(seconds[1]), "", f"{seconds[0] / seconds[1]:.2f}"])
    heads = ["dense int8", "memory / arithmetic alone", "2:4 int8", "memory / arithmetic alone", "dense / 2:4"]
    return markdown_table([f"{batch} at once, ms", *heads], rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _bounds(times: StepTimes, part: str) -> str:
    return f"{_ms(times.memory[part])} / {_ms(times.arithmetic[part])}" if part in times.memory else ""


def main(
    work: Annotated[Path, typer.Option(help="Work directory of a run of benchmarks.cpu.")],
    name: Annotated[str, typer.Option(help="What the model is called in results.")],
    threads: Annotated[int | None, typer.Option(help="Threads; default all cores.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each model.", min=1)] = 5,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; default 1, 4 and 8.", min=1)] = None,
    context: Annotated[int, typer.Option(help="Tokens before the steps.", min=1)] = 96,
    steps: Annotated[int, typer.Option(help="Steps of each batch size in a turn.", min=1)] = 32,
    out: Annotated[Path, typer.Option(help="Directory for the table and the JSON.")] = RESULTS,
) -> None:
    """Profile a decoding step of int8 models, dense and 2:4. Keep the machine idle meanwhile."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    sources = Sources(work, work, (), work)
    models = {candidate.name: candidate.path(sources) for candidate in chosen([DENSE, SPARSE])[0]}
    for model in models.values():
        if not model.exists():
            raise InputError(f"{model} does not exist: run 'python -m benchmarks.cpu --work {work}' first")
    threads, batches = threads or available_cores(), sorted(batch or [1, 4, 8])
    warn_if_busy(console)
    turns: dict[str, list[dict[int, StepTimes]]] = {each: [] for each in models}
    with shown_progress("measuring", rounds * len(models)) as advance:
        for round_ in range(rounds):
            for each in sorted(models, reverse=round_ % 2 == 1):
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    turns[each].append(
                        process.submit(step_times, models[each], threads, batches, context, steps).result()
                    )
                advance(1)

    found = {each: {size: middle([turn[size] for turn in of]) for size in batches} for each, of in turns.items()}
    machine, now = this_machine(), datetime.now(UTC)
    stem = f"cpu-step-{name.lower()}-after-{context}-{now:%Y-%m-%d}"
    text = report(name, found, batches, f"{machine.cpu}, threads: {threads}, {now:%Y-%m-%d}", context, rounds)
    record = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine.model_dump(),
        "model": name,
        "threads": threads,
        "context": context,
        "seconds": {each: {size: asdict(times) for size, times in of.items()} for each, of in found.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    write_text(out / f"{stem}.md", text)
    print(text)
    console.print(f"wrote {out / stem}.md and .json")


def report(
    name: str,
    found: Mapping[str, Mapping[int, StepTimes]],
    batches: Sequence[int],
    machine: str,
    context: int,
    rounds: int,
) -> str:
    """The markdown: how it was measured, and a table for each batch size."""
    lines = [
        f"# {name}: where a decoding step's time goes",
        "",
        f"{machine}. Medians of {rounds} turns, each a process of its own; ONNX Runtime's profile of steps after "
        f"{context} tokens. 'layers' are the linears of the blocks with the norms, gates and sums that are computed in "
        "them; 'rest' is the embedding, the last norm, and all time between nodes, profiling's own included. Memory "
        "alone is the bytes of the weights at the speed of plain reading, measured in the same turn; arithmetic alone "
        "is what the kernel takes for as many weights that lie in a cache. A part cannot be faster than the slower of "
        "the two; the bound of the weights is the sum of those, with no attention and nothing between nodes.",
        "",
    ]
    for size in batches:
        lines += [table(size, found[DENSE][size], found[SPARSE][size]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    run(lambda: typer.run(main))
