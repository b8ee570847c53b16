"""`python -m benchmarks.kernels`: the 2:4 kernels against torch's and ONNX Runtime's dense linears, on this CPU.

Weights come from memory, not from a cache: each candidate rotates through copies of its weight.
"""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.kernels.candidates import BASELINES, Candidate, candidates, memory_read, random_bitmask
from benchmarks.load.machine import available_cores, this_machine
from benchmarks.timing import interleave, times_as_fast
from cast_serve import kernels
from cast_serve.kernels import prepack

SHAPES = [(4096, 4096), (11008, 4096)]
"""[N, K]: attention and feed-forward linears of a 7 B model."""
MEMORY = "reading memory"
RESULTS = Path(__file__).parents[1] / "results"


def call_overhead() -> float:
    """Seconds that one call of a layer with 8 weights takes: all of it is overhead."""
    values, indices = prepack(torch.randn(1, 4), random_bitmask(1, 8))
    x, linear, calls = torch.randn(1, 8), torch.ops.cast24.linear_packed, 20000
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            linear(x, values, indices, 1)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def measure(
    shape: tuple[int, int], batch_sizes: list[int], rounds: int, memory: Candidate, advance: Callable[[], object]
) -> list[dict[str, Any]]:
    """Measure all candidates at one shape; one record per batch size and candidate."""
    rows, columns = shape
    records = []
    for batch in batch_sizes:
        x = [torch.randn(batch, columns) for _ in range(8)]
        built = candidates(rows, columns, x) | {MEMORY: memory}
        timings = interleave(
            {name: candidate.call for name, candidate in built.items()},
            rounds=rounds,
            calls=6 if batch <= 8 else 2,
            after_round=advance,
        )
        share = {name: candidate.weight_bytes / memory.weight_bytes for name, candidate in built.items()}
        baselines = {kind: [timings[name] for name in names] for kind, names in BASELINES.items()}
        records += [
            {
                "rows": rows,
                "columns": columns,
                "batch": batch,
                "candidate": name,
                "seconds": timing.median,
                "seconds_p25": timing.low,
                "seconds_p75": timing.high,
                "weight_bytes": built[name].weight_bytes,
                "of_read_bandwidth": share[name] * times_as_fast(timing, [timings[MEMORY]]),
                "speedup_over_best_dense": {kind: times_as_fast(timing, dense) for kind, dense in baselines.items()},
            }
            for name, timing in timings.items()
        ]
    return records


def print_table(records: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        title="Linear layers, weights read from memory; x kind: speed against the fastest dense one of that kind"
    )
    for heading in ("N x K", "M", "weights"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "p25-p75", "GB/s", "of bw", *(f"x {kind}" for kind in BASELINES)):
        table.add_column(heading, justify="right", min_width=5)
    previous = None
    for r in records:
        if previous and previous != (r["rows"], r["batch"]):
            table.add_section()
        previous = (r["rows"], r["batch"])
        table.add_row(
            f"{r['rows']} x {r['columns']}",
            str(r["batch"]),
            r["candidate"],
            f"{r['seconds'] * 1e3:.2f}",
            f"{r['seconds_p25'] * 1e3:.2f}-{r['seconds_p75'] * 1e3:.2f}",
            f"{r['weight_bytes'] / r['seconds'] / 1e9:.1f}",
            f"{r['of_read_bandwidth']:.0%}",
            *(f"{r['speedup_over_best_dense'][kind]:.2f}" for kind in BASELINES),
        )
    console.print(table)


def main(
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes M; default 1, 8, 32, 512.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every candidate; default all cores.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each candidate.")] = 8,
    overhead: Annotated[bool, typer.Option("--overhead", help="Measure only the cost of one call.")] = False,
    write: Annotated[bool, typer.Option("--json", help="Write the measurements to benchmarks/results/.")] = False,
) -> None:
    """Measure the 2:4 kernels, float and quantized, against dense linears of torch and ONNX Runtime."""
    console = Console()
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    batches = batch or [1, 8, 32, 512]
    with torch.inference_mode():
        seconds_per_call = call_overhead()
        console.print(f"torch.ops.cast24.linear_packed on a 1 x 8 layer: {seconds_per_call * 1e6:.1f} us a call")
        if overhead:
            return
        console.print(f"{kernels.isa()}, {threads} threads")
        memory = memory_read()
        columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(SHAPES) * len(batches) * rounds)
            records = [
                record
                for shape in SHAPES
                for record in measure(shape, batches, rounds, memory, lambda: progress.advance(task))
            ]
    print_table(records, console)
    if write:
        machine = this_machine().model_dump()
        machine["versions"]["torch"] = version("torch")
        now = datetime.now(UTC)
        path = RESULTS / f"kernels-{now:%Y-%m-%d}.json"
        path.parent.mkdir(exist_ok=True)
        result = {
            "date": now.isoformat(timespec="seconds"),
            "machine": machine,
            "isa": kernels.isa(),
            "threads": threads,
            "call_seconds": seconds_per_call,
            "measurements": records,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
