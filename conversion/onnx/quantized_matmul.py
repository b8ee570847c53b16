"""Rewrite 3, quantized: MatMul with a packed weight -> cast24::Sparse24MatMulNBits with panels."""

import onnx_ir as ir
import torch
from torch import Tensor

from conversion.onnx.linear import block_weights, lazy, replace_matmul
from conversion.onnx.stacked_layers import check_stacked, stacked_layers
from conversion.packed_checkpoint import PackedCheckpoint
from conversion.panel import ROWS
from conversion.quantization.formats import Quantization, dequantize
from conversion.quantized_panel import panel_bytes, panel_group, to_quantized_panels


def use_quantized_matmul(model: ir.Model, source: PackedCheckpoint, *, float_activations: bool) -> None:
    """Replace the MatMul of every packed linear, in place.

    Args:
        model: a graph whose in-scope weights [K, N] are those of `source`, dequantized.
        source: a checkpoint of int8 or int4 values.
        float_activations: multiply by activations as they are, instead of rounded to 8 bits.
    """
    graph = model.graph
    for node, weight in block_weights(graph):
        panels = _Panels(weight, source)
        value = panels.initializer()
        graph.register_initializer(value)
        attributes = {**panels.attributes(), "float_activations": int(float_activations)}
        replace_matmul(graph, node, "Sparse24MatMulNBits", [value], attributes)


def packed_parts(source: PackedCheckpoint, weight: ir.TensorProtocol) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values, bitmask, scale) of the layers that the graph has as one `weight` [K, N], in its rows' order.

    InputError if they are not what the graph multiplies by.
    """
    assert source.quantization is not None
    layers = stacked_layers(weight, source.config["model_type"], source.sparse_layers)
    parts = [(*source.packed(layer), source.scale(layer)) for layer in layers]
    stored, bitmask, scale = (torch.cat([part[i] for part in parts]) for i in range(3))  # type: ignore[misc]
    check_stacked(weight, layers, dequantize(stored, bitmask, scale, source.quantization))
    return stored, bitmask, scale


class _Panels:
    """Reads a fused linear's packed parts when its panels are asked for."""

    def __init__(self, weight: ir.TensorProtocol, source: PackedCheckpoint) -> None:
        assert source.quantization is not None
        self._weight = weight
        self._source = source
        self._quantization: Quantization = source.quantization
        self.columns, self.rows = weight.shape.numpy()

    def attributes(self) -> dict[str, int]:
        bits, group = self._quantization.values.bits, panel_group(self._quantization)
        return {"N": self.rows, "K": self.columns, "bits": bits, "group_size": group}

    def initializer(self) -> ir.Value:
        """A graph value of the panels, still to be made."""
        shape = [-(-self.rows // ROWS), panel_bytes(self.columns, self._quantization, sparse=True)]
        name = f"{str(self._weight.name).removesuffix('MatMul.weight')}panels"
        return lazy(name, ir.DataType.UINT8, shape, self._make)

    def _make(self) -> ir.TensorProtocol:
        parts = packed_parts(self._source, self._weight)
        return ir.tensor(to_quantized_panels(*parts, self._quantization).numpy())
