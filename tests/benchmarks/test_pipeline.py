"""Reuse and failure of stages, with scripts in place of the real commands."""

import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.pipeline.run import StageFailed, run_stages
from benchmarks.pipeline.stages import Preset, Stage, stages
from benchmarks.pipeline.texts import check_texts
from conversion.errors import InputError
from conversion.hub import local_model

# appends its name to a log, then copies its input to its output, or fails with the code it is given
SCRIPT = """
import pathlib, sys
name, source, target, code = sys.argv[1:]
if pathlib.Path(target).exists(): sys.exit(f"{target} exists")
with open("ran.log", "a") as log: print(name, file=log)
if int(code): sys.exit(int(code))
pathlib.Path(target).write_text(pathlib.Path(source).read_text())
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").write_text("weights")
    return tmp_path


def stage(name: str, source: str, target: str, code: int = 0) -> Stage:
    return Stage(name, (name, source, target, str(code)), (Path(source),), (Path(target),), minutes=1)


def chain(failing: int = 0) -> list[Stage]:
    return [stage("train", "source", "trained"), stage("convert", "trained", "packed", failing)]


def run(plan: list[Stage], tmp_path: Path) -> list[str]:
    """Run and return the names of the stages that really ran."""
    log = tmp_path / "ran.log"
    log.unlink(missing_ok=True)
    run_stages(plan, tmp_path, Console(quiet=True), (sys.executable, "-c", SCRIPT))
    return log.read_text().split() if log.exists() else []


def test_a_second_run_reuses_everything(workplace: Path) -> None:
    assert run(chain(), workplace) == ["train", "convert"]
    assert (workplace / "packed").read_text() == "weights"
    assert run(chain(), workplace) == []


def test_what_depends_on_a_change_runs_again(workplace: Path) -> None:
    run(chain(), workplace)
    (workplace / "packed").unlink()
    assert run(chain(), workplace) == ["convert"]
    os.utime(workplace / "source", ns=(1, 1))
    assert run(chain(), workplace) == ["train", "convert"]
    changed = [chain()[0], stage("convert", "trained", "elsewhere")]
    assert run(changed, workplace) == ["convert"]


def test_a_failure_stops_with_its_code_and_keeps_what_is_finished(workplace: Path) -> None:
    with pytest.raises(StageFailed) as failure:
        run(chain(failing=3), workplace)
    assert (failure.value.stage.name, failure.value.code) == ("convert", 3)
    assert run(chain(), workplace) == ["convert"]


def test_stages_feed_each_other() -> None:
    """Whatever a stage reads is given by the user or written by a stage before it."""
    source, data, heldout = Path("model"), Path("train.jsonl"), Path("heldout.jsonl")
    known = {source, data, heldout}
    for each in stages(source, data, heldout, Preset.quick, Path("out")):
        assert set(each.inputs) <= known, each.name
        known |= set(each.outputs)


def test_a_source_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'no/such-model' is no local directory"):
        local_model("no/such-model")


def documents(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_held_out_text_that_was_trained_on_is_refused(tmp_path: Path) -> None:
    data = documents(tmp_path / "train.jsonl", "one", "two", "three")
    check_texts(data, documents(tmp_path / "other.jsonl", "four", "five"))
    with pytest.raises(InputError, match=r"1 of 2 held-out documents of .*heldout.jsonl are in the training text"):
        check_texts(data, documents(tmp_path / "heldout.jsonl", "four", "two\n"))
    with pytest.raises(InputError, match="3 of 3 held-out"):
        check_texts(tmp_path, data)
    with pytest.raises(InputError, match="is empty"):
        check_texts(data, documents(tmp_path / "blank.jsonl", "", "\n"))
