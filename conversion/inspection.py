"""What is in a model directory: sparsity, violations and sizes, layer by layer."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from conversion.checkpoint import Checkpoint
from conversion.errors import InputError
from conversion.families import LM_HEAD
from conversion.model_config import read_config
from conversion.packed import VALUES_SUFFIX
from conversion.packed_checkpoint import PackedCheckpoint, open_checkpoint
from conversion.progress import byte_progress

ONNX_MANIFEST = "cast_onnx.json"


@dataclass(frozen=True)
class LayerInfo:
    """One linear of a transformer block.

    Attributes:
        name: checkpoint name of the linear.
        shape: [N, K].
        sparsity: share of zeros.
        violations: groups of four with more than two nonzeros.
        dense_bytes: bytes of the dense weight in the dtype of its values, scales of quantized ones included.
        packed_bytes: bytes of values, bitmask and scales.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    violations: int
    dense_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class DirectoryInfo:
    """A model directory at a glance.

    Attributes:
        kind: "dense", "2:4 stored dense", "packed 2:4", "onnx dense" or "onnx 2:4".
        model_type: the family of config.json.
        value_dtype: dtypes of the blocks' linears.
        embedding_dtype: dtype of the token embedding; None for ONNX directories.
        layers: every linear in the scope of CAST; empty for ONNX directories.
        sparsity: share of zeros over all layers; None for ONNX directories.
        violations: groups with more than two nonzeros over all layers.
        linear_dense_bytes: bytes of those linears stored dense.
        linear_packed_bytes: bytes of those linears packed.
        other_bytes: bytes of all other weights.
        stored_bytes: bytes of all weights as they are stored here.
        packed_ratio: size of the whole model packed, relative to dense; None for ONNX directories.
    """

    directory: str
    kind: str
    model_type: str
    value_dtype: str
    embedding_dtype: str | None
    layers: list[LayerInfo]
    sparsity: float | None
    violations: int
    linear_dense_bytes: int
    linear_packed_bytes: int
    other_bytes: int
    stored_bytes: int
    packed_ratio: float | None

    @property
    def packed_bits_per_weight(self) -> float:
        """Bits that a weight of the linears in scope takes packed, everything counted."""
        return 8 * self.linear_packed_bytes / sum(math.prod(layer.shape) for layer in self.layers)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def inspect_directory(directory: str | Path, *, show_progress: bool = False) -> DirectoryInfo:
    """Read a model directory of any kind that this package makes or takes.

    Args:
        directory: Hugging Face model (dense or 2:4), packed checkpoint, or ONNX directory.
        show_progress: draw a progress bar; every linear is read.

    Raises:
        InputError: not a model directory, damaged, or of an unsupported architecture.
    """
    directory = Path(directory)
    if (directory / ONNX_MANIFEST).is_file():
        return _inspect_onnx(directory)
    checkpoint = open_checkpoint(directory)
    packed = isinstance(checkpoint, PackedCheckpoint)
    layers = []
    total = sum(info.nbytes for info in checkpoint.shards.infos.values())
    with byte_progress("reading", total, show_progress) as advance:
        for name in checkpoint.scope:
            layers.append(_inspect_layer(checkpoint, name))
            advance(layers[-1].packed_bytes if packed else layers[-1].dense_bytes)
    linear_dense = sum(layer.dense_bytes for layer in layers)
    linear_packed = sum(layer.packed_bytes for layer in layers)
    other = total - (linear_packed if packed else linear_dense)
    violations = sum(layer.violations for layer in layers)
    weights = sum(rows * columns for rows, columns in (layer.shape for layer in layers))
    return DirectoryInfo(
        directory=str(directory),
        kind="packed 2:4" if packed else "dense" if violations else "2:4 stored dense",
        model_type=checkpoint.config["model_type"],
        value_dtype=", ".join(sorted({_value_dtype(checkpoint, name) for name in checkpoint.scope})),
        embedding_dtype=_embedding_dtype(checkpoint),
        layers=layers,
        sparsity=sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in layers) / weights,
        violations=violations,
        linear_dense_bytes=linear_dense,
        linear_packed_bytes=linear_packed,
        other_bytes=other,
        stored_bytes=total,
        packed_ratio=(linear_packed + other) / (linear_dense + other),
    )


def _value_dtype(checkpoint: Checkpoint | PackedCheckpoint, name: str) -> str:
    if isinstance(checkpoint, PackedCheckpoint) and checkpoint.quantization is not None:
        return checkpoint.quantization.values.name
    stored = name.removesuffix(".weight") + VALUES_SUFFIX if isinstance(checkpoint, PackedCheckpoint) else name
    return str(checkpoint.shards.info(stored).dtype).removeprefix("torch.")


def _embedding_dtype(checkpoint: Checkpoint | PackedCheckpoint) -> str:
    if isinstance(checkpoint, PackedCheckpoint) and checkpoint.embedding is not None:
        return checkpoint.embedding.values.name
    embedding = next(name for name in checkpoint.embedding_tensors if name != LM_HEAD)
    return str(checkpoint.shards.info(embedding).dtype).removeprefix("torch.")


def _inspect_layer(checkpoint: Checkpoint | PackedCheckpoint, name: str) -> LayerInfo:
    rows, columns = checkpoint.linear_shape(name)
    weight: Tensor = checkpoint.linear_weight(name)
    nonzeros = (weight != 0).reshape(rows, columns // 4, 4).sum(-1)
    quantization = checkpoint.quantization if isinstance(checkpoint, PackedCheckpoint) else None
    value_bits = 8 * weight.element_size() if quantization is None else quantization.values.bits
    scale_bytes = 0 if quantization is None else 4 * rows * quantization.groups(columns)
    value_bytes = rows * columns * value_bits // 8
    return LayerInfo(
        name=name.removesuffix(".weight"),
        shape=(rows, columns),
        sparsity=1 - int(nonzeros.sum()) / (rows * columns),
        violations=int((nonzeros > 2).sum()),
        dense_bytes=value_bytes + scale_bytes,
        packed_bytes=value_bytes // 2 + rows * columns // 8 + scale_bytes,
    )


def _inspect_onnx(directory: Path) -> DirectoryInfo:
    try:
        manifest: dict[str, Any] = json.loads((directory / ONNX_MANIFEST).read_text())
        sparse_bytes, all_bytes = manifest["sparse_weight_bytes"], manifest["weight_bytes"]
        pattern, value_dtype = manifest["pattern"], manifest["value_dtype"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{directory / ONNX_MANIFEST} is damaged: export the model again") from None
    return DirectoryInfo(
        directory=str(directory),
        kind=f"onnx {pattern}",
        model_type=read_config(directory)["model_type"],
        value_dtype=value_dtype,
        embedding_dtype=None,
        layers=[],
        sparsity=None,
        violations=0,
        linear_dense_bytes=0,
        linear_packed_bytes=sparse_bytes,
        other_bytes=all_bytes - sparse_bytes,
        stored_bytes=sum(path.stat().st_size for path in directory.glob("model.onnx*")),
        packed_ratio=None,
    )
