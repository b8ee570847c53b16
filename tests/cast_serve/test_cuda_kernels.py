"""The CUDA kernels without a GPU: their layout, and their own source run under an emulation of mma.sp."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.kernels import TILES
from cast_serve.kernels.cuda import nvrtc, tiled, warpgroup, weight_only
from cast_serve.kernels.cuda.layout import from_fragments, to_fragments
from cast_serve.kernels.cuda.linear import (
    TYPES,
    Ring,
    expand,
    in_rows_of_16_bytes,
    packed_linear,
    quantize_rows,
    ring,
    tiled_linear,
)
from cast_serve.kernels.cuda.plan import Plan, Types
from cast_serve.kernels.cuda.small_m import Variant, plan
from cast_serve.kernels.cuda.source import source
from cast_serve.kernels.cuda.tiled import Tile, cut_into, tiles
from cast_serve.kernels.cuda.warpgroup import WarpgroupTile
from cast_serve.kernels.cuda.weight_only import weight_only_linear
from conversion.errors import InputError
from conversion.packed import unpack24
from conversion.quantization.formats import FP8, INT4, INT8, ValueFormat, encode
from tests.cast_serve.cuda_emulation.runner import Emulation, Launcher
from tests.cast_serve.sparse_layers import random_layer

DTYPES = [torch.bfloat16, torch.float16]
DTYPES_8_BIT = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (1, 8), (40, 72), (33, 576), (128, 136)])
def test_fragments_come_back(rows: int, columns: int, dtype: torch.dtype) -> None:
    layer = random_layer(rows, columns, dtype)
    fragments, metadata = to_fragments(layer.values, layer.bitmask)
    assert fragments.is_contiguous()
    assert metadata.is_contiguous()
    padded = -(-rows // 16) * 16 * (-(-columns // 64)) * 64
    assert (fragments.nbytes + metadata.nbytes) * 16 == padded * 2 * 9
    back, bitmask = from_fragments(fragments, metadata, rows, columns)
    assert torch.equal(back, layer.values)
    assert torch.equal(bitmask, layer.bitmask)


def test_a_damaged_bitmask_is_refused() -> None:
    layer = random_layer(16, 64, torch.bfloat16)
    layer.bitmask[3, 2] = 0b0111_0011
    with pytest.raises(InputError, match="row 3, group 5 of the bitmask is 0111"):
        to_fragments(layer.values, layer.bitmask)


def emulated(
    emulation: Emulation,
    x: Tensor,
    packed: tuple[Tensor, Tensor],
    rows: int,
    cut: Plan | None = None,
    bias: Tensor | None = None,
    seed: int = 0,
    **scales: Tensor | torch.dtype,
) -> Tensor:
    """packed_linear in the emulation; every byte of the weight must be read once for each block of rows of x."""
    launch = Launcher(emulation, [*packed, x], seed)
    y = packed_linear(x, *packed, rows, bias, cut=cut, launch=launch, **scales)  # type: ignore[arg-type]
    assert not ring(x.device).zeros.any()
    times = 1 if cut is None else cut.grid[2]
    assert all((reads == times).all() for reads in launch.reads[:2]), "a byte of the weight was not read exactly once"
    return y


def relative_error(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor, scales: Tensor | float = 1.0) -> float:
    """The largest error, in units of the sum of all terms' magnitudes."""
    x, dense, bias = x.double(), dense.double(), bias.double()
    expected, magnitude = x @ dense.T * scales + bias, x.abs() @ dense.abs().T * scales + bias.abs()
    return float(((y.double() - expected).abs() / magnitude).max())


