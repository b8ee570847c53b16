"""The packed linear for GPUs, with the emulation in the GPU's place."""

from typing import Any

import pytest
import torch

from cast_serve.kernels.cuda import cusparselt, linear, torch_ops
from cast_serve.kernels.cuda.crossover import DEVICES, Table
from cast_serve.torch_model.gpu_linear import GpuSparseLinear
from conversion.errors import InputError
from tests.cast_serve.cuda_emulation.runner import Emulation, Launcher
from tests.cast_serve.sparse_layers import random_layer


@pytest.fixture(autouse=True)
def gpu(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "launch_on_gpu", Launcher(emulation, None))
    monkeypatch.setattr(torch_ops, "table", lambda _: Table({}, DEVICES["H100"]))
    monkeypatch.setattr(torch.ops.cast24, "linear_cuda", torch_ops.linear_cuda, raising=False)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_it_multiplies(dtype: torch.dtype, kept: torch.dtype) -> None:
    layer, x = random_layer(48, 64, dtype), torch.randn(2, 3, 64).to(dtype)
    module = GpuSparseLinear(64, 48, bias=True)
    torch.nn.init.normal_(module.bias)
    module.pack(layer.values, layer.bitmask)
    assert module.panel_values.dtype == kept
    assert module.compressed is None
    y = module(x)
    assert y.dtype == dtype
    expected = torch.nn.functional.linear(x.double(), layer.dense.double(), module.bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=5e-2)
    assert not module.state_dict().keys() - {"bias"}


def test_fast_keeps_a_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST24_SPARSE_MEMORY", "fast")
    monkeypatch.setattr(cusparselt, "available", lambda: True)
    compressed: list[Any] = []
    monkeypatch.setattr(cusparselt, "compress", lambda dense: compressed.append(dense) or dense)
    layer = random_layer(48, 64, torch.bfloat16)
    module = GpuSparseLinear(64, 48, bias=False)
    module.pack(layer.values, layer.bitmask)
    assert torch.equal(compressed[0], layer.dense)
    other = GpuSparseLinear(40, 24, bias=False)  # sizes that cuSPARSELt does not take
    odd = random_layer(24, 40, torch.bfloat16)
    other.pack(odd.values, odd.bitmask)
    assert other.compressed is None


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST24_SPARSE_MEMORY", "much")
    layer = random_layer(16, 64, torch.bfloat16)
    with pytest.raises(InputError, match="'much': set it to low or fast"):
        GpuSparseLinear(64, 16, bias=False).pack(layer.values, layer.bitmask)
