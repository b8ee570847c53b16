"""Packed checkpoints in vLLM say what their dense, masked and dequantized weights say there."""

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from cast_serve.torch_model.modules import PackedLinear
from conversion.quantization.formats import FP8, INT4, INT8, Quantization
from tests.vllm.checkpoints import Checkpoints
from tests.vllm.engine import engine, greedy, tokens

FLOAT_ACTIVATIONS = {"cast24_float_activations": True}
INT8_ROWS, INT4_GROUPS = Quantization(INT8, None), Quantization(INT4, 32)


@pytest.mark.parametrize("name", ["llama", "qwen2", "smollm3", "granite", "llama-ignore", "gpt2", "opt"])
def test_float_values_give_the_dense_models_tokens(name: str, checkpoints: Checkpoints) -> None:
    assert tokens(checkpoints.packed(name)) == tokens(checkpoints.dense(name))


@pytest.mark.parametrize(
    ("name", "quantization", "embedding"),
    [
        ("llama", INT8_ROWS, INT8_ROWS),
        ("llama", INT4_GROUPS, INT4_GROUPS),
        ("qwen2", Quantization(INT8, 32), INT8_ROWS),
        ("llama", Quantization(FP8, 64), None),
    ],
    ids=["llama-int8", "llama-int4", "qwen2-int8-groups", "llama-fp8"],
)
def test_quantized_values_give_the_dequantized_models_tokens(
    name: str, quantization: Quantization, embedding: Quantization | None, checkpoints: Checkpoints
) -> None:
    packed = checkpoints.packed(name, quantization, embedding)
    exact = tokens(packed, hf_overrides=FLOAT_ACTIVATIONS)
    assert exact == tokens(checkpoints.unpacked(packed))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models_run(dtype: str, checkpoints: Checkpoints) -> None:
    packed, dense = checkpoints.packed("llama", value_dtype=dtype), checkpoints.dense("llama")
    same = [a == b for a, b in zip(tokens(packed, dtype=dtype), tokens(dense, dtype=dtype), strict=True)]
    assert sum(same) >= 3  # of 5: rounding differs in the order of sums


def test_only_the_packed_copy_stays(checkpoints: Checkpoints) -> None:
    with engine(checkpoints.packed("llama", INT8_ROWS, INT8_ROWS)) as llm:
        report = llm.llm_engine.vllm_config.quant_config.report

        def look(model: nn.Module) -> tuple[int, int, set[str]]:
            packed = {module for module in model.modules() if isinstance(module, PackedLinear)}
            tensors = {t.data_ptr(): t.nbytes for module in packed for t in module.buffers()}
            return len(packed), sum(tensors.values()), {name.rpartition(".")[2] for name, _ in model.named_parameters()}

        ((layers, nbytes, parameters),) = llm.apply_model(look)
    assert layers == 2 * 4 + 1  # qkv, o, gate and up, down; the embedding
    assert parameters == {"weight"}  # of norms: portable tensors are gone
    assert nbytes == report.packed_bytes < 0.4 * report.dense_bytes
    assert set(report.kernels.values()) == {8, 1}


def test_layers_to_ignore_are_vllms_own(checkpoints: Checkpoints) -> None:
    with engine(checkpoints.packed("llama-ignore")) as llm:

        def dense(model: nn.Module) -> list[str]:
            found = [(n, m) for n, m in model.named_modules() if isinstance(m, LinearBase)]
            return [name for name, module in found if isinstance(module.quant_method, UnquantizedLinearMethod)]

        (names,) = llm.apply_model(dense)
    assert names == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.slow
def test_compiled_graphs_give_the_eager_tokens(checkpoints: Checkpoints) -> None:
    packed = checkpoints.packed("llama", INT8_ROWS, INT8_ROWS)
    with engine(packed, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.backend == "inductor"
        found = greedy(llm)
    assert found == tokens(packed)
    torch.compiler.reset()
