"""Every bad request is answered with a fitting 4xx, one sentence and OpenAI's error body."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cast_serve.server.body_limit import MAX_BODY
from cast_serve.server.model import ServedModel
from cast_serve.server.tokenizer import Tokenizer
from tests.cast_serve.live_server import live_server
from tests.cast_serve.test_server_api import Served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from tests.cast_serve import tiny_tokenizers

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny_tokenizers.byte_level().save(str(path))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer) -> Iterator[Served]:
    served = Served(tokenizer)
    with live_server(served.load) as served.url:
        yield served


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": 3}, "prompt", "a string, a list of strings"),
        ({"prompt": [1, "a"]}, "prompt", "a string, a list of strings"),
        ({"prompt": [[1, 2.5]]}, "prompt", "a string, a list of strings"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": []}, "prompt", "no tokens"),
        ({"prompt": [1, 99999]}, "prompt", "token ids must lie in 0.."),
        ({"prompt": [-1]}, "prompt", "token ids must lie in 0.."),
        ({"model": None}, "model", "required"),
        ({"model": 1}, "model", "valid string"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, got -1"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2, got 2.1"),
        ({"temperature": "0.5"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
        ({"max_tokens": -5}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": "many"}, "max_tokens", "valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "valid integer"),
        ({"seed": "x"}, "seed", "valid integer"),
        ({"stop": 5}, "stop", "valid list"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids", "valid integer"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs 'stream': true"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": 1, "echo": True}, "echo", "cannot be combined"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"frequency_penalty": -1}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"top_k": 5}, "top_k", "not supported"),
        ({"no_such_thing": 5}, "no_such_thing", "not supported"),
    ],
)
def test_bad_completion(served: Served, changes: dict[str, Any], param: str, message: str) -> None:
    body = {"model": "tiny", "prompt": "Hello"} | changes
    error = error_of(httpx.post(served.url + COMPLETIONS, json=body), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": None}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": [{"content": "Hi"}]}, "messages", "messages.0.role' is required"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages", "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'image_url'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs': true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"messages": [{"role": "refused", "content": "x"}]}, "messages", "only users may speak"),
    ],
)
def test_bad_chat(served: Served, changes: dict[str, Any], param: str, message: str) -> None:
    body = {"model": "tiny", "messages": [USER]} | changes
    error = error_of(httpx.post(served.url + CHAT, json=body), 400)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    "field",
    [
        '"model": "t\\ud800"',
        '"messages": [{"role": "user", "content": "a\\ud800b"}]',
        '"messages": [{"role": "user", "content": [{"type": "text", "text": "\\udfff"}]}]',
        '"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]',
        '"chat_template_kwargs": {"x": ["\\ud800"]}',
        '"\\ud800": 1',
    ],
)
def test_half_a_surrogate_pair(served: Served, field: str) -> None:
    body = '{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], ' + field + "}"
    answer = httpx.post(served.url + CHAT, content=body, headers={"content-type": "application/json"})
    message = error_of(answer, 400)["message"]
    assert "half a surrogate pair" in message
    assert "\\ud800" in message or "\\udfff" in message


def test_template_variables_may_have_any_name_but_that_of_the_messages(served: Served) -> None:
    body = {"model": "tiny", "messages": [USER], "max_tokens": 1}
    names = ("self", "variables", "source")
    for name in names:
        answer = httpx.post(served.url + CHAT, json=body | {"chat_template_kwargs": {name: 1}})
        assert answer.status_code == 200, answer.text
    answer = httpx.post(served.url + CHAT, json=body | {"chat_template_kwargs": {"messages": []}})
    assert error_of(answer, 400)["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_deep_nesting(served: Served, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    body = f'{{"model": "tiny", "messages": [{{"role": "user", "content": "x", "name": {nested}}}]}}'
    answer = httpx.post(served.url + CHAT, content=body, headers={"content-type": "application/json"})
    error_of(answer, 400)


def test_a_body_too_large(served: Served) -> None:
    error = error_of(httpx.post(served.url + COMPLETIONS, json={"model": "tiny", "prompt": "a" * MAX_BODY}), 413)
    assert str(MAX_BODY) in error["message"]


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b'{"model": "tiny", ', {"content-type": "application/json"}, "not valid JSON"),
        (b"", {"content-type": "application/json"}, "must be a JSON object"),
        (b"[1]", {"content-type": "application/json"}, "must be a JSON object"),
        (b'{"model": "tiny"}', {"content-type": "text/plain"}, "application/json"),
        (b'\xff\xfe{"', {"content-type": "application/json"}, ""),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', {"content-type": "application/json"}, "temperature"),
    ],
)
def test_malformed_body(served: Served, body: bytes, headers: dict[str, str], message: str) -> None:
    error = error_of(httpx.post(served.url + COMPLETIONS, content=body, headers=headers), 400)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": [4] * 200}, "prompt"),
        (COMPLETIONS, {"prompt": "fox " * 20_000}, "prompt"),
        (COMPLETIONS, {"prompt": ["Hello", [4] * 150], "max_tokens": 51}, "max_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "fox " * 200}]}, "messages"),
        (CHAT, {"messages": [USER], "max_tokens": 199}, "max_tokens"),
    ],
)
def test_longer_than_the_context(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    submitted = len(served.engine.generations)
    error = error_of(httpx.post(served.url + path, json={"model": "tiny"} | body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "context is 200 tokens" in error["message"]
    assert len(served.engine.generations) == submitted


def test_the_whole_context_can_be_used(served: Served) -> None:
    body = {"model": "tiny", "prompt": [4] * 150, "max_tokens": 50, "ignore_eos": True}
    assert httpx.post(served.url + COMPLETIONS, json=body).json()["usage"]["total_tokens"] == 200
    body = {"model": "tiny", "prompt": [4] * 199}
    assert httpx.post(served.url + COMPLETIONS, json=body).json()["usage"]["total_tokens"] == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_unknown_model(served: Served, path: str) -> None:
    body = {"model": "gpt-4", "prompt": "a", "messages": [USER]}
    error = error_of(httpx.post(served.url + path, json=body), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'tiny'" in error["message"]


def test_unknown_route_and_method(served: Served) -> None:
    error_of(httpx.get(served.url + "/v1/embeddings"), 404)
    error_of(httpx.get(served.url + COMPLETIONS), 405)


def test_harmless_parameters_are_accepted(served: Served) -> None:
    body = {
        "model": "tiny",
        "messages": [USER],
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "temperature": None,
        "stop": None,
        "seed": -3,
    }
    assert httpx.post(served.url + CHAT, json=body).status_code == 200


def test_model_without_chat_template(tokenizer: Tokenizer) -> None:
    served = Served(tokenizer)

    def load() -> ServedModel:
        model = served.load()
        object.__setattr__(model, "chat_template", None)
        return model

    with live_server(load) as url:
        error = error_of(httpx.post(url + CHAT, json={"model": "tiny", "messages": [USER]}), 400)
        assert "no chat template" in error["message"]
