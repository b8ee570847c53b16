"""Which product the GPU operators take, and the operators themselves with the emulation in the GPU's place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cast_serve.kernels.torch_ops
from cast_serve.kernels.cuda import crossover, cusparselt, linear, torch_ops, weight_only
from cast_serve.kernels.cuda.crossover import Choice, Point, Table
from cast_serve.kernels.cuda.cusparselt import Algorithm
from cast_serve.kernels.cuda.layout import to_fragments
from cast_serve.kernels.cuda.linear import TYPES, prepack
from cast_serve.kernels.cuda.plan import Entry, Types
from cast_serve.kernels.cuda.small_m import VARIANTS
from conversion.quantization.formats import INT4, INT8, Quantization, dequantize, encode
from tests.cast_serve.cuda_emulation.runner import Emulation, Launcher
from tests.cast_serve.sparse_layers import random_layer

WHERE = {"device": "NVIDIA H100 80GB HBM3", "driver": 13000, "torch": "2.11.0", "cusparselt": 800}
LAYER = (64, 128, "bfloat16")
BF16 = TYPES[torch.bfloat16, torch.bfloat16]


def points(*rows: int, **seconds: list[float]) -> list[Point]:
    return [
        Point(row, {method: taken[i] for method, taken in seconds.items()}, Algorithm(i, 2))
        for i, row in enumerate(rows)
    ]


def test_the_measured_times_decide() -> None:
    measured = points(1, 64, 1024, small_m=[1.0, 2.0, 9.0], expanded=[3.0, 3.0, 5.0], cusparselt=[4.0, 1.0, 3.0])
    table = Table({LAYER: list(reversed(measured))}, crossover.DEVICES["H100"])
    assert table.choose(1, LAYER, True) == Choice("small_m")
    assert table.choose(2, LAYER, True) == Choice("cusparselt", Algorithm(1, 2))  # as at 64 rows
    assert table.choose(2, LAYER, False) == Choice("small_m")
    assert table.choose(5000, LAYER, True) == Choice("cusparselt", Algorithm(2, 2))
    assert table.choose(5000, LAYER, False) == Choice("expanded")


@pytest.mark.parametrize("device", [*crossover.DEVICES, "NVIDIA L40S"])
def test_the_model_streams_for_few_rows_and_multiplies_for_many(device: str) -> None:
    table = Table({}, crossover.modelled_device(device))
    for layer in ((4096, 4096, "bfloat16"), (14336, 4096, "float16"), (4096, 4096, "int8")):
        assert all(table.choose(M, layer, True).method == "small_m" for M in (1, 8, 16))
        assert table.choose(8192, layer, True).method in ("tiled", "cusparselt")
        assert table.choose(8192, layer, False).method in ("tiled", "expanded")
        assert table.choose(1024, layer, False).method == "tiled"
    int4 = (4096, 4096, "int4 g64")
    assert [table.choose(M, int4, False).method for M in (1, 16, 8192)] == ["small_m", "small_m", "tiled"]


def test_the_model_knows_where_the_full_speed_is_not_that_of_mma() -> None:
    layer = (4096, 4096, "bfloat16")
    for device, method in (("A100", "tiled"), ("RTX 4090", "tiled"), ("H100", "expanded"), ("H200", "expanded")):
        assert Table({}, crossover.DEVICES[device]).choose(8192, layer, False).method == method


def test_a_table_counts_where_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    crossover.save({LAYER: points(8, small_m=[2.0], expanded=[1.0])}, WHERE)
    other = (32, 64, "float16")
    path = crossover.save({other: points(8, small_m=[1.0], expanded=[2.0])}, WHERE)
    assert path.name == "NVIDIA-H100-80GB-HBM3.json"
    assert len(json.loads(path.read_text())["layers"]) == 2
    assert crossover.load(WHERE).choose(1, LAYER, False).method == "expanded"
    assert crossover.load(WHERE).choose(1, other, False).method == "small_m"
    assert not crossover.load(WHERE | {"torch": "2.12.0"}).points
    monkeypatch.setenv("CAST24_TUNING", str(tmp_path / "elsewhere.json"))
    assert not crossover.load(WHERE).points


class Gpu:
    """Stands in for the GPU: the emulation launches kernels, and a table chooses.

    Attributes:
        launched: names of kernels.
    """

    def __init__(self, emulation: Emulation, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[str] = []

        def launch(types: Types, entry: Entry, *rest: Any) -> None:
            self.launched.append(entry.name)
            Launcher(emulation, None)(types, entry, *rest)

        monkeypatch.setattr(linear, "launch_on_gpu", launch)
        monkeypatch.setattr(torch_ops, "table", lambda _: table)


@pytest.mark.parametrize(
    ("rows", "kernel"),
    [
        *[(1, VARIANTS[0].entry.name), (9, VARIANTS[1].entry.name), (64, "expand"), (100, "tiled_4_4_4_2_1")],
        (200, "warpgroup_256_4"),
    ],
)
def test_operators_by_rows(emulation: Emulation, monkeypatch: pytest.MonkeyPatch, rows: int, kernel: str) -> None:
    seconds = {"small_m": [1.0, 2.0, 3.0, 3.0], "expanded": [2.0, 1.0, 2.0, 2.0], "tiled": [3.0, 2.0, 1.0, 2.0]}
    seconds["warpgroup"] = [4.0, 3.0, 2.0, 1.0]
    gpu = Gpu(emulation, Table({LAYER: points(32, 64, 128, 256, **seconds)}, crossover.DEVICES["H100"]), monkeypatch)
    layer, x, bias = random_layer(64, 128, torch.bfloat16), torch.randn(rows, 128), torch.randn(64)
    packed = prepack(layer.values, layer.bitmask)
    gpu.launched.clear()
    expected = x.bfloat16().double() @ layer.dense.double().T + bias.double()
    y = torch_ops.linear_packed(x, *packed, 64, bias)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    assert gpu.launched == [kernel]
    assert torch.equal(torch_ops.linear(x, layer.values, layer.bitmask, None, bias), y)


def test_any_leading_axes(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(emulation, Table({}, crossover.DEVICES["H100"]), monkeypatch)
    layer = random_layer(24, 40, torch.bfloat16)
    packed = to_fragments(layer.values, layer.bitmask)
    for shape in ((40,), (2, 3, 40), (0, 40)):
        x = torch.randn(shape).bfloat16()
        y = torch_ops.linear_packed(x, *packed, 24)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dense), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 64)])
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(3, torch.float32), (70, torch.bfloat16), (2, torch.float16), (130, torch.float32), (300, torch.bfloat16)],
)
def test_the_quantized_operator(
    emulation: Emulation,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    dtype: torch.dtype,
    bits: int,
    group_size: int | None,
) -> None:
    if bits == 8 and dtype == torch.float16:
        return
    seconds = {"small_m": [1.0, 2.0, 2.0, 2.0], "expanded": [2.0, 1.0, 2.0, 2.0], "tiled": [2.0, 2.0, 1.0, 2.0]}
    measured = points(64, 256, 512, 1024, **seconds, warpgroup=[2.0, 2.0, 2.0, 1.0])
    known = (40, 200, "int8" if bits == 8 else "int4 g64")
    gpu = Gpu(emulation, Table({known: measured}, crossover.DEVICES["H100"]), monkeypatch)
    layer, x, bias = random_layer(40, 200, torch.float32), torch.randn(2, rows, 200).to(dtype), torch.randn(40)
    codes = (layer.values * 2).round().clamp(-8, 7)
    scale = torch.rand(40, 1 if group_size is None else -(-200 // group_size))
    format = Quantization(INT8 if bits == 8 else INT4, group_size)
    stored = encode(codes, format.values)
    dense = dequantize(stored, layer.bitmask, scale, format)
    packed = weight_only.pack(stored, layer.bitmask, scale, group_size)
    y = torch_ops.linear_quantized(x, packed, 40, bits, True, group_size or 0, False, bias)
    assert y.dtype == dtype
    (launched,) = gpu.launched
    assert launched.startswith({2: "small_m", 3: "small_m", 70: "expand", 130: "tiled", 300: "warpgroup"}[rows])
    rounded = x.bfloat16() if dtype == torch.float32 else x
    expected = rounded.double() @ dense.double().T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=1e-1)
    with pytest.raises(RuntimeError, match="is not the packed form of a weight"):
        torch_ops.linear_quantized(x, packed, 60, bits, True, group_size or 0)


@pytest.mark.parametrize("method", ["tiled_8_bit", "warpgroup_8_bit"])
def test_x_is_rounded_where_that_was_measured_to_be_fastest(
    emulation: Emulation, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    known = (40, 200, "int8")
    measured = points(64, 256, small_m=[1.0, 2.0], tiled=[3.0, 1.5], cusparselt=[5.0, 1.2], **{method: [2.0, 1.0]})
    table = Table({known: measured}, crossover.DEVICES["H100"])
    gpu = Gpu(emulation, table, monkeypatch)
    layer, x, bias = random_layer(40, 200, torch.float32), torch.randn(2, 50, 200).bfloat16(), torch.randn(40)
    codes, scale = (layer.values * 2).round().clamp(-127, 127), torch.rand(40, 1)
    stored = encode(codes, INT8)
    dense = dequantize(stored, layer.bitmask, scale, Quantization(INT8, None))
    packed = weight_only.pack(stored, layer.bitmask, scale, None)
    expected = x.double() @ dense.double().T + bias.double()
    for compressed, float_activations in ((None, False), (None, True), (dense, True)):
        y = torch_ops.linear_quantized_cuda(x, packed, compressed, 40, 8, 0, float_activations, bias)
        torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=0.1 if float_activations else 0.8)
    assert gpu.launched[0] == "quantize_rows"
    assert gpu.launched[1].startswith(method.removesuffix("_8_bit"))
    assert [name.split("_")[0] for name in gpu.launched[2:]] == ["tiled", "tiled"]
    assert len(torch_ops.linear_quantized_cuda(x[:0], packed, None, 40, 8, 0)) == 0
    few = torch_ops.linear_quantized(x[:, :3], packed, 40, 8, True, 0)
    assert gpu.launched[-1].startswith("small_m")
    torch.testing.assert_close(few.double(), expected[:, :3] - bias.double(), rtol=2e-2, atol=0.1)
    assert table.rounds(known)
    assert not table.rounds((40, 200, "float8_e4m3fn"))
    assert not Table({known: points(64, small_m=[1.0], **{method: [2.0]})}, crossover.DEVICES["H100"]).rounds(known)


def test_cusparselt_gets_whole_rows_of_eight(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def multiply(compressed: Any, right: Any, bias: Any, *, transpose_result: bool, **algorithm: Any) -> Any:
        seen.append((tuple(right.shape), transpose_result, algorithm))
        return torch.nn.functional.linear(right.t(), compressed, bias)

    Gpu(emulation, Table({LAYER: points(512, small_m=[2.0], cusparselt=[1.0])}, crossover.DEVICES["H100"]), monkeypatch)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    layer, x = random_layer(64, 128, torch.bfloat16), torch.randn(2, 50, 128).bfloat16()
    packed = to_fragments(layer.values, layer.bitmask)
    y = torch_ops.linear_cuda(x, *packed, layer.dense, 64, None)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dense), rtol=2e-2, atol=2e-2)
    algorithm = {"alg_id": 0, "split_k": 2, "split_k_mode": -1}
    assert seen == [((128, 104), True, {"out_dtype": None, **algorithm})]
    assert cusparselt.fits(64, 128)
    assert not cusparselt.fits(40, 136)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 12)}, "multiple of 8"),
        ({"x": torch.ones(2, 64)}, "not the packed form of a weight"),
        ({"out_features": 70}, "not the packed form of a weight"),
        ({"fragments": torch.ones(2, 4, 32, 8)}, "bfloat16 or float16"),
        ({"bias": torch.ones(3)}, r"bias must have shape \[24\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any], message: str) -> None:
    layer = random_layer(24, 128, torch.bfloat16)
    fragments, metadata = to_fragments(layer.values, layer.bitmask)
    x = torch.ones(2, 128)
    given = {"x": x, "fragments": fragments, "metadata": metadata, "compressed": None, "out_features": 24, "bias": None}
    with pytest.raises(RuntimeError, match=message):
        torch_ops.linear_cuda(**given | change)


def test_operators_are_registered_for_gpus() -> None:
    ops = cast_serve.kernels.torch_ops.torch.ops.cast24
    with FakeTensorMode():
        x = torch.empty(2, 5, 64, dtype=torch.bfloat16, device="cuda")
        fragments = torch.empty(1, 2, 32, 8, dtype=torch.bfloat16, device="cuda")
        metadata = torch.empty(1, 1, 32, dtype=torch.uint32, device="cuda")
        quantized = ops.linear_quantized_cuda(x, torch.empty(16 * 64, device="cuda"), None, 16, 8, 0, True)
        packed = ops.linear_packed(x, fragments, metadata, 16), ops.linear_cuda(x, fragments, metadata, None, 16)
        for y in (*packed, quantized):
            assert (y.shape, y.dtype, y.device.type) == ((2, 5, 16), x.dtype, "cuda")
    for name in (
        "linear",
        "linear_packed",
        "linear_quantized",
        "linear_cuda",
        "linear_quantized_cuda",
        "quantized_rows",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cast24::{name}", "CUDA")
