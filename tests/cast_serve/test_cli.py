"""The command line as a whole: every command is there, and one whose packages are missing says what to install."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cast_serve.cli import EXTRAS, build_app

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_every_command_has_extras_that_exist() -> None:
    assert set(EXTRAS) == set(PROJECT["entry-points"]["cast.commands"])
    assert [command.name for command in build_app().registered_commands] == list(EXTRAS)
    for extras in EXTRAS.values():
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_version_is_said() -> None:
    result = CliRunner().invoke(build_app(), ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"cast-serve {PROJECT['version']}\n")


@pytest.mark.parametrize(("command", "extra"), [("eval", "eval"), ("convert", "tensorrt")])
def test_extras_are_named_whole_in_help(command: str, extra: str) -> None:
    """Square brackets are markup there."""
    assert f"'cast-serve[{extra}]'" in CliRunner().invoke(build_app(), [command, "--help"]).stdout


@pytest.mark.parametrize(
    ("missing", "arguments", "install"),
    [
        ("matplotlib", ["train", "model", "--data", "text.txt", "--out", "out"], "train"),
        ("scipy", ["scaling-law", "records.json", "--out", "out"], "train"),
        ("psutil", ["bench", "--dense", "model", "--sparse", "model"], "bench"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    missing: str, arguments: list[str], install: str, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from cast_serve.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: cast {arguments[0]} needs the package '{missing}" in done.stderr
    assert done.stderr.strip().endswith(f"pip install 'cast-serve[{install}]'")
