"""The quality table end to end on a tiny model: two methods at two budgets, interrupted, reused, written down."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from benchmarks import quality
from benchmarks.comparison import study as study_module
from benchmarks.comparison.study import Study, plan
from benchmarks.comparison.variants import find_variants
from cast_train.evaluation.evaluate import evaluate
from conversion.errors import InputError
from tests.cast_train.tiny import save_model, write_text

SMALL = (
    "batch_tokens=64,block_length=16,micro_batch_tokens=64,calibration_tokens=256,lr=2e-3,precision=fp32,log_steps=4"
)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {
        "model": save_model(tmp_path / "model"),
        "train": write_text(tmp_path / "train.txt"),
        "heldout": write_text(tmp_path / "heldout.txt", 800, seed=1),
        "second": write_text(tmp_path / "second.txt", 800, seed=2),
        "work": tmp_path / "work",
        "out": tmp_path / "results",
    }


def invoke(files: dict[str, Path], *arguments: str) -> Result:
    settings = [part for setting in SMALL.split(",") for part in ("--set", setting)]
    command = [arguments[0], str(files["model"]), "--data", str(files["train"]), "--heldout", str(files["heldout"])]
    command += ["--heldout", str(files["second"]), "--context", "32", "--eval-tokens", "320"]
    command += ["--work", str(files["work"]), "--out", str(files["out"]), *settings, *arguments[1:]]
    return CliRunner().invoke(quality.app, command, catch_exceptions=False)


def written(files: dict[str, Path], suffix: str) -> Path:
    (path,) = files["out"].glob(f"*{suffix}")
    return path


@pytest.mark.slow
def test_table_of_two_methods_at_two_budgets(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("table", "--tokens", "640,320", "--methods", "dense,sparsegpt,srste,cast", "--set", "srste.lr=1e-3")
    assert invoke(files, *arguments).exit_code == 0
    results = json.loads(written(files, ".json").read_text())
    cells = {(cell["variant"], cell["tokens"]): cell for cell in results["cells"]}
    assert list(cells) == [
        ("dense", None),
        ("sparsegpt", None),
        *((method, tokens) for tokens in (320, 640) for method in ("srste", "cast")),
    ]
    assert cells["srste", 320]["config"]["lr"] == 1e-3
    assert cells["cast", 640]["config"]["lr"] == 2e-3
    assert cells["cast", 640]["training"]["trained_tokens"] == 640
    assert all("kl" in cell["texts"]["heldout.txt"] for name, cell in cells.items() if name[0] != "dense")
    assert "kl" not in cells["cast", 640]["texts"]["second.txt"]
    (dense,) = evaluate([files["model"]], files["heldout"], 32, 320)["models"].values()
    assert cells["dense", None]["texts"]["heldout.txt"] == dense
    assert results["versions"]["torch"]

    markdown = written(files, ".md").read_text()
    value = cells["cast", 640]["texts"]["heldout.txt"]["perplexity"]
    assert f"{value:.2f}" in markdown
    assert "| method | 320 tokens | 640 tokens |" in markdown
    assert written(files, ".png").read_bytes().startswith(b"\x89PNG")
    assert not list(files["work"].glob("*/model"))  # scored and removed

    # Again: nothing is trained, and the numbers are the same
    monkeypatch.setattr(study_module, "train", lambda *_, **__: pytest.fail("a finished cell was trained again"))
    assert invoke(files, *arguments).exit_code == 0
    assert json.loads(written(files, ".json").read_text())["cells"] == results["cells"]


def test_an_interrupted_cell_goes_on_and_a_failed_one_is_shown(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    original = study_module.train

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        if len(calls) == 1:
            raise RuntimeError("killed")
        if args[3].method == "srste":
            raise InputError("the loss became nan at step 3")
        return original(*args, **kwargs)

    monkeypatch.setattr(study_module, "train", interrupted)
    arguments = ("table", "--tokens", "320", "--methods", "cast,srste")
    with pytest.raises(RuntimeError, match="killed"):
        invoke(files, *arguments)
    assert invoke(files, *arguments).exit_code == 0
    assert all(call["resume"] for call in calls)
    cells = json.loads(written(files, ".json").read_text())["cells"]
    assert ["failed" in cell for cell in cells] == [False, True]
    assert "the loss became nan at step 3" in written(files, ".md").read_text()


def test_sweep_writes_every_point(files: dict[str, Path]) -> None:
    arguments = ("sweep", "--tokens", "320", "--over", "lr=1e-3,2e-3", "--over", "eta=0.5", "--method", "cast")
    assert invoke(files, *arguments, "--name", "llama-0.85m").exit_code == 0
    results = json.loads(written(files, "-llama-0.85m.json").read_text())
    assert results["swept"] == {"lr": [1e-3, 2e-3], "eta": [0.5]}
    points = [(cell["config"]["lr"], cell["config"]["eta"]) for cell in results["cells"]]
    assert points == [(1e-3, 0.5), (2e-3, 0.5)]
    assert written(files, ".png").stat().st_size > 0


def test_values_to_sweep_over() -> None:
    assert quality._swept("betas=[0.9,0.95],[0.9,0.98]") == ("betas", [[0.9, 0.95], [0.9, 0.98]])
    assert quality._swept("warm_start=none,wanda") == ("warm_start", ["none", "wanda"])
    assert quality._swept("compile=true,false") == ("compile", [True, False])


def test_a_cell_is_known_by_what_touches_its_result(files: dict[str, Path]) -> None:
    def directories(**changes: Any) -> set[str]:
        study = Study(files["model"], (str(files["train"]),), (files["heldout"],), files["work"], changes=changes)
        cells = plan(study, find_variants("dense,wanda,cast"), [51200])
        return {study._directory(cell).name for cell in cells}

    before = directories()
    assert directories(log_steps=7) == before
    changed = directories(lr=3e-4) - before
    assert {name.split("-")[0] for name in changed} == {"cast"}
    files["train"].write_text("other text")
    assert {name.split("-")[0] for name in directories() - before} == {"wanda", "cast"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table", "--tokens", "few"), "--tokens 'few'"),
        (("table", "--tokens", "320", "--methods", "cost"), "no method 'cost'"),
        (("table", "--tokens", "320", "--set", "cost.lr=1"), "--set cost.lr=1"),
        (("table", "--tokens", "320", "--methods", "gmp", "--set", "gmp.decay=1"), "no setting 'decay'"),
        (("sweep", "--tokens", "320", "--over", "lr"), "--over lr"),
        (("sweep", "--tokens", "320", "--over", "tokens=64,128"), "--over tokens=64,128: .* the budget is --tokens"),
        (("sweep", "--tokens", "320", "--over", "lr=1", "--method", "wanda"), "--method 'wanda'"),
    ],
)
def test_wrong_arguments_are_said(files: dict[str, Path], arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        invoke(files, *arguments)
