"""Held-out text that quotes training text: it shares 13 consecutive words with it, the usual contamination test."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

WORDS = 13


def quoting(held: Sequence[str], training: Iterable[str]) -> set[int]:
    """Return the positions in `held` of texts that share any 13 consecutive words with a text of `training`.

    Case and punctuation do not count. Training text is streamed: only the held-out texts' words are kept in memory.
    """
    holders: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for position, text in enumerate(held):
        for words in _runs(text):
            holders[words].add(position)
    found: set[int] = set()
    for text in training:
        for words in _runs(text):
            if words in holders:
                found |= holders[words]
    return found


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    # A text shorter than the window counts whole, so that a short duplicate is caught too.
    for start in range(max(1, len(words) - WORDS + 1)):
        yield tuple(words[start : start + WORDS])
