"""`cast bench` and `cast pipeline`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.pipeline.stages import Preset
from conversion.errors import InputError


def bench(
    dense: Annotated[Path, typer.Option(help="Dense model: a directory, or a hub id.", show_default=False)],
    sparse: Annotated[Path, typer.Option(help="Its 2:4 model, packed, likewise.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory for bench.json, report.html and the servers' logs.")] = Path(
        "bench"
    ),
    concurrency: Annotated[str, typer.Option(help="Numbers of concurrent requests to try.")] = "1,4,8",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of every prompt; default: 128, or two thirds of a shorter context."),
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=2, help="Length of every answer; default: 64, or a third of a shorter context.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests of each concurrent user in a round, and at least 4 in all.")
    ] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each model; the spread is taken over them.")] = 5,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text to cut prompts from, .txt or .jsonl with a 'text' field; else random tokens."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each server; else the server's default.")
    ] = None,
    quality: Annotated[Path | None, typer.Option(help="Output of `cast eval --json`, to show in the report.")] = None,
    training_curve: Annotated[
        Path | None, typer.Option(help="PNG drawn by `cast train`, to show in the report.")
    ] = None,
) -> None:
    """Measure a 2:4 model against its dense one under the same load, and write a report.

    Starts both servers and loads them in turn with streamed requests of fixed lengths.
    Compares time to first token (TTFT), time per output token (TPOT), end-to-end time, tokens/s and memory.
    Keep the machine idle meanwhile.

    Example: cast bench --dense SmolLM2-135M --sparse out/packed --out bench
    """
    from functools import partial

    from rich.console import Console

    from benchmarks.load.bench import measure
    from benchmarks.load.measurements import Settings
    from benchmarks.load.servers import serve_command
    from benchmarks.report.quality import Quality
    from benchmarks.report.render import read_png, write_report
    from benchmarks.report.summary import summary_table
    from cast_serve.server.model_dir import find_onnx_dir
    from conversion.hub import local_model
    from conversion.model_config import context_length, read_config

    dense, sparse = local_model(dense), local_model(sparse)
    concurrencies = _concurrencies(concurrency)
    evaluated = Quality.read(quality) if quality else None
    if training_curve is not None:
        read_png(training_curve)  # now, not after an hour of measuring
    context = context_length(read_config(dense)) or sys.maxsize
    settings = Settings(
        concurrencies=concurrencies,
        prompt_tokens=prompt_tokens or min(128, 2 * context // 3),
        output_tokens=output_tokens or min(64, context // 3),
        requests_per_user=requests,
        rounds=rounds,
        threads=threads,
    )
    if prompts is not None:
        settings.prompt_source = f"cut from {prompts.name}"
    for directory in (dense, sparse):
        find_onnx_dir(directory, None)  # `cast serve` would do it too, but it is no part of a server's start
    out.mkdir(parents=True, exist_ok=True)
    result = measure(
        {"dense": dense, "sparse": sparse}, settings, out, partial(serve_command, threads=threads), prompts
    )
    report = write_report(result, out, evaluated, training_curve)
    console = Console()
    console.print(summary_table(result, evaluated))
    console.print(f"report: {report.resolve()}", soft_wrap=True)


def pipeline(
    source: Annotated[str, typer.Argument(help="Dense model: a directory, or an id on the hub.")],
    out: Annotated[Path, typer.Option(help="Directory for everything that is made.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Text to train on: .txt, .jsonl or .parquet.", show_default=False)],
    heldout: Annotated[Path, typer.Option(help="Other text, to evaluate on.", show_default=False)],
    preset: Annotated[Preset, typer.Option(help="quick: minutes on a CPU; full: the paper's recipe, on a GPU.")] = (
        Preset.quick
    ),
    tokens: Annotated[int | None, typer.Option(help="Training tokens, instead of the preset's.", min=1)] = None,
) -> None:
    """Go the whole way: train to 2:4, evaluate, convert, serve and measure against the dense model.

    Runs the other commands, each as its own process, and shows them; run again, it reuses what is finished.

    Example: cast pipeline SmolLM2-135M --data train.jsonl --heldout heldout.jsonl --out demo
    """
    from rich.console import Console

    from benchmarks.load.measurements import BenchResult
    from benchmarks.pipeline.run import StageFailed, run_stages
    from benchmarks.pipeline.stages import Outputs, stages
    from benchmarks.pipeline.texts import check_texts
    from benchmarks.report.quality import Quality
    from benchmarks.report.summary import summary_table
    from conversion.families import family_of
    from conversion.hub import local_model
    from conversion.model_config import read_config

    for text in (data, heldout):
        if not text.exists():
            raise InputError(f"there is no text {text}: give a .txt, .jsonl or .parquet file")
    check_texts(data, heldout)
    directory = local_model(source)
    family_of(read_config(directory)["model_type"])
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose a directory as output")
    console = Console()
    try:
        ran = run_stages(stages(directory, data, heldout, preset, out, tokens), out, console)
    except StageFailed as failure:
        console.print(f"stage '{failure.stage.name}' failed: mend it and run again, finished stages are kept")
        raise typer.Exit(failure.code) from None
    if ran:  # `cast bench`, the last of them, has just printed the table
        return
    made = Outputs(out)
    result = BenchResult.model_validate_json(made.measurements.read_bytes())
    console.print(summary_table(result, Quality.read(made.quality)))
    console.print(f"report: {made.page.resolve()}", soft_wrap=True)


def _concurrencies(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise InputError(f"--concurrency '{text}' is no list of positive numbers: give for example 1,4,8")
    return numbers
