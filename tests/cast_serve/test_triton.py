"""The 2:4 Triton kernel, by Triton's own interpreter in the GPU's place, and when it is taken."""

from types import ModuleType

import pytest
import torch

from cast_serve.kernels.cuda import linear, nvrtc, torch_ops
from cast_serve.torch_model.gpu_linear import GpuSparseLinear
from conversion.errors import InputError
from tests.cast_serve.conftest import Interpreted
from tests.cast_serve.sparse_layers import random_layer


@pytest.fixture
def kernel(interpreted: Interpreted) -> ModuleType:
    return interpreted("cast_serve.kernels.cuda.triton_linear")


@pytest.fixture
def without_nvrtc(monkeypatch: pytest.MonkeyPatch, kernel: ModuleType) -> None:
    monkeypatch.setattr(nvrtc, "available", lambda: False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("M", "N", "K", "bias"), [(1, 5, 8, False), (3, 40, 136, True), (17, 33, 264, True), (130, 70, 64, False)]
)
def test_it_multiplies(kernel: ModuleType, M: int, N: int, K: int, bias: bool, dtype: torch.dtype) -> None:
    layer = random_layer(N, K, dtype)
    x = torch.randn(2 * M, K + 8).to(dtype)[::2, :K]
    added = torch.randn(N).to(dtype) if bias else None
    y = kernel.triton_linear(x, layer.values, layer.bitmask, added)
    assert y.dtype == dtype
    expected = x.double() @ layer.dense.double().T + (0.0 if added is None else added.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=2e-2)


def test_every_nibble_finds_its_columns(kernel: ModuleType) -> None:
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8)
    bitmask = (nibbles[:, None] | nibbles[None, :] << 4).view(36, 1)
    values = torch.arange(1, 1 + 36 * 4).view(36, 4).to(torch.float16)
    y = kernel.triton_linear(torch.eye(8).half(), values, bitmask)
    for row in range(36):
        kept = [c for c in range(8) if int(bitmask[row, 0]) >> c & 1]
        assert y[kept, row].tolist() == values[row].tolist()
        assert y[:, row].count_nonzero() == 4


@pytest.mark.usefixtures("without_nvrtc")
def test_the_operators_take_it_where_nvrtc_is_missing() -> None:
    layer, x, bias = random_layer(48, 64, torch.bfloat16), torch.randn(2, 3, 64), torch.randn(48)
    packed = linear.prepack(layer.values, layer.bitmask)
    assert linear.is_portable(packed[0])
    expected = x.bfloat16().double() @ layer.dense.double().T + bias.double()
    for y in (
        torch_ops.linear_packed(x, *packed, 48, bias),
        torch_ops.linear(x, layer.values, layer.bitmask, None, bias),
    ):
        assert y.dtype == x.dtype
        torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="not the packed form of a weight"):
        torch_ops.linear_packed(x, *packed, 47)


@pytest.mark.usefixtures("without_nvrtc")
def test_the_layer_keeps_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST24_SPARSE_MEMORY", "fast")
    monkeypatch.setattr(torch.ops.cast24, "linear_cuda", torch_ops.linear_cuda, raising=False)
    layer, x = random_layer(48, 64, torch.float16), torch.randn(5, 64).half()
    module = GpuSparseLinear(64, 48, bias=False)
    module.pack(layer.values, layer.bitmask)
    assert module.compressed is None
    torch.testing.assert_close(module(x), torch.nn.functional.linear(x, layer.dense), rtol=1e-2, atol=2e-2)


@pytest.mark.usefixtures("without_nvrtc")
def test_damaged_weights_are_refused() -> None:
    layer = random_layer(4, 16, torch.bfloat16)
    with pytest.raises(InputError, match="not of one weight"):
        linear.prepack(layer.values, layer.bitmask[:, :1])
    layer.bitmask[2, 1] = 0x37
    with pytest.raises(InputError, match="row 2, group 2"):
        linear.prepack(layer.values, layer.bitmask)


def test_without_both_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise InputError("kernels for GPUs need NVRTC")

    monkeypatch.setattr(nvrtc, "available", lambda: False)
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(linear, "prepare", lambda types, device: missing())
    layer = random_layer(4, 16, torch.bfloat16)
    with pytest.raises(InputError, match="need NVRTC"):
        linear.prepack(layer.values, layer.bitmask)
