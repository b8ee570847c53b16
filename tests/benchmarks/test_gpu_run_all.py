"""The runner of the GPU steps, tried without a GPU: time limits, selection, and the one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from benchmarks.gpu import run_all
from benchmarks.gpu.run_all import STEPS, Step, chosen, run_steps
from benchmarks.gpu.training_correctness import check


def module(directory: Path, name: str, code: str) -> str:
    (directory / f"{name}.py").write_text(code)
    return name


def test_steps_are_limited_and_do_not_harm_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    writes = (
        "import sys, json, pathlib; pathlib.Path(sys.argv[-1], 'numbers.json').write_text(json.dumps(sys.argv[1:]))"
    )
    steps = [
        Step("fails", 20, module(tmp_path, "fails", "raise SystemExit(3)")),
        Step("hangs", 0.5, module(tmp_path, "hangs", "import time; print('begun', flush=True); time.sleep(60)")),
        Step("works", 20, module(tmp_path, "works", writes), ("--fast",)),
    ]
    records = run_steps(steps, tmp_path / "out", None, total_s=60)
    assert records["fails"]["status"] == "failed with 3"
    assert records["hangs"]["status"].startswith("stopped after")
    assert records["hangs"]["seconds"] < 10
    assert records["works"]["status"] == "ok"
    assert records["works"]["results"] == {"numbers.json": ["--fast", "--json", str(tmp_path / "out" / "works")]}
    monkeypatch.setattr(run_all, "_WORTHWHILE_S", 100)
    assert run_steps(steps[:1], tmp_path / "out", None, total_s=60)["fails"]["status"].startswith("left out")


def test_steps_are_chosen_by_name() -> None:
    names = [step.name for step in STEPS]
    assert [step.name for step in chosen([], names[1])] == names[1:]
    assert [step.name for step in chosen([names[2], names[0]], None)] == [names[0], names[2]]
    with pytest.raises(typer.BadParameter, match="there is no step 'x'"):
        chosen(["x"], None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--out", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert process.returncode == 2
    assert process.stderr == "error: this machine has no CUDA device: run it where there is one\n"
    assert not (tmp_path / "out").exists()


def test_training_is_correct_on_this_device() -> None:
    result = check(torch.accelerator.current_accelerator() or torch.device("cpu"))
    assert result["ok"], json.dumps(result)
