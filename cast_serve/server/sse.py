"""Streamed chunks as server-sent events.

One chunk is written per generated token, so this is the hot path of the server: everything that does not change within
a response is serialised once, and a chunk is a few string concatenations.
"""

import json
from abc import ABC, abstractmethod
from typing import Any

from cast_serve.server.protocol import Usage

DONE = b"data: [DONE]\n\n"


class ChunkWriter(ABC):
    """Writes the chunks of one response.

    Args:
        envelope: id, object, created, model and system_fingerprint.
        include_usage: add "usage": null to every chunk, as the API does when a usage chunk follows.
    """

    def __init__(self, envelope: dict[str, Any], *, include_usage: bool) -> None:
        self._envelope = envelope
        self._head = f'data: {json.dumps(envelope)[:-1]}, "choices": [{{"index": '
        self._tail = '}], "usage": null}\n\n' if include_usage else "}]}\n\n"

    def chunk(
        self, index: int, text: str, *, first: bool, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> bytes:
        """One choice's new text; `first` marks the first chunk of that choice."""
        event = f"{self._head}{index}, {self._payload(text, first)}"
        if logprobs is None and finish_reason is None:
            return f'{event}, "logprobs": null, "finish_reason": null{self._tail}'.encode()
        ending = f'"logprobs": {json.dumps(logprobs)}, "finish_reason": {json.dumps(finish_reason)}'
        return f"{event}, {ending}{self._tail}".encode()

    def usage(self, usage: Usage) -> bytes:
        """The extra chunk, without choices, that `stream_options.include_usage` asks for."""
        return f"data: {json.dumps(self._envelope | {'choices': [], 'usage': usage.model_dump()})}\n\n".encode()

    @abstractmethod
    def _payload(self, text: str, first: bool) -> str:
        """The member that carries the text."""


class CompletionChunks(ChunkWriter):
    def _payload(self, text: str, first: bool) -> str:
        return f'"text": {json.dumps(text)}'


class ChatChunks(ChunkWriter):
    def _payload(self, text: str, first: bool) -> str:
        role = '"role": "assistant", ' if first else ""
        return f'"delta": {{{role}"content": {json.dumps(text)}}}'
