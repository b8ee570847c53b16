"""`python -m benchmarks.cpu`: a model end to end on this CPU, 2:4 beside dense and llama.cpp, speed beside quality.

All candidates in one run, interleaved, with equal threads and the same prompts, greedy, engines alone without HTTP.
Each turn is a process of its own, so that no candidate's threads or memory are in the way of another's.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from conversion.command import run
from conversion.errors import InputError

RESULTS = Path(__file__).parents[1] / "results"
RANDOM = "random-1.1b"


def main(
    work: Annotated[Path, typer.Option(help="Directory in which made models are kept for the next run.")],
    dense: Annotated[Path | None, typer.Option(help="The dense model, a Hugging Face directory.")] = None,
    sparse: Annotated[Path | None, typer.Option(help="Its 2:4 version, a plain Hugging Face directory.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Held-out text: perplexity, and the prompts.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Text to quantize both models on; may be repeated.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Instead of models: random weights in the shape of TinyLlama 1.1B.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only candidates whose name begins so; may be repeated. See --list.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every candidate; default all cores.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each candidate.", min=1)] = 5,
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests at once; default 1, 4 and 8.", min=1)] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated for each.", min=2)] = 64,
    prefill_tokens: Annotated[int, typer.Option(help="Tokens of the prompt whose reading is timed.", min=1)] = 512,
    eval_tokens: Annotated[int, typer.Option(help="Most held-out tokens to score.", min=2)] = 20_480,
    context: Annotated[int, typer.Option(help="Tokens of a scored window.", min=2)] = 1024,
    out: Annotated[Path, typer.Option(help="Directory for the table, the JSON and the picture.")] = RESULTS,
    names: Annotated[bool, typer.Option("--list", help="List the candidates and stop.")] = False,
) -> None:
    """Compare every form of a model that a user of a CPU would think of. Keep the machine idle meanwhile."""
    from benchmarks.cpu import models
    from benchmarks.cpu.candidates import CANDIDATES, chosen

    if names:
        print("\n".join(candidate.name for candidate in CANDIDATES))
        return
    from rich.console import Console

    from benchmarks.cpu import measure, prompts, report
    from benchmarks.load.machine import available_cores, this_machine, warn_if_busy
    from benchmarks.random_models import random_models
    from benchmarks.shapes import SHAPES
    from conversion.progress import shown_progress

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if random:
        if dense or sparse or heldout or calibration:
            raise InputError("--random makes its own models: leave --dense, --sparse, --heldout and --calibration out")
        dense, sparse = random_models(work, SHAPES["1b"] | {"max_position_embeddings": 2048})
    elif dense is None or sparse is None or heldout is None:
        raise InputError("give --dense, --sparse and --heldout, or --random")
    sources = models.Sources(dense, sparse, tuple(calibration or ()), work)
    models.check_work(sources)
    candidates, left_out = chosen(only or [])
    if left_out:
        console.print(left_out)
    measure.make(candidates, sources, console.print)

    levels = sorted(concurrency or [1, 4, 8])
    threads = threads or available_cores()
    windows = prompts.windows(dense, heldout, context, eval_tokens) if heldout else []
    prompt_ids, long_prompt = prompts.prompts(dense, windows, levels[-1], prompt_tokens, prefill_tokens)
    perplexities: dict[str, float] = {}
    if windows:
        with shown_progress("perplexity", len(candidates)) as advance:
            perplexities = measure.score(candidates, sources, threads, windows, advance)
    warn_if_busy(console)
    plan = measure.Plan(threads, prompt_ids, long_prompt, output_tokens, levels)
    with shown_progress("measuring", rounds * len(candidates)) as advance:
        found, others = measure.measure(candidates, sources, plan, rounds, perplexities, advance)

    machine, now = this_machine(), datetime.now(UTC)
    name = RANDOM if random else dense.absolute().name
    stem = f"cpu-{name.lower()}-{now:%Y-%m-%d}"
    runtimes = sorted({m.turns[0].about for m in found})
    about = [
        f"{name} on a CPU: 2:4 beside dense and llama.cpp",
        f"{machine.cpu}, threads: {threads}, {now:%Y-%m-%d}. {'. '.join(runtimes)}.",
        f"Medians of {rounds} rounds (lowest to highest) in which every candidate has a turn, in a process of its own, "
        f"each timing repeated for {measure.REPEATED_S:g} s. "
        f"Prompts of {prompt_tokens} tokens, {output_tokens} tokens generated greedily for each, end to end without a "
        f"server; decoding only counts what comes after the last prompt is read. Prefill reads {prefill_tokens} "
        "tokens. Peak memory is the whole process's, files mapped into it included. "
        + (
            f"Perplexity on {len(windows)} windows of {context} held-out tokens. "
            if windows
            else "Weights are random. "
        )
        + ("Linears of our kernels are quantized on calibration text, all else" if calibration else "All weights are")
        + " rounded to nearest. "
        + f"Others kept at most {others:.2f} cores busy during a turn.",
    ]
    record = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine.model_dump(),
        "runtimes": runtimes,
        "model": name,
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "prefill_tokens": prefill_tokens,
        "heldout": {"windows": len(windows), "context": context} if windows else None,
        "other_cpu": others,
    }
    print(report.write(found, levels, about, record, out / stem))
    console.print(f"wrote {out / stem}.md, .json and .png")


if __name__ == "__main__":
    run(lambda: typer.run(main))
