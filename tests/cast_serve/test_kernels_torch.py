"""torch.ops.cast24."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cast_serve.kernels
from tests.cast_serve.sparse_layers import random_layer
from tests.cast_serve.test_kernels import assert_close

prepack = cast_serve.kernels.prepack
pytestmark = pytest.mark.usefixtures("two_threads")
ops = torch.ops.cast24
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 8, 17, 33])
def test_portable_and_packed_operators_agree(batch: int, dtype: torch.dtype) -> None:
    layer = random_layer(576, 576, dtype)
    x, bias = torch.randn(batch, 576), torch.randn(576)
    y = ops.linear_packed(x, *prepack(layer.values, layer.bitmask), 576, bias)
    rounds = cast_serve.kernels.isa() == "avx512bf16"  # inputs to bf16, for bf16 weights
    seen = x.to(dtype) if rounds else x
    assert_close(y, seen, layer.dense, bias)
    assert torch.equal(y, ops.linear(x, layer.values, layer.bitmask, None, bias))


def test_threads_do_not_change_the_result() -> None:
    layer = random_layer(330, 576, torch.float32)
    panels, x = prepack(layer.values, layer.bitmask), torch.randn(5, 576)
    several = ops.linear_packed(x, *panels, 330)
    torch.set_num_threads(1)
    assert torch.equal(ops.linear_packed(x, *panels, 330), several)


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (0, 40), (2, 0, 40)])
def test_any_leading_axes(shape: tuple[int, ...]) -> None:
    layer = random_layer(33, 40, torch.float32)
    x = torch.randn(shape)
    for y in (
        ops.linear(x, layer.values, layer.bitmask),
        ops.linear_packed(x, *prepack(layer.values, layer.bitmask), 33),
    ):
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dense))


def test_non_contiguous_tensors() -> None:
    layer = random_layer(33, 40, torch.float32)
    x, bias = torch.randn(40, 6).T, torch.randn(66)[::2]
    values, bitmask = layer.values.T.contiguous().T, layer.bitmask.T.contiguous().T
    expected = torch.nn.functional.linear(x, layer.dense, bias)
    torch.testing.assert_close(ops.linear(x, values, bitmask, None, bias), expected)
    torch.testing.assert_close(ops.linear_packed(x, *prepack(values, bitmask), 33, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bfloat16_activations_are_summed_in_float32(dtype: torch.dtype) -> None:
    layer = random_layer(33, 576, dtype)
    x, bias = torch.randn(4, 576).bfloat16(), torch.randn(33).bfloat16()
    y = ops.linear_packed(x, *prepack(layer.values, layer.bitmask), 33, bias)
    assert y.dtype == torch.bfloat16
    exact = ops.linear_packed(x.float(), *prepack(layer.values, layer.bitmask), 33, bias.float())
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(ops.linear(x, layer.values, layer.bitmask, None, bias), y)


def test_opcheck() -> None:
    layer = random_layer(33, 40, torch.bfloat16)
    x, bias = torch.randn(3, 40), torch.randn(33)
    torch.library.opcheck(ops.linear.default, (x, layer.values, layer.bitmask, None, bias))
    torch.library.opcheck(ops.linear_packed.default, (x, *prepack(layer.values, layer.bitmask), 33, bias))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 5, 40, dtype=torch.bfloat16)
        y = ops.linear(x, torch.empty(33, 20), torch.empty(33, 5, dtype=torch.uint8))
        z = ops.linear_packed(x, torch.empty(3, 10, 2, 16), torch.empty(3, 2, 16, dtype=torch.uint32), 33)
    for out in (y, z):
        assert out.shape == (2, 5, 33)
        assert out.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiles_whole_for_any_batch() -> None:
    layer = random_layer(33, 40, torch.float32)
    panels = prepack(layer.values, layer.bitmask)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(ops.linear_packed(x * 2, *panels, 33)) + ops.linear(x, layer.values, layer.bitmask)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (1, 4, 7):
            x = torch.randn(batch, 40)
            torch.testing.assert_close(compiled(x), block(x))


def test_wrong_arguments_are_named() -> None:
    layer = random_layer(33, 40, torch.float32)
    values, indices = prepack(layer.values, layer.bitmask)
    x = torch.randn(2, 40)
    for arguments, complaint in [
        ((x[:, :39], values, indices, 33), "last axis of x"),
        ((torch.randn(2, 48), values, indices, 33), r"panel_values must have shape \[3, 12, 2, 16\]"),
        ((x.double(), values, indices, 33), "x must be float32 or bfloat16"),
        ((x, values.half(), indices, 33), "panel_values must be float32 or bfloat16"),
        ((x, values.bfloat16(), indices, 33), r"panel_values must have shape \[3, 10, 16, 2\]"),
        ((x, values, indices.int(), 33), "panel_indices must be uint32"),
        ((x, values, indices[:2], 33), "panel_indices must have shape"),
        ((x, values, indices, 49), r"panel_values must have shape \[4,"),
        ((x, values, indices, 0), "out_features"),
        ((x, values, indices, 33, torch.zeros(32)), r"bias must have shape \[33\]"),
    ]:
        with pytest.raises(RuntimeError, match=complaint):
            ops.linear_packed(*arguments)
    for arguments, complaint in [
        ((x, layer.values, layer.bitmask[:, :4]), r"bitmask must have shape \[33, 5\]"),
        ((x, layer.values[:, :18], layer.bitmask), r"values must have shape \[33, 20\]"),
        ((x, layer.values, layer.bitmask.int()), "bitmask must be uint8"),
        ((x, layer.values, layer.bitmask, torch.ones(33, 1)), "values with a scale must be int8"),
    ]:
        with pytest.raises(RuntimeError, match=complaint):
            ops.linear(*arguments)


def test_a_damaged_bitmask_is_refused() -> None:
    layer = random_layer(33, 40, torch.float32)
    layer.bitmask[20, 3] ^= 1 << 4
    with pytest.raises(RuntimeError, match="row 20, group 7"):
        ops.linear(torch.randn(2, 40), layer.values, layer.bitmask)
