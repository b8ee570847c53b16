"""Quantized weights in the kernel library: every instruction set of this machine against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cast_serve.kernels import prepack_quantized
from conversion.errors import InputError
from conversion.quantization.formats import INT4, INT8, Quantization, dequantize, encode
from tests.cast_serve.sparse_layers import random_layer
from tests.cast_serve.test_kernels import assert_close

BATCHES = [1, 3, 8, 17, 70]
SHAPES = [(1, 8), (33, 40), (80, 576)]
FORMATS = [Quantization(INT8, None), Quantization(INT8, 32), Quantization(INT4, 64), Quantization(INT4, 128)]
linear = torch.ops.cast24.linear_quantized

pytestmark = pytest.mark.usefixtures("two_threads")


def quantized_layer(
    rows: int, columns: int, quantization: Quantization, *, sparse: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Random codes as stored, bitmask, scales, and the dense weight in float64."""
    kept = columns // 2 if sparse else columns
    codes = torch.randint(quantization.values.lowest, quantization.values.highest + 1, (rows, kept)).float()
    scale = (torch.rand(rows, quantization.groups(columns)) + 0.1) * torch.where(torch.rand(rows, 1) < 0.3, -1, 1)
    stored = encode(codes, quantization.values)
    if not sparse:
        return stored, None, scale, (codes * quantization.spread(scale, columns)).double()
    bitmask = random_layer(rows, columns, torch.float32).bitmask
    return stored, bitmask, scale, dequantize(stored, bitmask, scale, quantization).double()


def exactly_rounded(batch: int, columns: int, group: int) -> Tensor:
    """Activations that rounding to 8 bits does not change: multiples of a power of two, up to 127 times it."""
    groups = -(-columns // group)
    integers = torch.randint(-127, 128, (batch, groups, group)).float()
    integers[..., :8] = 127 * torch.where(torch.rand(batch, groups, 8) < 0.5, -1, 1)
    return (integers * 2.0 ** torch.randint(-9, 3, (batch, groups, 1))).flatten(1)[:, :columns].contiguous()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("quantization", FORMATS, ids=lambda q: f"{q.values.name}-{q.group_size}")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_match_float64(isa: str, rows: int, columns: int, quantization: Quantization, sparse: bool) -> None:
    stored, bitmask, scale, dense = quantized_layer(rows, columns, quantization, sparse=sparse)
    panels, bits, group = prepack_quantized(stored, bitmask, scale, quantization.group_size)
    for batch in BATCHES:
        bias = torch.randn(rows)
        x = exactly_rounded(batch, columns, group)
        assert_close(linear(x, panels, rows, bits, sparse, group, False, bias), x, dense, bias)
        x = torch.randn(batch, columns)
        assert_close(linear(x, panels, rows, bits, sparse, group, True, bias), x, dense, bias)
        assert_close(linear(x, panels, rows, bits, sparse, group, True), x, dense, None)


def test_rounding_activations_errs_by_half_a_step_at_most(isa: str) -> None:
    rows, columns, quantization = 48, 320, Quantization(INT8, 64)
    stored, bitmask, scale, dense = quantized_layer(rows, columns, quantization, sparse=True)
    panels, bits, group = prepack_quantized(stored, bitmask, scale, 64)
    x = torch.randn(20, columns)
    half_step = x.view(20, -1, group).abs().amax(-1).double() / 127 / 2
    bound = half_step @ dense.abs().view(rows, -1, group).sum(-1).T
    error = (linear(x, panels, rows, bits, True, group).double() - x.double() @ dense.T).abs()
    assert (error <= 1.0001 * bound).all()
    assert error.max() > 0.01 * bound.max()  # activations were rounded indeed


@pytest.mark.parametrize("quantization", FORMATS[1:3], ids=lambda q: q.values.name)
@pytest.mark.parametrize("float_activations", [False, True])
def test_a_row_does_not_depend_on_its_batch(isa: str, quantization: Quantization, float_activations: bool) -> None:
    rows, columns = 50, 200
    for sparse in (True, False):
        stored, bitmask, scale, _ = quantized_layer(rows, columns, quantization, sparse=sparse)
        panels, bits, group = prepack_quantized(stored, bitmask, scale, quantization.group_size)
        x = torch.randn(150, columns)
        options = (rows, bits, sparse, group, float_activations)
        alone = torch.cat([linear(row[None], panels, *options) for row in x])
        for batch in (*range(2, 20), 64, 65, 150):
            assert torch.equal(linear(x[150 - batch :], panels, *options), alone[150 - batch :])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(isa: str, bad: float) -> None:
    stored, bitmask, scale, _ = quantized_layer(16, 64, FORMATS[1], sparse=True)
    panels, bits, group = prepack_quantized(stored, bitmask, scale, 32)
    x = torch.randn(3, 64)
    x[1, 40] = bad
    y = linear(x, panels, 16, bits, True, group)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()
    assert torch.equal(linear(torch.zeros(1, 64), panels, 16, bits, True, group), torch.zeros(1, 16))


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda q: f"{q.values.name}-{q.group_size}")
def test_the_portable_tensors_give_the_same(quantization: Quantization) -> None:
    stored, bitmask, scale, _ = quantized_layer(40, 288, quantization, sparse=True)
    panels, bits, group = prepack_quantized(stored, bitmask, scale, quantization.group_size)
    x, bias = torch.randn(2, 3, 288), torch.randn(40)
    packed = linear(x, panels, 40, bits, True, group, False, bias)
    assert torch.equal(torch.ops.cast24.linear(x, stored, bitmask, scale, bias), packed)
    assert packed.shape == (2, 3, 40)


