"""What the plugin does not serve, and says so."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.version
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

from cast_serve.vllm_plugin import config as plugin_config
from cast_serve.vllm_plugin import register
from cast_serve.vllm_plugin.config import Cast24Config
from cast_serve.vllm_plugin.linear import SparseLinearMethod
from conversion.errors import InputError
from conversion.packed_checkpoint import PackedFormat
from conversion.quantization.formats import INT4, INT8, Quantization
from tests.vllm.checkpoints import Checkpoints
from tests.vllm.engine import tokens

LAYER = "model.layers.1.self_attn.k_proj"


def damaged(source: Path, target: Path, **changed: torch.Tensor | None) -> Path:
    """A copy whose tensors `LAYER.name` are others; None removes one."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changed.items():
        del tensors[f"{LAYER}.{name}"]
        if tensor is not None:
            tensors[f"{LAYER}.{name}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((target / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(tensors, file.name)
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def tampered() -> torch.Tensor:
    bitmask = torch.full((64, 16), 0x33, dtype=torch.uint8)
    bitmask[5, 3] = 0x37
    return bitmask


def test_registration_may_happen_again() -> None:
    for _ in range(2):
        register()
    assert QUANTIZATION_METHODS.count("cast24") == 1
    assert get_quantization_config("cast24") is Cast24Config


def test_a_vllm_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.version, "__version_tuple__", (0, 30, 2))
    register()
    try:
        with pytest.raises(InputError, match=r"need vLLM 0\.31 or newer"):
            get_quantization_config("cast24").from_config({})
    finally:
        monkeypatch.undo()
        register()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"weight_bitmask": None}, f"tensor '{LAYER}.weight_bitmask' is missing"),
        ({"weight_values": torch.zeros(64, 32)}, f"layer '{LAYER}' has values of shape \\[64, 32\\]"),
        (
            {"weight_values": torch.zeros(32, 64), "weight_bitmask": torch.full((32, 16), 0x33, dtype=torch.uint8)},
            r"k_proj.weight' has shape \[32, 128\], but 'model.layers.0.self_attn.k_proj.weight' has \[64, 128\]",
        ),
        ({"weight_bitmask": tampered()}, f"tensor '{LAYER}.weight_bitmask' .* row 5, group 6 of the bitmask is 0111"),
    ],
    ids=["missing", "values of another shape", "layer of another shape", "tampered bitmask"],
)
def test_damage_is_found_before_the_engine_starts(
    changed: dict[str, torch.Tensor | None], sentence: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory = damaged(checkpoints.packed("llama"), tmp_path / "damaged", **changed)
    with pytest.raises(ValueError, match=sentence):
        EngineArgs(model=str(directory)).create_engine_config()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"weight_values": None}, "qkv_proj' got 192 of 256 rows of weight_values"),
        (
            {"weight_bitmask": torch.full((64, 8), 0x33, dtype=torch.uint8)},
            r"needs tensors \[N, 16\], and .* \[64, 8\]",
        ),
        # row 5 of k_proj lies behind q_proj's 128
        ({"weight_bitmask": tampered()}, "layers.1.self_attn.qkv_proj': .* exactly two in row 133, group 6"),
    ],
    ids=["missing", "wrong shape", "tampered bitmask"],
)
def test_what_comes_is_checked_where_files_are_not(
    changed: dict[str, torch.Tensor | None],
    sentence: str,
    checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = damaged(checkpoints.packed("llama"), tmp_path / "damaged", **changed)
    unchecked = SimpleNamespace(check_bitmasks=lambda: None)
    monkeypatch.setattr(plugin_config, "PackedCheckpoint", lambda directory: unchecked)  # as for a model of the hub
    with pytest.raises(InputError, match=sentence):
        tokens(directory)


def test_lora_is_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(InputError, match="LoRA adapters do not run on 2:4 layers"):
        tokens(checkpoints.packed("llama"), enable_lora=True)


@pytest.mark.parametrize(
    ("quantization", "columns", "unit"),
    [(None, 12, 8), (Quantization(INT8, None), 12, 8), (Quantization(INT4, 64), 96, 64)],
)
def test_a_shard_that_cuts_a_byte_or_a_group_is_refused(
    quantization: Quantization | None, columns: int, unit: int
) -> None:
    config = Cast24Config(PackedFormat(torch.float32, quantization, None, ()))
    with pytest.raises(
        InputError, match=f"'down' has {2 * columns} inputs, {columns} for each worker, .* {unit}, where"
    ):
        SparseLinearMethod(config, "down").create_weights(
            torch.nn.Module(), columns, [16], 2 * columns, 16, torch.float32, weight_loader=print
        )


def test_no_kernels_no_service(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="tpu")
    monkeypatch.setattr(plugin_config, "current_platform", platform)
    with pytest.raises(InputError, match="no 2:4 kernels for tpu"):
        tokens(checkpoints.packed("llama"))


def test_the_key_of_compiled_graphs_knows_the_layout(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**options: Any) -> str:
        config = EngineArgs(model=str(checkpoints.packed("llama")), max_model_len=64, **options).create_engine_config()
        return str(config.compute_hash())

    first = key()
    assert first == key()
    assert first != key(hf_overrides={"cast24_float_activations": True})
    monkeypatch.setattr(plugin_config, "LAYOUT", plugin_config.LAYOUT + 1)
    assert first != key()
