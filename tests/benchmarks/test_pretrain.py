"""A dense model from scratch, which later steps take as they take a downloaded one."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pretrain
from benchmarks.pretrain import main
from cast_train.evaluation.evaluate import evaluate
from conversion.checkpoint import Checkpoint
from conversion.errors import InputError
from conversion.tokenizer import load_tokenizer

SIZES: dict[str, Any] = {"tokens": 65536, "vocabulary": 300, "hidden": 32, "layers": 1, "context": 32, "lr": 1e-2}


def write(path: Path, numbers: range) -> Path:
    texts = (f"the {i % 7} cats saw {i % 5} dogs\n" * 8 for i in numbers)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_model_has_learned_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "STEP_TOKENS", 512)
    train, heldout = write(tmp_path / "train.jsonl", range(60)), write(tmp_path / "heldout.jsonl", range(60, 80))
    main(tmp_path / "model", [str(train)], **SIZES, seed=0)
    found = evaluate([tmp_path / "model"], heldout, 32, 2048)
    (scores,) = found["models"].values()
    assert scores["perplexity"] < 3  # of 300 tokens
    tokenizer = load_tokenizer(tmp_path / "model")
    ids = tokenizer("the 3 cats, naïve ones,\n saw 8 dögs")["input_ids"]
    assert tokenizer.decode(ids) == "the 3 cats, naïve ones,\n saw 8 dögs"
    assert 257 < len(tokenizer) <= 300
    assert len(Checkpoint(tmp_path / "model").scope) == 7  # all linears of the block can be 2:4
    facts = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    assert facts["tokens"] == 65536


def test_a_size_without_whole_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--hidden 40 is no multiple of 32"):
        main(tmp_path / "model", [str(write(tmp_path / "train.jsonl", range(9)))], **SIZES | {"hidden": 40}, seed=0)
    assert not (tmp_path / "model").exists()
