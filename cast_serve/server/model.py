"""The one model that a server serves: engine, tokenizer and chat template of an ONNX model directory."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cast_serve.engine import Engine
from cast_serve.engine.manifest import read_manifest
from cast_serve.freed_memory import return_freed_memory
from cast_serve.server.chat_template import ChatTemplate
from cast_serve.server.errors import APIError
from cast_serve.server.protocol import Cast24, Model
from cast_serve.server.tokenizer import Tokenizer

_LONG_TEXT = 10_000  # characters; tokenizing more would hold up other requests' tokens


@dataclass(frozen=True)
class ServedModel:
    """Everything that answering a request needs.

    Attributes:
        name: the id that requests must name.
        eos_token_ids: tokens that end a generation unless the request says `ignore_eos`.
        fingerprint: changes with the weights and with the version of this software.
        created: Unix time of loading.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    eos_token_ids: frozenset[int]
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def load(cls, onnx_dir: Path, name: str, **engine_options: Any) -> "ServedModel":
        """Load `onnx_dir` (see conversion.onnx.export); InputError says what is wrong with it."""
        manifest = read_manifest(onnx_dir)
        tokenizer = Tokenizer(onnx_dir / "tokenizer.json")
        chat_template = ChatTemplate.load(onnx_dir)
        engine = Engine(onnx_dir, **engine_options)
        return_freed_memory()  # parsing the tokenizer and the graph leaves 15 MB and more
        return cls(
            name=name,
            engine=engine,
            tokenizer=tokenizer,
            chat_template=chat_template,
            eos_token_ids=frozenset(manifest.eos_token_ids),
            fingerprint=f"cast-{version('cast-serve')}-{manifest.source_fingerprint[:12]}",
        )

    def card(self) -> Model:
        """The model as /v1/models describes it."""
        info = self.engine.info
        return Model(
            id=self.name,
            created=self.created,
            max_model_len=info.context_length,
            cast24=Cast24(
                pattern=info.pattern,
                value_dtype=info.value_dtype,
                sparse_layers=info.sparse_layers,
                weight_bytes=info.weight_bytes,
                sparse_weight_bytes=info.sparse_weight_bytes,
                kernel=info.kernel,
                context_length=info.context_length,
            ),
        )

    def require_name(self, name: str) -> None:
        if name != self.name:
            raise APIError(
                f"the model '{name}' does not exist: this server serves '{self.name}'",
                param="model",
                code="model_not_found",
                status=404,
            )

    def render_chat(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The prompt text for `messages`; `variables` go to the template."""
        if self.chat_template is None:
            raise APIError("this model has no chat template: use /v1/completions", param="messages")
        try:
            return self.chat_template.render(messages, **variables)
        except ValueError as error:
            raise APIError(f"the model's chat template refuses these messages: {error}", param="messages") from None

    async def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text (see Tokenizer.encode)."""

        def encode() -> list[list[int]]:
            return [self.tokenizer.encode(text, special=special) for text in texts]

        return await asyncio.to_thread(encode) if sum(map(len, texts)) > _LONG_TEXT else encode()

    def room_for(self, prompt_ids: list[int], max_tokens: int | None, default: int | None, param: str) -> int:
        """How many tokens to generate for a prompt.

        Args:
            max_tokens: what the request asks for.
            default: what to take if it asks for nothing; None for all that the context holds.
            param: the request's name for the prompt, for the error.
        """
        context = self.engine.info.context_length
        if not prompt_ids:
            raise APIError("the prompt has no tokens", param=param)
        if max(prompt_ids) >= self.engine.info.vocab_size or min(prompt_ids) < 0:
            raise APIError(f"token ids must lie in 0..{self.engine.info.vocab_size - 1}", param=param)
        room = context - len(prompt_ids)
        if room < (max_tokens or 1):
            asked = f" and {max_tokens} are to be generated" if max_tokens else ""
            mend = "shorten it" if room < 1 else f"ask for at most {room}"
            raise APIError(
                f"this model's context is {context} tokens, but the prompt has {len(prompt_ids)}{asked}: {mend}",
                param=param if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        return max_tokens or min(default or room, room)
