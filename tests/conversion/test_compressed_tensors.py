"""Importing checkpoints of compressed-tensors.

data/compressed_tensors.safetensors holds layers that compressed-tensors 0.14.0.1 itself wrote, with the codes and
scales that went in (random weights; row 3 is zero, rows 5 and 6 have groups with fewer than two nonzeros).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conversion import load_packed, save_packed, unpack24
from conversion.checkpoint import Checkpoint
from conversion.compressed_tensors import marlin24
from conversion.errors import InputError
from conversion.quantization.formats import decode
from tests.conversion.models import prune

WRITTEN = load_file(Path(__file__).parent / "data" / "compressed_tensors.safetensors")
SPARSE = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}


def layer(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in WRITTEN.items() if key.startswith(f"{name}.")}


def scheme(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}}}


# What each layer's checkpoint would say of it.
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "bitmask": {"format": "dense", "sparsity_config": SPARSE},
    "int8": scheme(num_bits=8, type="int", strategy="channel") | {"format": "int-quantized", "sparsity_config": SPARSE},
    "int8_tensor": scheme(num_bits=8, type="int", strategy="tensor")
    | {"format": "int-quantized", "sparsity_config": SPARSE},
    "fp8": scheme(num_bits=8, type="float", strategy="channel")
    | {"format": "float-quantized", "sparsity_config": SPARSE},
    "marlin4": scheme(num_bits=4, type="int", strategy="channel") | {"format": "marlin-24"},
    "marlin8": scheme(num_bits=8, type="int", strategy="channel") | {"format": "marlin-24"},
}


def model() -> LlamaForCausalLM:
    """A Llama all of whose linears are [64, 64]."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    made = LlamaForCausalLM(config).bfloat16()
    prune(made)
    return made


def checkpoint(directory: Path, stored: dict[str, Tensor], description: dict[str, Any]) -> Path:
    """A model directory each of whose linears holds `stored`."""
    model().save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        del tensors[name]
        for kind, tensor in stored.items():
            if not kind.startswith("expected"):
                tensors[f"{name.removesuffix('weight')}{kind}"] = tensor.clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", **description}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_checkpoint_becomes_format_1_with_the_same_codes_and_scales(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = layer(name)
    save_packed(checkpoint(tmp_path / "old", written, DESCRIPTIONS[name]), tmp_path / "packed")
    packed = load_packed(tmp_path / "packed")
    assert len(packed.sparse_layers) == 7
    codes = written["expected_codes"].float()
    if name == "int8":  # compressed-tensors took -128 for the smallest of its group, and left it out
        codes = codes.where(codes != -128, 0)
    if name == "marlin8":  # the packed format has no -128
        assert f"{7 * int((codes == -128).sum())} weights at int8 code -128" in caplog.text
        codes = codes.clamp(min=-127)
    for sparse in packed.sparse_layers:
        values, bitmask = packed.packed(sparse)
        if packed.quantization is None:
            assert torch.equal(unpack24(values, bitmask), written["expected_codes"])
            continue
        found = unpack24(decode(values, packed.quantization.values), bitmask)
        assert torch.equal(found, codes)
        scale = packed.scale(sparse)
        assert scale is not None
        assert torch.equal(scale, written["expected_scale"].float().reshape(-1, 1).expand_as(scale))


@pytest.mark.parametrize(("name", "bits"), [("marlin4_groups", 4), ("marlin4_few_groups", 4), ("marlin8", 8)])
def test_marlin_24_is_undone(name: str, bits: int) -> None:
    written = layer(name)
    codes = marlin24.codes(written["weight_packed"], written["meta"], bits)
    assert torch.equal(codes, written["expected_codes"].float())
    assert torch.equal(marlin24.scales(written["scale_packed"], codes.shape[1]), written["expected_scale"].float())


def test_a_group_without_two_nonzeros_is_packed_like_any_other(tmp_path: Path) -> None:
    written = layer("bitmask")
    save_packed(checkpoint(tmp_path / "old", written, DESCRIPTIONS["bitmask"]), tmp_path / "packed")
    bitmask = load_packed(tmp_path / "packed").packed("model.layers.0.mlp.up_proj")[1]
    assert (bitmask[3] == 0x33).all()  # zeros: the first two are kept


def test_dense_codes_and_dense_weights_are_read_too(tmp_path: Path) -> None:
    written = layer("int8")
    codes = written["expected_codes"]
    dense = {"weight": codes, "weight_scale": written["weight_scale"]}
    description = DESCRIPTIONS["int8"] | {"sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}}
    save_packed(checkpoint(tmp_path / "codes", dense, description), tmp_path / "packed-codes")
    values, bitmask = load_packed(tmp_path / "packed-codes").packed("model.layers.0.mlp.up_proj")
    assert torch.equal(unpack24(values, bitmask), codes.clamp(min=-127))
    plain = {"weight": layer("bitmask")["expected_codes"]}
    description = {"sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}}
    save_packed(checkpoint(tmp_path / "plain", plain, description), tmp_path / "packed-plain")
    values, bitmask = load_packed(tmp_path / "packed-plain").packed("model.layers.0.mlp.up_proj")
    assert torch.equal(unpack24(values, bitmask), plain["weight"])


def test_an_old_checkpoint_reads_as_its_dense_model(tmp_path: Path) -> None:
    written = layer("fp8")
    source = Checkpoint(checkpoint(tmp_path / "old", written, DESCRIPTIONS["fp8"]))
    expected = written["expected_codes"].float() * written["expected_scale"].float()
    assert torch.equal(source.tensor("model.layers.0.self_attn.q_proj.weight"), expected)
    assert "quantization_config" not in source.config
    save_packed(source.directory, tmp_path / "floats", "float32")
    assert load_packed(tmp_path / "floats").quantization is None


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (scheme(num_bits=4, type="int", strategy="channel") | {"format": "pack-quantized"}, "'pack-quantized': 2:4"),
        ({"format": "dense", "sparsity_config": {"format": "sparse-bitmask"}}, "'sparse-bitmask': 2:4 weights"),
        (
            scheme(num_bits=8, type="int", strategy="channel", symmetric=False) | {"format": "int-quantized"},
            "symmetric: False",
        ),
        (
            scheme(num_bits=8, type="int", strategy="group", group_size=16) | {"format": "int-quantized"},
            "group size 16",
        ),
        ({"quant_method": "gptq"}, r"already quantized or packed \(gptq\)"),
    ],
)
def test_what_is_not_read_is_named(description: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "old", layer("int8"), description)
    with pytest.raises(InputError, match=message):
        Checkpoint(directory)


def test_groups_in_the_order_of_activations_are_refused(tmp_path: Path) -> None:
    stored = layer("int8") | {"weight_g_idx": torch.arange(64) % 2}
    with pytest.raises(InputError, match=r"order of activations \('model\.layers\.0\..*weight_g_idx'\)"):
        Checkpoint(checkpoint(tmp_path / "old", stored, DESCRIPTIONS["int8"]))


def test_a_tampered_bitmask_is_named(tmp_path: Path) -> None:
    written = layer("bitmask")
    written["bitmask"] = written["bitmask"].clone()
    written["bitmask"][5, 3] = 0x37
    directory = checkpoint(tmp_path / "old", written, DESCRIPTIONS["bitmask"])
    with pytest.raises(InputError, match="row 5, group 6 of the bitmask"):
        save_packed(directory, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
