"""A Hugging Face checkpoint directory, read lazily: its config, its family's scope, its dense tensors."""

from collections.abc import Callable, Iterable
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.compressed_tensors.shards import CompressedShards, description
from conversion.errors import InputError
from conversion.families import LM_HEAD, Family, family_of, in_scope, is_embedding
from conversion.model_config import read_config
from conversion.packed import pack24
from conversion.quantization.formats import Quantization
from conversion.shards import Shards

# Everything beside weights and config that a model directory needs to be used.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Checkpoint:
    """A dense checkpoint; its linears may be 2:4 in value. What compressed-tensors wrote is read as the dense model.

    Attributes:
        directory: where it lies.
        config: the parsed config.json.
        family: naming and storage of its blocks' linears.
        scope: names of the weight tensors that CAST makes 2:4, in checkpoint order.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self.family: Family = family_of(self.config["model_type"])
        if (compressed := description(self.config)) is not None:
            self.shards: Shards = CompressedShards(self.directory, compressed)
            self.config = {key: value for key, value in self.config.items() if value is not compressed}
        elif quantization := self.config.get("quantization_config"):
            method = quantization.get("quant_method")
            raise InputError(
                f"{self.directory} is already quantized or packed ({method}): give the dense model it came from"
            )
        else:
            self.shards = Shards(self.directory)
        self.scope = [name for name, info in self.shards.infos.items() if in_scope(self.family, name, info.shape)]
        check_complete(self.directory, self.config, self.family, self.names, lambda name: self.shards.info(name).shape)
        if not self.scope:
            raise InputError(f"{self.directory} holds no linear layer whose input size is a multiple of 8")

    @cached_property
    def scope_set(self) -> frozenset[str]:
        return frozenset(self.scope)

    @property
    def dense_linears(self) -> list[str]:
        """Weights of linears inside the blocks that stay dense because their input size is no multiple of 8."""
        return [
            name
            for name, info in self.shards.infos.items()
            if name not in self.scope_set
            and len(info.shape) == 2
            and name.endswith(".weight")
            and self.family.block.match(name)
        ]

    @property
    def embedding_tensors(self) -> list[str]:
        """Names of the token embedding and, where it is stored, of lm_head."""
        return [name for name in self.names if is_embedding(self.family, name)]

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.shards.infos)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The narrowest floating dtype that holds every weight exactly."""
        return widest(info.dtype for info in self.shards.infos.values())

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored."""
        return self.shards.tensor(name)

    def linear_weight(self, name: str) -> Tensor:
        """Weight tensor `name` of the scope as [N=out, K=in], whichever way it is stored."""
        weight = self.tensor(name)
        return weight.T if self.family.transposed else weight

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a weight tensor of the scope."""
        rows, columns = self.shards.info(name).shape
        return (columns, rows) if self.family.transposed else (rows, columns)

    @property
    def quantization(self) -> Quantization | None:
        """How its weights already are quantized; None if they are not."""
        return self.shards.quantization if isinstance(self.shards, CompressedShards) else None

    def first_violation(self) -> str | None:
        """Say which tensor, row and group is the first that is not 2:4; None if the whole scope is."""
        for name in self.scope:
            try:
                pack24(self.linear_weight(name))
            except InputError as error:
                return f"tensor '{name}', {error}"
        return None


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype to which all floating dtypes of a checkpoint convert exactly."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return reduce(torch.promote_types, floating, floating[0])


def check_complete(
    directory: Path,
    config: dict[str, Any],
    family: Family,
    names: list[str],
    shape_of: Callable[[str], tuple[int, ...]],
) -> None:
    """Refuse a checkpoint that lacks a tensor of its model, or whose blocks differ in their tensors' shapes.

    All families here repeat one block, so what one block has, every block must have.
    """
    blocks: dict[str, dict[str, str]] = {}
    for name in names:
        if match := family.block.match(name):
            blocks.setdefault(match.group(), {})[name[match.end() :]] = name
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if not blocks or (layers is not None and len(blocks) != layers):
        raise InputError(f"{directory} holds {len(blocks)} of {layers} layers: copy or make the checkpoint again")
    outside = {".".join(name.split(".")[-2:]) for name in names}
    tied = config.get("tie_word_embeddings", family.ties_embeddings)
    for expected in (family.embedding, *family.outside, *(() if tied else (LM_HEAD,))):
        if expected not in outside:
            raise _missing(expected, directory)
    first = {part: name for block in reversed(blocks.values()) for part, name in block.items()}
    for block, tensors in blocks.items():
        for part, example in first.items():
            if part not in tensors:
                raise _missing(block + part, directory)
            if shape_of(tensors[part]) != shape_of(example):
                raise InputError(
                    f"tensor '{block}{part}' has shape {list(shape_of(tensors[part]))}, but '{example}' has "
                    f"{list(shape_of(example))}: copy or make the checkpoint again"
                )


def _missing(name: str, directory: Path) -> InputError:
    return InputError(f"tensor '{name}' is missing from {directory}: copy or make the checkpoint again")
