"""What is timed: one linear layer, dense as torch and ONNX Runtime do it, and 2:4 as our kernels do it.

A candidate is called with a counter, by which it rotates through copies of its weight and through inputs, so that every
call reads the weight from memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from cast_serve.kernels import prepack, prepack_quantized

ROTATED_BYTES = 384 << 20
"""Of each candidate's weights: much more than a last-level cache, which keeps a part of what just exceeds it."""
ORT_BLOCK = 128
"""Columns that share a scale in ORT's 8-bit MatMulNBits: with more scales it is slower."""


@dataclass(frozen=True)
class Candidate:
    """A call, and the bytes of weights that it reads."""

    call: Callable[[int], object]
    weight_bytes: int


def copies(bytes_each: int) -> range:
    return range(max(2, -(-ROTATED_BYTES // bytes_each)))


def candidates(rows: int, columns: int, x: list[Tensor]) -> dict[str, Candidate]:
    """All candidates by name, of a layer [rows, columns]; x are inputs [M, columns], float32."""
    return {
        "torch fp32": torch_dense(rows, columns, torch.float32, x),
        "ort fp32": ort_dense(rows, columns, x),
        "torch bf16": torch_dense(rows, columns, torch.bfloat16, x),
        "torch int8": torch_int8(rows, columns, x),
        "ort int8": ort_nbits(rows, columns, 8, ORT_BLOCK, x),
        "torch int4 g128": torch_int4(rows, columns, 128, x),
        "ort int4 g32": ort_nbits(rows, columns, 4, 32, x),
        "ort int4 g128": ort_nbits(rows, columns, 4, 128, x),
        "2:4 fp32": sparse(rows, columns, torch.float32, x),
        "2:4 bf16": sparse(rows, columns, torch.bfloat16, x),
        "2:4 int8": sparse_quantized(rows, columns, 8, None, x),
        "2:4 int4 g64": sparse_quantized(rows, columns, 4, 64, x),
        "2:4 int4 g128": sparse_quantized(rows, columns, 4, 128, x),
    }


def memory_read() -> Candidate:
    """512 MB summed by all threads: the bound at M = 1. Timed in turn with the candidates: memory's speed drifts."""
    # numpy gets huge pages, as prepack does. No two pages are equal: the host of a virtual machine may keep those once.
    data = torch.from_numpy(np.random.default_rng(0).random(128 << 20, dtype=np.float32))
    return Candidate(lambda _: data.sum(), data.nbytes)


BASELINES = {
    "fp32": ("torch fp32", "ort fp32"),
    "bf16": ("torch bf16",),
    "int8": ("torch int8", "ort int8"),
    "int4": ("torch int4 g128", "ort int4 g32", "ort int4 g128"),
}
"""Dense candidates by what their users chose; a speed-up is over the fastest of a kind."""


def random_bitmask(rows: int, columns: int) -> Tensor:
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8)[torch.randint(6, (rows, columns // 8, 2))]
    return nibbles[..., 0] | nibbles[..., 1] << 4


def sparse(rows: int, columns: int, dtype: torch.dtype, x: list[Tensor]) -> Candidate:
    values, bitmask = torch.randn(rows, columns // 2).to(dtype), random_bitmask(rows, columns)
    weight_bytes = values.nbytes + bitmask.nbytes
    weights = [prepack(values, bitmask) for _ in copies(weight_bytes)]
    linear = torch.ops.cast24.linear_packed.default
    return Candidate(lambda i: linear(x[i % len(x)], *weights[i % len(weights)], rows), weight_bytes)


def sparse_quantized(rows: int, columns: int, bits: int, group_size: int | None, x: list[Tensor]) -> Candidate:
    dtype = torch.int8 if bits == 8 else torch.uint8
    info = torch.iinfo(dtype)
    values = torch.randint(info.min + 1, info.max + 1, (rows, columns // 2 * bits // 8), dtype=dtype)
    scale = torch.rand(rows, -(-columns // (group_size or columns)))
    bitmask = random_bitmask(rows, columns)
    weight_bytes = values.nbytes + bitmask.nbytes + scale.nbytes
    weights = [prepack_quantized(values, bitmask, scale, group_size) for _ in copies(weight_bytes)]
    linear = torch.ops.cast24.linear_quantized.default

    def call(i: int) -> Tensor:
        panels, bits, group = weights[i % len(weights)]
        result: Tensor = linear(x[i % len(x)], panels, rows, bits, True, group)
        return result

    return Candidate(call, weight_bytes)


def torch_dense(rows: int, columns: int, dtype: torch.dtype, x: list[Tensor]) -> Candidate:
    weight = torch.randn(rows, columns).to(dtype)
    weights = [weight.clone() for _ in copies(weight.nbytes)]
    inputs = [x_.to(dtype) for x_ in x]
    linear = torch.nn.functional.linear
    return Candidate(lambda i: linear(inputs[i % len(x)], weights[i % len(weights)]), weight.nbytes)


def torch_int8(rows: int, columns: int, x: list[Tensor]) -> Candidate:
    """Dynamic quantization: one scale per weight row, activations rounded to 8 bits per call."""
    weight = torch.randn(rows, columns)
    quantized = torch.quantize_per_channel(
        weight, weight.abs().amax(1) / 127, torch.zeros(rows, dtype=torch.long), 0, torch.qint8
    )
    weight_bytes = rows * columns + 4 * rows
    weights = [torch.ops.quantized.linear_prepack(quantized, None) for _ in copies(weight_bytes)]
    linear = torch.ops.quantized.linear_dynamic
    return Candidate(lambda i: linear(x[i % len(x)], weights[i % len(weights)], True), weight_bytes)


def torch_int4(rows: int, columns: int, group_size: int, x: list[Tensor]) -> Candidate:
    """Weight-only quantization with bfloat16 activations."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (rows, columns), dtype=torch.int32), 2
    )
    scales = torch.rand(columns // group_size, rows, 2).bfloat16()
    weight_bytes = packed.nbytes + scales.nbytes
    weights = [packed.clone() for _ in copies(weight_bytes)]
    inputs = [x_.bfloat16() for x_ in x]
    linear = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Candidate(lambda i: linear(inputs[i % len(x)], weights[i % len(weights)], group_size, scales), weight_bytes)


def ort_dense(rows: int, columns: int, x: list[Tensor]) -> Candidate:
    weight = np.random.default_rng(0).standard_normal((columns, rows), dtype=np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    return _ort(node, {"w": weight}, rows, columns, x)


def ort_nbits(rows: int, columns: int, bits: int, block: int, x: list[Tensor]) -> Candidate:
    """MatMulNBits at accuracy level 4 (activations rounded to 8 bits), its fastest."""
    rng = np.random.default_rng(0)
    blocks = -(-columns // block)
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "w", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    weight = rng.integers(0, 256, (rows, blocks, block * bits // 8), dtype=np.uint8)
    return _ort(node, {"w": weight, "scales": rng.random(rows * blocks, np.float32)}, rows, columns, x)


def _ort(node: onnx.NodeProto, constants: dict[str, np.ndarray], rows: int, columns: int, x: list[Tensor]) -> Candidate:
    """One session per copy of the weight, each of a single node; they share the process's thread pool."""
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", columns])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["M", rows])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    serialized = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # With pools of their own, one session's idle threads would spin on the cores that the next one needs.
    options.use_per_session_threads = False
    weight_bytes = sum(array.nbytes for array in constants.values())
    sessions = [
        onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        for _ in copies(weight_bytes)
    ]
    inputs = [x_.numpy() for x_ in x]
    return Candidate(lambda i: sessions[i % len(sessions)].run(None, {"x": inputs[i % len(x)]}), weight_bytes)
