"""`cast_serve.load`: packed checkpoints as transformers models."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, pipeline

import cast_serve
from cast_serve import kernels
from conversion import save_packed
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.onnx import export
from conversion.packed_checkpoint import PackedCheckpoint
from conversion.quantization.formats import FP8, INT4, INT8, Quantization
from tests.cast_serve.tiny_llama import Tiny
from tests.conversion.models import CONFIGS, make_model, packed

TOKENS = torch.tensor([[5, 17, 3, 88, 41, 2, 60, 8, 93, 55], [9, 33, 12, 71, 4, 7, 11, 13, 54, 1]])
INT8_ROWS, INT4_GROUPS = Quantization(INT8, None), Quantization(INT4, 32)


def label(quantization: Quantization | None) -> str:
    return "float" if quantization is None else f"{quantization.values.name}-{quantization.group_size}"


def relative_error(directory: Path, logits: Tensor) -> float:
    """Largest difference to the logits of the unpacked, dequantized model in float64, relative to the largest logit."""
    model = dense_model(PackedCheckpoint(directory), torch.float32).double()
    with torch.no_grad():
        exact = model(TOKENS).logits
    return float((logits.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_float_values_give_the_dense_models_logits_and_tokens(name: str, tmp_path: Path) -> None:
    directory = packed(tmp_path, name)
    model = cast_serve.load(directory)
    assert relative_error(directory, model(TOKENS).logits) < 5e-6
    dense = dense_model(PackedCheckpoint(directory))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS), "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **options), dense.generate(TOKENS, **options))


@pytest.mark.parametrize("quantization", [INT8_ROWS, Quantization(INT8, 32), INT4_GROUPS], ids=label)
@pytest.mark.parametrize("name", ["llama", "llama-untied-rope3", "gpt2"])
def test_quantized_values_give_the_dequantized_models_logits(
    name: str, quantization: Quantization, tmp_path: Path
) -> None:
    directory = packed(tmp_path, name, quantization=quantization)
    exact = cast_serve.load(directory, float_activations=True)(TOKENS).logits
    rounded = cast_serve.load(directory)(TOKENS).logits
    assert relative_error(directory, exact) < 1e-5
    assert 1e-4 < relative_error(directory, rounded) < 0.05  # activations are rounded to 8 bits


def test_values_without_a_kernel_become_floats(tmp_path: Path) -> None:
    directory = packed(tmp_path, "llama", quantization=Quantization(FP8, None))
    with pytest.warns(UserWarning, match=r"float8_e4m3fn values, for which a cpu device has no kernel: they become"):
        model = cast_serve.load(directory)
    assert relative_error(directory, model(TOKENS).logits) < 5e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_values(dtype: str, tmp_path: Path) -> None:
    directory = packed(tmp_path, "gpt2", value_dtype=dtype)
    logits = cast_serve.load(directory)(TOKENS).logits
    assert logits.dtype == torch.float32
    rounds = dtype == "bfloat16" and kernels.isa() == "avx512bf16"  # inputs, for bf16 weights
    assert relative_error(directory, logits) < (0.02 if rounds else 5e-6)


@pytest.mark.parametrize("quantization", [None, INT8_ROWS], ids=label)
def test_a_bfloat16_model_runs_in_bfloat16_unless_told_otherwise(
    quantization: Quantization | None, tmp_path: Path
) -> None:
    make_model(CONFIGS["llama"], sparse=True).bfloat16().save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed", quantization=quantization)
    logits = cast_serve.load(tmp_path / "packed")(TOKENS).logits
    assert logits.dtype == torch.bfloat16
    assert relative_error(tmp_path / "packed", logits) < 0.05
    model = cast_serve.load(tmp_path / "packed", dtype=torch.float32)
    assert model.dtype == model(TOKENS).logits.dtype == torch.float32


@pytest.mark.parametrize("quantization", [None, INT8_ROWS, INT4_GROUPS], ids=label)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sparse_weights_are_held_once_and_packed(
    name: str, quantization: Quantization | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = packed(tmp_path, name, quantization=quantization)
    checkpoint = PackedCheckpoint(directory)
    monkeypatch.setattr(PackedCheckpoint, "linear_weight", lambda *_: pytest.fail("a weight was unpacked"))
    model = cast_serve.load(directory)
    layers = [module for module in model.modules() if type(module).__name__ in ("SparseLinear", "QuantizedLinear")]
    assert len(layers) == len(checkpoint.sparse_layers)
    for layer in layers:
        rows, columns = layer.out_features, layer.in_features
        weights = [tensor for _, tensor in layer.named_buffers()]
        panels, words = -(-rows // 16), -(-columns // 32)
        index = 4 * 16 * words
        if quantization is None:
            expected = panels * (columns // 2 * 4 * 16 + index)
        else:
            groups = -(-columns // (quantization.group_size or 128))
            expected = panels * (groups * 6 * 16 + index + words * 16 * 16 * quantization.values.bits // 8)
        assert sum(tensor.nbytes for tensor in weights) == expected
        assert [parameter for parameter, _ in layer.named_parameters()] == ["bias"] * (layer.bias is not None)
    dense = sum(checkpoint.shards.info(each).nbytes for each in set(checkpoint.names) - set(checkpoint.scope))
    biases_included = sum(parameter.nbytes for parameter in model.parameters())  # tied ones counted once
    assert biases_included == dense
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("embedding", [INT8_ROWS, INT4_GROUPS], ids=label)
@pytest.mark.parametrize("quantization", [None, INT8_ROWS], ids=label)
@pytest.mark.parametrize("name", ["llama", "llama-untied-rope3", "gpt2", "opt"])
def test_a_quantized_embedding_is_held_once(
    name: str, quantization: Quantization | None, embedding: Quantization, tmp_path: Path
) -> None:
    directory = packed(tmp_path, name, quantization=quantization, embedding=embedding)
    model = cast_serve.load(directory, float_activations=True)
    assert relative_error(directory, model(TOKENS).logits) < 1e-5
    lookup, head = model.get_input_embeddings().panels, model.get_output_embeddings().panels
    assert (lookup.data_ptr() == head.data_ptr()) == (name != "llama-untied-rope3")
    assert not [name for name, parameter in model.named_parameters() if 97 in parameter.shape]  # tokens
    assert relative_error(directory, cast_serve.load(directory)(TOKENS).logits) < 0.05
    with pytest.raises(IndexError, match="outside the 97 rows"):
        model(torch.tensor([[97]]))


def test_the_directorys_tokenizer_and_generation_settings_are_used(tiny: Tiny, tmp_path: Path) -> None:
    save_packed(tiny.hf, tmp_path / "packed")
    (tmp_path / "packed" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    model = cast_serve.load(tmp_path / "packed")
    assert model.generation_config.eos_token_id == [2, 7]
    generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "packed"))
    (answer,) = generate("ab", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("ab")


def test_a_loaded_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cast24 and is not serializable"):
        cast_serve.load(packed(tmp_path, "llama")).save_pretrained(tmp_path / "again")


def test_what_cannot_be_loaded_is_refused_in_one_sentence(tmp_path: Path) -> None:
    directory = packed(tmp_path, "llama")
    export(directory, tmp_path / "onnx")
    shutil.copytree(directory, tmp_path / "settings")
    (tmp_path / "settings" / "generation_config.json").write_text("{")
    for folder, options, message in [
        (tmp_path / "settings", {}, r"generation_config\.json cannot be used .*: mend or delete it"),
        (tmp_path / "model", {}, "is not packed: pack it with 'cast convert"),
        (tmp_path / "onnx", {}, "give the packed checkpoint it was made from"),
        (tmp_path / "nowhere", {}, "does not exist"),
        (directory, {"float_activations": True}, "leave float_activations out"),
        (directory, {"dtype": torch.float16}, r"a cpu device .*float32 or torch\.bfloat16, not torch\.float16"),
        (directory, {"device": "cuda:99"}, "sees no device 'cuda:99' on this machine"),
        (directory, {"device": "meta"}, "no 2:4 kernels for 'meta': use cpu or cuda"),
        (directory, {"device": "gpu"}, "there is no device 'gpu': use cpu or cuda"),
    ]:
        with pytest.raises(InputError, match=message):
            cast_serve.load(folder, **options)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, cast_serve; cast_serve.__all__; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
