"""MatMul with a 2:4 weight -> cast24::Sparse24MatMulGpu with the weight in the order that the GPU reads it."""

from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from cast_serve.kernels.cuda import nvrtc, weight_only
from cast_serve.kernels.cuda.layout import LANES, ROWS, STEP, to_fragments
from cast_serve.kernels.cuda.plan import Types
from cast_serve.kernels.cuda.source import source
from conversion.onnx.linear import block_weights, lazy, replace_matmul
from conversion.onnx.paged_attention import DOMAIN
from conversion.onnx.quantized_matmul import packed_parts
from conversion.packed import pack24
from conversion.packed_checkpoint import PackedCheckpoint
from conversion.quantization.formats import FP8, Quantization

ARCHITECTURE = "compute_80"
"""The oldest that has mma.sp; the driver makes machine code of it for whatever newer GPU it finds."""


def use_gpu_matmul(model: ir.Model, checkpoint: PackedCheckpoint | None) -> int:
    """Replace the MatMul of every linear in the blocks whose input size is a multiple of 8, in place; return how many.

    Weights are packed when the graph is saved, one linear at a time. The kernels' code is one more initializer, PTX,
    which all operators share.

    Args:
        model: a float16 graph whose in-scope weights [K, N] are 2:4 along K.
        checkpoint: where quantized values come from; None if the graph's are to be kept.

    Raises:
        InputError: groups that the GPU's kernel has no multiple of, or no NVRTC.
    """
    quantization = None if checkpoint is None else checkpoint.quantization
    bits = 16 if quantization is None else quantization.values.bits
    attributes = {"bits": bits, "group_size": 0}
    if quantization is not None and quantization.group_size is not None:
        weight_only.check_group_size(quantization.group_size)
        attributes["group_size"] = quantization.group_size
    graph = model.graph
    model.opset_imports[DOMAIN] = 1
    code = _code(quantization)
    graph.register_initializer(code)
    replaced = block_weights(graph)
    for node, weight in replaced:
        columns, rows = weight.shape.numpy()
        if quantization is None:
            size, pack = _float_size(rows, columns), partial(_float_bytes, weight)
        else:
            assert checkpoint is not None
            size = weight_only.packed_bytes(rows, columns, bits, quantization.group_size)
            pack = partial(_quantized_bytes, weight, checkpoint)
        name = str(weight.name).replace("MatMul.weight", "packed")
        packed = lazy(name, ir.DataType.UINT8, [size], pack)
        graph.register_initializer(packed)
        replace_matmul(graph, node, "Sparse24MatMulGpu", [packed, code], {"N": rows, "K": columns, **attributes})
    return len(replaced)


def _code(quantization: Quantization | None) -> ir.Value:
    weight = "Fp16"
    if quantization is not None:
        weight = "F8" if quantization.values is FP8 else f"W{quantization.values.bits}"
    ptx = nvrtc.compile_source(source(Types(weight, "Fp16")), ARCHITECTURE).code.rstrip(b"\0")
    data = np.frombuffer(ptx, np.uint8)
    return ir.Value(
        name="cast24.kernels",
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape(data.shape),
        const_value=ir.tensor(data, name="cast24.kernels"),
    )


def _float_size(rows: int, columns: int) -> int:
    """Of fragments and metadata: 36 bytes for each lane and step."""
    return -(-rows // ROWS) * -(-columns // STEP) * LANES * (32 + 4)


def _float_bytes(weight: ir.TensorProtocol) -> ir.TensorProtocol:
    values, bitmask = pack24(torch.from_numpy(weight.numpy()).T)
    fragments, metadata = to_fragments(values, bitmask)
    return _tensor(torch.cat([fragments.view(torch.uint8).flatten(), metadata.view(torch.uint8).flatten()]))


def _quantized_bytes(weight: ir.TensorProtocol, checkpoint: PackedCheckpoint) -> ir.TensorProtocol:
    assert checkpoint.quantization is not None
    parts = packed_parts(checkpoint, weight)
    return _tensor(weight_only.packed_in_fragments(*parts, checkpoint.quantization.group_size))


def _tensor(data: Tensor) -> ir.TensorProtocol:
    return ir.tensor(data.view(torch.uint8).numpy())
