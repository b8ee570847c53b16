"""Directories that appear complete or not at all, and what they may replace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.atomic import new_directory
from conversion.errors import InputError


def make(target: Path, **options: object) -> None:
    with new_directory(target, **options) as building:  # type: ignore[arg-type]
        (building / "config.json").write_text("new")


def test_only_what_was_made_so_before_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out, overwrite=True)  # an empty directory
    make(out, overwrite=True)
    with pytest.raises(InputError, match=r"there is no cast_onnx.json"):
        make(out, overwrite=True, made=["cast_onnx.json"])
    (out / "config.json").rename(out / "notes.txt")
    with pytest.raises(InputError, match="holds other files than would replace it"):
        make(out, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_the_old_directory_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", os.rename
    out.mkdir()
    (out / "config.json").write_text("old")

    def fail(source: Path, target: Path) -> None:
        if target == out and (source / "config.json").read_text() == "new":
            raise PermissionError(13, "no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(PermissionError):
        make(out, overwrite=True)
    assert (out / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("place", ["file/out", "file/further/out", "/proc/none/out"])
def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        make(tmp_path / place)


def test_a_command_that_is_told_to_stop_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import pathlib, time; from conversion.atomic import new_directory; from conversion.command import run\n"
        "def work():\n    with new_directory(pathlib.Path('out')):\n"
        "        print('begun', flush=True); time.sleep(60)\n"
        "run(work)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())
