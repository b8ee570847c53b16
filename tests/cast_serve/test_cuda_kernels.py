"""The CUDA kernels without a GPU: their layout, and their own source run under an emulation of mma.sp."""

from pathlib import Path

import pytest
import torch

from cast_serve.kernels.cuda.layout import from_fragments, to_fragments
from cast_serve.kernels.cuda.small_m import VARIANTS, Types, Variant, plan
from conversion.errors import InputError
from tests.cast_serve.cuda_emulation.runner import Emulation
from tests.cast_serve.sparse_layers import random_layer

BF16, FP16 = Types("Bf16", "Bf16"), Types("Fp16", "Fp16")
S8, E4M3 = Types("S8", "Bf16"), Types("E4m3", "Fp16")
TYPES = {torch.bfloat16: BF16, torch.float16: FP16}


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return Emulation(tmp_path_factory.mktemp("emulation"), VARIANTS, [BF16, FP16, S8, E4M3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (1, 8), (40, 72), (33, 576), (128, 136)])
def test_fragments_come_back(rows: int, columns: int, dtype: torch.dtype) -> None:
    layer = random_layer(rows, columns, torch.float32)
    values = (layer.values * 20).to(dtype)
    fragments, metadata = to_fragments(values, layer.bitmask)
    assert fragments.is_contiguous()
    assert metadata.is_contiguous()
    size, bits = fragments.nbytes + metadata.nbytes, 8 * dtype.itemsize
    padded = -(-rows // 16) * 16 * (-(-columns // 64)) * 64
    assert size * 8 == padded * (bits + 2) // 2  # 9/16 of 16 bits, 5/8 of 8
    back, bitmask = from_fragments(fragments, metadata, rows, columns)
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(bitmask, layer.bitmask)


def test_a_damaged_bitmask_is_refused() -> None:
    layer = random_layer(16, 64, torch.bfloat16)
    layer.bitmask[3, 2] = 0b0111_0011
    with pytest.raises(InputError, match="row 3, group 5 of the bitmask is 0111"):
        to_fragments(layer.values, layer.bitmask)


SHAPES = [
    *[(1, 16, 64), (3, 1, 8), (8, 136, 1032), (2, 20, 4200), (9, 40, 72)],
    *[(17, 330, 576), (33, 150, 200), (64, 300, 640), (70, 48, 264)],
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_small_m_against_float64(
    emulation: Emulation, batch: int, rows: int, columns: int, dtype: torch.dtype, multiprocessors: int
) -> None:
    layer = random_layer(rows, columns, dtype)
    x, bias = torch.randn(batch, columns).to(dtype), torch.randn(rows).to(dtype)
    cut = plan(batch, rows, columns, multiprocessors)
    y = emulation.linear(TYPES[dtype], x, *to_fragments(layer.values, layer.bitmask), rows, cut, bias=bias)
    expected = x.double() @ layer.dense.double().T + bias.double()
    error = (y.double() - expected).abs() / (x.double().abs() @ layer.dense.double().abs().T + bias.double().abs())
    assert error.max() < torch.finfo(dtype).eps, (cut, error.max())


def test_the_result_does_not_depend_on_the_order_of_blocks(emulation: Emulation) -> None:
    layer = random_layer(40, 1024, torch.bfloat16)
    x, packed = torch.randn(3, 1024).bfloat16(), to_fragments(layer.values, layer.bitmask)
    cut = plan(3, 40, 1024, 132)
    assert cut.splits == 4
    results = [emulation.linear(BF16, x, *packed, 40, cut, seed=seed) for seed in range(4)]
    assert all(torch.equal(results[0], result) for result in results)


def test_rows_of_x_apart_and_no_bias(emulation: Emulation) -> None:
    layer = random_layer(24, 72, torch.float16)
    x = torch.randn(5, 160).half()[:, 16:88]
    y = emulation.linear(FP16, x, *to_fragments(layer.values, layer.bitmask), 24, plan(5, 24, 72, 4))
    torch.testing.assert_close(y.double(), x.double() @ layer.dense.double().T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 16, 64), (5, 40, 72), (16, 33, 1032), (40, 100, 1288)])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_small_m_of_8_bit_types(
    emulation: Emulation, batch: int, rows: int, columns: int, dtype: torch.dtype, multiprocessors: int
) -> None:
    layer = random_layer(rows, columns, torch.float32)
    values, dense = (layer.values * 20).to(dtype), (layer.dense * 20).to(dtype)
    x = torch.zeros(batch, -(-columns // 16) * 16, dtype=dtype)[:, :columns]  # rows start at multiples of 16 bytes
    x.copy_((torch.randn(batch, columns) * 20).to(dtype))
    x_scale, w_scale = torch.rand(batch), torch.rand(rows)
    types, out = (S8, torch.bfloat16) if dtype == torch.int8 else (E4M3, torch.float16)
    bias = torch.randn(rows).to(out)
    packed, cut = to_fragments(values, layer.bitmask), plan(batch, rows, columns, multiprocessors)
    w_scale = w_scale / 1000
    y = emulation.linear(types, x, *packed, rows, cut, bias=bias, x_scale=x_scale, w_scale=w_scale, dtype=out)
    scales = x_scale.double()[:, None] * w_scale.double()
    expected = x.double() @ dense.double().T * scales + bias.double()
    bound = x.double().abs() @ dense.double().abs().T * scales + bias.double().abs()
    assert ((y.double() - expected).abs() / bound).max() < torch.finfo(out).eps


VARIANTS_TO_TUNE = [Variant(1, depth=8), Variant(2, row_tiles=2), Variant(1, warps=4, row_tiles=2), Variant(8, depth=2)]


@pytest.mark.slow
def test_other_variants(tmp_path: Path) -> None:
    emulation = Emulation(tmp_path, VARIANTS_TO_TUNE, [BF16])
    layer = random_layer(300, 840, torch.bfloat16)
    packed = to_fragments(layer.values, layer.bitmask)
    for variant in VARIANTS_TO_TUNE:
        x = torch.randn(8 * variant.column_tiles + 1, 840).bfloat16()
        y = emulation.linear(BF16, x, *packed, 300, plan(len(x), 300, 840, 132, variant, 3))
        torch.testing.assert_close(y.double(), x.double() @ layer.dense.double().T, rtol=1e-2, atol=1e-2)
