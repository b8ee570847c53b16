"""`python -m benchmarks.kernels`: the 2:4 kernels against torch's and ONNX Runtime's dense linears, on this CPU.

Weights come from memory, not from a cache: each candidate rotates through copies of at least ROTATED_BYTES.
"""

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.load.machine import this_machine
from benchmarks.timing import Timing, interleave
from cast_serve import kernels
from cast_serve.kernels.torch_ops import prepack

SHAPES = [(4096, 4096), (11008, 4096)]
"""[N, K]: attention and feed-forward linears of a 7 B model."""
ROTATED_BYTES = 128 << 20
RESULTS = Path(__file__).parent / "results"

BASELINES = ("torch fp32", "ort fp32", "torch bf16")
Candidate = Callable[[int], object]


def random_sparse(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random (values [N, K/2], bitmask [N, K/8]) in the portable format."""
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8)[torch.randint(6, (rows, columns // 8, 2))]
    return torch.randn(rows, columns // 2).to(dtype), nibbles[..., 0] | nibbles[..., 1] << 4


def copies(bytes_each: int) -> range:
    return range(max(2, -(-ROTATED_BYTES // bytes_each)))


def sparse_candidate(rows: int, columns: int, dtype: torch.dtype, x: list[torch.Tensor]) -> tuple[Candidate, int]:
    """Return the call and the weight bytes it reads."""
    portable = random_sparse(rows, columns, dtype)
    weight_bytes = sum(tensor.nbytes for tensor in portable)
    weights = [prepack(*portable) for _ in copies(weight_bytes)]
    linear = torch.ops.cast24.linear_packed.default
    return lambda i: linear(x[i % len(x)], *weights[i % len(weights)], rows), weight_bytes


def torch_candidate(rows: int, columns: int, dtype: torch.dtype, x: list[torch.Tensor]) -> tuple[Candidate, int]:
    weight = torch.randn(rows, columns).to(dtype)
    weights = [weight.clone() for _ in copies(weight.nbytes)]
    inputs = [x_.to(dtype) for x_ in x]
    linear = torch.nn.functional.linear
    return lambda i: linear(inputs[i % len(x)], weights[i % len(weights)]), weight.nbytes


def ort_candidate(rows: int, columns: int, x: list[torch.Tensor]) -> tuple[Candidate, int]:
    """One session per copy of the weight, each a single MatMul; they share the process's thread pool."""
    weight = np.random.default_rng(0).standard_normal((columns, rows), dtype=np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", columns])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["M", rows])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    serialized = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    # With pools of their own, one session's idle threads would spin on the cores that the next one needs.
    options.use_per_session_threads = False
    sessions = [
        onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        for _ in copies(weight.nbytes)
    ]
    inputs = [x_.numpy() for x_ in x]
    return lambda i: sessions[i % len(sessions)].run(None, {"x": inputs[i % len(x)]}), weight.nbytes


def read_bandwidth() -> float:
    """Bytes per second that all threads together read, summing 512 MB: the bound of every call at M = 1."""
    data = torch.from_numpy(np.ones(128 << 20, dtype=np.float32))  # numpy's memory is in huge pages, as prepack's is
    return data.nbytes / interleave({"sum": lambda _: data.sum()}, rounds=3, calls=4)["sum"].median


def call_overhead() -> float:
    """Seconds that one call of a layer with 8 weights takes: all of it is overhead."""
    values, indices = prepack(*random_sparse(1, 8, torch.float32))
    x, linear, calls = torch.randn(1, 8), torch.ops.cast24.linear_packed, 20000
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            linear(x, values, indices, 1)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def measure(
    shape: tuple[int, int], batch_sizes: list[int], rounds: int, advance: Callable[[], object]
) -> list[dict[str, Any]]:
    """Measure all candidates at one shape; one record per batch size and candidate."""
    rows, columns = shape
    records = []
    for batch in batch_sizes:
        x = [torch.randn(batch, columns) for _ in range(8)]
        built = {
            "torch fp32": torch_candidate(rows, columns, torch.float32, x),
            "ort fp32": ort_candidate(rows, columns, x),
            "torch bf16": torch_candidate(rows, columns, torch.bfloat16, x),
            "2:4 fp32": sparse_candidate(rows, columns, torch.float32, x),
            "2:4 bf16": sparse_candidate(rows, columns, torch.bfloat16, x),
        }
        timings: dict[str, Timing] = interleave(
            {name: call for name, (call, _) in built.items()},
            rounds=rounds,
            calls=6 if batch <= 8 else 2,
            after_round=advance,
        )
        records += [
            {
                "rows": rows,
                "columns": columns,
                "batch": batch,
                "candidate": name,
                "seconds": timing.median,
                "seconds_p25": timing.low,
                "seconds_p75": timing.high,
                "weight_bytes": built[name][1],
            }
            | {f"speedup_over_{base}": timings[base].median / timing.median for base in BASELINES}
            for name, timing in timings.items()
        ]
    return records


def print_table(records: list[dict[str, Any]], bandwidth: float, console: Console) -> None:
    table = Table(title="Linear layers, weights read from memory")
    for heading in ("N x K", "M", "weights"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "p25-p75", "GB/s", "of bw", *(f"x {base}" for base in BASELINES)):
        table.add_column(heading, justify="right", min_width=5)
    previous = None
    for r in records:
        if previous and previous != (r["rows"], r["batch"]):
            table.add_section()
        previous = (r["rows"], r["batch"])
        rate = r["weight_bytes"] / r["seconds"]
        table.add_row(
            f"{r['rows']} x {r['columns']}",
            str(r["batch"]),
            r["candidate"],
            f"{r['seconds'] * 1e3:.2f}",
            f"{r['seconds_p25'] * 1e3:.2f}-{r['seconds_p75'] * 1e3:.2f}",
            f"{rate / 1e9:.1f}",
            f"{rate / bandwidth:.0%}",
            *(f"{r[f'speedup_over_{base}']:.2f}" for base in BASELINES),
        )
    console.print(table)


def main(
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes M; default 1, 8, 32, 512.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every candidate; default all cores.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each candidate.")] = 8,
    overhead: Annotated[bool, typer.Option("--overhead", help="Measure only the cost of one call.")] = False,
    write: Annotated[bool, typer.Option("--json", help="Write the measurements to benchmarks/results/.")] = False,
) -> None:
    """Measure the 2:4 kernels against dense linears of torch and ONNX Runtime."""
    console = Console()
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    batches = batch or [1, 8, 32, 512]
    with torch.inference_mode():
        seconds_per_call = call_overhead()
        console.print(f"torch.ops.cast24.linear_packed on a 1 x 8 layer: {seconds_per_call * 1e6:.1f} us a call")
        if overhead:
            return
        bandwidth = read_bandwidth()
        console.print(f"{kernels.isa()}, {threads} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
        columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(SHAPES) * len(batches) * rounds)
            records = [
                record for shape in SHAPES for record in measure(shape, batches, rounds, lambda: progress.advance(task))
            ]
    print_table(records, bandwidth, console)
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
            "read_bytes_per_second": bandwidth,
            "call_seconds": seconds_per_call,
            "measurements": records,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