SHAPES = [
    *[(1, 16, 64), (3, 1, 8), (8, 136, 2056), (2, 20, 4200), (9, 40, 72)],
    *[(17, 330, 576), (33, 150, 200), (64, 300, 640), (70, 48, 264)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_small_m_against_float64(
    emulation: Emulation, batch: int, rows: int, columns: int, dtype: torch.dtype, multiprocessors: int
) -> None:
    layer = random_layer(rows, columns, dtype)
    x, bias = torch.randn(batch, columns).to(dtype), torch.randn(rows).to(dtype)
    cut = plan(batch, rows, columns, multiprocessors)
    y = emulated(emulation, x, to_fragments(layer.values, layer.bitmask), rows, cut, bias)
    assert relative_error(y, x, layer.dense, bias) < torch.finfo(dtype).eps


def test_the_result_does_not_depend_on_the_order_of_blocks(emulation: Emulation) -> None:
    layer = random_layer(40, 4096, torch.bfloat16)
    x, packed = torch.randn(3, 4096).bfloat16(), to_fragments(layer.values, layer.bitmask)
    cut = plan(3, 40, 4096, 132)
    assert cut.splits == 4
    results = [emulated(emulation, x, packed, 40, cut, seed=seed) for seed in range(4)]
    assert all(torch.equal(results[0], result) for result in results)


def test_calls_take_turns_on_the_ring_of_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "SIZE", 10)
    counters = Ring(torch.device("cpu"))
    start = counters.zeros.data_ptr()
    assert [(counters.take(count) - start) // 4 for count in (4, 4, 3, 7, 1)] == [0, 4, 0, 3, 0]


def test_rows_of_x_apart_and_no_bias(emulation: Emulation) -> None:
    layer, x = random_layer(24, 72, torch.float16), torch.randn(5, 160).half()[:, 16:88]
    y = emulated(emulation, x, to_fragments(layer.values, layer.bitmask), 24)
    torch.testing.assert_close(y.double(), x.double() @ layer.dense.double().T, rtol=1e-3, atol=1e-3)


def test_other_strides_are_copied() -> None:
    wide = torch.randn(5, 160).half()
    in_place, shifted, transposed = wide[:, 16:88], wide[:, 3:75], wide.T.contiguous().T[:, :72]
    assert in_rows_of_16_bytes(in_place) is in_place
    for x in (shifted, transposed, wide[:1, :72].expand(3, 72), torch.ones(3, 24, dtype=torch.int8)):
        copy = in_rows_of_16_bytes(x)
        assert torch.equal(copy, x)
        assert copy.data_ptr() % 16 == copy.stride(0) * copy.itemsize % 16 == 0
        assert copy.stride(1) == 1


TILED_SHAPES = [(1, 16, 64), (65, 33, 72), (130, 270, 200), (64, 128, 1160), (129, 300, 520)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows", "columns"), TILED_SHAPES)
@pytest.mark.parametrize("tile", [0, 1, 2])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_tiled_against_float64(
    emulation: Emulation, batch: int, rows: int, columns: int, dtype: torch.dtype, tile: int, multiprocessors: int
) -> None:
    layer = random_layer(rows, columns, dtype)
    wide = torch.randn(batch, columns + 24).to(dtype)
    x, bias = wide[:, 8 : columns + 8], torch.randn(rows).to(dtype)
    packed = to_fragments(layer.values, layer.bitmask)
    cut = cut_into(tiles(TYPES[dtype, dtype])[tile], batch, rows, columns, multiprocessors)
    assert (cut.splits > 1) == (multiprocessors > 1 and columns > 500)
    launch = Launcher(emulation, [*packed, wide, bias], seed=batch)
    y = tiled_linear(x, *packed, rows, bias, cut=cut, launch=launch)
    assert relative_error(y, x, layer.dense, bias) < torch.finfo(dtype).eps
    assert all((reads > 0).all() for reads in launch.reads[:2]), "a byte of the weight was not read"
    assert not ring(x.device).zeros.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "group_size"), [(INT8, None), (FP8, 64), (INT4, 128), (INT4, 64)])
@pytest.mark.parametrize("tile", [0, 1, 2])
def test_tiled_weight_only(
    emulation: Emulation, format: ValueFormat, group_size: int | None, dtype: torch.dtype, tile: int
) -> None:
    values, bitmask, scale, dense = quantized_layer(301, 328, format, group_size)
    packed = weight_only.pack(values, bitmask, scale, group_size)
    x, bias = torch.randn(70, 328).to(dtype), torch.randn(301).to(dtype)
    cut = cut_into(tiles(Types("W8", "Bf16"))[tile], 70, 301, 328, 1)
    launch = Launcher(emulation, [packed, x])
    y = weight_only_linear(x, packed, 301, format.bits, group_size, bias, method="tiled", cut=cut, launch=launch)
    assert relative_error(y, x, dense, bias) < torch.finfo(dtype).eps


WARPGROUP_SHAPES = [(1, 16, 64), (65, 33, 72), (130, 270, 200), (260, 140, 600)]
MANY_PANELS = (140, 2100, 72)


@pytest.mark.parametrize(
    ("tile", "batch", "rows", "columns", "dtype"),
    [
        *[(tile, *shape, DTYPES[i % 2]) for tile in warpgroup.TILES for i, shape in enumerate(WARPGROUP_SHAPES)],
        (warpgroup.TILES[0], *MANY_PANELS, torch.bfloat16),
    ],
)
def test_warpgroup_against_float64(
    emulation: Emulation, tile: WarpgroupTile, batch: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    """Buffers go round several times, clusters reach past the weight's end, and panels are several or one."""
    layer = random_layer(rows, columns, dtype)
    wide = torch.randn(batch, columns + 24).to(dtype)
    x, bias = wide[:, 8 : columns + 8], torch.randn(rows).to(dtype)
    packed = to_fragments(layer.values, layer.bitmask)
    cut = warpgroup.cut_into(tile, batch, rows, columns)
    launch = Launcher(emulation, [*packed, wide, bias], seed=batch)
    y = tiled_linear(x, *packed, rows, bias, cut=cut, launch=launch)
    assert relative_error(y, x, layer.dense, bias) < torch.finfo(dtype).eps
    assert all((reads > 0).all() for reads in launch.reads[:2]), "a byte of the weight was not read"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "group_size"), [(INT8, None), (FP8, None), (FP8, 64), (INT4, 128), (INT4, 64)])
