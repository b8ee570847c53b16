"""Prompts of one exact length, the same for every server."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from conversion.errors import InputError

RESERVED_TOKENS = 256
"""Vocabularies keep control tokens at their start; random prompts stay clear of them where there is room."""


def vocab_size(model: Path) -> int:
    """The vocabulary size in a model directory's config.json; InputError if there is none."""
    try:
        return int(json.loads((model / "config.json").read_bytes())["vocab_size"])
    except (OSError, ValueError, KeyError):
        raise InputError(f"{model} is no model directory: its config.json with a vocab_size is missing") from None


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `length` uniform token ids: no two share a prefix, so nothing can be cached between them."""
    low = RESERVED_TOKENS if vocab_size > 2 * RESERVED_TOKENS else 0
    ids = np.random.default_rng(seed).integers(low, vocab_size, size=(count, length))
    return [row.tolist() for row in ids]


def text_prompts(source: Path, count: int, length: int, model: Path) -> list[list[int]]:
    """Cut the text of `source` (.txt, or .jsonl with a "text" field) into `count` prompts of `length` tokens.

    `model` is the directory whose tokenizer.json makes the tokens. InputError if the text is missing or too short.
    """
    from tokenizers import Tokenizer

    if not source.is_file():
        raise InputError(f"there is no prompt file {source}: give a .txt file, or a .jsonl file with a 'text' field")
    vocabulary = model / "tokenizer.json"
    if not vocabulary.is_file():
        raise InputError(f"{model} has no tokenizer.json to cut the prompts with: leave out --prompts")
    tokenizer = Tokenizer.from_file(str(vocabulary))
    ids: list[int] = []
    for text in _texts(source):
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= count * length:
            return [ids[i * length : (i + 1) * length] for i in range(count)]
    raise InputError(f"{source} holds {len(ids)} tokens, but {count} prompts of {length} need {count * length}")


def _texts(source: Path) -> Iterator[str]:
    with source.open(encoding="utf-8") as lines:
        if source.suffix != ".jsonl":
            yield lines.read()
            return
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(f"line {number} of {source} is not a JSON object with a 'text' field") from None
