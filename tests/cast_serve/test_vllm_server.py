"""`cast serve --engine vllm`, as far as it goes without vLLM."""

import json
import sys
from pathlib import Path

import pytest

from cast_serve import cli
from cast_serve.server import vllm_server


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[str]:
    """The command that `cast serve` becomes."""
    became: list[list[str]] = []
    monkeypatch.setattr(vllm_server.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_server, "environment", lambda given, threads: {"threads": threads})
    monkeypatch.setattr(vllm_server.os, "execve", lambda file, command, environment: became.append(command))
    monkeypatch.setattr(sys, "argv", ["cast", "serve", *map(str, arguments)])
    cli.build_app()(standalone_mode=False)
    return became[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    return tmp_path


def test_known_options_get_vllms_names_and_others_pass_through(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--engine", "vllm", "--port", 1234, "--max-batch-size", 4, "--max-model-len", 512, "-tp", 2]
    assert run(monkeypatch, model, *options)[2:] == [
        *("vllm.entrypoints.cli.main", "serve", str(model), "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", "1234", "--served-model-name", model.name, "--max-num-seqs", "4"),
        *("--max-model-len", "512", "-tp", "2"),
    ]


def test_a_named_dtype_wins(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, model, "--engine", "vllm", "--dtype=bfloat16").count("--dtype") == 0


def test_the_environment_keeps_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "version", lambda name: "0.32.0+cpu")
    assert vllm_server.environment({"OMP_NUM_THREADS": "7", "A": "b"}, None) == {
        "OMP_NUM_THREADS": "7",
        "A": "b",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_USE_AOT_COMPILE": "0",
    }
    assert vllm_server.environment({"OMP_NUM_THREADS": "7"}, 3)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(vllm_server, "version", lambda name: "0.32.0")
    assert vllm_server.environment({"A": "b"}, None) == {"A": "b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "vllm"], "needs vLLM: pip install"),
        (["--engine", "vllm", "--max-queue", "3"], "--max-queue is for --engine onnxruntime"),
        (["--max-model-len", "512"], "has no argument '--max-model-len'"),
    ],
)
def test_what_cannot_be_is_refused(
    options: list[str], message: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_server.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["cast", "serve", str(model), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
