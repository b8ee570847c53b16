"""Text to token ids and back, with `tokenizers` alone.

Token ids become text incrementally: each token is a fixed sequence of bytes, so a choice's text is the UTF-8 decoding
of the bytes so far. That is what the library's own decoders compute for byte-level BPE and for SentencePiece with byte
fallback, and it also gives the `bytes` of each token that the API's log-probabilities ask for.
"""

import codecs
import json
import re
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer

from conversion.errors import InputError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SENTENCEPIECE_SPACE = "\u2581"


class Tokenizer:
    """A tokenizer.json.

    Raises InputError if the file is missing, broken or of a kind whose tokens are not sequences of bytes (WordPiece).
    """

    def __init__(self, path: Path) -> None:
        try:
            self._raw = RawTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"cannot read the tokenizer {path}: {error}") from None
        self._raw.no_truncation()
        self._raw.no_padding()
        self._special = {token_id for token_id, token in self._raw.get_added_tokens_decoder().items() if token.special}
        self._to_bytes = _bytes_of_tokens(self._raw, path)
        self._known: dict[int, bytes] = {}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the model's post-processor adds, such as a beginning-of-sequence."""
        (encoding,) = self._raw.encode_batch_fast([text], add_special_tokens=special)  # `encode` would hold the GIL
        return encoding.ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of `token_ids` without special tokens."""
        return self._raw.decode(token_ids, skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (empty for an id outside the tokenizer's vocabulary)."""
        known = self._known.get(token_id)
        if known is None:
            token = self._raw.id_to_token(token_id)
            known = self._known[token_id] = b"" if token is None else self._to_bytes(token)
        return known

    def is_special(self, token_id: int) -> bool:
        """Whether a token is control, not text (end of sequence and the like)."""
        return token_id in self._special


class Detokenizer:
    """Turns the tokens of one choice into text as they come.

    Half a UTF-8 character is kept until its rest arrives; what can never become a character shows as U+FFFD. Special
    tokens give no text. A leading space of the first token stays, because generated text continues a prompt.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Return the text that `token_id` completes, possibly empty."""
        if self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Return what an unfinished character at the end of the stream shows as."""
        return self._utf8.decode(b"", final=True)


def _bytes_of_tokens(raw: RawTokenizer, path: Path) -> Callable[[str], bytes]:
    """Choose how a token's vocabulary entry becomes bytes, from the tokenizer's decoder."""
    decoder = json.loads(raw.decoder.__getstate__()) if raw.decoder is not None else {"type": "none"}
    steps = {step["type"] for step in decoder.get("decoders", [decoder])}
    if steps == {"ByteLevel"}:
        return _byte_level
    if steps & {"ByteFallback", "Metaspace"} and steps <= {"ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}:
        return _sentencepiece
    raise InputError(
        f"{path} decodes with {' + '.join(sorted(steps))}: only byte-level and SentencePiece BPE can be served"
    )


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:  # an added token, written as it is
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SENTENCEPIECE_SPACE, " ").encode()


def _gpt2_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where it is one, else from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _gpt2_alphabet()
