"""A finished model as a plain Hugging Face directory."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conversion.progress import without_transformers_bars


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Path, directory: Path) -> None:
    """Save `model` and `tokenizer` to `directory`, with the generation settings of the `source` they came from."""
    with without_transformers_bars():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", directory)
