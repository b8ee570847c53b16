"""Text sampled from the teacher: its own distribution, cached, resumable."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cast_train import self_data
from cast_train.config import CastConfig
from cast_train.self_data import sample_text, with_samples
from cast_train.training import train
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_model
from conversion.errors import InputError
from tests.cast_train.tiny import config, save_model


@pytest.fixture
def model(tmp_path: Path) -> tuple[Checkpoint, PreTrainedTokenizerBase]:
    directory = save_model(tmp_path / "model")
    return Checkpoint(directory), AutoTokenizer.from_pretrained(directory)


def texts(parts: list[Path]) -> list[str]:
    return [json.loads(line)["text"] for part in parts for line in part.read_text().splitlines()]


def test_an_interrupted_or_shorter_call_is_extended(
    tmp_path: Path, model: tuple[Checkpoint, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample_text(*model, 3 * 32 * 16, 16, tmp_path / "a")
    assert len(whole) == 3
    first = sample_text(*model, 32 * 16, 16, tmp_path / "b")
    assert len(first) == 1
    calls = []
    original = self_data._sample
    monkeypatch.setattr(self_data, "_sample", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    longer = sample_text(*model, 2 * 32 * 16 + 1, 16, tmp_path / "b")
    assert len(calls) == 2
    assert texts(longer) == texts(whole)
    assert sample_text(*model, 3 * 32 * 16, 16, tmp_path / "b") == longer
    assert len(calls) == 2


def test_samples_follow_the_models_distribution(model: tuple[Checkpoint, PreTrainedTokenizerBase]) -> None:
    checkpoint, tokenizer = model
    network = dense_model(checkpoint, torch.float32)
    # Sharpen, so that the distribution is far from uniform
    network.get_output_embeddings().weight.data *= 8
    rows = self_data._sample(network, tokenizer, 4000, 3, seed=0)
    special = set(tokenizer.all_special_ids)
    assert not special & {row[0] for row in rows}
    with torch.no_grad():
        predicted = network(torch.tensor([[row[0]] for row in rows])).logits[:, 0].softmax(-1).mean(0)
    counts = Counter(row[1] for row in rows)
    seen = torch.tensor([counts[token] / len(rows) for token in range(len(predicted))])
    assert (seen - predicted).abs().sum() < 0.15
    assert (predicted - 1 / len(predicted)).abs().sum() > 0.3


def test_eos_ends_a_document(model: tuple[Checkpoint, PreTrainedTokenizerBase]) -> None:
    _, tokenizer = model
    eos = tokenizer.eos_token_id
    ids = tokenizer("abc")["input_ids"]
    assert [text.replace(" ", "") for text in self_data._documents([[*ids, eos, *ids], [eos, *ids]], tokenizer)] == [
        "abc",
        "abc",
        "abc",
    ]


def test_self_stands_beside_other_text(tmp_path: Path, model: tuple[Checkpoint, PreTrainedTokenizerBase]) -> None:
    found = with_samples(["more.txt", "self:600"], *model, 10_000, 16, tmp_path)
    assert found[0] == "more.txt"
    assert len(found) == 3  # two batches of 32 x 16
    with pytest.raises(InputError, match="self:1000000"):
        with_samples(["self:few"], *model, 10_000, 16, tmp_path)


def test_training_needs_no_text(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")
    settings = config(steps=3)
    assert isinstance(settings, CastConfig)
    summary = train(directory, ["self"], tmp_path / "out", settings, cache_dir=tmp_path / "cache", force=True)
    assert summary["data"] == ["self"]
    assert summary["text_tokens"] >= 3 * 64


def test_a_tokenizer_that_cannot_be_used_is_refused_before_sampling(
    model: tuple[Checkpoint, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(self_data, "_sample", lambda *args, **kwargs: pytest.fail("sampled"))
    checkpoint, tokenizer = model
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # has no embedding, and needs none
    with pytest.raises(pytest.fail.Exception, match="sampled"):
        sample_text(checkpoint, tokenizer, 16, 16, tmp_path / "cache")
    tokenizer.add_tokens(["the"])
    with pytest.raises(InputError, match="it makes token 98, and the model knows 97"):
        sample_text(checkpoint, tokenizer, 16, 16, tmp_path / "cache")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        sample_text(checkpoint, tokenizer, 16, 16, tmp_path / "cache")
