"""Channels in another order: every family computes what it did, and 2:4 takes less away."""

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PretrainedConfig, PreTrainedModel
from typer.testing import CliRunner

from cast_serve.cli import build_app
from cast_train.oneshot import prune
from cast_train.permutation import permute
from cast_train.permutation.channels import MLP, RESIDUAL, VALUES, channels_of
from cast_train.permutation.search import cut_part, search_order
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_model
from conversion.errors import InputError
from tests.cast_train.tiny import FAMILIES, save_model, write_text
from tests.conversion.models import CONFIGS, make_model

OPT = CONFIGS["opt"].to_diff_dict()
VARIANTS: dict[str, PretrainedConfig] = {
    **{family: CONFIGS[family] for family in FAMILIES},
    "llama, lm_head of its own, biases": type(CONFIGS["llama"])(
        **CONFIGS["llama"].to_diff_dict() | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    ),
    "llama, as many tokens as channels": type(CONFIGS["llama"])(
        **CONFIGS["llama"].to_diff_dict() | {"vocab_size": CONFIGS["llama"].hidden_size}
    ),
    "opt, norms behind": OPTConfig(**OPT | {"do_layer_norm_before": False}),
    "opt, narrow embedding": OPTConfig(**OPT | {"word_embed_proj_dim": 16}),
}


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    """A random model; norms and biases, too, differ from channel to channel."""
    torch.manual_seed(5)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(-1, 1)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) % model.config.vocab_size
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("name", VARIANTS)
def test_any_order_of_channels_leaves_the_logits(name: str) -> None:
    model = model_of(VARIANTS[name])
    expected = logits(model)
    before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    kinds = set()
    for channels in channels_of(model):
        channels.reorder(torch.randperm(channels.size))
        kinds.add(channels.kind)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert kinds == {MLP, VALUES, RESIDUAL}
    narrow = {id(model.get_input_embeddings().weight)} if "narrow" in name else set()  # is not in the residual stream
    for parameter_name, parameter in model.named_parameters():
        per_head = "q_norm" in parameter_name or "k_norm" in parameter_name
        queries = parameter.dim() == 1 and ("q_proj" in parameter_name or "k_proj" in parameter_name)
        if id(parameter) not in narrow and not per_head and not queries:
            assert not torch.equal(parameter, before[parameter]), f"{parameter_name} has its old order"


def test_channels_that_no_2_4_linear_reads_stay() -> None:
    config = type(CONFIGS["llama"])(**CONFIGS["llama"].to_diff_dict() | {"intermediate_size": 44})
    kinds = {channels.kind for channels in channels_of(model_of(config))}
    assert kinds == {VALUES, RESIDUAL}


@pytest.mark.parametrize("seed", range(3))
def test_no_exchange_of_two_channels_betters_what_the_search_finds(seed: int) -> None:
    saliency = torch.rand(7, 16, generator=torch.Generator().manual_seed(seed)) ** 4
    order = search_order(saliency, sweeps=300, seed=seed)
    assert sorted(order.tolist()) == list(range(16))
    found = cut_part(saliency[:, order])
    assert found < cut_part(saliency)
    for i, j in itertools.combinations(range(16), 2):
        exchanged = order.clone()
        exchanged[i], exchanged[j] = order[j], order[i]
        assert cut_part(saliency[:, exchanged]) > found - 1e-6


def test_the_search_never_loses_and_deals_large_channels_out() -> None:
    generator = torch.Generator().manual_seed(0)
    saliency = torch.rand(50, 1200, generator=generator)  # more groups than exchange channels at once
    saliency[:, :600] *= 100  # half of the channels are large, and stand together
    cuts = [cut_part(saliency[:, search_order(saliency, sweeps)]) for sweeps in (0, 1, 5, 40)]
    assert cuts == sorted(cuts, reverse=True)
    assert cuts[0] > 0.15
    assert cuts[-1] < 0.02


def test_what_is_cut_is_by_definition() -> None:
    saliency = torch.tensor([[4.0, 3, 2, 1], [1, 1, 1, 1]])
    assert cut_part(saliency) == pytest.approx((3 + 2) / 14)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_model_computes_the_same_and_loses_less(family: str) -> None:
    torch.manual_seed(6)
    calibration = torch.randint(0, 97, (16, 24))
    dense, model = model_of(CONFIGS[family]), model_of(CONFIGS[family])
    for each in (dense, model):  # large channels side by side
        for channels in channels_of(each):
            for reader in channels.readers:
                weight = reader.linear.weight.data.T if family == "gpt2" else reader.linear.weight.data
                weight[:, reader.start : reader.start + channels.size // 2] *= 4
    expected = logits(dense)
    gains = permute(model, calibration)
    assert [gain.kind for gain in gains] == [MLP, VALUES, RESIDUAL]
    for gain in gains:
        assert gain.after < gain.before / 2
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for each in (dense, model):
        prune(each, "wanda", calibration)
    assert (logits(model) - expected).square().mean() < (logits(dense) - expected).square().mean() / 2


def test_the_command_writes_a_directory_like_the_one_it_reads(tmp_path: Path) -> None:
    dense = save_model(tmp_path / "dense")
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(dense)
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "permuted"
    arguments = ["permute", str(dense), "--data", str(text), "--out", str(out), "--calibration-tokens", "512"]
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0, result.output
    assert "instead of" in result.output
    old, new = Checkpoint(dense), Checkpoint(out)
    assert new.dtype == torch.bfloat16
    assert {path.name for path in dense.iterdir()} <= {path.name for path in out.iterdir()}
    torch.testing.assert_close(logits(dense_model(new, torch.float32)), logits(dense_model(old, torch.float32)))
    for name in old.names:  # the same numbers, none rounded, in another order
        assert not torch.equal(new.tensor(name), old.tensor(name))
        assert torch.equal(new.tensor(name).flatten().sort().values, old.tensor(name).flatten().sort().values)
    again = CliRunner().invoke(build_app(), arguments)
    assert "already exists" in str(again.exception)


def test_what_cannot_be_permuted_is_refused_in_a_sentence(tmp_path: Path) -> None:
    sparse = save_model(tmp_path / "sparse")
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(sparse)
    text, out = str(write_text(tmp_path / "text.txt")), tmp_path / "out"
    refused = CliRunner().invoke(build_app(), ["permute", str(sparse), "--data", text, "--out", str(out)])
    assert "is 2:4 already" in str(refused.exception)
    assert not out.exists()
    model = model_of(CONFIGS["llama"])
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        permute(model, torch.randint(0, 97, (4, 16)))


def test_a_linear_that_never_fires_has_no_better_order() -> None:
    model = model_of(CONFIGS["llama"])
    model.model.layers[0].self_attn.v_proj.weight.data.zero_()
    expected = logits(model)
    permute(model, torch.randint(0, 97, (4, 16)))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
