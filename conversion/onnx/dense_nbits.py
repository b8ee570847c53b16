"""Rewrite 3, dense and quantized: MatMul -> com.microsoft::MatMulNBits, as the stock builder has it, or our DenseNBits.

These are what 2:4 is compared with: dense models at the bits that a user would otherwise take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

from conversion.errors import InputError
from conversion.onnx.linear import block_weights, lazy, replace_matmul
from conversion.onnx.stacked_layers import check_stacked, stacked_layers
from conversion.panel import ROWS
from conversion.quantization.formats import INT4, INT8, Quantization, dequantize, encode
from conversion.quantization.quantize import quantize_dense
from conversion.quantized_panel import panel_bytes, panel_group, to_quantized_panels

Codes = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By tensor name, codes [N, K] and scales [N, G]."""

INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy_level with activations rounded to 8 bits: its fastest."""


@dataclass(frozen=True)
class DenseQuantization:
    """How the linears of a dense model are quantized, and what multiplies them.

    Attributes:
        weights: int8 or int4, and its groups.
        operator: "MatMulNBits" is ONNX Runtime's, with the stock builder's rounding; "DenseNBits" is ours.
        calibration: text files on which "DenseNBits" makes up for rounding as 2:4 models do; none rounds to nearest.
    """

    weights: Quantization
    operator: Literal["MatMulNBits", "DenseNBits"] = "DenseNBits"
    calibration: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.weights.values not in (INT8, INT4):
            raise InputError(f"a dense model cannot be exported in {self.weights.values.name}: use int8 or int4")
        if self.operator == "MatMulNBits" and self.weights.group_size is None:
            raise InputError("MatMulNBits has scales per group: name a group size")
        if self.operator == "MatMulNBits" and self.calibration:
            raise InputError("MatMulNBits is rounded as the stock builder does: leave calibration text out")


def use_dense_nbits(
    model: ir.Model, quantization: DenseQuantization, model_type: str, calibrated: Codes | None = None
) -> None:
    """Quantize the dense linears of the blocks, and with MatMulNBits lm_head too, as the builder does, in place.

    Weights are quantized one by one when the graph is saved.

    Args:
        model: a graph whose weights [K, N] are those that `calibrated` stands for, where it is given.
        quantization: what to make.
        model_type: of the config.
        calibrated: what `calibrated_codes` found; None rounds to nearest.
    """
    if quantization.operator == "MatMulNBits":
        _use_matmul_nbits(model, quantization.weights)
        return
    graph = model.graph
    for node, weight in block_weights(graph):
        columns, rows = weight.shape.numpy()
        shape = [-(-rows // ROWS), panel_bytes(columns, quantization.weights, sparse=False)]
        name = f"{str(weight.name).removesuffix('MatMul.weight')}panels"
        make = partial(_panels, weight, quantization.weights, model_type, calibrated)
        panels = lazy(name, ir.DataType.UINT8, shape, make)
        graph.register_initializer(panels)
        bits, group = quantization.weights.values.bits, panel_group(quantization.weights)
        attributes = {"N": rows, "K": columns, "bits": bits, "group_size": group, "resident": 1}
        replace_matmul(graph, node, "DenseNBits", [panels], attributes)


def _panels(
    weight: ir.TensorProtocol, quantization: Quantization, model_type: str, calibrated: Codes | None
) -> ir.TensorProtocol:
    if calibrated is None:
        stored, scale = quantize_dense(torch.from_numpy(weight.numpy()).T.contiguous(), quantization)
    else:
        layers = stacked_layers(weight, model_type, calibrated)
        codes, scale = (torch.cat([calibrated[layer][i] for layer in layers]) for i in range(2))
        stored = encode(codes, quantization.values)
        check_stacked(weight, layers, dequantize(stored, None, scale, quantization))
    return ir.tensor(to_quantized_panels(stored, None, scale, quantization).numpy())


def _use_matmul_nbits(model: ir.Model, quantization: Quantization) -> None:
    graph = model.graph
    model.opset_imports["com.microsoft"] = 1
    for node in [node for node in graph if node.op_type == "MatMul"]:
        weight = None if node.inputs[1] is None else node.inputs[1].const_value
        if weight is None:
            continue
        blocks = _Blocks(weight, quantization)
        values = blocks.initializers()
        for value in values:
            graph.register_initializer(value)
        columns, rows = weight.shape.numpy()
        nbits = ir.node(
            "MatMulNBits",
            [node.inputs[0], *values],
            {
                "K": columns,
                "N": rows,
                "bits": quantization.values.bits,
                "block_size": blocks.size,
                "accuracy_level": INT8_ACTIVATIONS,
            },
            domain="com.microsoft",
            name=f"{node.name}NBits",
        )
        ir.convenience.replace_nodes_and_values(graph, node, [node], [nbits], [node.outputs[0]], [nbits.outputs[0]])


class _Blocks:
    """Quantizes a weight when its codes are asked for, and keeps its scales until they are asked for too."""

    def __init__(self, weight: ir.TensorProtocol, quantization: Quantization) -> None:
        assert quantization.group_size is not None
        self._weight = weight
        self._bits = quantization.values.bits
        self.size = quantization.group_size
        self._made: np.ndarray | None = None

    def initializers(self) -> tuple[ir.Value, ir.Value]:
        """Graph values of codes [N, blocks, bytes] uint8 and scales [N, blocks] float32, still to be made."""
        columns, rows = self._weight.shape.numpy()
        blocks = -(-columns // self.size)
        name = f"{self._weight.name}_Q{self._bits}"
        codes = [rows, blocks, self.size * self._bits // 8]
        return (
            lazy(name, ir.DataType.UINT8, codes, self._codes),
            lazy(f"{name}_scales", ir.DataType.FLOAT, [rows, blocks], self._scales),
        )

    def _quantized(self) -> tuple[np.ndarray, np.ndarray]:
        config = DefaultWeightOnlyQuantConfig(block_size=self.size, is_symmetric=True, bits=self._bits)
        codes, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
            np.ascontiguousarray(self._weight.numpy(), np.float32)
        )
        return codes, scales

    def _codes(self) -> ir.TensorProtocol:
        codes, self._made = self._quantized()
        return ir.tensor(codes)

    def _scales(self) -> ir.TensorProtocol:
        scales, self._made = self._quantized()[1] if self._made is None else self._made, None
        return ir.tensor(scales)
