"""Documents of text files, one string each. Imports no torch, so that any command can look at texts."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conversion.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".parquet")
_PIECE = 1 << 18  # characters of a text file that are handed on together


def read_documents(data: Sequence[str | Path]) -> Iterator[str]:
    """Yield the documents of `data`, named as for `load_tokens`, one string each."""
    for source in (source for entry in data for source in open_sources(str(entry))):
        parts: list[str] = []
        for text, ends, _ in source.pieces():
            parts.append(text)
            if ends:
                yield "".join(parts)
                parts = []


class Source:
    """Documents of one origin.

    Attributes:
        streamed: its size is unknown and may have no practical end: no more of it should be read than is needed.
    """

    streamed = False

    def fingerprint(self) -> str:
        raise NotImplementedError

    def size(self) -> int:
        """Total of the amounts that `pieces` yields, for the progress bar; not of what is streamed."""
        raise NotImplementedError

    def pieces(self) -> Iterator[tuple[str, bool, int]]:
        """Yield (text, whether a document ends with it, its share of size(), or its characters where streamed)."""
        raise NotImplementedError


class _TextFile(Source):
    def __init__(self, path: Path) -> None:
        self.path = path

    def fingerprint(self) -> str:
        with self.path.open("rb") as file:
            return self.path.suffix + hashlib.file_digest(file, "sha256").hexdigest()

    def size(self) -> int:
        return self.path.stat().st_size

    def pieces(self) -> Iterator[tuple[str, bool, int]]:
        lines: list[str] = []
        length = 0
        try:
            with self.path.open(encoding="utf-8") as file:
                for line in file:
                    if length >= _PIECE:
                        yield "".join(lines), False, length
                        lines, length = [], 0
                    lines.append(line)
                    length += len(line)
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        yield "".join(lines), True, length


class _JsonLines(_TextFile):
    def pieces(self) -> Iterator[tuple[str, bool, int]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    raise InputError(f"{self.path}, line {number}: not valid JSON") from None
                text = row.get("text") if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise InputError(f'{self.path}, line {number}: no "text" field that holds a string')
                yield text, True, len(line)


class _Parquet(_TextFile):
    def pieces(self) -> Iterator[tuple[str, bool, int]]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid:
            raise InputError(f"{self.path} is not a parquet file") from None
        if "text" not in file.schema_arrow.names:
            raise InputError(f'{self.path} has no "text" column, only {", ".join(file.schema_arrow.names)}')
        share = self.size() // max(1, file.metadata.num_rows)
        for batch in file.iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield text, True, share


class _HubDataset(Source):
    """A split of a dataset on the hub, streamed: nobody wants a whole crawl on disk. Offline, what was downloaded.

    Files of a large one are often each of one origin, so those are read in random order, the same each time.
    """

    streamed = True

    def __init__(self, entry: str) -> None:
        try:
            import datasets
        except ImportError:
            raise InputError(
                f"{entry} is no file or directory here, and to look for it on the hub takes the package 'datasets': "
                "pip install 'cast-serve[train]'"
            ) from None
        from huggingface_hub import HfApi, constants

        name, configuration, split = [*entry.split(":"), "", ""][:3]
        offline = constants.HF_HUB_OFFLINE
        try:
            commit = None if offline else HfApi().dataset_info(name).sha  # before `datasets`, which asks for 20 seconds
            self._rows: Any = datasets.load_dataset(
                name, configuration or None, split=split or "train", streaming=not offline
            )
            version = commit or self._rows._fingerprint
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"'{entry}' is neither a file or directory here nor a dataset that the hub gives as NAME, NAME:CONFIG "
                f"or NAME:CONFIG:SPLIT: {reason}"
            ) from None
        if not offline and self._rows.num_shards > 1:
            self._rows = self._rows.shuffle(seed=0)
        columns = list(self._rows.column_names or next(iter(self._rows), {}))
        if "text" not in columns:
            raise InputError(f'dataset {name} has no "text" column, only {", ".join(columns)}')
        self._identity = f"{name}:{configuration}:{split}@{version}"

    def fingerprint(self) -> str:
        return self._identity

    def pieces(self) -> Iterator[tuple[str, bool, int]]:
        for row in self._rows:
            if row["text"] is not None:
                yield row["text"], True, len(row["text"])


def open_sources(entry: str) -> list[Source]:
    """Return what a file, a directory of files or a hub dataset (NAME, NAME:CONFIG or NAME:CONFIG:SPLIT) stands for.

    Raises:
        InputError: there is no such thing, or a file is empty or of another kind than SUFFIXES.
    """
    path = Path(entry)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise InputError(f"{path} holds no {', '.join(SUFFIXES)} file")
        return [_file_source(file) for file in files]
    if path.is_file():
        return [_file_source(path)]
    no_dataset = entry.partition(":")[0].count("/") > 1 or entry.startswith(".")
    if path.suffix in SUFFIXES or path.is_absolute() or no_dataset:
        raise InputError(f"{path} does not exist")
    return [_HubDataset(entry)]


def _file_source(path: Path) -> Source:
    readers = {".txt": _TextFile, ".jsonl": _JsonLines, ".parquet": _Parquet}
    if path.suffix not in readers:
        raise InputError(f"{path} is no {', '.join(SUFFIXES)} file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    return readers[path.suffix](path)
