"""Chat templates render as transformers renders them, on the shapes that published models use."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cast_serve.server.chat_template import ChatTemplate
from conversion.errors import InputError
from tests.cast_serve import tiny_tokenizers

# ruff: noqa: E501  the templates keep the lines they were published with

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] if loop.index0 == 0 and system else message['content'] %}
    {% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{% endfor %}"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n" }}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
QWEN3 = """{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}{%- set ns.last_query_index = index %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and loop.index0 > ns.last_query_index %}{% generation %}{{- message | tojson }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "qwen3": QWEN3}
CHATS = [
    [{"role": "user", "content": "Hi <b>there</b> & 'you'"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Größe? 漢字 🙂\n"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": " 2 "},
        {"role": "user", "content": '{"a": "<tag>"}'},
    ],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<é>"}],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_equals_transformers(name: str, chat: list[dict[str, str]], variables: dict[str, Any], tmp_path: Path) -> None:
    reference = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizers.byte_level(), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    reference.chat_template = TEMPLATES[name]
    reference.save_pretrained(tmp_path)
    expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **variables)
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(chat, **variables) == expected


def test_date_is_todays() -> None:
    rendered = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render([])
    assert rendered == datetime.now().strftime("%Y-%m-%d")


def test_template_in_tokenizer_config_with_named_templates_and_token_objects(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([]) == "<s>yes"


@pytest.mark.parametrize(
    "config",
    ["{", "[]", '{"chat_template": 5}', '{"chat_template": [1]}', '{"chat_template": "x", "bos_token": 5}'],
)
def test_damaged_tokenizer_config_is_an_input_error(config: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError, match=r"tokenizer_config\.json|not valid jinja"):
        ChatTemplate.load(tmp_path)


def test_no_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_failing_or_unsafe_template_is_a_value_error(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ChatTemplate(source, {}).render([])


def test_broken_template_is_an_input_error() -> None:
    with pytest.raises(InputError, match="not valid jinja"):
        ChatTemplate("{% if %}", {})
