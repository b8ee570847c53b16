"""Requests and responses of the OpenAI API, as far as this server speaks it.

Extensions, named as in vLLM: `stop_token_ids`, `ignore_eos` and `chat_template_kwargs`. A parameter that would change
the result and is not supported is refused by name; one that cannot change it is accepted and ignored. `null` stands for
the default. Streamed chunks are not modelled here: `sse.py` writes them without validation.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cast_serve.engine.types import FinishReason
from cast_serve.server.errors import APIError

MAX_CHOICES = 128
MAX_STOPS = 16

# Values that ask for nothing: with them an unsupported parameter is harmless.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
}
# Bookkeeping of OpenAI's platform, without influence on the text.
_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


def _require_text(body: dict[str, Any]) -> None:
    """Refuse what JSON can hold and neither tokenizers nor answers can: half a surrogate pair, and endless nesting."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise APIError(f"the request holds {half}, half a surrogate pair, which is no text: send whole pairs") from None
    except RecursionError:
        raise APIError("the request's lists and objects are nested too deep") from None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> list[str | list[int]]:
    """One prompt (text or token ids) or a list of them -> a list of them."""
    prompts = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    if not all(isinstance(prompt, str) or (isinstance(prompt, list) and _all_ints(prompt)) for prompt in prompts):
        raise ValueError("it must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    return prompts


def _all_ints(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


NonEmptyString = Annotated[str, Field(min_length=1)]
StopList = Annotated[list[NonEmptyString], BeforeValidator(_as_list), Field(max_length=MAX_STOPS)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stop: StopList = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        _require_text(data)
        return {key: value for key, value in data.items() if value is not None}

    @property
    def sequences(self) -> int:
        """How many choices are to be generated."""
        return self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def refuse_unsupported(self) -> None:
        """Raise APIError for the first parameter whose effect this server would silently leave out."""
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED or value in _NEUTRAL.get(name, ()) or (name == "best_of" and value == self.n):
                continue
            raise APIError(f"parameter '{name}' is not supported by this server: leave it out", param=name)
        if self.stream_options is not None and not self.stream:
            raise APIError("parameter 'stream_options' needs 'stream': true", param="stream_options")


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False

    @property
    def sequences(self) -> int:
        return len(self.prompt) * self.n

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.echo and self.logprobs is not None:
            raise APIError("parameter 'echo' cannot be combined with 'logprobs' by this server", param="echo")


class TextPart(BaseModel):
    type: str
    text: str = ""


class Message(BaseModel):
    """One chat message; fields that only some templates know (name, reasoning_content) are handed on to them."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message with its content as one string."""
        return self.model_dump(exclude_unset=True) | {"content": self._text()}

    def _text(self) -> str | None:
        if not isinstance(self.content, list):
            return self.content
        for part in self.content:
            if part.type != "text":
                raise APIError(
                    f"message content of type '{part.type}' is not supported: this model reads text", param="messages"
                )
        return "\n".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if "messages" in self.chat_template_kwargs:
            raise APIError(
                "parameter 'chat_template_kwargs' cannot hold 'messages': leave it out", param="chat_template_kwargs"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError("parameter 'top_logprobs' needs 'logprobs': true", param="top_logprobs")


class Usage(BaseModel):
    """Token counts. A token that ended the text (end of sequence) counts, though it shows in no text."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Cast24(BaseModel):
    """Proof of what runs, counted from the loaded model."""

    pattern: str
    value_dtype: str
    sparse_layers: int
    weight_bytes: int
    sparse_weight_bytes: int
    kernel: str
    context_length: int


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cast"
    max_model_len: int
    cast24: Cast24


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
