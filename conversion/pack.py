"""Writing the packed checkpoint: shard by shard, one tensor in memory at a time."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from conversion.atomic import new_directory
from conversion.checkpoint import COMPANION_FILES, Checkpoint
from conversion.errors import InputError
from conversion.packed import BITMASK_SUFFIX, PATTERN, VALUES_SUFFIX, pack24
from conversion.packed_checkpoint import QUANT_METHOD, VALUE_DTYPES, VERSION
from conversion.progress import byte_progress
from conversion.shards import INDEX, ShardWriter

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def save_packed(
    source_dir: str | Path,
    out_dir: str | Path,
    value_dtype: str | None = None,
    *,
    overwrite: bool = False,
    show_progress: bool = False,
) -> None:
    """Pack a 2:4 Hugging Face model directory into the packed format, version 1.

    Args:
        source_dir: a dense-stored model whose in-scope linears are exactly 2:4.
        out_dir: appears complete or not at all.
        value_dtype: "float32", "bfloat16" or "float16" to round the kept values to; None keeps the source's dtype.
            Tensors out of scope are copied as they are.
        overwrite: replace an existing `out_dir`.

    Raises:
        InputError: the source is damaged or not 2:4 (the first offending tensor, row and group are named), a value does
            not fit value_dtype, or `out_dir` exists.
    """
    source = Checkpoint(source_dir)
    dtype = _value_dtype(source, value_dtype)
    total_bytes = sum(info.nbytes for info in source.shards.infos.values())
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    packed_bytes = 0
    with (
        new_directory(Path(out_dir), overwrite, source.directory) as building,
        byte_progress("packing", total_bytes, show_progress) as advance,
    ):
        for shard, infos in source.shards.by_shard():
            layouts = {name: _layout(source, name, dtype) for name in infos}
            with ShardWriter(
                building / shard, {k: v for layout in layouts.values() for k, v in layout.items()}
            ) as writer:
                for name, info in infos.items():
                    for packed_name, tensor in _pack(source, name, dtype).items():
                        digests[packed_name] = writer.write(packed_name, tensor)
                        weight_map[packed_name] = shard
                        packed_bytes += tensor.nbytes
                    advance(info.nbytes)
        index = {"metadata": {"total_size": packed_bytes, "sha256": digests}, "weight_map": weight_map}
        (building / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _write_config(source, dtype, building)
        for file in COMPANION_FILES:
            if (source.directory / file).is_file():
                shutil.copyfile(source.directory / file, building / file)


def _value_dtype(source: Checkpoint, requested: str | None) -> torch.dtype:
    """The dtype of all kept values: the requested one, or the source's."""
    if requested is None:
        dtypes = {source.shards.info(name).dtype for name in source.scope}
        if len(dtypes) > 1 or not dtypes <= set(VALUE_DTYPES.values()):
            raise InputError(
                f"the linears of {source.directory} are stored as {', '.join(sorted(map(str, dtypes)))}: "
                "name one dtype with --value-dtype"
            )
        return dtypes.pop()
    if requested not in VALUE_DTYPES:
        raise InputError(f"value dtype '{requested}' is not supported: use one of {', '.join(VALUE_DTYPES)}")
    return VALUE_DTYPES[requested]


def _layout(source: Checkpoint, name: str, dtype: torch.dtype) -> Layout:
    """Names, shapes and dtypes that source tensor `name` becomes."""
    if name not in source.scope_set:
        info = source.shards.info(name)
        return {name: (info.shape, info.dtype)}
    rows, columns = source.linear_shape(name)
    layer = name.removesuffix(".weight")
    return {
        layer + VALUES_SUFFIX: ((rows, columns // 2), dtype),
        layer + BITMASK_SUFFIX: ((rows, columns // 8), torch.uint8),
    }


def _pack(source: Checkpoint, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that source tensor `name` becomes."""
    if name not in source.scope_set:
        return {name: source.tensor(name)}
    try:
        values, bitmask = pack24(source.linear_weight(name))
    except InputError as error:
        raise InputError(
            f"{source.directory} is not 2:4: tensor '{name}', {error}; train or prune it to 2:4 first"
        ) from None
    rounded = values.to(dtype)
    if not rounded.isfinite().all():
        raise InputError(f"tensor '{name}' holds values that do not fit {dtype}: choose a wider --value-dtype")
    layer = name.removesuffix(".weight")
    return {layer + VALUES_SUFFIX: rounded, layer + BITMASK_SUFFIX: bitmask}


def _write_config(source: Checkpoint, dtype: torch.dtype, directory: Path) -> None:
    dense = [name.removesuffix(".weight") for name in source.dense_linears]
    config = source.config | {
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "pattern": PATTERN,
            "value_dtype": next(name for name, value in VALUE_DTYPES.items() if value == dtype),
            "group_size": None,
            "ignore": ["lm_head", *dense],
        }
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
