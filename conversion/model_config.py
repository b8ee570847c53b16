"""The config.json of a model directory. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from conversion.errors import InputError


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory; InputError if there is none or it names no model type."""
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give the path of a model directory")
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} holds no config.json: give the path of a model directory")
    try:
        config = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path} is not valid JSON: copy the checkpoint again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path} names no model_type: give the path of a model directory")
    return config


def context_length(config: dict[str, Any]) -> int | None:
    """The most tokens that the positions of a config.json reach; None where it leaves that to its model's default."""
    context: int | None = config.get("max_position_embeddings", config.get("n_positions"))
    return context
