"""Log-probabilities of shown tokens, as /v1/completions and /v1/chat/completions each report them."""

from collections.abc import Iterable
from typing import Any

from cast_serve.engine.types import TokenEvent
from cast_serve.server.tokenizer import Tokenizer

_FLOOR = -9999.0  # JSON has no -inf; OpenAI's API writes this


def completion_logprobs(tokenizer: Tokenizer, tokens: Iterable[tuple[int, TokenEvent]]) -> dict[str, Any]:
    """Parallel lists, one entry a token; each token comes with the offset of its text."""
    result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for offset, event in tokens:
        top = {_name(tokenizer, token_id): _finite(logprob) for token_id, logprob in event.top_logprobs}
        top.setdefault(_name(tokenizer, event.token_id), _finite(event.logprob))
        result["tokens"].append(_name(tokenizer, event.token_id))
        result["token_logprobs"].append(_finite(event.logprob))
        result["top_logprobs"].append(top)
        result["text_offset"].append(offset)
    return result


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[tuple[int, TokenEvent]]) -> dict[str, Any]:
    content = [
        _entry(tokenizer, event.token_id, event.logprob)
        | {"top_logprobs": [_entry(tokenizer, token_id, logprob) for token_id, logprob in event.top_logprobs]}
        for _, event in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    name = _name(tokenizer, token_id)
    return {"token": name, "logprob": _finite(logprob), "bytes": list(tokenizer.token_bytes(token_id))}


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; bytes that are no whole character are written \\xNN, so that names stay apart."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")


def _finite(logprob: float | None) -> float:
    return _FLOOR if logprob is None else max(logprob, _FLOOR)
