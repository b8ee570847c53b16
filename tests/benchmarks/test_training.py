"""The training benchmark on a tiny shape: its numbers hang together."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.shapes import SHAPES
from benchmarks.training import measure
from cast_train.config import CastConfig


def make() -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES["tiny"]), dtype=torch.float32)
    return model


def test_both_runs_are_timed_and_the_ratio_includes_the_mask() -> None:
    config = CastConfig.preset("full", batch_tokens=128, block_length=32, micro_batch_tokens=64, steps=1000)
    rounds: list[int] = []
    result = measure(make, config, rounds=2, after_round=lambda: rounds.append(1))
    assert len(rounds) == 2
    assert (result["batch_tokens"], result["micro_batches"]) == (128, 2)
    seconds = result["seconds_per_step"]
    refresh = result["timings"]["refresh"]["median"] / config.mask_interval
    assert seconds["cast"] == pytest.approx(result["timings"]["cast"]["median"] + refresh)
    assert result["ratio"] == pytest.approx(seconds["plain"] / seconds["cast"])
    assert result["mfu"] is None or result["device"] != "cpu"
    assert {"student forward", "teacher", "loss", "student backward", "optimizer"} < result["breakdown_s"].keys()
    flops = result["flops_per_token"]
    assert result["flops_per_s"]["plain"] == pytest.approx(sum(flops.values()) * result["tokens_per_s"]["plain"])


def test_compiled_blocks_are_timed_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = CastConfig.preset("full", batch_tokens=64, block_length=32, micro_batch_tokens=64, steps=1000)
    result = measure(make, config, rounds=1, after_round=lambda: None, compiled=True)
    speed = result["tokens_per_s"]
    assert list(speed) == ["cast", "plain", "compiled"]
    assert result["compiled_ratio"] == pytest.approx(speed["compiled"] / speed["cast"])
