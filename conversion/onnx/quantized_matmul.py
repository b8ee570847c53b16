"""Rewrite 3, quantized: MatMul with a packed weight -> cast24::Sparse24MatMulNBits with panels."""

import re

import onnx_ir as ir
import torch
from torch import Tensor

from conversion.errors import InputError
from conversion.onnx.linear import block_weights, lazy, replace_matmul
from conversion.packed_checkpoint import PackedCheckpoint
from conversion.panel import ROWS
from conversion.quantization.formats import Quantization, dequantize
from conversion.quantized_panel import panel_bytes, panel_group, to_quantized_panels

# The builder's names of a block's linears -> the checkpoint's, whose rows follow one another.
_LLAMA = {
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_proj": ("self_attn.q_proj",),
    "attn.k_proj": ("self_attn.k_proj",),
    "attn.v_proj": ("self_attn.v_proj",),
    "attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj",),
    "mlp.up_proj": ("mlp.up_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}
_SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gpt2": {
        "attn.qkv_proj": ("attn.c_attn",),
        "attn.o_proj": ("attn.c_proj",),
        "mlp.fc1": ("mlp.c_fc",),
        "mlp.fc2": ("mlp.c_proj",),
    },
    "opt": {
        "attn.qkv_proj": _LLAMA["attn.qkv_proj"],
        "attn.o_proj": ("self_attn.out_proj",),
        "mlp.fc1": ("fc1",),
        "mlp.fc2": ("fc2",),
    },
}


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
    block, role = _split(str(weight.name))
    by_place = {_place(layer): layer for layer in source.sparse_layers}
    layers = [by_place[block, part] for part in _SOURCES[source.config["model_type"]][role]]
    parts = [(*source.packed(layer), source.scale(layer)) for layer in layers]
    stored, bitmask, scale = (torch.cat([part[i] for part in parts]) for i in range(3))  # type: ignore[misc]
    given = torch.from_numpy(weight.numpy()).T
    if not torch.equal(dequantize(stored, bitmask, scale, source.quantization).to(given.dtype), given):
        raise InputError(
            f"the graph's {weight.name} is not {' + '.join(layers)}: this architecture cannot be exported with "
            "quantized values"
        )
    return stored, bitmask, scale


def _place(layer: str) -> tuple[int, str]:
    """'model.layers.3.self_attn.q_proj' -> (3, 'self_attn.q_proj'), for every family's prefix."""
    match = re.fullmatch(r"(?:\w+\.)*?(?:layers|h)\.(\d+)\.(.+)", layer)
    assert match is not None
    return int(match[1]), match[2]


def _split(weight: str) -> tuple[int, str]:
    """'model.layers.3.attn.qkv_proj.MatMul.weight' -> (3, 'attn.qkv_proj')."""
    return _place(weight.removesuffix(".MatMul.weight"))


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
