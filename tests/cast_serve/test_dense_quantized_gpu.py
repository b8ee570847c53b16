"""Dense quantized weights for GPUs, embedding and lm_head on one copy, the kernel interpreted by Triton."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from cast_serve.kernels.cuda import dense_quantized, torch_ops
from conversion.errors import InputError
from conversion.quantization.formats import INT4, INT8, Quantization, dequantize, encode
from tests.cast_serve.conftest import Interpreted

ROWS_INT8, GROUPS_INT8 = Quantization(INT8, None), Quantization(INT8, 64)
GROUPS_INT4 = [Quantization(INT4, size) for size in (32, 128, 256)]


@pytest.fixture
def kernel(interpreted: Interpreted) -> ModuleType:
    return interpreted("cast_serve.kernels.cuda.triton_dense")


def label(quantization: Quantization) -> str:
    return f"{quantization.values.name}-{quantization.group_size}"


def random_weight(N: int, K: int, quantization: Quantization) -> tuple[Tensor, Tensor, Tensor]:
    """Stored codes of all values, scales, and the dense weight."""
    values = quantization.values
    stored = encode(torch.randint(values.lowest, values.highest + 1, (N, K)), values)
    scale = torch.rand(N, quantization.groups(K)) + 0.5
    return stored, scale, dequantize(stored, None, scale, quantization)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", [ROWS_INT8, GROUPS_INT8, *GROUPS_INT4], ids=label)
@pytest.mark.parametrize(("M", "N", "K", "bias"), [(1, 5, 8, False), (3, 40, 136, True), (37, 33, 264, True)])
def test_it_multiplies(
    kernel: ModuleType, M: int, N: int, K: int, bias: bool, quantization: Quantization, dtype: torch.dtype
) -> None:
    stored, scale, dense = random_weight(N, K, quantization)
    size, bits = quantization.group_size, quantization.values.bits
    rows = dense_quantized.pack(stored, scale, size)
    assert rows.shape == (N, dense_quantized.row_bytes(K, bits, size))
    assert rows.shape[1] % 16 == 0
    x = torch.randn(2 * M, K + 8).to(dtype)[::2, :K]
    added = torch.randn(N).to(dtype) if bias else None
    y = kernel.dense_quantized_linear(x, rows, N, bits, size, added)
    assert y.dtype == dtype
    expected = x.double() @ dense.double().T + (0.0 if added is None else added.double())
    error = (y.double() - expected).abs() / (x.double().abs() @ dense.double().abs().T)
    assert error.max() < torch.finfo(dtype).eps  # y's rounding alone: the interpreter cuts off where a GPU rounds


@pytest.mark.parametrize("quantization", [ROWS_INT8, GROUPS_INT8, *GROUPS_INT4], ids=label)
@pytest.mark.parametrize("columns", [8, 136, 512])
def test_rows_are_looked_up_exactly(quantization: Quantization, columns: int) -> None:
    stored, scale, dense = random_weight(21, columns, quantization)
    size, bits = quantization.group_size, quantization.values.bits
    rows = dense_quantized.pack(stored, scale, size)
    ids = torch.tensor([[0, 20, 7], [7, 3, 1]])
    assert torch.equal(torch_ops.quantized_rows(ids, rows, 21, columns, bits, size or 0), dense[ids])


@pytest.mark.usefixtures("kernel")
def test_the_operator_takes_it() -> None:
    stored, scale, dense = random_weight(40, 64, ROWS_INT8)
    rows = dense_quantized.pack(stored, scale, None)
    x, bias = torch.randn(2, 3, 64), torch.randn(40)
    y = torch_ops.linear_quantized(x, rows, 40, 8, False, 0, False, bias)
    assert (y.dtype, y.shape) == (x.dtype, (2, 3, 40))
    expected = torch.nn.functional.linear(x, dense, bias)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    assert torch_ops.linear_quantized(x[:0], rows, 40, 8, False, 0).shape == (0, 3, 40)
    with pytest.raises(RuntimeError, match="not the packed form of a dense weight"):
        torch_ops.linear_quantized(x, rows, 41, 8, False, 0)
    with pytest.raises(RuntimeError, match="not those of this weight"):
        torch_ops.quantized_rows(torch.tensor([0]), rows, 40, 136, 8, 0)


def test_what_does_not_belong_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, scale, _ = random_weight(40, 64, GROUPS_INT8)
    with pytest.raises(InputError, match=r"float32 scale \[40, 2\], not torch.float32 \[40, 1\]"):
        dense_quantized.pack(stored, scale, 32)
    with pytest.raises(InputError, match="int8 or uint8 matrices"):
        dense_quantized.pack(stored.float(), scale, 64)
    monkeypatch.setattr(dense_quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs Triton"):
        dense_quantized.pack(stored, scale, 64)
