"""Detokenizing token by token against the library's own decoding of the whole."""

import functools
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from cast_serve.server.tokenizer import Detokenizer, Tokenizer
from conversion.errors import InputError
from tests.cast_serve import tiny_tokenizers


@functools.cache
def loaded(kind: str) -> tuple[RawTokenizer, Tokenizer]:
    raw = getattr(tiny_tokenizers, kind)()
    with tempfile.TemporaryDirectory() as directory:
        raw.save(f"{directory}/tokenizer.json")
        return raw, Tokenizer(Path(directory) / "tokenizer.json")


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.feed(token_id) for token_id in token_ids), detokenizer.flush()]


@given(st.lists(st.integers(0, 320), max_size=40))
def test_byte_level_stream_equals_whole_decode_for_any_tokens(token_ids: list[int]) -> None:
    raw, tokenizer = loaded("byte_level")
    assert "".join(pieces(tokenizer, token_ids)) == raw.decode(token_ids, skip_special_tokens=True)


@given(st.text(max_size=40))
def test_sentencepiece_stream_equals_whole_decode_for_any_text(text: str) -> None:
    raw, tokenizer = loaded("sentencepiece")
    token_ids = tokenizer.encode(text)
    got = pieces(tokenizer, token_ids)
    # The decoder of the whole strips the space that the normalizer put in front; a continuation must keep it.
    assert "".join(got) == " " + text.replace("\u2581", " ") if text else got == [""]
    assert raw.decode(token_ids) == "".join(got)[1:]


@given(st.lists(st.integers(0, 400), max_size=30))
def test_sentencepiece_stream_equals_whole_decode_where_bytes_are_characters(token_ids: list[int]) -> None:
    raw, tokenizer = loaded("sentencepiece")
    token_ids = [i for i in token_ids if not 3 + 128 <= i < 3 + 256 and raw.id_to_token(i)]  # no broken UTF-8
    whole = raw.decode(token_ids, skip_special_tokens=True)
    got = "".join(pieces(tokenizer, token_ids))
    assert got in (whole, " " + whole)


@given(st.text(max_size=20))
def test_no_piece_holds_half_a_character(text: str) -> None:
    for kind in ("byte_level", "sentencepiece"):
        _, tokenizer = loaded(kind)
        got = pieces(tokenizer, tokenizer.encode(text))
        assert all("\ufffd" not in piece for piece in got) or "\ufffd" in text


def test_emoji_comes_out_whole_with_its_last_byte() -> None:
    _, tokenizer = loaded("sentencepiece")
    *first, last = tokenizer.encode("🙂")[-4:]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.feed(token_id) for token_id in first] == ["", "", ""]
    assert detokenizer.feed(last) == "🙂"


def test_broken_character_at_the_end_shows_as_replacement() -> None:
    _, tokenizer = loaded("byte_level")
    half = [tokenizer._raw.token_to_id(char) for char in "ðŁ"]
    assert pieces(tokenizer, half) == ["", "", "\ufffd"]


def test_special_tokens_give_no_text_and_added_ones_do() -> None:
    raw, tokenizer = loaded("byte_level")
    added = raw.token_to_id("<tool call>")
    assert "".join(pieces(tokenizer, [1, added, 2])) == "<tool call>"


def test_missing_file_and_unknown_decoder_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
    wordpiece = RawTokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="WordPiece"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_long_text_holds_up_no_other_thread() -> None:
    thread = threading.Thread(target=loaded("byte_level")[1].encode, args=("the lazy dog " * 50_000,))
    thread.start()
    looks = 0
    while thread.is_alive():
        time.sleep(0.001)
        looks += 1
    assert looks > 5
