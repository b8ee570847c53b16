"""Models and texts by their names on the hub, from the command line, with a hub on localhost."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conversion.hub import model_name
from tests.cast_train.tiny import save_model, tokenizer, write_text
from tests.conversion.models import CONFIGS, make_model
from tests.hub import COMMIT, Hub, serving

ROW_CHARACTERS = 10_000
ROWS = 250  # more than the tokenizer is handed at once


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    dense = save_model(root / "models" / "acme" / "dense")
    (dense / "original").mkdir()
    (dense / "original" / "consolidated.safetensors").write_bytes(b"the same again")
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(root / "models" / "acme" / "sparse")
    tokenizer().save_pretrained(root / "models" / "acme" / "sparse")
    text = root / "datasets" / "acme" / "text"
    (text / "letters").mkdir(parents=True)
    row = json.dumps({"text": write_text(root / "row.txt", ROW_CHARACTERS).read_text()}) + "\n"
    (text / "letters" / "train.jsonl").write_text(row * ROWS)
    (text / "letters" / "test.jsonl").write_text(row)
    (text / "README.md").write_text(
        "---\nconfigs:\n- config_name: letters\n  data_files:\n  - split: train\n    path: letters/train.jsonl\n"
        "  - split: test\n    path: letters/test.jsonl\n- config_name: files\n  data_files: files/*.jsonl\n---\n"
    )
    (text / "files").mkdir()
    for letter in "abcd":
        (text / "files" / f"{letter}.jsonl").write_text(f'{{"text": "{letter}"}}\n' * 50)
    with serving(root) as found:
        yield found


def run(hub: Hub, directory: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python in `directory`, with the hub as the only one."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(directory / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(directory / "cache"),
        "NO_COLOR": "1",
    }
    return subprocess.run([sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True)


def cast(hub: Hub, directory: Path, *arguments: str, fails: bool = False) -> str:
    """Run `cast` in `directory`; return what it printed, to stderr if it has to fail."""
    done = run(hub, directory, ["-m", "cast_serve.cli", *arguments])
    assert done.returncode == (2 if fails else 0), done.stderr
    return done.stderr if fails else done.stdout


def test_a_model_and_text_of_the_hub_are_trained_on_and_no_more_is_read_than_needed(hub: Hub, tmp_path: Path) -> None:
    budget = ["--steps", "2", "--batch-tokens", "64", "--block-length", "16", "--warm-start", "none", "--force"]
    cast(hub, tmp_path, "train", "acme/dense", "--data", "acme/text:letters", "--out", "trained", *budget)
    training = json.loads((tmp_path / "trained" / "training.json").read_text())
    assert training["source"] == "acme/dense"
    assert 64 * 2 <= training["text_tokens"] < ROWS * ROW_CHARACTERS / 2
    assert not any("consolidated" in request for request in hub.requests)

    arguments = ["acme/dense", "trained", "--teacher", "acme/dense", "--data", "acme/text:letters:test"]
    cast(hub, tmp_path, "eval", *arguments, "--context", "64", "--tokens", "512", "--json", "quality.json")
    models = json.loads((tmp_path / "quality.json").read_text())["models"]
    assert list(models) == ["acme/dense", "trained"]
    assert models["acme/dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert models["trained"]["kl"] > 0


def test_the_files_of_a_dataset_are_mixed_alike_each_time(hub: Hub, tmp_path: Path) -> None:
    code = "from conversion.text import read_documents; print(''.join(read_documents(['acme/text:files'])))"
    first, again = (run(hub, tmp_path, ["-c", code]).stdout.strip() for _ in range(2))
    assert first == again
    assert sorted(first) == sorted("abcd" * 50)
    assert set(first[:50]) == set("abcd")


def test_a_plan_needs_no_more_of_a_model_than_its_config(hub: Hub, tmp_path: Path) -> None:
    before = len(hub.requests)
    assert "parameters" in cast(
        hub, tmp_path, "train", "acme/dense", "--preset", "full", "--dry-run", "--gpu", "h100", "--mfu", "0.4"
    )
    files = {request.rsplit("/", 1)[1] for request in hub.requests[before:] if "/resolve/" in request}
    assert files == {"config.json"}


def test_a_sparse_model_of_the_hub_is_packed_and_looked_at(hub: Hub, tmp_path: Path) -> None:
    cast(hub, tmp_path, "convert", "acme/sparse", "packed", "--verify")
    assert (tmp_path / "packed" / "config.json").is_file()
    found = json.loads(cast(hub, tmp_path, "info", "acme/sparse", "--json"))
    assert found["kind"] == "2:4 stored dense"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["convert", "acme/nothing", "packed"], "'acme/nothing' is no local directory and no model that the hub gives"),
        (["eval", "acme/dense", "--data", "acme/nothing"], "'acme/nothing' is neither a file or directory here"),
        (["eval", "acme/dense", "--data", "acme/text"], "Please pick one among the available configs"),
        (["eval", "acme/dense", "--data", "acme/text:letters:validation"], "NAME:CONFIG:SPLIT: Bad split"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_a_sentence(
    hub: Hub, tmp_path: Path, arguments: list[str], match: str
) -> None:
    assert match in " ".join(cast(hub, tmp_path, *arguments, fails=True).split())


def test_a_model_in_the_hubs_cache_is_called_by_its_repository(tmp_path: Path) -> None:
    assert model_name(tmp_path / "models--acme--tiny-llama" / "snapshots" / COMMIT) == "tiny-llama"
    assert model_name(tmp_path / "mine") == "mine"
