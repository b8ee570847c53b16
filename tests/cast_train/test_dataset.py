"""Corpus files to token blocks."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import cast_train.dataset
import conversion.text
from cast_train.dataset import TokenBlocks, load_tokens
from conversion.errors import InputError
from conversion.text import read_documents
from tests.cast_train.tiny import EOS, tokenizer, write_text

TEXTS = ["first text", "second", "the third one"]


def write_corpus(directory: Path, suffix: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"corpus{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)) + "\n")
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3, 4], "text": [*TEXTS, None]}), path)
    else:
        for i, text in enumerate(TEXTS):
            (directory / f"{i}.txt").write_text(text)
        return directory
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_documents_are_joined_by_eos(suffix: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "data", suffix)
    tokens = load_tokens([str(corpus)], tokenizer(), tmp_path / "cache", progress=False).tokens
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    decoded = "".join(tokenizer().convert_ids_to_tokens(tokens.tolist()))
    assert decoded == "".join(text + EOS for text in TEXTS)
    assert list(read_documents([corpus])) == TEXTS


def test_a_long_text_is_one_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion.text, "_PIECE", 50)
    text = "".join(f"line {i} of many\n" for i in range(40))
    (tmp_path / "long.txt").write_text(text)
    ids = load_tokens([str(tmp_path / "long.txt")], tokenizer(), tmp_path / "cache", progress=False).tokens.tolist()
    assert ids == [*tokenizer()(text, add_special_tokens=False)["input_ids"], tokenizer().eos_token_id]
    assert list(read_documents([tmp_path / "long.txt"])) == [text]


def test_tokenizes_once_for_the_same_text_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_text(tmp_path / "text.txt")
    first = load_tokens([str(corpus)], tokenizer(), tmp_path / "cache", progress=False)
    with monkeypatch.context() as forbidden:
        forbidden.setattr(cast_train.dataset, "_tokenize", None)
        again = load_tokens([str(corpus)], tokenizer(), tmp_path / "cache", progress=False)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.tokens, first.tokens)
    other = tokenizer()
    other.eos_token = "e"
    assert load_tokens([str(corpus)], other, tmp_path / "cache", progress=False).fingerprint != first.fingerprint
    write_text(corpus, seed=1)
    assert load_tokens([str(corpus)], tokenizer(), tmp_path / "cache", progress=False).fingerprint != first.fingerprint


def test_an_interrupted_tokenization_leaves_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        load_tokens([str(path)], tokenizer(), tmp_path / "cache", progress=False)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_of_processes_that_start_together_one_tokenizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, calls = write_text(tmp_path / "text.txt"), []
    tokenize = cast_train.dataset._tokenize

    def slowly(*arguments: Any) -> None:
        calls.append(arguments)
        time.sleep(0.3)
        tokenize(*arguments)

    monkeypatch.setattr(cast_train.dataset, "_tokenize", slowly)
    with ThreadPoolExecutor(3) as pool:
        caches = list(pool.map(lambda _: load_tokens([str(corpus)], tokenizer(), tmp_path / "cache"), range(3)))
    assert len(calls) == 1
    assert all(np.array_equal(cache.tokens, caches[0].tokens) for cache in caches)


def test_blocks_cover_the_corpus_once_per_pass_in_an_order_of_the_seed(tmp_path: Path) -> None:
    corpus = write_text(tmp_path / "text.txt", characters=1000)
    cache = load_tokens([str(corpus)], tokenizer(), tmp_path / "cache", progress=False)
    per_pass = len(cache.tokens) // 16
    blocks = TokenBlocks(cache, 16, 2 * per_pass + 3, seed=5)
    assert len(blocks) == 2 * per_pass + 3
    expected = {tuple(cache.tokens[i * 16 : i * 16 + 16].tolist()) for i in range(per_pass)}
    passes = [[tuple(blocks[p * per_pass + i]["input_ids"].tolist()) for i in range(per_pass)] for p in range(2)]
    assert set(passes[0]) == set(passes[1]) == expected
    assert passes[0] != passes[1]
    same = TokenBlocks(cache, 16, 10, seed=5)
    assert all(np.array_equal(same[i]["input_ids"], blocks[i]["input_ids"]) for i in (9, 0, 4))
    other = TokenBlocks(cache, 16, 10, seed=6)
    assert any(not np.array_equal(other[i]["input_ids"], blocks[i]["input_ids"]) for i in range(10))


def test_a_missing_path_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(InputError, match="texts/of/mine does not exist"):
        load_tokens(["texts/of/mine"], tokenizer(), Path("cache"), progress=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", "", "is empty"),
        ("blank.jsonl", "\n\n", "text is empty"),
        ("field.jsonl", '{"content": "x"}\n', 'line 1: no "text" field'),
        ("broken.jsonl", '{"text": "x"\n', "line 1: not valid JSON"),
        ("broken.parquet", "no parquet", "not a parquet file"),
        ("table.csv", "a,b", "is no .txt, .jsonl, .parquet file"),
    ],
)
def test_refuses_bad_files(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_tokens([str(path)], tokenizer(), tmp_path / "cache", progress=False)


def test_refuses_other_bad_corpora(tmp_path: Path) -> None:
    def load(*data: str) -> cast_train.dataset.TokenCache:
        return load_tokens(data, tokenizer(), tmp_path / "cache", progress=False)

    pyarrow.parquet.write_table(pyarrow.table({"words": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match='no "text" column, only words'):
        load(str(tmp_path / "other.parquet"))
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load(str(tmp_path / "latin.txt"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="holds no"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no training text"):
        load()
    (tmp_path / "short.txt").write_text("short")
    short = load(str(tmp_path / "short.txt"))
    with pytest.raises(InputError, match="less than one block"):
        TokenBlocks(short, 16, 1, 0)
    nameless = tokenizer()
    nameless.eos_token = None
    with pytest.raises(InputError, match="EOS"):
        load_tokens([str(tmp_path / "short.txt")], nameless, tmp_path / "cache")
