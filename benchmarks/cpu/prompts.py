"""The token ids that every candidate is given."""

import itertools
from pathlib import Path

import numpy as np

from conversion.errors import InputError
from conversion.model_config import read_config


def windows(model: Path, heldout: Path, context: int, tokens: int) -> list[list[int]]:
    """Held-out windows as `cast eval` cuts them."""
    from cast_train.evaluation.windows import heldout_windows
    from conversion.text import read_documents
    from conversion.tokenizer import load_tokenizer

    found: list[list[int]] = heldout_windows(
        list(read_documents([heldout])), load_tokenizer(model), context, tokens
    ).tolist()
    return found


def prompts(
    model: Path, windows: list[list[int]], count: int, tokens: int, long: int
) -> tuple[list[list[int]], list[int]]:
    """`count` prompts of `tokens` tokens, and one of `long`: from the held-out text, or random where there is none.

    Raises:
        InputError: the text is too short.
    """
    wanted = count * tokens + long
    ids = list(itertools.islice(itertools.chain.from_iterable(windows), wanted))
    if not windows:
        ids = np.random.default_rng(0).integers(0, read_config(model)["vocab_size"], wanted).tolist()
    if len(ids) < wanted:
        raise InputError(f"the prompts take {wanted} tokens of held-out text and {len(ids)} are scored: give more text")
    return [ids[i * tokens : (i + 1) * tokens] for i in range(count)], ids[count * tokens :]
