"""One-shot pruning against the methods' definitions, written out plainly in float64."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from cast_train.methods.sparsegpt import sparsegpt
from cast_train.methods.wanda import wanda
from cast_train.oneshot import prune
from conversion.errors import InputError
from conversion.hessian import DAMPING


def correlated_inputs(features: int, samples: int = 300) -> torch.Tensor:
    mixing = torch.randn(features, features, dtype=torch.float64)
    return torch.randn(samples, features, dtype=torch.float64) @ mixing


def reference_sparsegpt(weight: torch.Tensor, gram: torch.Tensor, shrink: float) -> torch.Tensor:
    """Optimal brain surgeon by its formula: invert the Hessian of the columns still free at every single step."""
    weight = weight.clone()
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    for column in range(weight.shape[1]):
        if column % 4 == 0:
            ahead = [torch.linalg.inv(hessian[c:, c:])[0, 0] for c in range(column, column + 4)]
            saliency = weight[:, column : column + 4] ** 2 / torch.stack(ahead)
            masked = saliency.argsort(dim=1)[:, :2] + column
        inverse = torch.linalg.inv(hessian[column:, column:])
        is_masked = (masked == column).any(dim=1)
        old = weight[:, column].clone()
        new = torch.where(is_masked, old * shrink, old)
        weight[:, column:] -= torch.outer((old - new) / inverse[0, 0], inverse[0])
        weight[:, column] = new
    return weight


@pytest.mark.parametrize("shrink", [0.0, 0.25])
def test_sparsegpt_is_optimal_brain_surgeon(shrink: float) -> None:
    weight = torch.randn(9, 136, dtype=torch.float64)  # more than one block of columns, and not a multiple of it
    inputs = correlated_inputs(136)
    gram = inputs.T @ inputs
    torch.testing.assert_close(sparsegpt(weight, gram, shrink), reference_sparsegpt(weight, gram, shrink))


def test_sparsegpt_leaves_channels_alone_that_never_fire() -> None:
    inputs = correlated_inputs(16)
    inputs[:, 5] = 0
    pruned = sparsegpt(torch.randn(4, 16, dtype=torch.float64), inputs.T @ inputs, 0.0)
    assert pruned.isfinite().all()
    assert (pruned[:, 5] == 0).all()


def test_wanda_ranks_by_weight_times_input_norm() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    norms = torch.tensor([100.0, 10.0, 1.0, 0.1])
    assert wanda(weight, torch.diag(norms**2), 0.5).tolist() == [[1.0, 2.0, 1.5, 2.0]]


def tiny(config: LlamaConfig | GPT2Config) -> PreTrainedModel:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_prune_leaves_exactly_two_of_four_along_the_input_axis(config: LlamaConfig | GPT2Config, method: str) -> None:
    model = tiny(config)
    embedding = model.get_input_embeddings().weight.clone()
    prune(model, method, torch.randint(0, 64, (10, 16)))
    checked = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (".layers." in name or ".h." in name):
            weight = parameter.T if config is GPT2 else parameter
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
            checked += 1
    assert checked == (14 if config is LLAMA else 8)
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_later_blocks_are_calibrated_behind_pruned_ones() -> None:
    model, calibration = tiny(LLAMA), torch.randint(0, 64, (10, 16))
    dense = tiny(LLAMA)
    prune(model, "sparsegpt", calibration)

    captured: list[torch.Tensor] = []
    down = dense.model.layers[1].mlp.down_proj
    original = down.weight.detach().clone()
    # The same walk by hand: the pruned model up to the last linear, whose weight is still the dense one.
    dense.load_state_dict({**model.state_dict(), "model.layers.1.mlp.down_proj.weight": original})
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(dense.model.layers[1].self_attn, name).weight.data = getattr(
            tiny(LLAMA).model.layers[1].self_attn, name
        ).weight.data
    for name in ("gate_proj", "up_proj"):
        getattr(dense.model.layers[1].mlp, name).weight.data = getattr(
            tiny(LLAMA).model.layers[1].mlp, name
        ).weight.data
    down.register_forward_pre_hook(lambda _, args: captured.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(calibration)
    expected = sparsegpt(original, captured[0].T @ captured[0], 0.0)
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight.data, expected, rtol=1e-3, atol=1e-5)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="needs calibration text"):
        prune(tiny(LLAMA), "wanda")
    with pytest.raises(InputError, match="magnitude, wanda, sparsegpt"):
        prune(tiny(LLAMA), "obd")


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_damaged_weight_is_named(method: str) -> None:
    model, calibration = tiny(LLAMA), torch.randint(0, 64, (10, 16))
    model.model.layers[1].mlp.down_proj.weight.data[2, 3] = float("nan")
    with pytest.raises(InputError, match=r"'model\.layers\.1\.mlp\.down_proj' has a weight that is not finite"):
        prune(model, method, calibration)


def test_inputs_that_are_not_finite_are_said() -> None:
    model = tiny(LLAMA)
    model.model.embed_tokens.weight.data[:, 0] = float("inf")
    with pytest.raises(InputError, match="on the calibration text the model computes numbers that are not finite"):
        prune(model, "sparsegpt", torch.randint(0, 64, (10, 16)))
