"""The runner of the GPU steps, tried without a GPU: time limits, selection, and the one sentence."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks.gpu import run_all
from benchmarks.gpu.quality import estimate, unfinished
from benchmarks.gpu.run_all import _TINY_QUALITY, STEPS, Step, chosen, run_steps
from benchmarks.gpu.training_correctness import check
from cast_train.config import CONFIGS
from cast_train.plan import make_plan
from tests.cast_train.tiny import save_model, write_text

ROOT = Path(__file__).parents[2]


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
    records = run_steps(steps, tmp_path / "out", {}, total_s=60)
    assert records["fails"]["status"] == "failed with 3"
    assert records["hangs"]["status"].startswith("stopped after")
    assert records["hangs"]["seconds"] < 10
    assert records["works"]["status"] == "ok"
    assert records["works"]["results"] == {"numbers.json": ["--fast", "--json", str(tmp_path / "out" / "works")]}
    monkeypatch.setattr(run_all, "_WORTHWHILE_S", 100)
    assert run_steps(steps[:1], tmp_path / "out", {}, total_s=60)["fails"]["status"].startswith("left out")


def test_what_a_killed_step_has_written_is_kept_and_so_are_the_steps_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    writes = "import sys, pathlib; pathlib.Path(sys.argv[-1], 'numbers.json').write_text('[1, 2'); raise SystemExit(1)"
    steps = [Step("half", 20, module(tmp_path, "half", writes)), Step("next", 20, "json.tool", package="no_such_one")]
    saved: list[list[str]] = []
    records = run_steps(steps, tmp_path / "out", {}, total_s=60, save=lambda records: saved.append(list(records)))
    assert records["half"]["results"] == {"numbers.json": "[1, 2"}
    assert saved == [["half"], ["half", "next"]]


def test_steps_whose_package_is_missing_are_left_out(tmp_path: Path) -> None:
    records = run_steps([Step("serves", 20, "json.tool", package="no_such_package")], tmp_path, {}, total_s=60)
    assert records["serves"]["status"] == "left out: no_such_package is not installed"


def test_steps_get_what_they_take_and_are_left_out_without_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    prints = module(tmp_path, "prints", "import sys; print(sys.argv[1:])")
    step = Step("prints", 20, prints, ("--big",), tiny=("--small",), takes=("data", "model"), needs=("model",))
    records = run_steps([step], tmp_path / "out", {"data": ["a"]}, total_s=60)
    assert records["prints"]["status"] == "left out: give --model"
    given = {"data": ["a", "b"], "model": ["m"], "state": ["s"]}
    records = run_steps([step], tmp_path / "out", given, total_s=60, tiny=True)
    expected = ["--small", "--json", str(tmp_path / "out" / "prints"), "--data", "a", "--data", "b", "--model", "m"]
    assert records["prints"]["log_tail"] == f"{expected}\n"


def test_a_step_with_grace_is_asked_to_stop_before_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: {}); [time.sleep(1) for _ in range(60)]"
    steps = [
        Step("saves", 12, module(tmp_path, "saves", code.format("sys.exit(143)")), grace_s=10),
        Step("deaf", 3, module(tmp_path, "deaf", code.format("None")), grace_s=1),
    ]
    records = run_steps(steps, tmp_path / "out", {}, total_s=60)
    assert records["saves"]["status"] == "to be continued"
    assert records["deaf"]["status"] == "stopped after 3 s"


@pytest.mark.slow
def test_all_steps_in_miniature_quality_over_several_calls(tmp_path: Path) -> None:
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "train.txt")
    heldout = write_text(tmp_path / "heldout.txt", 800, seed=1)
    given = ["--model", str(model), "--data", str(text), "--heldout", str(heldout), "--state", str(tmp_path / "state")]
    options: dict[str, Any] = {"cwd": ROOT, "text": True}

    # The quality step by itself, stopped in the training of its first method
    state = tmp_path / "state" / "quality"
    quality = [sys.executable, "-m", "benchmarks.gpu.quality", *_TINY_QUALITY, "--json", str(tmp_path / "first")]
    process = subprocess.Popen([*quality, *given], stderr=subprocess.PIPE, **options)
    while not any(len(lines) > 1 for lines in unfinished(state).values()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 143, said
    assert "go on with" in said
    (lines,) = json.loads((tmp_path / "first" / "unfinished.json").read_text()).values()
    (checkpoint,) = state.glob("cast-*/model.run/checkpoint-*")
    assert 0 < lines[-1]["step"] <= int(checkpoint.name.split("-")[1]) < 80

    out = tmp_path / "out"
    run_all = [sys.executable, "-m", "benchmarks.gpu.run_all", "--tiny", "--out", str(out), *given]
    subprocess.run(run_all, check=True, capture_output=True, **options)
    (written,) = out.glob("*.json")
    steps = json.loads(written.read_text())["steps"]
    missing = {step.name: step.package for step in STEPS if step.package and find_spec(step.package) is None}
    assert {name: step["status"] for name, step in steps.items()} == {
        step.name: f"left out: {missing[step.name]} is not installed" if step.name in missing else "ok"
        for step in STEPS
    }
    assert f"continuing from {checkpoint}" in next(out.glob("*/quality.log")).read_text()
    (table,) = (value for name, value in steps["quality"]["results"].items() if name.endswith("gpu-quality.json"))
    assert [cell["variant"] for cell in table["cells"]] == ["dense", "cast", "ast"]
    assert all(cell["training"]["trained_tokens"] == 5120 for cell in table["cells"][1:])
    assert steps["quality"]["results"]["unfinished.json"] == {}


def test_the_estimate_follows_from_the_mfu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model")
    assert "'cpu' is not known" in estimate(model, [640], 2, [], 0.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    settings = ["batch_tokens=64", "block_length=16"]
    config = CONFIGS["cast"].preset("quick", batch_tokens=64, block_length=16, tokens=640)
    plan = make_plan(model, config, gpu="h100", mfu=0.5)
    said = estimate(model, [320, 640], 2, settings, 0.5)
    assert f"{plan.tokens_per_s:,.0f} tokens/s if 50% of the peak of NVIDIA H100 80GB HBM3 is reached" in said


def test_steps_are_chosen_by_name() -> None:
    names = [step.name for step in STEPS]
    assert [step.name for step in chosen([], names[1])] == names[1:]
    assert [step.name for step in chosen([names[2], names[0]], None)] == [names[0], names[2]]
    with pytest.raises(typer.BadParameter, match="there is no step 'x'"):
        chosen(["x"], None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--out", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 2
    assert process.stderr == "error: this machine has no CUDA device: run it where there is one\n"
    assert not (tmp_path / "out").exists()


def test_training_is_correct_on_this_device() -> None:
    result = check(torch.accelerator.current_accelerator() or torch.device("cpu"))
    assert result["ok"], json.dumps(result)