def test_bfloat16_inputs_and_compile() -> None:
    stored, bitmask, scale, _ = quantized_layer(40, 64, FORMATS[2], sparse=True)
    panels, bits, group = prepack_quantized(stored, bitmask, scale, 64)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    y = linear(x, panels, 40, bits, True, group)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear(x.float(), panels, 40, bits, True, group).bfloat16())
    arguments = (panels, 40, bits, True, group)
    torch.library.opcheck(linear.default, (x.float(), *arguments), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x: linear(x, *arguments) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y + 1)


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda q: f"{q.values.name}-{q.group_size}")
def test_rows_of_a_dense_weight_are_read_back(quantization: Quantization) -> None:
    stored, _, scale, dense = quantized_layer(33, 72, quantization, sparse=False)
    panels, bits, group = prepack_quantized(stored, None, scale, quantization.group_size)
    ids = torch.tensor([[0, 32, 7], [16, 15, 32]])
    arguments = (ids, panels, 33, 72, bits, group)
    assert torch.equal(torch.ops.cast24.quantized_rows(*arguments), dense[ids].float())
    torch.library.opcheck(torch.ops.cast24.quantized_rows.default, arguments)
    with pytest.raises(IndexError, match="outside the 33 rows"):
        torch.ops.cast24.quantized_rows(ids + 1, *arguments[1:])
    with pytest.raises(RuntimeError, match="not those of this weight"):
        torch.ops.cast24.quantized_rows(ids, panels, 33, 128, bits, group)


def damaged(change: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
    stored, bitmask, scale, _ = quantized_layer(33, 64, FORMATS[1], sparse=True)
    assert bitmask is not None
    tensors = {"values": stored, "bitmask": bitmask, "scale": scale}
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(values=t["values"].float()), "int8 or uint8"),
        (lambda t: t.update(values=t["values"][:, :30]), "multiple of 8"),
        (lambda t: t["values"].__setitem__((4, 7), -128), "-128, which is no code"),
        (lambda t: t.update(bitmask=t["bitmask"][:, :4]), r"bitmask must be uint8 \[33, 8\]"),
        (lambda t: t.update(scale=t["scale"][:, :1]), r"scale must be float32 \[33, 2\]"),
        (lambda t: t["bitmask"].__setitem__((32, 5), 0x37), "row 32, group 10"),
    ],
)
def test_bad_tensors_are_refused(change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepack_quantized(**damaged(change), group_size=32)


def test_group_sizes_without_a_kernel_are_refused() -> None:
    stored, bitmask, scale, _ = quantized_layer(8, 64, FORMATS[1], sparse=True)
    with pytest.raises(InputError, match="group size 16"):
        prepack_quantized(stored, bitmask, scale, 16)
    with pytest.raises(RuntimeError, match="panels must have shape"):
        linear(torch.randn(1, 64), torch.zeros(1, 8, dtype=torch.uint8), 8, 8, True, 32)
    with pytest.raises(RuntimeError, match="bits must be 8 or 4"):
        linear(torch.randn(1, 64), torch.zeros(1, 8, dtype=torch.uint8), 8, 5, True, 32)
