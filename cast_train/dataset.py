"""Text in, fixed blocks of tokens out: tokenized once into a memory-mapped cache."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from conversion.atomic import room_for
from conversion.errors import InputError
from conversion.progress import shown_progress
from conversion.text import Source, open_sources

_BATCH = 1 << 20  # characters handed to the tokenizer at once
_TOKEN_CHARACTERS = 4  # about, to show progress by
_CACHE_VERSION = 2


@dataclass(frozen=True)
class TokenCache:
    """All tokens of a corpus, memory-mapped.

    Attributes:
        tokens: [total] uint16 or uint32; every document is followed by the EOS token.
        fingerprint: hash of the texts and the tokenizer.
        largest: token of the corpus.
    """

    tokens: np.ndarray
    fingerprint: str
    largest: int


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """`count` blocks of `block_length` tokens, in an order that depends on nothing but seed and position.

    Blocks do not overlap; what is left over at the end of the corpus is dropped. Every pass over the corpus is a new
    permutation. An item is {"input_ids": [block_length] int64}.
    """

    def __init__(self, cache: TokenCache, block_length: int, count: int, seed: int) -> None:
        """InputError if the corpus is shorter than one block."""
        self._blocks_in_corpus = len(cache.tokens) // block_length
        if self._blocks_in_corpus == 0:
            raise InputError(
                f"the text has {len(cache.tokens)} tokens, less than one block of {block_length}: give more text or "
                "shorter blocks"
            )
        self._tokens = cache.tokens
        self._block_length = block_length
        self._count = count
        self._seed = seed
        self._pass = -1
        self._order = np.empty(0, dtype=np.int64)
        self._first_pass: np.ndarray | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self._place(index) * self._block_length
        return {"input_ids": torch.from_numpy(self._tokens[start : start + self._block_length].astype(np.int64))}

    @property
    def rows(self) -> int:
        """Number of different blocks."""
        return min(self._count, self._blocks_in_corpus)

    def row(self, index: int) -> int:
        """Return the index below `rows` at which the first pass over the corpus has the text of block `index`."""
        if index < self._blocks_in_corpus:
            return index
        if self._first_pass is None:
            first = np.random.default_rng([self._seed, 0]).permutation(self._blocks_in_corpus)
            self._first_pass = np.argsort(first)
        return int(self._first_pass[self._place(index)])

    def _place(self, index: int) -> int:
        """Return which block of the corpus is block `index` of the run."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        number, position = divmod(index, self._blocks_in_corpus)
        if number != self._pass:
            self._order = np.random.default_rng([self._seed, number]).permutation(self._blocks_in_corpus)
            self._pass = number
        return int(self._order[position])


def load_tokens(
    data: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path | None = None,
    *,
    needed: int | None = None,
    progress: bool = True,
) -> TokenCache:
    """Tokenize a corpus, or open the cache that an earlier call made of the same texts and tokenizer.

    Documents are joined by the EOS token: that is how models saw documents end in pretraining, and without it the
    last words of one text would be taken for the context of the next.

    Args:
        data: files (.txt: one document a file; .jsonl with a "text" field; .parquet with a "text" column),
            directories of such files, or datasets of the Hugging Face hub with a "text" column: NAME, NAME:CONFIG or
            NAME:CONFIG:SPLIT, the split being "train" unless named.
        cache_dir: where caches live; default `cast-serve/tokens` in the user's cache directory.
        needed: tokens at which reading stops in each dataset of the hub; files are read whole.

    Raises:
        InputError: a file is missing, empty or malformed, or has no text.
    """
    check_eos(tokenizer)
    sources = [source for entry in data for source in open_sources(entry)]
    if not sources:
        raise InputError("no training text was given")
    texts = [f"{source.fingerprint()} to {needed}" if source.streamed else source.fingerprint() for source in sources]
    fingerprint = _hash(str(_CACHE_VERSION), _tokenizer_hash(tokenizer), *texts)
    cache_dir = cache_dir or default_cache()
    target = cache_dir / fingerprint
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{fingerprint}.lock"):  # of a run's processes one tokenizes, the others wait for it
        if not target.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f".{fingerprint}.", dir=cache_dir))
            try:
                with room_for(target):
                    _tokenize(sources, tokenizer, partial, needed, progress)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    meta = json.loads((target / "meta.json").read_text())
    tokens = np.memmap(target / "tokens.bin", dtype=meta["dtype"], mode="r", shape=(meta["tokens"],))
    return TokenCache(tokens, fingerprint, meta["largest"])


def check_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """InputError if a tokenizer has no token to end documents with."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token to end documents with: set eos_token in its tokenizer_config")


def check_vocabulary(largest: int, vocabulary: int, directory: Path) -> None:
    """InputError if a model of `vocabulary` tokens has no embedding for the largest that its own tokenizer makes."""
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer of {directory} does not match its model: it makes token {largest}, and the model knows "
            f"{vocabulary}; copy the tokenizer from where the model came from"
        )


def default_cache() -> Path:
    """Where texts and their tokens are cached unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cast-serve" / "tokens"


def _tokenize(
    sources: list[Source], tokenizer: PreTrainedTokenizerBase, directory: Path, needed: int | None, progress: bool
) -> None:
    """Write tokens.bin and meta.json into `directory`. InputError if there is no token."""
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    total, largest = 0, 0
    size = sum(_TOKEN_CHARACTERS * (needed or 0) if source.streamed else source.size() for source in sources)
    with shown_progress("tokenizing", size, progress) as advance, (directory / "tokens.bin").open("wb") as out:
        for source in sources:
            start = total
            for batch in _batches(source.pieces()):
                encoded = tokenizer([text for text, _, _ in batch], add_special_tokens=False)["input_ids"]
                for ids, (_, ends, _) in zip(encoded, batch, strict=True):
                    if ends and ids:
                        ids.append(tokenizer.eos_token_id)
                    tokens = np.asarray(ids, dtype=dtype)
                    out.write(tokens.tobytes())
                    largest = max(largest, int(tokens.max(initial=0)))
                    total += len(tokens)
                advance(sum(amount for _, _, amount in batch))
                if source.streamed and needed is not None and total - start >= needed:
                    break
    if total == 0:
        raise InputError("the training text is empty")
    (directory / "meta.json").write_text(
        json.dumps({"dtype": np.dtype(dtype).name, "tokens": total, "largest": largest})
    )


def _batches(pieces: Iterable[tuple[str, bool, int]]) -> Iterator[list[tuple[str, bool, int]]]:
    batch: list[tuple[str, bool, int]] = []
    length = 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece[0])
        if length >= _BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return _hash(content, str(tokenizer.eos_token_id))


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
