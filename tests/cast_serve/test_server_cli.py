"""`cast serve` as a process: it converts, says what runs, ends cleanly, and refuses bad input in one sentence."""

import contextlib
import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cast_serve.server import model_dir
from conversion.errors import InputError
from conversion.fingerprint import source_fingerprint
from conversion.onnx import GRAPH
from conversion.pack import save_packed
from tests.cast_serve.live_server import eventually
from tests.cast_serve.test_server_engine import SPARSE_LINEARS
from tests.cast_serve.tiny_llama import Tiny

SERVE = [sys.executable, "-m", "cast_serve.cli", "serve"]


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny-packed"
    save_packed(tiny.hf, folder)
    return folder


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and the line it prints when it is ready."""
    process = subprocess.Popen([*SERVE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def refusal(*arguments: str) -> str:
    """What `cast serve` says before it gives up."""
    result = subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_packed_directory_is_converted_once_served_and_stopped(packed: Path) -> None:
    with serving(str(packed), "--port", "0", "--max-batch-size", "2") as (process, line):
        assert line.startswith("ready: http://127.0.0.1:"), process.communicate()
        assert f"2:4 float32, {SPARSE_LINEARS} sparse linears" in line
        url = line.split()[1]
        model = httpx.get(f"{url}/models").json()["data"][0]
        assert (model["id"], model["cast24"]["sparse_layers"]) == ("tiny-packed", SPARSE_LINEARS)
        body = {"model": "tiny-packed", "prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert "data: [DONE]" in list(lines)  # a running answer is finished
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, "")
        assert [text for text in err.splitlines() if not text.startswith("converting ")] == []
    made = (packed / "cast-onnx" / "model.onnx").stat().st_mtime_ns

    with serving(str(packed), "--port", "0", "--served-model-name", "org/other") as (process, line):
        assert "serves org/other" in line
        assert httpx.get(f"{line.split()[1]}/models/org/other").json()["id"] == "org/other"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert (packed / "cast-onnx" / "model.onnx").stat().st_mtime_ns == made


@pytest.mark.slow
def test_a_request_that_never_ends_is_cut_after_the_drain(tiny: Tiny) -> None:
    """The drain is 5 s; the server must be gone soon after, with exit code 0, whatever clients do."""
    with serving(str(tiny.onnx), "--port", "0") as (process, line):
        port = int(line.split()[1].split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as idle:
            idle.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert idle.recv(10_000).startswith(b"HTTP/1.1 503")
        _, err = process.communicate(timeout=15)
        assert process.returncode == 0
        assert "Traceback" not in err


def test_missing_directory(tmp_path: Path) -> None:
    assert "does not exist" in refusal(str(tmp_path / "none"))


def test_directory_without_a_model(tmp_path: Path) -> None:
    assert "is no model directory" in refusal(str(tmp_path), "--port", "0")


def test_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "model type 'mamba' is not supported" in refusal(str(tmp_path), "--port", "0")


def test_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(str(tmp_path), "--port", "0")


def test_port_in_use_is_noticed_first(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refusal(str(tmp_path), "--port", str(port))


def test_unknown_host(tmp_path: Path) -> None:
    assert "cannot listen on" in refusal(str(tmp_path), "--host", "256.1.1.1")


def test_what_changed_is_converted_again(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copytree(packed, source, ignore=shutil.ignore_patterns("cast-onnx"))
    conversions = []

    def convert(directory: Path, target: Path, value_dtype: str | None) -> None:
        conversions.append((target, value_dtype))
        target.mkdir(exist_ok=True)
        made_from = {"source_fingerprint": source_fingerprint(directory), "graph": GRAPH}
        (target / "cast_onnx.json").write_text(json.dumps(made_from))

    monkeypatch.setattr(model_dir, "_convert", convert)
    assert model_dir.find_onnx_dir(source, None) == source / "cast-onnx"
    assert model_dir.find_onnx_dir(source, None) == source / "cast-onnx"
    assert model_dir.find_onnx_dir(source, "bfloat16") == source / "cast-onnx-bfloat16"
    assert conversions == [(source / "cast-onnx", None), (source / "cast-onnx-bfloat16", "bfloat16")]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    model_dir.find_onnx_dir(source, None)
    assert len(conversions) == 3
    made_from = json.loads((source / "cast-onnx" / "cast_onnx.json").read_text())
    (source / "cast-onnx" / "cast_onnx.json").write_text(json.dumps(made_from | {"graph": GRAPH - 1}))
    model_dir.find_onnx_dir(source, None)
    assert len(conversions) == 4
    assert model_dir.find_onnx_dir(source / "cast-onnx", None) == source / "cast-onnx"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_stopped_while_converting_leaves_nothing(
    packed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    source = tmp_path / "source"
    shutil.copytree(packed, source, ignore=shutil.ignore_patterns("cast-onnx"))
    with subprocess.Popen([*SERVE, str(source), "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        assert eventually(lambda: any(source.glob(".cast-onnx.*")), 60)
        converting = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()  # until the last of both processes has ended
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert psutil.wait_procs(converting, 10)[1] == []
    assert not any(source.glob("*cast-onnx*"))


def test_a_directory_that_is_not_ours_is_kept(packed: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(packed, source, ignore=shutil.ignore_patterns("cast-onnx"))
    for name in ("onnx", "cast-onnx"):
        (source / name).mkdir()
        (source / name / "model_q4.onnx").write_text("precious")
    with pytest.raises(InputError, match="cast-onnx holds other files"):
        model_dir.find_onnx_dir(source, None)
    for name in ("onnx", "cast-onnx"):
        assert (source / name / "model_q4.onnx").read_text() == "precious"


def test_conversion_without_torch_names_the_command(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"cast convert .* --to onnx"):
        model_dir.find_onnx_dir(packed, "float32")


def test_serving_imports_no_torch_and_no_transformers() -> None:
    code = (
        "import sys, cast_serve.server.run, cast_serve.server.model_dir, cast_serve.engine.engine;"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cast_onnx.json", '{"version": 3', "cast_onnx.json is damaged"),
        ("cast_onnx.json", '{"version": 3}', "cast_onnx.json is damaged"),
        ("model.onnx", "{}", "cannot be loaded"),
        ("tokenizer.json", "{}", "cannot read the tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
    ],
)
def test_damaged_onnx_directory(tiny: Tiny, tmp_path: Path, name: str, content: str, message: str) -> None:
    damaged = tmp_path / "onnx"
    shutil.copytree(tiny.onnx, damaged)
    (damaged / name).write_text(content)
    assert message in refusal(str(damaged), "--port", "0")
