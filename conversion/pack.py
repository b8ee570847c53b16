"""Writing the packed checkpoint: shard by shard, one tensor in memory at a time."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from conversion.atomic import new_directory
from conversion.checkpoint import COMPANION_FILES, Checkpoint
from conversion.compressed_tensors.shards import CompressedShards
from conversion.errors import InputError
from conversion.families import is_embedding
from conversion.packed import BITMASK_SUFFIX, PATTERN, SCALE_SUFFIX, VALUES_SUFFIX, kept_columns, pack24
from conversion.packed_checkpoint import QUANT_METHOD, VALUE_DTYPES, VERSION
from conversion.progress import byte_progress
from conversion.quantization.formats import FORMATS, INT4, INT8, Quantization, encode
from conversion.shards import INDEX, ShardWriter

logger = logging.getLogger(__name__)

FLOAT_DTYPES = {name: dtype for name, dtype in VALUE_DTYPES.items() if name not in FORMATS}

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
Codes = tuple[Tensor, Tensor]  # [N, K], [N, G]


@dataclass(frozen=True)
class _Values:
    """What becomes of kept values: another floating dtype, or codes and scales; and of the embedding.

    Attributes:
        dtype: in which they are stored.
        quantization: how they are quantized; None if they are not.
        codes: codes and scales by tensor name, where calibration text has chosen them.
        embedding: how the embedding and lm_head are quantized; None copies them.
    """

    dtype: torch.dtype
    quantization: Quantization | None = None
    codes: Mapping[str, Codes] = field(default_factory=dict)
    embedding: Quantization | None = None

    @property
    def name(self) -> str:
        if self.quantization is not None:
            return self.quantization.values.name
        return next(name for name, value in VALUE_DTYPES.items() if value == self.dtype)


def save_packed(
    source_dir: str | Path,
    out_dir: str | Path,
    value_dtype: str | None = None,
    *,
    quantization: Quantization | None = None,
    calibration: Sequence[str | Path] = (),
    embedding: Quantization | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> None:
    """Pack a 2:4 Hugging Face model directory into the packed format, version 1.

    Args:
        source_dir: a dense-stored model whose in-scope linears are exactly 2:4.
        out_dir: appears complete or not at all.
        value_dtype: "float32", "bfloat16" or "float16" to round the kept values to; None keeps the source's dtype, or
            the codes and scales of a quantized one that compressed-tensors wrote.
            Tensors out of scope are copied as they are.
        quantization: quantize the kept values so, instead.
        calibration: text files on which quantization chooses scales and feeds rounding errors forward (the dense model
            is then held in memory as float32); none rounds to nearest, tensor by tensor.
        embedding: quantize embedding and lm_head to this, int8 or int4, rounding to nearest; None copies them.
        overwrite: replace an existing `out_dir`.

    Raises:
        InputError: the source is damaged or not 2:4 (the first offending tensor, row and group are named), a value does
            not fit value_dtype, the calibration text is too short, or `out_dir` exists.
    """
    source = Checkpoint(source_dir)
    if embedding is not None:
        _check_embedding(source, embedding)
    total_bytes = sum(info.nbytes for info in source.shards.infos.values())
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    packed_bytes = 0
    with new_directory(Path(out_dir), overwrite, source.directory, [INDEX]) as building:
        values = replace(_values(source, value_dtype, quantization, calibration), embedding=embedding)
        with byte_progress("packing", total_bytes, show_progress) as advance:
            for shard, infos in source.shards.by_shard():
                layouts = {name: _layout(source, name, values) for name in infos}
                with ShardWriter(
                    building / shard, {k: v for layout in layouts.values() for k, v in layout.items()}
                ) as writer:
                    for name, info in infos.items():
                        for packed_name, tensor in _pack(source, name, values).items():
                            digests[packed_name] = writer.write(packed_name, tensor)
                            weight_map[packed_name] = shard
                            packed_bytes += tensor.nbytes
                        advance(info.nbytes)
        if isinstance(source.shards, CompressedShards) and (clipped := sum(source.shards.clipped.values())):
            logger.warning("%d weights at int8 code -128, which the packed format lacks, became -127", clipped)
        index = {"metadata": {"total_size": packed_bytes, "sha256": digests}, "weight_map": weight_map}
        (building / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _write_config(source, values, building)
        for file in COMPANION_FILES:
            if (source.directory / file).is_file():
                shutil.copyfile(source.directory / file, building / file)


def _values(
    source: Checkpoint, value_dtype: str | None, quantization: Quantization | None, calibration: Sequence[str | Path]
) -> _Values:
    if quantization is None:
        if calibration:
            raise InputError("calibration text is for quantized values: name a format to quantize to, or leave it out")
        if source.quantization is not None and value_dtype is None:
            return _Values(source.quantization.values.dtype, source.quantization)
        return _Values(_float_dtype(source, value_dtype))
    if value_dtype is not None:
        raise InputError("kept values are either quantized or of another floating dtype: name one of the two")
    if not calibration:
        return _Values(quantization.values.dtype, quantization)
    from conversion.dense_model import dense_model
    from conversion.quantization.calibrated import calibrated_codes

    if (violation := source.first_violation()) is not None:
        raise _not_sparse(source, violation)
    model = dense_model(source, torch.float32)
    codes = calibrated_codes(model, source, quantization, calibration, sparse=True)
    return _Values(quantization.values.dtype, quantization, codes)


def _check_embedding(source: Checkpoint, quantization: Quantization) -> None:
    if quantization.values not in (INT8, INT4):
        raise InputError(f"an embedding cannot be quantized to {quantization.values.name}: use int8 or int4")
    for name in source.embedding_tensors:
        if (columns := source.shards.info(name).shape[-1]) % 8:
            raise InputError(
                f"tensor '{name}' has {columns} columns, and only multiples of 8 are quantized: leave --embedding out"
            )


def _float_dtype(source: Checkpoint, requested: str | None) -> torch.dtype:
    """The dtype of all kept values: the requested one, or the source's."""
    if requested is None:
        dtypes = {source.shards.info(name).dtype for name in source.scope}
        if len(dtypes) > 1 or not dtypes <= set(FLOAT_DTYPES.values()):
            raise InputError(
                f"the linears of {source.directory} are stored as {', '.join(sorted(map(str, dtypes)))}: "
                "name one dtype with --value-dtype"
            )
        return dtypes.pop()
    if requested not in FLOAT_DTYPES:
        raise InputError(f"value dtype '{requested}' is not supported: use one of {', '.join(FLOAT_DTYPES)}")
    return FLOAT_DTYPES[requested]


