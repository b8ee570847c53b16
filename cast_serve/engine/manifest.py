"""What `cast_onnx.json` says about an ONNX model directory."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_origin

from conversion.errors import InputError

VERSION = 3


@dataclass(frozen=True)
class Manifest:
    """The fields of cast_onnx.json that serving needs (conversion.onnx.export writes it)."""

    pattern: str
    value_dtype: str
    sparse_layers: int
    weight_bytes: int
    num_layers: int
    kv_num_heads: int
    head_dim: int
    cache_dtype: str
    context_length: int
    vocab_size: int
    inputs: list[str]
    eos_token_ids: list[int]
    source_fingerprint: str


def read_manifest(onnx_dir: Path) -> Manifest:
    """Read and check it; InputError if the directory is not one, or not of a version this software reads."""
    path = onnx_dir / "cast_onnx.json"
    for needed in (path, onnx_dir / "model.onnx"):
        if not needed.is_file():
            raise InputError(
                f"{onnx_dir} is no exported ONNX model (no {needed.name}): make one with cast convert --to onnx"
            )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if version != VERSION:
            raise InputError(f"{path} has version {version}, this software reads {VERSION}: export the model again")
        manifest = Manifest(**{field.name: content[field.name] for field in fields(Manifest)})
        for field in fields(Manifest):
            kind: Any = get_origin(field.type) or field.type
            if not isinstance(getattr(manifest, field.name), kind):
                raise TypeError(f"'{field.name}' is no {kind.__name__}")
        return manifest
    except InputError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): export the model again") from None