def test_warpgroup_weight_only(
    emulation: Emulation, format: ValueFormat, group_size: int | None, dtype: torch.dtype
) -> None:
    values, bitmask, scale, dense = quantized_layer(301, 328, format, group_size)
    packed = weight_only.pack(values, bitmask, scale, group_size)
    x, bias = torch.randn(140, 328).to(dtype), torch.randn(301).to(dtype)
    launch = Launcher(emulation, [packed, x])
    y = weight_only_linear(x, packed, 301, format.bits, group_size, bias, method="warpgroup", launch=launch)
    # several scales of a row are multiplied into the weight, which is rounded again
    assert relative_error(y, x, dense, bias) < (1 if group_size is None else 2) * torch.finfo(dtype).eps


def test_a_cluster_reads_x_once(emulation: Emulation) -> None:
    layer, x = random_layer(1024, 128, torch.bfloat16), torch.randn(256, 128).bfloat16()
    packed = to_fragments(layer.values, layer.bitmask)
    for tile in warpgroup.TILES:
        cut, launch = warpgroup.cut_into(tile, 256, 1024, 128), Launcher(emulation, [*packed, x])
        tiled_linear(x, *packed, 1024, cut=cut, launch=launch)
        of_weight, _, of_x = (reads.unique().tolist() for reads in launch.reads)
        assert of_weight == [256 // tile.rows]
        assert of_x == [1024 // (128 * tile.cluster)]


def test_warpgroup_tiles_fill_the_gpu() -> None:
    types = TYPES[torch.bfloat16, torch.bfloat16]
    for M, N, K in [(256, 14336, 4096), (512, 4096, 4096), (2048, 4096, 14336), (8192, 11008, 4096)]:
        cut = warpgroup.plan(M, N, K, 132, types)
        assert cut.grid[0] % cut.kernel.entry.cluster == 0
        assert math.prod(cut.grid) >= 56
    assert all(warpgroup.plan(M, 14336, 4096, 132, types).kernel.entry.cluster == 4 for M in (2048, 8192))
    assert warpgroup.plan(8192, 14336, 4096, 132, types).kernel == warpgroup.TILES[3]
    assert all(tile.entry.shared_bytes <= 227 << 10 for tile in warpgroup.TILES)


def test_tiles_leave_no_multiprocessor_idle() -> None:
    types = TYPES[torch.bfloat16, torch.bfloat16]
    by_size = tiles(types)
    for M, N, K in [(70, 4096, 4096), (256, 4096, 14336), (512, 14336, 4096), (8192, 4096, 4096)]:
        cut = tiled.plan(M, N, K, 132, types)
        assert math.prod(cut.grid) > 0.7 * 132
        assert cut.splits == 1 or math.prod(cut.grid) <= 132
        assert cut.splits * cut.steps_per_split >= cut.steps > (cut.splits - 1) * cut.steps_per_split
    assert all(tiled.plan(M, 14336, 4096, 108, types).kernel == by_size[-1] for M in (2048, 4096, 8192))


@pytest.mark.parametrize("dtype", DTYPES_8_BIT)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 72), (2, 5000)])
def test_rows_are_rounded_with_scales_of_their_own(
    emulation: Emulation, rows: int, columns: int, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, columns).bfloat16() * torch.tensor([[0.01], [1e-38], [100.0]])[:rows].bfloat16()
    rounded, scale = quantize_rows(x, dtype, launch=Launcher(emulation, [x]))
    largest = 127.0 if dtype == torch.int8 else 448.0
    peak = x.float().abs().amax(1)
    torch.testing.assert_close(scale, torch.where(peak > 1e-30, peak / largest, 1.0))
    exact = x.float() * (1 / scale)[:, None]
    assert torch.equal(rounded.float(), exact.round() if dtype == torch.int8 else exact.to(dtype).float())
    assert rounded.stride(0) % 16 == 0
    ordered, same_scale = quantize_rows(x, dtype, for_products=True, launch=Launcher(emulation, [x]))
    assert torch.equal(same_scale, scale)
    # virtual groups 2 t + s of four columns are the real t + 4 s, in each half of a step
    whole = torch.nn.functional.pad(rounded.float(), (0, -columns % 64))
    assert torch.equal(ordered.float(), whole.view(rows, -1, 2, 4, 4).transpose(2, 3).reshape(rows, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (3, 8), (40, 200)])
