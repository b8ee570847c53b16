"""`cast serve --engine vllm` from the outside: the command, the openai client, and how it ends on bad input."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from cast_serve.vllm_plugin.refusal import show_refusals_plainly
from conversion.errors import InputError
from tests.vllm.checkpoints import Checkpoints
from tests.vllm.engine import engine, greedy

QUESTION = [{"role": "user", "content": "Hello"}]
CACHE = ["--kv-cache-memory-bytes", "33554432", "--max-model-len", "128"]


def cast(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cast_serve.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def client(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = [
        "serve",
        checkpoints.packed("llama"),
        "--engine",
        "vllm",
        "--port",
        port,
        "--served-model-name",
        "tiny",
    ]
    with log.open("w") as output:
        server = subprocess.Popen(
            cast(*arguments, "--enforce-eager", *CACHE), stdout=output, stderr=subprocess.STDOUT, env=os.environ.copy()
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        while True:
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        yield client
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
def test_completions_are_the_engines(client: openai.OpenAI, checkpoints: Checkpoints) -> None:
    prompt = [5, 17, 3, 88, 41, 60]
    answer = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    with engine(checkpoints.packed("llama")) as llm:
        (expected,) = greedy(llm, [prompt], 8)
    assert answer.choices[0].token_ids == expected  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_chat_streams_what_it_says_at_once(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**options, stream=True))  # type: ignore[call-overload]
    assert whole
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert len(chunks) > 2


@pytest.mark.slow
def test_vllm_serve_ends_with_the_sentence(checkpoints: Checkpoints, tmp_path: Path) -> None:
    packed = checkpoints.packed("llama")
    for file in packed.iterdir():
        text = file.read_bytes()
        (tmp_path / file.name).write_bytes(text.replace(b'"version": 1', b'"version": 2'))
    sentence = "is a packed checkpoint of version 2, and this release reads version 1"
    ours = subprocess.run(cast("serve", tmp_path, "--engine", "vllm"), capture_output=True, text=True)
    assert ours.returncode == 2
    assert ours.stderr.startswith("error: ")
    assert sentence in ours.stderr
    assert ours.stderr.count("\n") == 1
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path)]
    theirs = subprocess.run(vllm, capture_output=True, text=True)
    assert theirs.returncode != 0
    assert sentence in theirs.stderr.splitlines()[-1]
    assert "Traceback" not in theirs.stderr


def test_only_refusals_are_shown_plainly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: shown.append(error))
    show_refusals_plainly()
    show_refusals_plainly()

    def uncaught(error: BaseException) -> str:
        sys.excepthook(type(error), error, None)
        return capsys.readouterr().err

    wrapped = RuntimeError("could not start")
    wrapped.__cause__ = InputError("a layer is damaged")
    assert uncaught(wrapped) == "error: a layer is damaged\n"
    assert shown == []
    another = ValueError("not ours")
    assert uncaught(another) == ""
    assert shown == [another]
