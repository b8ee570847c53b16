"""`cast tune` without a GPU: which layers, what is measured, the table and its picture."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.gpu.machines import Rehearsal
from cast_serve.cli import build_app
from cast_serve.kernels.cuda import crossover, cusparselt, measurement, warpgroup
from cast_serve.kernels.cuda.crossover import Point
from cast_serve.kernels.cuda.cusparselt import Algorithm
from cast_serve.kernels.cuda.heat_map import draw
from cast_serve.kernels.cuda.tune import layers_of, tune
from conversion import save_packed
from conversion.errors import InputError
from conversion.quantization.formats import INT4, INT8, Quantization
from tests.conversion.models import CONFIGS, make_model

LAYER = (48, 136, "bfloat16")
MANY_ROWS = {"tiled", "warpgroup", "expanded"}


def in_8_bits(values: str) -> set[str]:
    """What Hopper has for weights of these values: no mma.sp of 8-bit floats."""
    return {"int8": {"tiled_8_bit", "warpgroup_8_bit"}, "float8_e4m3fn": {"warpgroup_8_bit"}}.get(values, set())


def test_layers_are_also_measured_fused(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    make_model(config, sparse=True).save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed", "float16")
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    expected = {(hidden, hidden), (kv, hidden), (inner, hidden), (hidden, inner)}
    expected |= {(hidden + 2 * kv, hidden), (2 * inner, hidden)}
    assert set(layers_of(tmp_path / "packed")) == {(*shape, "float16") for shape in expected}
    for quantization, values in ((Quantization(INT8, None), "int8"), (Quantization(INT4, 64), "int4 g64")):
        save_packed(tmp_path / "model", tmp_path / values, quantization=quantization)
        assert set(layers_of(tmp_path / values)) == {(*shape, values) for shape in expected}
    save_packed(tmp_path / "model", tmp_path / "int4 g32", quantization=Quantization(INT4, 32))
    with pytest.raises(InputError, match="groups must be a multiple of 64 columns, and 32 is not"):
        layers_of(tmp_path / "int4 g32")


class Scripted(Rehearsal):
    """Seconds by method and rows of x, whatever is called."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()
        self.by_kind = seconds
        self.measured: list[tuple[str, int]] = []

    def seconds(self, calls: Sequence[Any], *, repeats: int = 10, budget: float = 0.05) -> float:  # type: ignore[override]
        call: partial[Any] = calls[0]
        name = {"linear": "dense", "_expanded": "expanded", "tiled": "tiled"}.get(call.func.__name__, "small_m")
        name = "warpgroup" if call.keywords.get("planner") is warpgroup.plan else name
        rows = call.args[0].shape[0]
        self.measured.append((name, rows))
        if name == "expanded" and rows == 64:
            raise RuntimeError("refused")
        return self.by_kind[name] * (rows if name == "small_m" else 1)


def test_every_method_is_measured_until_it_is_hopeless() -> None:
    machine = Scripted({"dense": 10.0, "small_m": 1.0, "expanded": 20.0, "tiled": 30.0, "warpgroup": 130.0})
    counted = []
    points = tune(machine, [LAYER], [1, 64, 128, 256, 512], counted.append)[LAYER]
    assert [set(point.seconds) for point in points] == [
        {"dense", "small_m"},
        {"dense", "small_m", "tiled", "warpgroup"},  # a shape that expanded refuses
        {"dense", "small_m", "tiled", "warpgroup", "expanded"},
        {"dense", "small_m", "tiled", "expanded"},
        {"dense", "tiled", "expanded"},
    ]
    assert len(counted) == 5
    table = crossover.Table({LAYER: points}, crossover.DEVICES["H100"])
    assert [table.choose(M, LAYER, False).method for M in (1, 64, 100)] == ["small_m", "tiled", "expanded"]