def test_expand(emulation: Emulation, rows: int, columns: int, dtype: torch.dtype) -> None:
    layer = random_layer(rows, columns, dtype)
    packed = to_fragments(layer.values, layer.bitmask)
    assert torch.equal(expand(*packed, rows, columns, launch=Launcher(emulation, packed)), layer.dense)


def quantized_layer(rows: int, columns: int, values: ValueFormat, group_size: int | None) -> tuple[Tensor, ...]:
    """Stored codes, bitmask and scales of a random weight, and the weight, dense in float64."""
    layer = random_layer(rows, columns, torch.float32)
    codes = torch.randint(values.lowest, values.highest + 1, layer.values.shape)
    codes = codes.to(values.dtype).float() if values is FP8 else codes
    dense = unpack24(codes.double(), layer.bitmask)
    scale = torch.rand(rows, 1 if group_size is None else -(-columns // group_size)) + 0.01
    dense *= scale.double().repeat_interleave(group_size or columns, 1)[:, :columns]
    stored = encode(codes.float(), values)
    return stored, layer.bitmask, scale, dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("format", "group_size"),
    [(INT8, None), (INT8, 128), (FP8, None), (FP8, 64), (INT4, 64), (INT4, 256), (INT4, None)],
)
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 16, 64), (3, 40, 200), (9, 130, 1032), (40, 33, 328)])
def test_weight_only(
    emulation: Emulation,
    batch: int,
    rows: int,
    columns: int,
    format: ValueFormat,
    group_size: int | None,
    dtype: torch.dtype,
) -> None:
    bits = format.bits
    values, bitmask, scale, dense = quantized_layer(rows, columns, format, group_size)
    packed = weight_only.pack(values, bitmask, scale, group_size)
    assert packed.numel() == weight_only.packed_bytes(rows, columns, bits, group_size)
    x, bias = torch.randn(batch, columns).to(dtype), torch.randn(rows).to(dtype)
    launch, cut = Launcher(emulation, [packed, x]), plan(batch, rows, columns, 132)
    y = weight_only_linear(x, packed, rows, bits, group_size, bias, cut=cut, launch=launch)
    reads = launch.reads[0][: packed.numel() - 4 * 16 * -(-rows // 16) * scale.shape[1]]
    assert (reads == 1).all(), "a byte of the weight was not read exactly once"
    assert relative_error(y, x, dense, bias) < torch.finfo(dtype).eps
    several = weight_only_linear(
        x, packed, rows, bits, group_size, bias, method="expanded", launch=Launcher(emulation, [packed])
    )
    assert relative_error(several, x, dense, bias) < 2 * torch.finfo(dtype).eps  # the weight is rounded as well


def test_weight_only_is_as_small_as_it_can_be() -> None:
    dense = 2 * 4096 * 4096
    assert weight_only.packed_bytes(4096, 4096, 4, 128) / dense == (2 + 1 + 32 / 128) / 16
    assert weight_only.packed_bytes(4096, 4096, 8, None) / dense == pytest.approx(5 / 16, rel=2e-3)
    layer = quantized_layer(16, 64, INT4, 32)
    with pytest.raises(InputError, match="multiple of 64 columns"):
        weight_only.pack(*layer[:3], 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_8_bit_float_is_exact(emulation: Emulation, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = codes[~codes.float().isnan()][:248].view(62, 4)
    bitmask = torch.full((62, 1), 0b1010_0110, dtype=torch.uint8)
    packed = weight_only.pack(values, bitmask, torch.ones(62, 1), None)
    x = torch.eye(8).to(dtype)
    y = weight_only_linear(x, packed, 62, 8, None, launch=Launcher(emulation, None))
    assert torch.equal(y.T, unpack24(values.to(dtype), bitmask))


@pytest.mark.parametrize("format", [INT8, FP8])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 16, 64), (65, 33, 8), (40, 270, 320), (130, 140, 1032)])
@pytest.mark.parametrize("kernel", [*warpgroup.TILES, *tiles(Types("S8", "Bf16"))])
def test_products_in_8_bits(
    emulation: Emulation, kernel: WarpgroupTile | Tile, batch: int, rows: int, columns: int, format: ValueFormat
) -> None:
    """The weight's bytes are those that products in 16 bits read, and the integers' sums are exact."""
    values, bitmask, scale, dense = quantized_layer(rows, columns, format, None)
    packed = weight_only.pack(values, bitmask, scale, None)
    dtype = torch.float16 if batch in (1, 40) else torch.bfloat16
    wide = torch.randn(batch, columns + 24).to(dtype)
    x, bias = wide[:, 8 : columns + 8], torch.randn(rows).to(dtype)
    padded = -(-columns // 64) * 64
    if isinstance(kernel, WarpgroupTile):
        method, cut = "warpgroup_8_bit", warpgroup.cut_into(kernel, batch, rows, padded)
    else:
        method, cut = "tiled_8_bit", cut_into(kernel, batch, rows, padded, 132, 2)
    launch = Launcher(emulation, None, seed=batch)
    y = weight_only_linear(x, packed, rows, 8, None, bias, method=method, cut=cut, launch=launch)  # type: ignore[arg-type]
    rounded, x_scale = quantize_rows(x, values.dtype, launch=launch)
    assert y.dtype == x.dtype
    assert relative_error(y, rounded, dense, bias, x_scale.double()[:, None]) < torch.finfo(x.dtype).eps
    assert not ring(x.device).zeros.any()


VARIANTS_TO_TUNE = [
    *[Variant(1, depth=8), Variant(1, warps_k=8), Variant(2, row_tiles=2), Variant(1, warps=4, warps_k=4, row_tiles=2)],
    *[Variant(4, row_tiles=2, warps_k=2, depth=2), Variant(8, depth=2)],
]


@pytest.mark.slow
def test_other_tiles(tmp_path: Path) -> None:
    types = TYPES[torch.bfloat16, torch.bfloat16]
    emulation = Emulation(tmp_path, [types], TILES)
    layer, x = random_layer(300, 200, torch.bfloat16), torch.randn(140, 200).bfloat16()
    packed = to_fragments(layer.values, layer.bitmask)
    for tile in TILES:
        y = tiled_linear(
            x, *packed, 300, cut=cut_into(tile, 140, 300, 200, 1), launch=Launcher(emulation, [*packed, x])
        )
        torch.testing.assert_close(y.double(), x.double() @ layer.dense.double().T, rtol=1e-2, atol=1e-2)
    nvrtc.compile_source(source(types, tuple(TILES)), "sm_90a")


@pytest.mark.slow
def test_other_variants(tmp_path: Path) -> None:
    emulation = Emulation(tmp_path, [TYPES[torch.bfloat16, torch.bfloat16]], VARIANTS_TO_TUNE)
    layer = random_layer(300, 840, torch.bfloat16)
    packed = to_fragments(layer.values, layer.bitmask)
    for variant in VARIANTS_TO_TUNE:
        x = torch.randn(8 * variant.column_tiles + 1, 840).bfloat16()
        y = emulated(emulation, x, packed, 300, plan(len(x), 300, 840, 132, variant, 3))
        torch.testing.assert_close(y.double(), x.double() @ layer.dense.double().T, rtol=1e-2, atol=1e-2)
