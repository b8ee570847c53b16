"""Inputs and residual stream of a changed model beside those of the model as it was, seen in whole runs."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from cast_train.sparse_model import linear_weight, scope
from conversion.drift import DAMPING, DriftingInputs, drifting_inputs

COMMON: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**COMMON, intermediate_size=48, num_key_value_heads=2)
GRANITE = GraniteConfig(**COMMON, intermediate_size=48, residual_multiplier=0.3)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
OPT = OPTConfig(**COMMON, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
OPT_350M = OPTConfig(**OPT.to_diff_dict() | {"do_layer_norm_before": False})

_LLAMA_ORDER = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
_LLAMA_ORDER += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
_OPT_ORDER = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]]
ORDERS = {
    "llama": ("model.layers", _LLAMA_ORDER),
    "granite": ("model.layers", _LLAMA_ORDER),
    "gpt2": ("transformer.h", [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]),
    "opt": ("model.decoder.layers", _OPT_ORDER),
}


def tiny(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def whole_run(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every module that has one tensor of each."""
    seen = {}

    def note(name: str, args: tuple[Any, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            # (OPT's MLP flattens its tokens)
            seen[name] = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: note(name, args, output))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "config", [LLAMA, GRANITE, GPT2, OPT, OPT_350M], ids=["llama", "granite", "gpt2", "opt", "opt-350m"]
)
def test_what_a_linear_is_given_now_and_was_before(config: PretrainedConfig) -> None:
    model, original, tokens = tiny(config), tiny(config), torch.randint(0, 64, (20, 16))
    blocks, order = ORDERS[config.model_type]
    share = getattr(config, "residual_multiplier", 1.0)
    before = whole_run(original, tokens)
    names = {module: name for name, module in model.named_modules()}
    expected_order = [[f"{blocks}.{block}.{name}" for name in group] for block in range(2) for group in order]
    found_order = []
    for inputs in drifting_inputs(model, {module for _, module in scope(model)}, tokens, ""):
        group = [names[linear] for linear in inputs.linears]
        found_order.append(group)
        now = whole_run(model, tokens)
        x, x0 = now[group[0]][0], before[group[0]][0]
        torch.testing.assert_close(inputs.gram, x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inputs.drift, (x0 - x).T @ x, rtol=1e-4, atol=1e-4)

        # What is added to: the block's input for attention, for the MLP what is left of the block's output without it.
        block = ".".join(group[0].split(".")[: len(blocks.split(".")) + 1])
        name = group[0].removeprefix(block + ".")
        streams = []
        for run in (before, now):
            of_block, of_linear = run[block], run[group[0]]
            if name == order[1][0]:
                streams.append(of_block[0])
            elif name == order[3][0]:
                streams.append(of_block[1] - share * of_linear[1])
        if streams and config is not OPT_350M:  # which norms the sum itself: nothing to make up for
            assert inputs.stream_drift is not None
            missing = (streams[0] - streams[1]).T @ x / share
            torch.testing.assert_close(inputs.stream_drift, missing, rtol=1e-3, atol=1e-3)
        else:
            assert inputs.stream_drift is None
        for linear in inputs.linears:
            linear_weight(linear).data.mul_(1 + 0.5 * torch.randn_like(linear_weight(linear)))
    assert found_order == expected_order


@pytest.mark.parametrize("in_stream", [False, True])
def test_a_drift_is_made_up_for_as_far_as_a_linear_can(in_stream: bool) -> None:
    double = torch.float64
    weight, now = torch.randn(5, 12, dtype=double), torch.randn(60, 12, dtype=double)
    before = now + torch.randn_like(now)
    lacking = torch.randn(60, 5, dtype=double) if in_stream else torch.zeros(60, 5, dtype=double)
    inputs = DriftingInputs([], now.T @ now, (before - now).T @ now, lacking.T @ now if in_stream else None)
    damping = (DAMPING * inputs.gram.diagonal().mean()).sqrt() * torch.eye(12, dtype=double)
    wanted = torch.cat([before @ weight.T + lacking, damping @ weight.T])
    expected = torch.linalg.lstsq(torch.cat([now, damping]), wanted).solution.T
    torch.testing.assert_close(inputs.corrected(weight), expected)