@pytest.mark.parametrize("layer", [LAYER, (48, 136, "int8")])
@pytest.mark.parametrize("wrong", ["a tile", "a NaN"])
def test_a_kernel_that_computes_something_else_is_not_used(layer: tuple[int, int, str], wrong: str) -> None:
    def spoil(y: Tensor) -> Tensor:
        y[-8:, -8:] = y[-8:, -8:].flip(0) if wrong == "a tile" else torch.nan
        return y

    class Wrong(Rehearsal):
        @staticmethod
        def tiled(*weight: Any, planner: Any, **options: Any) -> Tensor:
            y = Rehearsal.tiled(*weight, **options)
            return spoil(y) if planner is warpgroup.plan else y

        @staticmethod
        def weight_only(*weight: Any, method: str, **options: Any) -> Tensor:
            y = Rehearsal.weight_only(*weight, **options)
            return spoil(y) if method == "warpgroup" else y

    with pytest.warns(UserWarning, match=r"warpgroup computes \(48, 136, .*\) wrongly at 64 rows"):
        (point,) = tune(Wrong(), [layer], [64])[layer]
    assert set(point.seconds) == {"dense", "small_m", "tiled", "expanded"} | in_8_bits(layer[2])


def test_nothing_is_measured_on_a_gpu_that_has_failed() -> None:
    class Failed(Rehearsal):
        @staticmethod
        def small_m(*_: Any, **__: Any) -> Tensor:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        tune(Failed(), [LAYER], [1])


@pytest.mark.parametrize("values", ["int8", "int4 g64", "float8_e4m3fn"])
def test_quantized_layers_are_measured(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, layer = Rehearsal(), (48, 136, values)
    for point in tune(machine, [layer], [1, 64])[layer]:
        many = MANY_ROWS | in_8_bits(values) if point.rows > 32 else set()
        assert set(point.seconds) == {"dense", "small_m"} | many
    machine.has_cusparselt = True
    monkeypatch.setattr(cusparselt, "fits", lambda *_: True)
    monkeypatch.setattr(cusparselt, "compress", lambda dense: dense)
    called = []

    def multiply(x: Tensor, weight: Tensor, w_scale: Tensor, bias: None, algorithm: Algorithm) -> Tensor:
        called.append((weight.shape, w_scale.shape, algorithm))
        return x @ (weight.to(x.dtype) * w_scale[:, None].to(x.dtype)).T

    def search(compressed: Tensor, right: Tensor, *rest: Any) -> tuple[int, int, int, int]:
        assert rest == (None, None, torch.bfloat16, True)
        return (3, 2, 1, 9)

    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=search), raising=False)
    monkeypatch.setattr(cusparselt, "linear_rounding", multiply)
    (point,) = tune(machine, [layer], [1])[layer]
    assert ("cusparselt" in point.seconds) == (values != "int4 g64")  # one scale a row
    assert set(called) == ({((48, 136), (48,), Algorithm(3, 2, 1))} if values != "int4 g64" else set())
    assert point.algorithm == (Algorithm() if values == "int4 g64" else Algorithm(3, 2, 1))


def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(build_app(), ["tune", "anywhere"])
    assert isinstance(result.exception, InputError)
    assert "no CUDA device" in str(result.exception)


def test_the_command_writes_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed")
    where = {"device": "a GPU", "driver": 1, "torch": "2", "cusparselt": None}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(crossover, "circumstances", lambda: where)
    monkeypatch.setattr(measurement, "Gpu", Rehearsal)
    picture = tmp_path / "map.png"
    command = ["tune", str(tmp_path / "packed"), "--max-rows", "2", "--plot", str(picture)]
    result = CliRunner().invoke(build_app(), command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    table = crossover.load(where)
    assert all([point.rows for point in points] == [1, 2] for points in table.points.values())
    assert set(table.points) == set(layers_of(tmp_path / "packed"))
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_picture_has_a_place_for_what_was_not_measured(tmp_path: Path) -> None:
    points = {
        LAYER: [Point(1, {"dense": 2.0, "small_m": 1.0}), Point(64, {"dense": 1.0, "small_m": 2.0, "cusparselt": 0.5})],
        (8, 8, "float16"): [Point(64, {"small_m": 1.0})],
    }
    draw(points, tmp_path / "map.svg", "a GPU")
    text = (tmp_path / "map.svg").read_text()
    assert "<svg" in text
