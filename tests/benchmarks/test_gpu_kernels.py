"""The kernels' checks and timings for a GPU: put together on the CPU, and run where there is a GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor

from benchmarks.gpu import graphs, kernels
from benchmarks.gpu.kernel_checks import SHAPES, TINY_SHAPES, correctness
from benchmarks.gpu.machines import Rehearsal
from cast_serve.kernels.cuda import warpgroup
from cast_serve.kernels.cuda.crossover import DEVICES, Table
from cast_serve.kernels.cuda.measurement import Gpu


def test_a_rehearsal_writes_every_part(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit) as end:
        kernels.main(tmp_path, tiny=True)
    assert end.value.exit_code == 0
    parts = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(parts) == set(kernels.PARTS)
    assert parts["correctness"]["ok"]
    records = parts["decode"]["records"]
    assert [record["M"] for record in records] == kernels.DECODE
    assert all(record["speedup_over_dense"]["dense"] == 1 for record in records)
    assert set(records[0]["seconds"]) == {"dense", "small_m", "small_m overlapping", "triton"}
    assert {"tiled", "expanded"} < set(parts["prefill"]["records"][0]["seconds"])
    assert parts["tiles"]["records"][0]["seconds"].keys() == {"dense", *(tile.entry.name for tile in kernels.TILES)}
    checks, *raced = parts["hopper"]["records"]
    assert checks["ok"]
    tiles = {tile.entry.name for tile in warpgroup.TILES}
    assert {"same bits again", "warpgroup int4 g64 float16 1x16x64"} < set(checks["checks"])
    assert {f"{tile} bfloat16 1x16x64" for tile in tiles} < set(checks["checks"])
    in_8_bits = [record for record in raced if "in_8_bits" in record]
    in_16_bits = [record for record in raced if "in_8_bits" not in record]
    assert all(record["taken"] in tiles for record in in_16_bits)
    assert all(set(record["seconds"]) == {"dense", "tiled", *tiles} for record in in_16_bits)
    assert [record["M"] for record in in_8_bits] == [record["M"] for record in in_16_bits]
    assert all(set(record["seconds"]) == {"dense", "2:4 int8", "2:4 float8_e4m3fn"} for record in in_8_bits)
    assert {"warpgroup in 8 bits, float8_e4m3fn bfloat16 1x16x64"} < set(checks["checks"])
    assert "tiled in 8 bits, int8 float16 8x136x1032" in parts["correctness"]["checks"]
    in_prefill = parts["prefill-quantized"]["records"][0]["candidates"]
    assert "seconds" in in_prefill["2:4 int8 in 8 bits"]
    assert all(cut["best"] for cut in parts["cuts"]["records"])


def test_parts_are_chosen_by_name(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit):
        kernels.main(tmp_path, ["correctness"], tiny=True)
    assert [path.name for path in tmp_path.iterdir()] == ["correctness.json"]
    with pytest.raises(typer.BadParameter, match="there is no part 'x'"):
        kernels.main(tmp_path, ["x"], tiny=True)


def test_a_wrong_kernel_is_found_and_its_place_is_shown() -> None:
    class SecondTileSwapped(Rehearsal):
        @staticmethod
        def small_m(x: Tensor, *rest: Tensor, **options: Tensor) -> Tensor:  # type: ignore[override]
            x = torch.cat((x[:, :32], x[:, 32:].roll(1, 1)), 1)
            return Rehearsal.small_m(x, *rest, **options)  # type: ignore[arg-type]

    found = correctness(SecondTileSwapped(), TINY_SHAPES)
    assert not found["ok"]
    assert "small_m bfloat16 8x136x1032" in found["wrong"]
    tile = found["checks"]["tile torch.bfloat16"]
    assert all(set(row[:32]) == {"."} and "x" in row[32:] for row in tile["where"])


def test_a_kernel_that_cannot_run_is_found() -> None:
    class Broken(Rehearsal):
        @staticmethod
        def expand(*_: object) -> Tensor:  # type: ignore[override]
            raise RuntimeError("no kernel image")

    found = correctness(Broken(), TINY_SHAPES[:1])
    assert found["checks"]["expand bfloat16 1x16x64"] == {"failure": "no kernel image"}
    assert "expand bfloat16 1x16x64" in found["wrong"]


@pytest.mark.parametrize("replays", [True, False])
def test_graphs_that_do_not_replay_are_found(monkeypatch: pytest.MonkeyPatch, replays: bool) -> None:
    def capture(call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        y = call()
        return (lambda: y.copy_(call()) if replays else None), y

    def linear(x: Tensor, fragments: Tensor, metadata: Tensor, compressed: None, N: int, bias: Tensor) -> Tensor:
        return Rehearsal.small_m(x, fragments, metadata, N, bias)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "N", 48)
    monkeypatch.setattr(graphs, "K", 128)
    monkeypatch.setattr(graphs.torch_ops, "table", lambda _: Table({}, DEVICES["H100"]))
    monkeypatch.setattr(torch.ops.cast24, "linear_cuda", linear, raising=False)
    found = graphs.graphs(Rehearsal())
    tests = [name for name in found if name.startswith("graph, ")]
    assert len(tests) == 8
    assert all(found[name]["ok"] is replays for name in [*tests, "overlapping"]), found
    assert not found["ok"]  # there are no streams


def test_what_hopper_computes_wrongly_fails_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rehearsal, "tiled", lambda x, *weight, **_: Rehearsal.small_m(x, *weight) + 1)
    with pytest.raises(typer.Exit) as end:
        kernels.main(tmp_path, ["hopper"], tiny=True)
    assert end.value.exit_code == 1
    checks, *_ = json.loads((tmp_path / "hopper.json").read_text())["records"]
    assert "warpgroup_128_2 bfloat16 1x16x64" in checks["wrong"]


def test_what_cannot_run_does_not_end_the_race() -> None:
    class Refuses(Rehearsal):
        @staticmethod
        def tiled(*_: object, **__: object) -> Tensor:
            raise RuntimeError("too many resources requested for launch")

    (record,) = kernels.race(Refuses(), [(48, 136)], [64], 1e9)
    assert record["failures"] == {"tiled": "RuntimeError: too many resources requested for launch"}
    assert "expanded" in record["seconds"]
    (record,) = kernels.tiles(Refuses(), [(48, 136)], [128])
    assert set(record["seconds"]) == {"dense"}
    assert len(record["failures"]) == len(kernels.TILES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    found = correctness(Gpu(), SHAPES)
    assert found["ok"], found["wrong"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_operators_in_graphs_on_streams_and_compiled() -> None:
    found = graphs.graphs(Gpu())
    assert found["ok"], found
