"""Which tensors of a checkpoint become 2:4: every linear inside the transformer blocks (CAST, Sec. III).

Embeddings, lm_head and norms stay dense. Works on names and shapes alone, so that training, conversion and inspection
agree on the scope without loading a model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from conversion.errors import InputError


@dataclass(frozen=True)
class Family:
    """How one model family names and stores the linears of its blocks.

    Attributes:
        block: pattern that a tensor name inside a transformer block starts with.
        embedding: last part of the token embedding's name.
        transposed: True where checkpoints store weights as [in, out] (GPT-2's Conv1D) instead of [out, in].
        outside: last parts of the names of the other tensors outside the blocks, lm_head apart.
        residual_adders: a block's linears whose outputs are added to the residual stream, each with the module that
            reads the stream before.
        ties_embeddings: whether lm_head shares the embedding where config.json does not say.
    """

    block: re.Pattern[str]
    embedding: str
    outside: tuple[str, ...]
    residual_adders: dict[str, str]
    transposed: bool = False
    ties_embeddings: bool = False


_LLAMA = Family(
    re.compile(r"(model\.)?layers\.\d+\."),
    "embed_tokens.weight",
    ("norm.weight",),
    {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
)

LM_HEAD = "lm_head.weight"

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "gpt2": Family(
        re.compile(r"(transformer\.)?h\.\d+\."),
        "wte.weight",
        ("wpe.weight", "ln_f.weight", "ln_f.bias"),
        {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
        transposed=True,
        ties_embeddings=True,
    ),
    "opt": Family(
        re.compile(r"(model\.)?(decoder\.)?layers\.\d+\."),
        "embed_tokens.weight",
        ("embed_positions.weight",),
        {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
        ties_embeddings=True,
    ),
}


def family_of(model_type: str) -> Family:
    """Return the family of a config's `model_type`; InputError names the supported ones otherwise."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise InputError(
            f"model type '{model_type}' is not supported: use a model of type {', '.join(FAMILIES)}"
        ) from None


def place_in_blocks(family: Family, name: str) -> str:
    """'model.layers.0.mlp.up_proj' -> '0.mlp.up_proj', which lacks the prefix that checkpoints differ in.

    Names outside the blocks stay as they are.
    """
    match = family.block.match(name)
    return name if match is None else match.group().split(".")[-2] + "." + name[match.end() :]


def is_embedding(family: Family, name: str) -> bool:
    """Tell whether checkpoint tensor `name` is the token embedding or lm_head."""
    return name == LM_HEAD or f".{name}".endswith(f".{family.embedding}")


def in_scope(family: Family, name: str, shape: Sequence[int]) -> bool:
    """Tell whether checkpoint tensor `name` is a linear weight that CAST makes 2:4.

    A linear whose input size K is no multiple of 8 cannot be packed (a bitmask byte covers 8 columns) and stays dense.
    """
    if len(shape) != 2 or not name.endswith(".weight") or not family.block.match(name):
        return False
    input_size = shape[0] if family.transposed else shape[1]
    return input_size % 8 == 0
