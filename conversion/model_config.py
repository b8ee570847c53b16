"""The config.json of a model directory, and its other JSON files. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from conversion.errors import InputError


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory; InputError if there is none or it is damaged."""
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give the path of a model directory")
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} holds no config.json: give the path of a model directory")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path} names no model_type: give the path of a model directory")
    for key in ("quantization_config", "compression_config"):
        if not isinstance(config.get(key), dict | None):
            raise InputError(f"{path} is damaged: its {key} is no object: copy the checkpoint again")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object that a model directory's file holds; {} if there is no such file, InputError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise InputError(f"{path} is not valid JSON: copy the checkpoint again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: copy the checkpoint again")
    return content


def context_length(config: dict[str, Any]) -> int | None:
    """The most tokens that the positions of a config.json reach; None where it leaves that to its model's default."""
    context: int | None = config.get("max_position_embeddings", config.get("n_positions"))
    return context
