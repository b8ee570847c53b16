"""Rewrite 4: lm_head as cast24::DenseLinear over a row-major weight, which a tied embedding shares."""

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from conversion.onnx.paged_attention import DOMAIN

EMBEDDING = "model.embed_tokens.weight"


def use_dense_linear(model: ir.Model, embedding: torch.Tensor, lm_head: torch.Tensor) -> None:
    """Replace lm_head's MatMul, whose weight is [H, V], by an operator that takes [V, H], in place.

    A tied embedding is then held once, for the Gather and for the logits. Weights that the checkpoint holds as bfloat16
    stay bfloat16; all others are float32.

    Args:
        model: a graph that ends in lm_head's MatMul.
        embedding: [V, H] token embedding.
        lm_head: [V, H] weight of lm_head, the very same tensor where the two are tied.
    """
    graph = model.graph
    logits = graph.outputs[0]
    head = logits.producer()
    assert head is not None
    shared = graph.initializers[EMBEDDING]
    if embedding.dtype == torch.bfloat16:
        _store_as_bfloat16(graph, shared, embedding)
    weight = shared
    if lm_head is not embedding:
        tensor = _stored(lm_head, "lm_head.weight")
        weight = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(weight)
    linear = ir.node("DenseLinear", [head.inputs[0], weight], domain=DOMAIN, name="/lm_head/DenseLinear")
    ir.convenience.replace_nodes_and_values(graph, head, [head], [linear], [logits], [linear.outputs[0]])


def _store_as_bfloat16(graph: ir.Graph, embedding: ir.Value, weight: torch.Tensor) -> None:
    """Hold the embedding as bfloat16 and widen the gathered rows."""
    gather = next(use.node for use in embedding.uses() if use.node.op_type == "Gather")
    embedding.const_value = TorchTensor(weight, name=embedding.name)
    embedding.dtype = ir.DataType.BFLOAT16
    rows = gather.outputs[0]
    cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT}, name="/model/embed_tokens/Cast")
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, rows.shape
    ir.convenience.replace_all_uses_with(rows, cast.outputs[0])
    cast.replace_input_with(0, rows)
    rows.dtype = ir.DataType.BFLOAT16
    graph.insert_after(gather, cast)


def _stored(weight: torch.Tensor, name: str) -> TorchTensor:
    return TorchTensor(weight if weight.dtype == torch.bfloat16 else weight.float(), name=name)