def _layout(source: Checkpoint, name: str, values: _Values) -> Layout:
    """Names, shapes and dtypes that source tensor `name` becomes."""
    layer, quantization = name.removesuffix(".weight"), values.quantization
    if values.embedding is not None and is_embedding(source.family, name):
        rows, columns = source.shards.info(name).shape
        return {
            layer + VALUES_SUFFIX: (values.embedding.stored_shape(rows, columns), values.embedding.values.dtype),
            layer + SCALE_SUFFIX: ((rows, values.embedding.groups(columns)), torch.float32),
        }
    if name not in source.scope_set:
        info = source.shards.info(name)
        return {name: (info.shape, info.dtype)}
    rows, columns = source.linear_shape(name)
    shape = (rows, columns // 2) if quantization is None else quantization.stored_shape(rows, columns // 2)
    layout: Layout = {
        layer + VALUES_SUFFIX: (shape, values.dtype),
        layer + BITMASK_SUFFIX: ((rows, columns // 8), torch.uint8),
    }
    if quantization is not None:
        layout[layer + SCALE_SUFFIX] = ((rows, quantization.groups(columns)), torch.float32)
    return layout


def _pack(source: Checkpoint, name: str, values: _Values) -> dict[str, Tensor]:
    """The tensors that source tensor `name` becomes."""
    layer = name.removesuffix(".weight")
    if values.embedding is not None and is_embedding(source.family, name):
        from conversion.quantization.quantize import quantize_dense

        stored, scale = quantize_dense(source.tensor(name), values.embedding)
        return {layer + VALUES_SUFFIX: stored, layer + SCALE_SUFFIX: scale}
    if name not in source.scope_set:
        return {name: source.tensor(name)}
    try:
        kept, bitmask = pack24(source.linear_weight(name))
    except InputError as error:
        raise _not_sparse(source, f"tensor '{name}', {error}") from None
    if values.quantization is not None:
        codes, scale = _codes(source, name, values.quantization, values.codes)
        stored = encode(codes[kept_columns(bitmask)].view(kept.shape), values.quantization.values)
        return {layer + VALUES_SUFFIX: stored, layer + BITMASK_SUFFIX: bitmask, layer + SCALE_SUFFIX: scale}
    rounded = kept.to(values.dtype)
    if not rounded.isfinite().all():
        raise InputError(f"tensor '{name}' holds values that do not fit {values.dtype}: choose a wider --value-dtype")
    return {layer + VALUES_SUFFIX: rounded, layer + BITMASK_SUFFIX: bitmask}


def _codes(source: Checkpoint, name: str, quantization: Quantization, calibrated: Mapping[str, Codes]) -> Codes:
    if name in calibrated:
        return calibrated[name]
    if isinstance(source.shards, CompressedShards) and source.quantization == quantization:
        return source.shards.codes(name)
    from conversion.quantization.quantize import quantize_weight

    weight = source.linear_weight(name).float()
    return quantize_weight(weight, weight != 0, quantization)


def _not_sparse(source: Checkpoint, violation: str) -> InputError:
    return InputError(f"{source.directory} is not 2:4: {violation}; train or prune it to 2:4 first")


def _write_config(source: Checkpoint, values: _Values, directory: Path) -> None:
    dense = [name.removesuffix(".weight") for name in source.dense_linears]
    config = source.config | {
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "pattern": PATTERN,
            "value_dtype": values.name,
            "group_size": None if values.quantization is None else values.quantization.group_size,
            "embedding": None if values.embedding is None else values.embedding.as_config(),
            "ignore": ["lm_head", *dense],
        }
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
