"""A random Llama and its 2:4 version, where only speed is asked for."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from conversion.atomic import new_directory
from conversion.checkpoint import Checkpoint
from conversion.progress import without_transformers_bars


def random_models(work: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """Make a random Llama in bfloat16 and its 2:4 version by magnitude, unless both are there; return where."""
    dense, sparse = work / "dense", work / "sparse"
    if not (dense.exists() and sparse.exists()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.bfloat16)
        save_model(model, dense)
        with torch.no_grad():
            for name in Checkpoint(dense).scope:
                groups = model.get_parameter(name).view(-1, 4)
                groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0.0)
        save_model(model, sparse)
    return dense, sparse


def save_model(model: PreTrainedModel, out: Path) -> None:
    """Save, unless it is there already."""
    if not out.exists():
        with new_directory(out) as building, without_transformers_bars():
            model.save_pretrained(building)
