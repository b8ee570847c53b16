"""A finished model as a plain Hugging Face directory."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conversion.checkpoint import Checkpoint
from conversion.progress import without_transformers_bars


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Path, directory: Path) -> None:
    """Save `model` and `tokenizer` to `directory`, with dtype and generation settings of the `source` they came from.

    `model` itself is cast. A weight that was trained in float32 is rounded to bfloat16 if the source held bfloat16.
    """
    model.to(Checkpoint(source).dtype)  # type: ignore[arg-type]
    with without_transformers_bars():
        model.save_pretrained(directory)
    for weights in directory.glob("*.safetensors"):  # which the library lets nobody else read
        weights.chmod((directory / "config.json").stat().st_mode)
    tokenizer.save_pretrained(directory)
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", directory)
