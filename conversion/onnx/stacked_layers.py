"""Which of a checkpoint's layers a weight of the graph is made of: the builder stacks q, k and v into one."""

import re
from collections.abc import Iterable

import onnx_ir as ir
import torch
from torch import Tensor

from conversion.errors import InputError

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
_STACKED: dict[str, dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"), _LLAMA),
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


def stacked_layers(weight: ir.TensorProtocol, model_type: str, layers: Iterable[str]) -> list[str]:
    """Return those of a checkpoint's `layers` whose rows the graph has as one `weight` [K, N], in its order.

    `layers` are names of layers or of their weight tensors.
    """
    block, role = _place(str(weight.name).removesuffix(".MatMul.weight"))
    by_place = {_place(layer): layer for layer in layers}
    return [by_place[block, part] for part in _STACKED[model_type][role]]


def check_stacked(weight: ir.TensorProtocol, layers: list[str], dequantized: Tensor) -> None:
    """InputError unless the graph multiplies by the quantized weight [N, K] of these layers."""
    given = torch.from_numpy(weight.numpy()).T
    if not torch.equal(dequantized.to(given.dtype), given):
        raise InputError(
            f"the graph's {weight.name} is not {' + '.join(layers)}: this architecture cannot be exported with "
            "quantized values"
        )


def _place(layer: str) -> tuple[int, str]:
    """'model.layers.3.self_attn.q_proj', with or without '.weight' -> (3, 'self_attn.q_proj'), for every prefix."""
    match = re.fullmatch(r"(?:\w+\.)*?(?:layers|h)\.(\d+)\.(.+?)(?:\.weight)?", layer)
    assert match is not None
    return int(match[1]), match[2]
