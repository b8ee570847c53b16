"""The load generator against a server whose delays are known."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.load.bench import drive, measure
from benchmarks.load.measurements import Level, LoadPlan, Role, Settings
from benchmarks.load.servers import Server, weight_files_bytes
from conversion.errors import InputError

FIRST_S, GAP_S = 0.1, 0.02


def fake(path: Path, **settings: object) -> Path:
    path.mkdir(parents=True)
    (path / "fake.json").write_text(json.dumps(settings))
    (path / "config.json").write_text('{"vocab_size": 64}')
    return path


def command(model: Path, port: int) -> Sequence[str]:
    return [sys.executable, "-m", "tests.benchmarks.fake_server", str(model), "--port", str(port)]


def server(tmp_path: Path, **settings: object) -> Server:
    return Server("dense", fake(tmp_path / "model", **settings), tmp_path / "log", command)


def plan(port: int, **changes: object) -> LoadPlan:
    base = LoadPlan(
        port=port,
        model="fake",
        prompts=[[1, 2, 3], [4, 5, 6]],
        output_tokens=11,
        requests={1: 2, 3: 6},
        warmup_users=1,
    )
    return base.model_copy(update=changes)


def test_known_delays_are_measured(tmp_path: Path) -> None:
    with server(tmp_path, first_s=FIRST_S, gap_s=GAP_S) as running:
        running.wait_ready()
        samples = list(drive(plan(running.port)))
    assert [s.concurrency for s in samples] == [1] * 2 + [3] * 6  # the warm-up is not among them
    for sample in samples:
        assert sample.error is None
        assert (sample.prompt_tokens, sample.completion_tokens) == (3, 11)
        assert sample.ttft_s is not None
        assert sample.tpot_s is not None
        assert FIRST_S <= sample.ttft_s < FIRST_S + 0.3
        assert GAP_S <= sample.tpot_s < GAP_S + 0.03
        assert sample.end_to_end_s >= sample.ttft_s + sum(sample.gaps_s)
        assert len(sample.gaps_s) == 10
    one = Level(concurrency=1, samples=samples[:2], resident=1).tokens_per_s
    three = Level(concurrency=3, samples=samples[2:], resident=1).tokens_per_s
    assert 0.5 < one / (11 / (FIRST_S + 10 * GAP_S)) <= 1
    assert 2 < three / one < 4  # three users wait at the same time


@pytest.mark.parametrize(
    ("fault", "failures", "reason"),
    [("status", 2, "out of luck"), ("short", 4, "10 tokens instead of 11"), ("cut", 4, "")],
)
def test_failed_requests_are_counted(tmp_path: Path, fault: str, failures: int, reason: str) -> None:
    with server(tmp_path, first_s=0, gap_s=0, fault=fault) as running:
        running.wait_ready()
        samples = list(drive(plan(running.port, requests={2: 4})))
    assert len(samples) == 4
    found = [sample.error for sample in samples if sample.error is not None]
    assert len(found) == failures
    assert all(reason in error for error in found)


def test_a_server_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"dense server .* exit code 1; its last output:\n    the weights are upside"),
        server(tmp_path, fault="exit") as running,
    ):
        running.wait_ready()


def test_both_servers_take_turns(tmp_path: Path) -> None:
    directories: dict[Role, Path] = {
        "dense": fake(tmp_path / "dense", first_s=0.04, gap_s=0.02, weight_bytes=1000),
        "sparse": fake(tmp_path / "sparse", first_s=0.02, gap_s=0.01, weight_bytes=600, pattern="2:4", sparse_layers=7),
    }
    settings = Settings(concurrencies=[1, 2], prompt_tokens=5, output_tokens=6, requests_per_user=1, rounds=2)
    result = measure(directories, settings, tmp_path, command)
    assert [(r.index, r.role) for r in result.rounds] == [(0, "dense"), (0, "sparse"), (1, "sparse"), (1, "dense")]
    assert result.models["sparse"].sparse_layers == 7
    assert result.rounds[0].memory.reported == 15_000_000
    assert result.rounds[0].memory.resident > 1e6
    assert all(level.resident > 1e6 for r in result.rounds for level in r.levels)
    assert all(len(level.succeeded) == 4 for r in result.rounds for level in r.levels)
    assert all(s.prompt_tokens == 5 for r in result.rounds for level in r.levels for s in level.samples)
    dense, sparse = (result.levels_of(role, 1)[0].tokens_per_s for role in ("dense", "sparse"))
    assert sparse > 1.2 * dense


def test_a_models_name_may_need_quoting_in_an_address(tmp_path: Path) -> None:
    with server(tmp_path, id="my model #1 (größer)") as running:
        running.wait_ready()
        assert running.describe().id == "my model #1 (größer)"


def test_weight_files_of_either_kind_are_weighed(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"12345")
    assert weight_files_bytes(tmp_path) == 10
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert weight_files_bytes(tmp_path) == 3


def test_a_sparse_model_without_sparse_layers_is_refused(tmp_path: Path) -> None:
    directories: dict[Role, Path] = {
        "dense": fake(tmp_path / "dense"),
        "sparse": fake(tmp_path / "sparse", pattern="2:4"),
    }
    with pytest.raises(InputError, match="executes no 2:4 layer"):
        measure(directories, Settings(), tmp_path, command)


def test_requests_beyond_the_context_are_refused(tmp_path: Path) -> None:
    directories: dict[Role, Path] = {
        "dense": fake(tmp_path / "dense"),
        "sparse": fake(tmp_path / "sparse", pattern="2:4", sparse_layers=1),
    }
    with pytest.raises(InputError, match="exceed the context of 256"):
        measure(directories, Settings(prompt_tokens=200, output_tokens=100), tmp_path, command)
