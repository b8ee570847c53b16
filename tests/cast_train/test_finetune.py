"""`cast train --finetune`: the saved zeros are the input's, full and low-rank, resumed, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer
from typer.testing import CliRunner

from cast_train.cli import train
from cast_train.finetune import finetune
from cast_train.health import read_metrics
from cast_train.methods.finetune import FinetuneConfig, FixedMaskAdam, MaskedLowRank
from cast_train.sparse_model import scope
from cast_train.trainer import CastTrainer, training_arguments
from conversion.errors import InputError
from conversion.families import family_of, in_scope
from tests.cast_train.tiny import BUDGET, save_model, tokenizer, write_text
from tests.conversion.models import CONFIGS, make_model


def config(**changes: object) -> FinetuneConfig:
    return FinetuneConfig(**{**BUDGET, **changes})


def sparse_model(directory: Path, family: str = "llama") -> Path:
    make_model(CONFIGS[family], sparse=True).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def run(root: Path, out: str, settings: FinetuneConfig, **options: Any) -> dict[str, Any]:
    text = write_text(root / "text.txt")
    return finetune(root / "sparse", [str(text)], root / out, settings, cache_dir=root / "cache", **options)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeros_are_those_of_the_input_and_the_rest_learns(family: str, lora_rank: int, tmp_path: Path) -> None:
    source = sparse_model(tmp_path / "sparse", family)
    run(tmp_path, "out", config(lora_rank=lora_rank))
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    checked = 0
    for name, weight in before.items():
        if in_scope(family_of(family), name, weight.shape):
            assert torch.equal(after[name] != 0, weight != 0), name
            assert not torch.signbit(after[name][weight == 0]).any()
            assert not torch.equal(after[name], weight)
            checked += 1
        elif lora_rank:
            assert torch.equal(after[name], weight), name
    assert checked >= 8
    metrics = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert metrics[-1]["ce"] < 0.97 * metrics[0]["ce"]
    assert all(line["masked"] == 0 for line in metrics)


def test_the_low_rank_update_is_w_plus_masked_ba(tmp_path: Path) -> None:
    linear = nn.Linear(8, 6, bias=False)
    with torch.no_grad():
        linear.weight[:, ::2] = 0
    base = linear.weight.detach().clone()
    update = MaskedLowRank(linear.weight, 2, alpha=6.0)
    parametrize.register_parametrization(linear, "weight", update)
    assert torch.equal(linear.weight, base)
    nn.init.normal_(update.b)
    torch.testing.assert_close(linear.weight, base + (base != 0) * (update.b @ update.a) * 3.0)


def test_masked_gradients_do_not_reach_the_moments() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 0.0, 2.0, 0.0]]))
    optimizer = FixedMaskAdam([{"params": [weight], "sparse": True}], 0.1, (0.9, 0.999), 1e-8, total_steps=3)
    reference = nn.Parameter(torch.tensor([1.0, 2.0]))
    adam = torch.optim.Adam([reference], lr=0.1)
    for gradient in ([3.0, 5.0, -1.0, 7.0], [1.0, -5.0, 2.0, 0.5], [0.1, 1.0, 1.0, 1.0]):
        weight.grad = torch.tensor([gradient])
        reference.grad = torch.tensor([gradient[0], gradient[2]])
        optimizer.step()
        adam.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[reference[0].item(), 0.0, reference[1].item(), 0.0]]))
    assert (optimizer.state[weight]["exp_avg_sq"][0, 1::2] == 0).all()


def test_gradients_are_clipped_by_what_is_used_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(self: Trainer, model: Any) -> Any:
        of_zeros.extend(module.weight.grad[module.weight == 0] for _, module in scope(model))
        return clip(self, model)

    of_zeros: list[torch.Tensor] = []
    clip = Trainer._clip_grad_norm
    monkeypatch.setattr(Trainer, "_clip_grad_norm", recorded)
    sparse_model(tmp_path / "sparse")
    run(tmp_path, "out", config(steps=1))
    assert len(torch.cat(of_zeros)) > 0
    assert not torch.cat(of_zeros).any()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    lora_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse_model(tmp_path / "sparse")
    settings = config(lora_rank=lora_rank, steps=12)
    run(tmp_path, "whole", settings)
    step = CastTrainer.training_step

    def interrupted(self: CastTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 9:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(CastTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "out", settings)
    monkeypatch.setattr(CastTrainer, "training_step", step)
    run(tmp_path, "out", settings, resume=True)
    expected = weights(tmp_path / "whole")
    for name, weight in weights(tmp_path / "out").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)


def test_what_is_not_sparse_is_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path / "sparse")
    with pytest.raises(InputError, match=r"not 2:4: tensor 'model\.layers\.0.*row 0, group 0"):
        run(tmp_path, "out", config())
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_sense_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="leave the warm start out"):
        config(warm_start="magnitude")
    with pytest.raises(InputError, match="low-rank updates are not sharded"):
        config(lora_rank=2, fsdp=True)
    assert FinetuneConfig.preset("quick").eta == 0
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as by accelerate launch
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    with pytest.raises(InputError, match="low-rank updates are not sharded"):
        training_arguments(config(lora_rank=2), tmp_path)


def test_the_command_finetunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = sparse_model(tmp_path / "sparse")
    text = write_text(tmp_path / "text.txt")
    app = typer.Typer()
    app.command()(train)
    arguments = [str(source), "--data", str(text), "--out", str(tmp_path / "out"), "--finetune"]
    budget = ["--steps", "2", "--batch-tokens", "64", "--block-length", "32", "--precision", "fp32"]
    refused = CliRunner().invoke(app, [*arguments, "--method", "gmp", *budget])
    assert "leave --method out" in str(refused.exception)
    result = CliRunner().invoke(app, [*arguments, "--lora-rank", "2", *budget])
    assert result.exit_code == 0, result.exception
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert summary["method"] == "finetune"
    assert summary["config"]["lora_rank"] == 2
