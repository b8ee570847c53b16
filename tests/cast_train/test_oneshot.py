"""One-shot pruning against the methods' definitions, written out plainly in float64."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from cast_train.methods.admm import GROWS_EVERY, ITERATIONS, PENALTY, PENALTY_GROWTH, admm
from cast_train.methods.sparsegpt import sparsegpt
from cast_train.methods.wanda import wanda
from cast_train.oneshot import prune
from cast_train.sparse_model import linear_weight, scope
from conversion.drift import drifting_inputs
from conversion.errors import InputError
from conversion.hessian import DAMPING, damped


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


def reference_admm(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """ADMM in the weight's own units, with the plain dual variable, then each row's best fit by solving for it."""
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    norms, penalty = hessian.diagonal(), PENALTY

    def nearest(free: torch.Tensor) -> torch.Tensor:
        dropped = (free**2 * norms).unflatten(1, (-1, 4)).argsort(dim=2)[..., :2]
        return free.unflatten(1, (-1, 4)).scatter(2, dropped, 0).flatten(1)

    sparse, dual = nearest(weight), torch.zeros_like(weight)
    for step in range(ITERATIONS):
        penalty *= PENALTY_GROWTH if step and step % GROWS_EVERY == 0 else 1
        pull = weight @ hessian + penalty * norms * sparse - dual
        free = torch.linalg.solve(hessian + penalty * norms.diag(), pull.T).T
        sparse = nearest(free + dual / (penalty * norms))
        dual += penalty * norms * (free - sparse)
    fitted = torch.zeros_like(weight)
    for row, (before, kept) in enumerate(zip(weight, sparse != 0, strict=True)):
        fitted[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ before)[kept])
    return fitted


def test_admm_is_the_alternation_and_the_fit() -> None:
    weight, inputs = torch.randn(9, 24, dtype=torch.float64), correlated_inputs(24)
    gram = inputs.T @ inputs
    torch.testing.assert_close(admm(weight, gram, 0.0), reference_admm(weight, gram))


def test_admm_fits_kept_weights_to_masked_ones_of_any_size() -> None:
    weight, inputs = torch.randn(9, 24, dtype=torch.float64), correlated_inputs(24)
    gram = inputs.T @ inputs
    masked = admm(weight, gram, 0.0) == 0
    assert (masked.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    shrunk = admm(weight, gram, 0.25)
    torch.testing.assert_close(shrunk[masked], 0.25 * weight[masked])
    slope = (shrunk - weight) @ damped(gram)
    assert slope[~masked].abs().max() < 1e-6 * slope[masked].abs().mean()


def test_admm_disturbs_a_layer_less_than_sparsegpt() -> None:
    weight, inputs = torch.randn(64, 136), correlated_inputs(136).float()
    gram = inputs.T @ inputs
    error = {f: ((f(weight, gram, 0.0) - weight) @ inputs.T).square().sum() for f in (admm, sparsegpt)}
    assert error[admm] < 0.9 * error[sparsegpt]


def test_admm_leaves_channels_alone_that_never_fire() -> None:
    inputs = correlated_inputs(16)
    inputs[:, 5] = 0
    pruned = admm(torch.randn(4, 16, dtype=torch.float64), inputs.T @ inputs, 0.25)
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
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
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


def test_admm_makes_up_for_what_was_pruned_before() -> None:
    model, by_hand, calibration = tiny(LLAMA), tiny(LLAMA), torch.randint(0, 64, (20, 16))
    prune(model, "admm", calibration)
    linears = {module for _, module in scope(by_hand)}
    for inputs in drifting_inputs(by_hand, linears, calibration, ""):
        for linear in inputs.linears:
            weight = linear_weight(linear)
            weight.data.copy_(admm(inputs.corrected(weight), inputs.gram, 0.0))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, by_hand.state_dict()[name])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="needs calibration text"):
        prune(tiny(LLAMA), "wanda")
    with pytest.raises(InputError, match="magnitude, wanda, sparsegpt, admm"):
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
