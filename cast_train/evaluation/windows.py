"""Running text as windows to score."""

from collections.abc import Iterable
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from conversion.errors import InputError

_CHARACTERS = 8  # of a token, at first; where tokens are longer, more text is read
_MARGIN = 4096  # tokens: what follows a token has no influence on it from that far


def heldout_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, context: int, tokens: int
) -> torch.Tensor:
    """Cut running text into windows to score: documents joined by a blank line, no BOS, no overlap.

    Of `texts`, which may have no end, only as many are read as the windows need.

    Returns:
        int64 token ids [windows, context]; as many whole windows as fit into the first `tokens` tokens.

    Raises:
        InputError: the text is shorter than one window.
    """
    ids = _first_tokens(texts, tokenizer, tokens)
    windows = min(len(ids), tokens) // context
    if windows == 0:
        raise InputError(
            f"the text has {min(len(ids), tokens)} tokens, less than one window of {context}: "
            "give more text or a smaller context"
        )
    return torch.tensor(ids[: windows * context]).view(windows, context)


def _first_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Return the tokens of the joined texts, the first `count` of them at least if there are as many."""
    parts = chain.from_iterable(("\n\n", text) if number else (text,) for number, text in enumerate(texts))
    text, wanted = "", _CHARACTERS * (count + _MARGIN)
    while True:
        read, length = [text], len(text)
        while length < wanted and (part := next(parts, None)) is not None:
            read.append(part)
            length += len(part)
        text = "".join(read)
        ids: list[int] = tokenizer(text[:wanted], add_special_tokens=False, verbose=False)["input_ids"]
        if length < wanted or len(ids) >= count + _MARGIN:
            return ids
        wanted *= 2
