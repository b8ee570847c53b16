"""Where the time of a decoding step goes in the engine, and what memory and arithmetic alone would take."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from benchmarks.cpu.steps import Steps
from benchmarks.kernels.candidates import memory_read, random_bitmask
from cast_serve.engine.manifest import read_manifest
from cast_serve.kernels import prepack_quantized
from conversion.errors import InputError

PARTS = ("layers", "lm_head", "attention", "rest")
"""The linears of the blocks, with the norms and gates computed in them; the rest is what lies between nodes, too."""
MULTIPLIES = {"Sparse24MatMulNBits": True, "DenseNBits": False}
"""Operators that multiply by int8 and int4 weights, and whether those are 2:4."""
CACHED = (1024, 512)
"""Rows and columns of a weight that stays in the cache."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one decoding step.

    Attributes:
        measured: by part.
        memory: that reading the weights of a part takes at the speed of plain reading, by part with weights.
        arithmetic: that the kernel takes for them from a cache, by part with weights.
    """

    measured: dict[str, float]
    memory: dict[str, float]
    arithmetic: dict[str, float]

    @property
    def bound(self) -> dict[str, float]:
        """What a part with weights takes at least: the longer of memory and arithmetic."""
        return {part: max(self.memory[part], self.arithmetic[part]) for part in self.memory}


@dataclass(frozen=True)
class Weight:
    """Of one node: an int8 or int4 matrix [rows, columns]."""

    part: str
    rows: int
    columns: int
    bits: int
    group_size: int
    sparse: bool
    stored_bytes: int


def step_times(onnx_dir: Path, threads: int, batches: list[int], context: int, steps: int) -> dict[int, StepTimes]:
    """Measure steps of each batch size, every sequence `context` tokens long at first; by batch size.

    Raises:
        InputError: a model whose linears are not int8 or int4.
    """
    torch.set_num_threads(threads)
    weights = read_weights(onnx_dir)
    seconds_per_byte = _seconds_per_byte()
    arithmetic = {batch: _arithmetic(weights, batch) for batch in batches}
    measured = _measured(onnx_dir, threads, batches, context, steps)
    memory = _by_part((weight, weight.stored_bytes * seconds_per_byte) for weight in weights)
    return {batch: StepTimes(measured[batch], memory, arithmetic[batch]) for batch in batches}


def read_weights(onnx_dir: Path) -> list[Weight]:
    """The quantized weights that a step multiplies by, in the graph's order; InputError if there are others."""
    graph = onnx.load(onnx_dir / "model.onnx", load_external_data=False).graph
    stored = {each.name: _stored_bytes(each) for each in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulNBits", "Gemm", "Sparse24MatMul", "DenseLinear"):
            raise InputError(f"{onnx_dir}: '{node.name}' is no product of int8 or int4 weights in our kernels")
        if node.op_type in MULTIPLIES:
            given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            sizes = (given["N"], given["K"], given["bits"], given["group_size"])
            found.append(Weight(part_of(node.name), *sizes, MULTIPLIES[node.op_type], stored[node.input[1]]))
    return found


def part_of(node: str) -> str:
    """The part that a node belongs to, by its name."""
    if node.startswith("/lm_head/") and node.rpartition("/")[2] in MULTIPLIES:
        return "lm_head"
    operator = node.rpartition("/")[2]
    return "layers" if operator in MULTIPLIES else "attention" if operator == "PagedAttention" else "rest"


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _seconds_per_byte() -> float:
    memory = memory_read()
    return median(_seconds(memory.call) for _ in range(7)) / memory.weight_bytes


def _arithmetic(weights: list[Weight], batch: int) -> dict[str, float]:
    """Seconds by part if every weight were in a cache: what the kernel takes for more rows there, without its call."""
    kinds = {(weight.bits, weight.sparse, weight.group_size): 0.0 for weight in weights}
    x = torch.randn(batch, CACHED[1])
    for bits, sparse, group in kinds:
        small, large = (_cached_call(x, rows, bits, sparse, group) for rows in (CACHED[0], 2 * CACHED[0]))
        times = [(_seconds(large), _seconds(small)) for _ in range(400)]
        more = median(t for t, _ in times) - median(t for _, t in times)
        kinds[bits, sparse, group] = more / (CACHED[0] * CACHED[1])
    per_weight = lambda w: kinds[w.bits, w.sparse, w.group_size]  # noqa: E731
    return _by_part((weight, weight.rows * weight.columns * per_weight(weight)) for weight in weights)


def _cached_call(x: torch.Tensor, rows: int, bits: int, sparse: bool, group_size: int) -> Callable[[int], object]:
    columns = CACHED[1]
    width = columns * bits // 8 // (2 if sparse else 1)
    dtype = torch.int8 if bits == 8 else torch.uint8
    values = torch.randint(1, 100, (rows, width), dtype=dtype)
    bitmask = random_bitmask(rows, columns) if sparse else None
    panels, _, group = prepack_quantized(values, bitmask, torch.rand(rows, columns // group_size), group_size)
    linear = torch.ops.cast24.linear_quantized.default
    return lambda _: linear(x, panels, rows, bits, sparse, group)


def _seconds(call: Callable[[int], object]) -> float:
    start = time.perf_counter()
    call(0)
    return time.perf_counter() - start


def _measured(
    onnx_dir: Path, threads: int, batches: list[int], context: int, steps: int
) -> dict[int, dict[str, float]]:
    """Median seconds by part, from ONNX Runtime's own profile."""
    ids = np.random.default_rng(0).integers(0, read_manifest(onnx_dir).vocab_size, (max(batches), context + steps))
    with tempfile.TemporaryDirectory() as directory:
        model = Steps(onnx_dir, threads, max(batches), context + steps, Path(directory) / "profile")
        for batch in batches:
            for row in range(0, context, 32):
                model.run(ids[:batch, row : min(row + 32, context)], row)
            for step in range(context, context + steps):
                model.run(ids[:batch, step : step + 1], step)
        events = json.loads(Path(model.session.end_profiling()).read_text())
    runs = _runs(events)
    before = -(-context // 32)
    by_batch = {}
    for i, batch in enumerate(batches):
        of_batch = runs[i * (before + steps) + before :][:steps]
        by_batch[batch] = {part: median(run[part] for run in of_batch) for part in PARTS}
    return by_batch


def _runs(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Seconds by part of each run of the graph, in order."""
    of_runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    nodes = [event for event in events if event["name"].endswith("_kernel_time")]
    nodes.sort(key=lambda event: event["ts"])
    found, taken = [], 0
    for run in of_runs:
        parts = dict.fromkeys(PARTS, 0.0)
        end = run["ts"] + run["dur"]
        while taken < len(nodes) and nodes[taken]["ts"] < end:
            parts[part_of(nodes[taken]["name"].removesuffix("_kernel_time"))] += nodes[taken]["dur"] / 1e6
            taken += 1
        parts["rest"] = run["dur"] / 1e6 - sum(seconds for part, seconds in parts.items() if part != "rest")
        found.append(parts)
    return found


def _by_part(seconds: Iterable[tuple[Weight, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for weight, each in seconds:
        sums[weight.part] = sums.get(weight.part, 0.0) + each
    return sums
