"""`cast serve --engine vllm`, as far as it goes without vLLM."""

import json
import sys
from pathlib import Path

import psutil
import pytest

from cast_serve import cli
from cast_serve.server import vllm_server
from conversion.errors import InputError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[str]:
    """The command that `cast serve` becomes."""
    return become(monkeypatch, *arguments, vllm="0.32.0+cpu")[0]


def become(monkeypatch: pytest.MonkeyPatch, *arguments: object, vllm: str) -> tuple[list[str], dict[str, str]]:
    """The command and environment that `cast serve` becomes."""
    became: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(vllm_server.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_server, "version", lambda name: vllm)
    monkeypatch.setattr(vllm_server.os, "execve", lambda _, command, environment: became.append((command, environment)))
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
        *("--kv-cache-memory-bytes", str(min(4 << 30, psutil.virtual_memory().total // 4))),
        *("--host", "127.0.0.1", "--port", "1234", "--served-model-name", model.name, "--max-num-seqs", "4"),
        *("--max-model-len", "512", "-tp", "2"),
    ]


def test_what_is_named_wins(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = run(monkeypatch, model, "--engine", "vllm", "--dtype=bfloat16", "--gpu-memory-utilization", "0.5")
    assert named.count("--dtype") == named.count("--kv-cache-memory-bytes") == 0
    on_gpu = vllm_server.command(model, ["--dtype", "bfloat16"], on_cpu=False)
    assert on_gpu[-3:] == [str(model), "--dtype", "bfloat16"]


def test_the_copies_of_a_weight_on_a_gpu_are_chosen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST24_SPARSE_MEMORY", "low")
    options = (model, "--engine", "vllm", "--sparse-memory", "fast")
    command, environment = become(monkeypatch, *options, vllm="0.32.0")
    assert "--sparse-memory" not in command
    assert environment["CAST24_SPARSE_MEMORY"] == "fast"
    with pytest.raises(InputError, match="--sparse-memory is for GPUs, and this vLLM is for CPUs"):
        become(monkeypatch, *options, vllm="0.32.0+cpu")


def test_the_environment_keeps_what_it_says() -> None:
    assert vllm_server.cpu_environment({"OMP_NUM_THREADS": "7", "A": "b"}, None) == {
        "OMP_NUM_THREADS": "7",
        "A": "b",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_USE_AOT_COMPILE": "0",
    }
    assert vllm_server.cpu_environment({"OMP_NUM_THREADS": "7"}, 3)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "vllm"], "needs vLLM: pip install"),
        (["--engine", "vllm", "--max-queue", "3"], "--max-queue is for --engine onnxruntime"),
        (["--sparse-memory", "fast"], "--sparse-memory is for GPUs"),
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
