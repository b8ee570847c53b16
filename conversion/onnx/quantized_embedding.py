"""Rewrite 4, quantized: embedding and lm_head as cast24::EmbeddingNBits and DenseNBits, which share tied weights."""

import onnx_ir as ir
from torch import Tensor

from conversion.onnx.dense_linear import EMBEDDING
from conversion.onnx.paged_attention import DOMAIN
from conversion.quantization.formats import Quantization
from conversion.quantized_panel import panel_group, to_quantized_panels


def use_quantized_embedding(
    model: ir.Model,
    embedding: tuple[Tensor, Tensor],
    lm_head: tuple[Tensor, Tensor],
    quantization: Quantization,
    *,
    float_activations: bool,
) -> None:
    """Let both operators read codes, in place.

    Args:
        model: a graph that gathers from the embedding and ends in lm_head's MatMul.
        embedding: codes as stored, [V, H] (4-bit: [V, H/2]), and scales [V, G] of the token embedding.
        lm_head: the same of lm_head; the very same pair where the two are tied.
        quantization: int8 or int4, and its groups.
        float_activations: multiply lm_head by activations as they are, instead of rounded to 8 bits.
    """
    graph = model.graph
    rows, columns = embedding[0].shape[0], embedding[0].shape[1] * 8 // quantization.values.bits
    attributes = {"K": columns, "bits": quantization.values.bits, "group_size": panel_group(quantization)}

    def panels(weight: tuple[Tensor, Tensor], name: str) -> ir.Value:
        stored, scale = weight
        tensor = ir.tensor(to_quantized_panels(stored, None, scale, quantization).numpy(), name=name)
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
        [head.inputs[0], weight, None, None, None],
        {**attributes, "N": lm_head[0].shape[0], "float_activations": int(float_activations)},
        domain=DOMAIN,
        name="/lm_head/DenseNBits",
    )
    ir.convenience.replace_nodes_and_values(graph, head, [head], [linear], [logits], [linear.outputs[0]])
