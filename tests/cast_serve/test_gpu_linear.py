"""The packed linear for GPUs, with the emulation in the GPU's place."""

from typing import Any

import pytest
import torch

from cast_serve.kernels.cuda import cusparselt, torch_ops, weight_only
from cast_serve.kernels.cuda.crossover import DEVICES, Point, Table
from cast_serve.torch_model import modules
from cast_serve.torch_model.gpu_linear import GpuQuantizedLinear, GpuSparseLinear
from conversion.errors import InputError
from conversion.quantization.formats import FP8, INT8, Quantization, ValueFormat, dequantize, encode
from tests.cast_serve.sparse_layers import random_layer

pytestmark = pytest.mark.usefixtures("emulated_gpu")


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


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What cuSPARSELt was given, whose product is a dense one here."""
    given: list[Any] = []

    def multiply(weight: Any, right: Any, *, out_dtype: torch.dtype, transpose_result: bool) -> Any:
        assert transpose_result
        assert right.dtype == weight.dtype
        return (right.t().double() @ weight.double().t()).to(out_dtype)

    monkeypatch.setenv("CAST24_SPARSE_MEMORY", "fast")
    monkeypatch.setattr(cusparselt, "available", lambda: True)
    monkeypatch.setattr(cusparselt, "compress", lambda dense: given.append(dense) or dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    # prepack asks the tensors where they are
    monkeypatch.setattr(modules, "prepack_quantized", torch_ops.prepack_quantized)
    return given


@pytest.mark.parametrize("values", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("rows", [5, 65, 100])
def test_quantized_weights_meet_many_rows_in_8_bits(compressed: list[Any], values: ValueFormat, rows: int) -> None:
    layer, scale = random_layer(64, 96, torch.float32), torch.rand(64, 1) + 0.5
    stored = encode((layer.values * 20).round(), values)
    dense = dequantize(stored, layer.bitmask, scale, Quantization(values, None))
    module = GpuQuantizedLinear(96, 64, bias=True)
    torch.nn.init.normal_(module.bias)
    module.pack(stored, layer.bitmask, scale, None, float_activations=False)
    assert torch.equal(compressed[0].float() * scale, dense)
    x = torch.randn(rows, 96).bfloat16()
    y = module(x)
    assert (y.dtype, y.shape) == (x.dtype, (rows, 64))
    expected = x.double() @ dense.double().T + module.bias.double()
    error = (y.double() - expected).abs() / (x.double().abs() @ dense.double().abs().T)
    assert error.max() < (0.04 if rows > 64 else 0.005)  # rounded to 8 bits, or not


@pytest.mark.parametrize(
    ("shape", "group_size", "float_activations"),
    [((64, 96), 64, False), ((64, 96), None, True), ((40, 96), None, False)],
)
def test_where_there_is_no_second_copy(
    compressed: list[Any], shape: tuple[int, int], group_size: int | None, float_activations: bool
) -> None:
    layer = random_layer(*shape, torch.float32)
    stored, scale = encode(layer.values * 20, INT8), torch.ones(shape[0], 1 if group_size is None else 2)
    module = GpuQuantizedLinear(shape[1], shape[0], bias=False)
    module.pack(stored, layer.bitmask, scale, group_size, float_activations=float_activations)
    assert module.compressed is None
    assert compressed == []


@pytest.mark.parametrize("float_activations", [False, True])
def test_x_is_rounded_unless_float_activations_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, float_activations: bool
) -> None:
    """Once a kernel that does so was measured to be the fastest; it is loaded with the weight."""
    prepared: list[Any] = []
    seconds = {"small_m": 2.0, "warpgroup_8_bit": 1.0}
    table = Table({(64, 96, "int8"): [Point(64, seconds)]}, DEVICES["H100"])
    monkeypatch.setattr(torch_ops, "table", lambda _: table)
    monkeypatch.setattr(modules, "prepack_quantized", torch_ops.prepack_quantized)
    monkeypatch.setattr(weight_only, "prepare_products_in_8_bits", lambda dtype, _: prepared.append(dtype))
    layer, scale = random_layer(64, 96, torch.float32), torch.rand(64, 1) + 0.5
    stored = encode((layer.values * 20).round(), INT8)
    dense = dequantize(stored, layer.bitmask, scale, Quantization(INT8, None))
    module = GpuQuantizedLinear(96, 64, bias=False)
    module.pack(stored, layer.bitmask, scale, None, float_activations=float_activations)
    assert prepared == ([] if float_activations else [torch.int8])
    x = torch.randn(70, 96).bfloat16()
    error = (module(x).double() - x.double() @ dense.double().T).abs()
    relative = (error / (x.double().abs() @ dense.double().abs().T)).max()
    assert relative < 0.004 if float_activations else 0.004 < relative < 0.04


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST24_SPARSE_MEMORY", "much")
    layer = random_layer(16, 64, torch.bfloat16)
    with pytest.raises(InputError, match="'much': set it to low or fast"):
        GpuSparseLinear(64, 16, bias=False).pack(layer.values, layer.bitmask)
