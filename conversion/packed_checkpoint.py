"""Reading the packed checkpoint, format version 1."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.checkpoint import Checkpoint, check_complete, widest
from conversion.errors import InputError
from conversion.families import Family, family_of, is_embedding
from conversion.model_config import read_config
from conversion.packed import BITMASK_SUFFIX, PATTERN, SCALE_SUFFIX, VALUES_SUFFIX, check_bitmask, unpack24
from conversion.quantization.formats import FORMATS, FP8, Quantization, check_scale, check_values, dequantize
from conversion.shards import Shards, tensor_bytes

VERSION = 1
QUANT_METHOD = "cast24"
VALUE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    **{name: value_format.dtype for name, value_format in FORMATS.items()},
}
_SUFFIXES = (VALUES_SUFFIX, BITMASK_SUFFIX, SCALE_SUFFIX)


def is_packed(config: dict[str, Any]) -> bool:
    """Tell whether a config.json belongs to a packed checkpoint."""
    return (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


@dataclass(frozen=True)
class PackedFormat:
    """What the quantization_config of a packed checkpoint says.

    Attributes:
        value_dtype: dtype that the kept values are stored in.
        quantization: how they are quantized; None if they are not.
        embedding: how the dense embedding and lm_head are quantized; None if they are not.
        ignore: names of linears that are stored dense.
    """

    value_dtype: torch.dtype
    quantization: Quantization | None
    embedding: Quantization | None
    ignore: tuple[str, ...]

    @classmethod
    def of_config(cls, config: dict[str, Any], where: str | Path) -> "PackedFormat":
        """Read a quantization_config; InputError, naming `where` it stands, if this release cannot read the format."""
        if config.get("version") != VERSION:
            raise InputError(
                f"{where} is a packed checkpoint of version {config.get('version')}, and this release reads "
                f"version {VERSION}: upgrade it, or convert the model again"
            )
        if config.get("pattern") != PATTERN or config.get("value_dtype") not in VALUE_DTYPES:
            raise InputError(
                f"{where} holds {config.get('pattern')} sparsity with {config.get('value_dtype')} values, "
                f"and this release reads {PATTERN} with {', '.join(VALUE_DTYPES)}"
            )
        try:
            quantization = Quantization.of_config(config)
        except InputError as error:
            raise InputError(f"config.json of {where}: {error}") from None
        embedding = _embedding(config.get("embedding"), where)
        return cls(VALUE_DTYPES[config["value_dtype"]], quantization, embedding, tuple(config.get("ignore", ())))


def _embedding(field: Any, where: str | Path) -> Quantization | None:
    if field is None:
        return None
    try:
        quantization = Quantization.of_config(field)
    except (InputError, AttributeError) as error:
        raise InputError(f"config.json of {where}: embedding: {error}") from None
    if quantization is None or quantization.values is FP8:
        raise InputError(
            f"config.json of {where} speaks of an embedding in {field.get('value_dtype')}, and this release reads "
            "int8 and int4"
        )
    return quantization


class PackedCheckpoint:
    """A packed checkpoint, read lazily: opening checks everything that the headers tell, no tensor is loaded.

    Every tensor that is read is compared with the SHA-256 that was stored when it was written.

    Attributes:
        directory: where it lies.
        config: the parsed config.json.
        family: naming and storage of its blocks' linears.
        sparse_layers: names of the packed linears ('model.layers.0.mlp.up_proj'), in checkpoint order.
        value_dtype: dtype that the kept values are stored in.
        quantization: how they are quantized; None if they are not.
        embedding: how the dense embedding and lm_head are quantized; None if they are not.
        quantized_embeddings: their names ('model.embed_tokens', 'lm_head') if they are.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self.family: Family = family_of(self.config["model_type"])
        if not is_packed(self.config):
            raise InputError(
                f"{self.directory} is not a packed checkpoint: make one with 'cast convert SRC OUT --to packed'"
            )
        layout = PackedFormat.of_config(self.config["quantization_config"], self.directory)
        self.value_dtype, self.quantization, self.embedding = layout.value_dtype, layout.quantization, layout.embedding
        self.shards = Shards(self.directory)
        layers = self._packed_layers()
        self.quantized_embeddings = [layer for layer in layers if is_embedding(self.family, f"{layer}.weight")]
        self.sparse_layers = [layer for layer in layers if layer not in self.quantized_embeddings]
        for layer in self.sparse_layers:
            self._check_layer(layer)
        self._check_embeddings()
        check_complete(self.directory, self.config, self.family, self.names, self._shape)

    def _packed_layers(self) -> list[str]:
        """Layers of which any packed tensor is there, in checkpoint order."""
        layers = (name.removesuffix(s) for name in self.shards.infos for s in _SUFFIXES if name.endswith(s))
        return list(dict.fromkeys(layers))

    def _check_layer(self, layer: str) -> None:
        values = self.shards.info(layer + VALUES_SUFFIX)
        bitmask = self.shards.info(layer + BITMASK_SUFFIX)
        if values.dtype != self.value_dtype or bitmask.dtype != torch.uint8:
            raise InputError(
                f"layer '{layer}' holds {values.dtype} values and a {bitmask.dtype} bitmask, but config.json says "
                f"{self.value_dtype} and the format torch.uint8: make the checkpoint again"
            )
        rows, columns = self._dense_shape(layer)
        quantization = self.quantization
        expected = (rows, columns // 2) if quantization is None else quantization.stored_shape(rows, columns // 2)
        if values.shape != expected:
            raise InputError(
                f"layer '{layer}' has values of shape {list(values.shape)} and a bitmask of shape "
                f"{list(bitmask.shape)}, not [N, K/2] (4-bit values: [N, K/4]) and [N, K/8]: make the checkpoint again"
            )
        if quantization is None:
            if layer + SCALE_SUFFIX in self.shards.infos:
                raise InputError(
                    f"layer '{layer}' has scales, but config.json says its values are not quantized: "
                    "make the checkpoint again"
                )
            return
        self._check_scale(layer, quantization)

    def _check_scale(self, layer: str, quantization: Quantization) -> None:
        rows, columns = self._dense_shape(layer)
        scale = self.shards.info(layer + SCALE_SUFFIX)
        if scale.dtype != torch.float32 or scale.shape != (rows, quantization.groups(columns)):
            raise InputError(
                f"layer '{layer}' has scales of shape {list(scale.shape)} and {scale.dtype}, but its config.json and "
                f"shape ask for {[rows, quantization.groups(columns)]} and torch.float32: make the checkpoint again"
            )

    def _check_embeddings(self) -> None:
        stored_as_floats = [name for name in self.shards.infos if is_embedding(self.family, name)]
        if stored_as_floats if self.embedding is not None else self.quantized_embeddings:
            raise InputError(
                f"config.json of {self.directory} and its tensors do not agree on whether the embedding is quantized: "
                "make the checkpoint again"
            )
        for layer in self.quantized_embeddings:
            assert self.embedding is not None
            values = self.shards.info(layer + VALUES_SUFFIX)
            if values.dtype != self.embedding.values.dtype or len(values.shape) != 2:
                raise InputError(
                    f"'{layer}' holds {values.dtype} values of shape {list(values.shape)}, but config.json speaks of a "
                    f"matrix of {self.embedding.values.name}: make the checkpoint again"
                )
            self._check_scale(layer, self.embedding)

    def _dense_shape(self, layer: str) -> tuple[int, int]:
        """(N, K) by the bitmask's shape, or by the values of an embedding; K is 0 if that is no matrix."""
        if layer in self.quantized_embeddings:
            assert self.embedding is not None
            rows, width = self.shards.info(layer + VALUES_SUFFIX).shape
            return rows, width * 8 // self.embedding.values.bits
        shape = self.shards.info(layer + BITMASK_SUFFIX).shape
        return (shape[0], 8 * shape[1]) if len(shape) == 2 else (0, 0)

    def _shape(self, name: str) -> tuple[int, ...]:
        layer = name.removesuffix(".weight")
        packed = layer in self._sparse or layer in self.quantized_embeddings
        return self._dense_shape(layer) if packed else self.shards.info(name).shape

    @property
    def names(self) -> list[str]:
        """Names that the dense model's tensors have, the packed weights included."""
        dense = [name for name in self.shards.infos if not name.endswith(_SUFFIXES)]
        return dense + [f"{layer}.weight" for layer in (*self.quantized_embeddings, *self.sparse_layers)]

    @property
    def embedding_tensors(self) -> list[str]:
        """Names that the token embedding and, where it is stored, lm_head have in the dense model."""
        return [name for name in self.names if is_embedding(self.family, name)]

    @property
    def scope(self) -> list[str]:
        """Names that the packed weights have in the dense model."""
        return [f"{layer}.weight" for layer in self.sparse_layers]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The narrowest floating dtype that holds every weight exactly; quantized ones are float32."""
        infos = self.shards.infos.items()
        return widest(info.dtype for name, info in infos if not (self.quantization and name.endswith(VALUES_SUFFIX)))

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a weight of the scope."""
        return self._dense_shape(name.removesuffix(".weight"))

    def check_bitmasks(self) -> None:
        """Read every bitmask, a ninth of 16-bit weights; InputError, naming layer, row and group, if one is damaged."""
        for layer in self.sparse_layers:
            self._checked(layer + BITMASK_SUFFIX, check_bitmask)

    def packed(self, layer: str) -> tuple[Tensor, Tensor]:
        """Values as stored, [N, K/2] (4-bit: [N, K/4]), and bitmask [N, K/8] of one packed linear.

        Raises:
            InputError: the bitmask or the values are damaged.
        """
        bitmask = self._checked(layer + BITMASK_SUFFIX, check_bitmask)
        if self.quantization is None:
            return self._checked(layer + VALUES_SUFFIX), bitmask
        value_format = self.quantization.values
        return self._checked(layer + VALUES_SUFFIX, lambda values: check_values(values, value_format)), bitmask

    def scale(self, layer: str) -> Tensor | None:
        """Scales [N, G] float32 of one packed linear, None if its values are not quantized; InputError if damaged."""
        return None if self.quantization is None else self._checked(layer + SCALE_SUFFIX, check_scale)

    def quantized_embedding(self, layer: str) -> tuple[Tensor, Tensor]:
        """Values as stored, [V, H] (4-bit: [V, H/2]), and scales [V, G] of an embedding; InputError if damaged."""
        assert self.embedding is not None
        value_format = self.embedding.values
        values = self._checked(layer + VALUES_SUFFIX, lambda values: check_values(values, value_format))
        return values, self._checked(layer + SCALE_SUFFIX, check_scale)

    def linear_weight(self, name: str) -> Tensor:
        """Dense weight [N, K], dequantized, of the packed linear whose weight has this name in the dense model."""
        layer = name.removesuffix(".weight")
        values, bitmask = self.packed(layer)
        scale = self.scale(layer)
        if scale is None or self.quantization is None:
            return unpack24(values, bitmask)
        return dequantize(values, bitmask, scale, self.quantization)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the dense model: packed weights unpacked and stored the family's way round, all dequantized."""
        layer = name.removesuffix(".weight")
        if layer in self._sparse:
            weight = self.linear_weight(name)
            return weight.T.contiguous() if self.family.transposed else weight
        if layer in self.quantized_embeddings:
            assert self.embedding is not None
            values, scale = self.quantized_embedding(layer)
            return dequantize(values, None, scale, self.embedding)
        return self._checked(name)

    @cached_property
    def _sparse(self) -> frozenset[str]:
        return frozenset(self.sparse_layers)

    def _checked(self, name: str, check: Callable[[Tensor], object] | None = None) -> Tensor:
        """Read a tensor; InputError if `check` raises one or if its SHA-256 is not the stored one."""
        tensor = self.shards.tensor(name)
        if check is not None:
            try:
                check(tensor)
            except InputError as error:
                raise InputError(f"tensor '{name}' of {self.directory}: {error}") from None
        self._check_digest(name, tensor)
        return tensor

    def _check_digest(self, name: str, tensor: Tensor) -> None:
        stored = self.shards.index.get("metadata", {}).get("sha256", {}).get(name)
        if stored is not None and hashlib.sha256(tensor_bytes(tensor)).hexdigest() != stored:
            raise InputError(
                f"tensor '{name}' of {self.directory} is damaged (its SHA-256 is not the stored one): "
                "copy or make the checkpoint again"
            )


def load_packed(directory: str | Path) -> PackedCheckpoint:
    """Open a packed checkpoint and check it as far as its headers tell.

    Raises:
        InputError: no directory, not a packed checkpoint of version 1, an unknown architecture, a truncated shard, or a
            tensor that is missing or has the wrong shape or dtype. Damaged contents are found when a tensor is read.
    """
    return PackedCheckpoint(directory)


def open_checkpoint(directory: str | Path) -> Checkpoint | PackedCheckpoint:
    """Open a model directory, dense or packed; raises as `Checkpoint` and `load_packed` do."""
    return PackedCheckpoint(directory) if is_packed(read_config(Path(directory))) else Checkpoint(directory)
