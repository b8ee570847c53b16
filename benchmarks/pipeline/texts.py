"""Held-out text must be text that the model was not trained on."""

import hashlib
from pathlib import Path

from conversion.errors import InputError
from conversion.text import read_documents


def check_texts(data: Path, heldout: Path) -> None:
    """Read both texts through.

    Raises:
        InputError: one is missing, empty or malformed, or they share a document.
    """
    unseen = {_digest(text) for text in read_documents([heldout]) if text.strip()}
    if not unseen:
        raise InputError(f"the held-out text {heldout} is empty")
    shared = unseen.intersection(map(_digest, read_documents([data])))
    if shared:
        raise InputError(
            f"{len(shared)} of {len(unseen)} held-out documents of {heldout} are in the training text {data} too: "
            "take them out of one of the two"
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.strip().encode()).digest()
