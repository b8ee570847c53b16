"""Rewrite 1: GroupQueryAttention over padded batches -> cast24::PagedAttention over ragged ones."""

import onnx_ir as ir
from transformers import PretrainedConfig

DOMAIN = "cast24"


def use_paged_attention(model: ir.Model, config: PretrainedConfig, cache: ir.DataType) -> None:
    """Replace every attention node and the graph's inputs and outputs, in place; the mask subgraph is left unused.

    Inputs become input_ids int64 [1, T] (all sequences' new tokens, one after the other), position_ids int64 [1, T]
    where the graph has learned positions, block_table int32 [B, max_blocks], past_lens int32 [B], cu_seqlens int32
    [B + 1], and key_cache.i and value_cache.i [num_blocks, block_size, kv_heads, head_dim] of dtype `cache`, float32 or
    bfloat16, which the operator writes in place. The only output is logits.
    """
    graph = model.graph
    model.opset_imports[DOMAIN] = 1
    tokens = [_retype(value, [1, "T"]) for value in graph.inputs if value.name in ("input_ids", "position_ids")]
    block_table = _input("block_table", ir.DataType.INT32, ["B", "max_blocks"])
    past_lens = _input("past_lens", ir.DataType.INT32, ["B"])
    cu_seqlens = _input("cu_seqlens", ir.DataType.INT32, ["B + 1"])
    graph.outputs[:] = [value for value in graph.outputs if value.name == "logits"]
    caches = []
    for layer, node in enumerate([node for node in graph if node.op_type == "GroupQueryAttention"]):
        attributes = {key: node.attributes[key].value for key in _KEPT_ATTRIBUTES}
        shape = ["num_blocks", "block_size", attributes["kv_num_heads"], head_dim(config)]
        both = [_input(f"{which}_cache.{layer}", cache, shape) for which in ("key", "value")]
        caches += both
        query, key, value = (_present(node.inputs[i]) for i in range(3))
        cos, sin = (_present(node.inputs[i]) for i in (7, 8))
        paged = ir.node(
            "PagedAttention",
            [query, key, value, *both, block_table, past_lens, cu_seqlens, cos, sin],
            attributes | {"local_window_size": attention_window(config, layer)},
            domain=DOMAIN,
            name=str(node.name).replace("GroupQueryAttention", "PagedAttention"),
        )
        ir.convenience.replace_nodes_and_values(graph, node, [node], [paged], [node.outputs[0]], [paged.outputs[0]])
    graph.inputs[:] = [*tokens, block_table, past_lens, cu_seqlens, *caches]


def attention_window(config: PretrainedConfig, layer: int) -> int:
    """How many tokens, itself included, a token of this layer attends to; -1 for all. As transformers masks them.

    The stock builder's attribute is not used: it forgets Mistral's window.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    sliding = layer_types[layer] == "sliding_attention" if layer_types else config.model_type == "mistral"
    return window if sliding and window is not None else -1


_KEPT_ATTRIBUTES = ("num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved", "softcap")


def _present(value: ir.Value | None) -> ir.Value | None:
    return value if value is not None and value.name else None


def _retype(value: ir.Value, shape: list[int | str]) -> ir.Value:
    value.shape = ir.Shape(shape)
    return value


def _input(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def head_dim(config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
