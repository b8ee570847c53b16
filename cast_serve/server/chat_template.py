"""A model's chat template, rendered as transformers' `apply_chat_template` renders it, without transformers."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conversion.errors import InputError
from conversion.model_config import read_json

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The compiled template with the special tokens it may name.

    Args:
        source: jinja text. It comes with the model, so it runs in a sandbox.
        special_tokens: e.g. {"bos_token": "<s>"}.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, TypeError, AttributeError) as error:  # the latter if it is no text
            raise InputError(f"the model's chat template is not valid jinja: {error}") from None
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, directory: Path) -> "ChatTemplate | None":
        """Read a model directory's template (chat_template.jinja, else tokenizer_config.json); None if it has none."""
        config = read_json(directory / "tokenizer_config.json")
        named = read_json(directory / "special_tokens_map.json") | config
        file = directory / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
        try:
            if isinstance(source, list):  # several named templates
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
            special = {key: _content(named[key]) for key in _SPECIAL_TOKENS if named.get(key) is not None}
        except (KeyError, TypeError):
            raise InputError(f"{directory / 'tokenizer_config.json'} is damaged: copy or make it again") from None
        return None if source is None else cls(source, special)

    def render(self, messages: list[dict[str, Any]], /, **variables: Any) -> str:
        """The prompt that asks for the next assistant message.

        Raises:
            ValueError: the template refuses these messages or fails on them; the message says why.
        """
        try:
            return self._template.render(
                {"tools": None, "documents": None, "add_generation_prompt": True}
                | self._special_tokens
                | variables
                | {"messages": messages}
            )
        except Exception as error:  # the template is a program: it can fail in any way
            raise ValueError(str(error) or type(error).__name__) from None


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's part for training; when serving it only passes its body through."""

    tags = {"generation"}  # noqa: RUF012  jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """jinja's own filter escapes HTML, which a prompt must not be."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]
