"""Rewrite 4, quantized: embedding and lm_head as cast24::EmbeddingNBits and DenseNBits, which share tied weights."""

import onnx_ir as ir
import torch
from torch import Tensor

from conversion.errors import InputError
from conversion.onnx.dense_linear import EMBEDDING
from conversion.onnx.paged_attention import DOMAIN
from conversion.quantization.formats import Quantization, encode
from conversion.quantization.quantize import quantize_weight
from conversion.quantized_panel import panel_group, to_quantized_panels


def use_quantized_embedding(model: ir.Model, embedding: Tensor, lm_head: Tensor, quantization: Quantization) -> None:
    """Round embedding and lm_head to nearest and let both operators read the codes, in place.

    Args:
        model: a graph that gathers from the embedding and ends in lm_head's MatMul.
        embedding: [V, H] token embedding.
        lm_head: [V, H] weight of lm_head, the very same tensor where the two are tied.
        quantization: int8 or int4, and its groups.

    Raises:
        InputError: H is no multiple of 8.
    """
    graph = model.graph
    rows, columns = embedding.shape
    if columns % 8:
        raise InputError(f"an embedding of {columns} columns cannot be quantized: it must be a multiple of 8")
    attributes = {"K": columns, "bits": quantization.values.bits, "group_size": panel_group(quantization)}

    def panels(weight: Tensor, name: str) -> ir.Value:
        tensor = ir.tensor(_panels(weight.detach().float(), quantization).numpy(), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    shared = panels(embedding, "model.embed_tokens.panels")
    gather = next(use.node for use in graph.initializers[EMBEDDING].uses() if use.node.op_type == "Gather")
    lookup = ir.node(
        "EmbeddingNBits",
        [gather.inputs[1], shared],
        {**attributes, "N": rows},
        domain=DOMAIN,
        name="/model/embed_tokens/EmbeddingNBits",
    )
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], [lookup], [gather.outputs[0]], [lookup.outputs[0]])

    weight = shared if lm_head is embedding else panels(lm_head, "lm_head.panels")
    logits = graph.outputs[0]
    head = logits.producer()
    assert head is not None
    linear = ir.node(
        "DenseNBits",
        [head.inputs[0], weight],
        {**attributes, "N": lm_head.shape[0]},
        domain=DOMAIN,
        name="/lm_head/DenseNBits",
    )
    ir.convenience.replace_nodes_and_values(graph, head, [head], [linear], [logits], [linear.outputs[0]])


def _panels(weight: Tensor, quantization: Quantization) -> Tensor:
    codes, scale = quantize_weight(weight, torch.ones_like(weight, dtype=torch.bool), quantization)
    return to_quantized_panels(encode(codes, quantization.values), None, scale, quantization)
