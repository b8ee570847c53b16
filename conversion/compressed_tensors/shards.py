"""A compressed-tensors checkpoint, tensor by tensor as the dense model it stands for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.compressed_tensors import marlin24
from conversion.errors import InputError
from conversion.packed import unpack24
from conversion.quantization.formats import FP8, INT4, INT8, Quantization
from conversion.shards import Shards, TensorInfo

BITMASK = "sparse-24-bitmask"
MARLIN = "marlin-24"
# What compressed-tensors called dense tensors of codes beside their scales.
_CODES = ("int-quantized", "float-quantized", "naive-quantized")
# Tensors that belong to a weight, or to activations, which are not quantized as the checkpoint says.
_BESIDE = (
    *(".bitmask", ".shape", ".meta", ".scale_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"),
    *(".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale"),
)


def description(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a config.json says of compressed-tensors; None if its model was not written by it."""
    found: dict[str, Any] | None = config.get("quantization_config") or config.get("compression_config")
    return found if found and found.get("quant_method", "compressed-tensors") == "compressed-tensors" else None


class CompressedShards(Shards):
    """The dense model's tensors. Those of quantized weights are dequantized, float32; `codes` gives them as they are.

    Attributes:
        quantization: of the weights; None if they are not quantized.
        clipped: by weight read so far, int8 codes that were -128, which the packed format lacks: they became -127.

    Raises:
        InputError: as `Shards` does, and for a format that 2:4 checkpoints were not written in.
    """

    def __init__(self, directory: Path, description: dict[str, Any]) -> None:
        self.directory = directory
        self._raw = Shards(directory)
        self.index = self._raw.index
        sparsity = (description.get("sparsity_config") or {}).get("format", "dense")
        stored = description.get("format", "dense")
        weights = _weights(directory, description)
        if sparsity not in ("dense", BITMASK) or (weights and stored not in (MARLIN, *_CODES)):
            unread = stored if sparsity == "dense" else sparsity
            raise InputError(
                f"{directory} is stored in compressed-tensors' format '{unread}': 2:4 weights are read from {BITMASK}, "
                f"{MARLIN}, and dense tensors"
            )
        self.quantization = None if weights is None else _quantization(directory, weights)
        self._bits = 0 if weights is None else int(weights["num_bits"])
        self.clipped: dict[str, int] = {}
        self.infos = {}
        for name, info in self._raw.infos.items():
            if name.endswith(".weight_g_idx"):
                raise InputError(
                    f"{directory} was quantized in the order of activations ('{name}'), and the packed format's groups "
                    "are of neighbouring columns: quantize it again without"
                )
            if not name.endswith(_BESIDE):
                self.infos.update([self._dense(name, info)])

    def _dense(self, name: str, info: TensorInfo) -> tuple[str, TensorInfo]:
        """Name and header that a stored tensor has in the dense model."""
        layer, _, kind = name.rpartition(".")
        shape, quantized = info.shape, kind == "weight" and f"{layer}.weight_scale" in self._raw.infos
        if kind == "compressed":
            shape, quantized = (shape[0], 2 * shape[1]), self.quantization is not None
        elif kind == "weight_packed":
            shape, quantized = marlin24.dense_shape(self._raw.info(f"{layer}.meta").shape), True
        if kind not in ("compressed", "weight_packed") and not quantized:
            return name, info
        return f"{layer}.weight", TensorInfo(info.shard, shape, torch.float32 if quantized else info.dtype)

    def tensor(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if name in self._raw.infos and f"{layer}.weight_scale" not in self._raw.infos:
            return self._raw.tensor(name)
        if self.quantization is None:
            self.info(name)
            return self._unpacked(layer)
        codes, scale = self.codes(name)
        return codes * self.quantization.spread(scale, codes.shape[1])

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes [N, K] and scales [N, G], float32, of a quantized weight; InputError if this one is not quantized."""
        layer, quantization = name.removesuffix(".weight"), self.quantization
        assert quantization is not None
        if f"{layer}.weight_packed" in self._raw.infos:
            packed, meta, scale_packed = (
                self._raw.tensor(f"{layer}.{kind}") for kind in ("weight_packed", "meta", "scale_packed")
            )
            codes = marlin24.codes(packed, meta, self._bits)
            scale = marlin24.scales(scale_packed, codes.shape[1])
        elif f"{layer}.weight_scale" in self._raw.infos:
            scale = self._raw.tensor(f"{layer}.weight_scale").float()
            stored = f"{layer}.compressed" in self._raw.infos
            codes = self._unpacked(layer) if stored else self._raw.tensor(name).float()
        else:
            raise InputError(f"tensor '{name}' of {self.directory} is not quantized like the others: leave it dense")
        if quantization.values is INT8:
            self.clipped[name] = int((codes == -128).sum())
            codes = codes.clamp(min=-127)
        rows, columns = codes.shape
        groups = quantization.groups(columns)
        scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
        if scale.shape[0] not in (1, rows) or scale.shape[1] not in (1, groups):
            raise InputError(
                f"layer '{layer}' of {self.directory} has scales of shape {list(scale.shape)}, and {[rows, groups]} "
                "would fit its config.json and weight"
            )
        return codes, scale.where(scale != 0, 1.0).expand(rows, groups).contiguous()

    def _unpacked(self, layer: str) -> Tensor:
        values, bitmask = self._raw.tensor(f"{layer}.compressed"), self._raw.tensor(f"{layer}.bitmask")
        try:
            return unpack24(values if self.quantization is None else values.float(), bitmask)
        except InputError as error:
            raise InputError(f"layer '{layer}' of {self.directory}: {error}") from None


def _weights(directory: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """How weights are quantized, in compressed-tensors' words; None if they are not."""
    schemes = [group.get("weights") for group in (description.get("config_groups") or {}).values()]
    if any(scheme != schemes[0] for scheme in schemes):
        raise InputError(f"{directory} quantizes its layers in several ways, and the packed format knows one")
    return schemes[0] if schemes else None


def _quantization(directory: Path, weights: dict[str, Any]) -> Quantization:
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
    values = {"int8": INT8, "int4": INT4, "float8": FP8}.get(f"{kind}{bits}")
    if values is None or strategy not in ("tensor", "channel", "group") or not weights.get("symmetric", True):
        raise InputError(
            f"{directory} holds {bits}-bit {kind} weights with scales for each {strategy}, symmetric: "
            f"{weights.get('symmetric')}: symmetric int4, int8 and fp8 for a tensor, channel or group are read"
        )
    if strategy == "group":
        return Quantization(values, weights["group_size"])
    return Quantization(values, 256 if values is INT4 else None)  # 4-bit values have groups in the packed format
