"""The tokenizer of a model directory, as transformers reads it."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from conversion.errors import InputError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(directory: Path) -> Any:
    """Return the directory's PreTrainedTokenizerBase. InputError if it has none, or one that cannot be read."""
    if not any((directory / file).is_file() for file in FILES):
        raise InputError(f"{directory} holds no tokenizer ({', '.join(FILES)}): copy it from where the model came from")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # damaged files end in whatever their reader stumbles over
        reason = " ".join(str(error).split())
        raise InputError(f"the tokenizer of {directory} cannot be read ({reason}): copy it again") from None
