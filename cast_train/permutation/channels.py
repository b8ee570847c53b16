"""Which weights share channels, so that these can change places together and the model computes what it did."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_train.sparse_model import linear_weight, scope
from conversion.block_walk import transformer_blocks

MLP, VALUES, RESIDUAL = "MLP", "values", "residual stream"


@dataclass(frozen=True)
class Axis:
    """`size` channels of a tensor, along axis `dim` from `start` on."""

    tensor: Tensor
    dim: int
    start: int
    size: int

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Put channel order[i] in place i."""
        part = self.tensor.narrow(self.dim, self.start, self.size)
        part.copy_(part.index_select(self.dim, order))


@dataclass(frozen=True)
class Reader:
    """A linear whose inputs `start` to `start + size` are channels of a set."""

    linear: nn.Linear | Conv1D
    start: int = 0


@dataclass(frozen=True)
class Channels:
    """A set of channels that can change places.

    Attributes:
        kind: what they are.
        size: how many.
        readers: linears that take them in; one with several heads may do so several times.
        others: where else they lie: outputs of linears, norms, embeddings.
    """

    kind: str
    size: int
    readers: list[Reader]
    others: list[Axis] = field(default_factory=list)

    def reorder(self, order: Tensor) -> None:
        """Put channel order[i] in place i, everywhere."""
        for reader in self.readers:
            Axis(linear_weight(reader.linear), 1, reader.start, self.size).reorder(order)
        for axis in self.others:
            axis.reorder(order)

    def add_outputs(self, linear: nn.Linear | Conv1D, start: int = 0) -> None:
        """Note that outputs `start` on of a linear are these channels."""
        self.others.append(Axis(linear_weight(linear), 0, start, self.size))
        if linear.bias is not None:
            self.others.append(Axis(linear.bias, 0, start, self.size))


def channels_of(model: PreTrainedModel) -> Iterator[Channels]:
    """Yield the sets of channels of a model that 2:4 linears read: of each MLP, each value head, the residual stream.

    Queries and keys are left out: their order is that of the rotary embedding.
    """
    config = model.config
    prunable = {module for _, module in scope(model)}
    parts_of = _FAMILIES.get(config.model_type, _llama)
    heads = config.num_attention_heads
    value_heads = getattr(config, "num_key_value_heads", None) or heads
    residual = Channels(RESIDUAL, config.hidden_size, [])
    blocks = transformer_blocks(model)
    for block in blocks:
        parts = parts_of(block)
        if parts.mlp_out in prunable:
            mlp = Channels(MLP, linear_weight(parts.mlp_out).shape[1], [Reader(parts.mlp_out)])
            for linear in parts.mlp_in:
                mlp.add_outputs(linear)
            yield mlp
        size = linear_weight(parts.attention_out).shape[1] // heads
        if parts.attention_out in prunable and size % 4 == 0:
            sharing = heads // value_heads
            for head in range(value_heads):
                starts = range(head * sharing * size, (head + 1) * sharing * size, size)
                values = Channels(VALUES, size, [Reader(parts.attention_out, start) for start in starts])
                values.add_outputs(parts.value, parts.value_start + head * size)
                yield values
        readers = dict.fromkeys((*parts.attention_in, *parts.mlp_in))
        residual.readers.extend(map(Reader, readers))
        for linear in (parts.attention_out, parts.mlp_out):
            residual.add_outputs(linear)
        for norm in block.children():
            if norm not in readers and not isinstance(norm, nn.Linear | Conv1D) and not any(norm.children()):
                residual.others.extend(Axis(p, 0, 0, residual.size) for p in norm.parameters())
    if all(reader.linear in prunable for reader in residual.readers):
        residual.others.extend(_outside(model, blocks, residual.size))
        yield residual


def _outside(model: PreTrainedModel, blocks: list[nn.Module], hidden: int) -> Iterator[Axis]:
    """Yield where the residual stream lies outside the blocks: embeddings, final norm, lm_head."""
    seen = {id(p) for block in blocks for p in block.parameters()}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            # OPT projects a narrower embedding into the stream, and out of it again
            dim = 0 if p.dim() == 1 or name.endswith("project_in") else 1
            if id(p) not in seen and p.shape[dim] == hidden:
                yield Axis(p, dim, 0, hidden)
            seen.add(id(p))  # lm_head may be the embedding


@dataclass(frozen=True)
class _Parts:
    """A block's linears by what they read and write; the values are outputs `value_start` on of `value`."""

    attention_in: tuple[Any, ...]
    value: Any
    value_start: int
    attention_out: Any
    mlp_in: tuple[Any, ...]
    mlp_out: Any


def _llama(block: Any) -> _Parts:
    at, mlp = block.self_attn, block.mlp
    return _Parts(
        (at.q_proj, at.k_proj, at.v_proj), at.v_proj, 0, at.o_proj, (mlp.gate_proj, mlp.up_proj), mlp.down_proj
    )


def _gpt2(block: Any) -> _Parts:
    at, mlp = block.attn, block.mlp
    return _Parts((at.c_attn,), at.c_attn, 2 * at.embed_dim, at.c_proj, (mlp.c_fc,), mlp.c_proj)


def _opt(block: Any) -> _Parts:
    at = block.self_attn
    return _Parts((at.q_proj, at.k_proj, at.v_proj), at.v_proj, 0, at.out_proj, (block.fc1,), block.fc2)


_FAMILIES: dict[str, Callable[[Any], _Parts]] = {"gpt2": _gpt2, "opt": _opt}
