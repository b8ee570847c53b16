"""Running text as windows to score."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from conversion.errors import InputError


def heldout_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int, tokens: int
) -> torch.Tensor:
    """Cut running text into windows to score: documents joined by a blank line, no BOS, no overlap.

    Returns:
        int64 token ids [windows, context]; as many whole windows as fit into the first `tokens` tokens.

    Raises:
        InputError: the text is shorter than one window.
    """
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    windows = min(len(ids), tokens) // context
    if windows == 0:
        raise InputError(
            f"the text has {min(len(ids), tokens)} tokens, less than one window of {context}: "
            "give more text or a smaller context"
        )
    return torch.tensor(ids[: windows * context]).view(windows, context)
