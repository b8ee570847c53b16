"""The comparison inside vLLM, as far as it goes without vLLM; tests/vllm runs its worker."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import vllm_cpu
from benchmarks.cpu import measure
from benchmarks.cpu.job import Job, Speed, Turn
from benchmarks.cpu.models import Sources
from conversion.checkpoint import Checkpoint
from conversion.errors import InputError
from tests.conversion.models import CONFIGS, make_model


def sources(folder: Path) -> Sources:
    make_model(CONFIGS["qwen2"], sparse=False).save_pretrained(folder / "dense")
    make_model(CONFIGS["qwen2"], sparse=True).save_pretrained(folder / "sparse")
    return Sources(folder / "dense", folder / "sparse", (), folder / "work")


def test_dense_int8_is_the_dense_model_rounded(tmp_path: Path) -> None:
    made = sources(tmp_path)
    vllm_cpu.dense_int8(made, tmp_path / "int8")
    rounded, exact = Checkpoint(tmp_path / "int8"), Checkpoint(made.dense)
    assert set(rounded.scope) == set(exact.scope)
    for name in exact.names:
        if name in exact.scope_set:
            error = (rounded.tensor(name) - exact.tensor(name)).norm() / exact.tensor(name).norm()
            assert 0 < error < 0.01
        else:
            assert torch.equal(rounded.tensor(name), exact.tensor(name))


def test_every_candidate_gets_a_turn_and_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sources(tmp_path)
    asked: list[Job] = []

    def run(candidate: object, job: Job, python: str) -> str:
        assert python == "/bin/sh"
        asked.append(job)
        turn = Turn({1: Speed(1.0, 4, 0.5, 3)}, 50.0, 9_000_000, 1.0, "a fake", 5_000_000)
        return json.dumps(turn, default=vars)

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(vllm_cpu, "warn_if_busy", lambda console: None)
    folders = {"work": made.work, "dense": made.dense, "sparse": made.sparse, "out": tmp_path / "out"}
    vllm_cpu.main(**folders, python=Path("/bin/sh"), rounds=2, concurrency=[1], prompt_tokens=8, prefill_tokens=16)
    assert [job.dtype for job in asked[:7]] == ["float32", "bfloat16", "bfloat16"] + ["float32"] + ["bfloat16"] * 3
    assert len(asked) == 14
    assert {Path(job.model).name for job in asked} == {
        "dense",
        "dense-int8",
        "packed",
        "2-4-int8",
        "2-4-int8-int8-embedding",
    }
    table = capsys.readouterr().out
    assert "weights resident" in table
    assert "| 2:4 bf16 | 0 MB | 5 MB | 9 MB | 4.0 (4.0–4.0) |" in table
    (record,) = (tmp_path / "out").glob("vllm-cpu-dense-*.json")
    assert len(json.loads(record.read_text())["candidates"]) == 7


def test_without_vllms_environment_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'make test-vllm' makes vLLM's environment"):
        vllm_cpu.main(work=tmp_path / "work", python=tmp_path / "python", random="tiny")
    assert not (tmp_path / "work").exists()
