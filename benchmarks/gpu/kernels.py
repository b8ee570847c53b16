"""`python -m benchmarks.gpu.kernels`: the GPU kernels, right first and fast second.

In this order, each part written to a JSON file of its own as it ends: correctness at odd shapes; decode (1 to 64 rows
of x) beside cuBLAS, on a dense weight, and cuSPARSELt; CUDA graphs, streams and torch.compile; decode with quantized
weights; prefill, quantized weights too; other tiles of the kernel for many rows, other cuts of the one for few. Weights
are read from memory: each call has its own copy, and copies are several times the cache.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.gpu import quantized
from benchmarks.gpu.kernel_checks import SHAPES as ODD_SHAPES
from benchmarks.gpu.kernel_checks import TINY_SHAPES, correctness
from benchmarks.gpu.machines import Rehearsal
from cast_serve.kernels.cuda import cusparselt, torch_ops
from cast_serve.kernels.cuda.measurement import Candidate, Gpu, Layer
from cast_serve.kernels.cuda.plan import Plan
from cast_serve.kernels.cuda.random_weights import Weight
from cast_serve.kernels.cuda.small_m import VARIANTS, Variant, plan
from cast_serve.kernels.cuda.tiled import Tile, cut_into

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)]
DECODE = [1, 2, 4, 8, 16, 32, 64]
PREFILL = [128, 256, 512, 1024, 2048, 4096, 8192]
CUT_ROWS = [1, 8, 16, 32, 64]
SPLITS = [1, 2, 3, 4, 6, 8, 12, 16]
CUTS = [
    *[Variant(1, warps_k=k, depth=4, blocks=blocks) for k in (1, 2, 4, 8) for blocks in (2, 3)],
    *[Variant(1, warps_k=k, depth=2, blocks=3) for k in (2, 4, 8)],
    *[Variant(1, warps_k=2, depth=8), Variant(1, warps_k=4, depth=8), Variant(1, warps=4, warps_k=4, blocks=6)],
    *[Variant(1, warps=16, warps_k=8, depth=2, blocks=1), Variant(1, warps=16, warps_k=16, depth=2, blocks=1)],
    *[Variant(2, warps_k=k, depth=4) for k in (1, 2, 4)],
    *[Variant(2, warps=4, warps_k=2, blocks=4), Variant(2, row_tiles=2, warps=4, warps_k=2, blocks=3)],
    *[Variant(4, warps_k=2), Variant(4, row_tiles=2, warps=4, depth=2, blocks=3)],
    *[Variant(8, depth=2), Variant(8, row_tiles=2, warps=8, depth=2, blocks=1)],
]
TILES = [
    *[Tile(8), Tile(8, warps_n=2), Tile(4), Tile(4, warps_n=2, blocks=2), Tile(4, warps_m=4, warps_n=2)],
    *[Tile(8, row_tiles=2, warps_m=1, blocks=2), Tile(4, row_tiles=2, blocks=2)],
]
TILE_ROWS = [128, 256, 1024, 4096]
DTYPE = torch.bfloat16

Shape = tuple[int, int]


def race(machine: Gpu, shapes: list[Shape], batches: list[int], bandwidth: float) -> list[dict[str, Any]]:
    """Seconds of every candidate, its speed-up over dense, and its weight's bytes/s as a part of the copy's."""
    records: list[dict[str, Any]] = []
    for N, K in shapes:
        layer = Layer(N, K, machine)
        for M in batches:
            candidates = layer.candidates(M)
            if machine.capability >= (9, 0):
                candidates["small_m overlapping"] = Candidate(layer.small_m(M, overlap=True), layer.packed_bytes)
            if machine.has_triton and M <= 64:
                candidates["triton"] = Candidate(layer.triton(M), layer.packed_bytes)
            seconds: dict[str, float] = {}
            failures: dict[str, str] = {}
            for name, candidate in candidates.items():
                try:
                    seconds[name] = machine.seconds(candidate.calls)
                except Exception as failure:  # Triton has its own; the others must still run
                    failures[name] = str(failure)
            rates = {name: candidates[name].weight_bytes / taken for name, taken in seconds.items()}
            speedup = {name: seconds["dense"] / taken for name, taken in seconds.items() if "dense" in seconds}
            of_copy = {name: rate / bandwidth for name, rate in rates.items()}
            records.append(
                {"M": M, "N": N, "K": K, "seconds": seconds, "failures": failures}
                | {"speedup_over_dense": speedup, "of_copy_bandwidth": of_copy}
            )
            results = [
                f"{name} {taken * 1e6:.1f} us ({rates[name] / 1e9:.0f} GB/s, x {speedup.get(name, 0):.2f})"
                for name, taken in seconds.items()
            ]
            print(f"{N} x {K}, M = {M}: {', '.join([*results, *(f'{name} failed' for name in failures)])}", flush=True)
    return records


def graphs(machine: Gpu) -> dict[str, Any]:
    """Whether the operator gives the same in CUDA graphs, on several streams at once, and compiled."""
    N, K, device = 1536, 1024, machine.device
    weight, bias = Weight(N, K, DTYPE, device), torch.randn(N, device=device).to(DTYPE)
    compressed = cusparselt.compress(weight.dense.to(DTYPE)) if machine.has_cusparselt else None

    def layer(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.cast24.linear_cuda(x, *weight.packed, compressed, N, bias)
        return y * 2

    def inputs(M: int) -> Tensor:
        return torch.randn(M, K, device=device).to(DTYPE)

    def in_graph(M: int) -> dict[str, Any]:
        x = inputs(M)
        layer(x)
        choice = torch_ops.table(device.index).choose(M, (N, K, "bfloat16"), compressed is not None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        same = []
        for _ in range(3):
            x.normal_()
            graph.replay()
            same.append(torch.allclose(y, layer(x), rtol=2e-2, atol=2e-2))
        return {"method": choice.method, "ok": all(same)}

    def on_streams() -> dict[str, Any]:
        streams, x = [torch.cuda.Stream() for _ in range(4)], inputs(7)
        expected = layer(x)
        torch.cuda.synchronize()
        results = []
        for turn in range(40):
            with torch.cuda.stream(streams[turn % 4]):
                results.append(layer(x))
        torch.cuda.synchronize()
        return {"ok": all(torch.equal(result, expected) for result in results)}

    def compiled() -> dict[str, Any]:
        compiled_layer = torch.compile(layer, fullgraph=True, dynamic=True)
        return {
            "ok": all(torch.allclose(compiled_layer(x), layer(x), rtol=2e-2, atol=2e-2) for x in map(inputs, (2, 40)))
        }

    found: dict[str, Any] = {}
    tests = {f"graph, M = {M}": partial(in_graph, M) for M in (1, 16, 64, 300, 1024)}
    for name, test in (tests | {"streams": on_streams, "torch.compile": compiled}).items():
        try:
            found[name] = test()
        except Exception as failure:  # a compiler has many; the other parts must still run
            found[name] = {"ok": False, "failure": f"{type(failure).__name__}: {failure}"[:2000]}
        print(f"{name}: {'ok' if found[name]['ok'] else found[name]}", flush=True)
    return {"ok": all(entry["ok"] for entry in found.values()), **found}


def cuts(
    machine: Gpu, shapes: list[Shape], batches: list[int], bandwidth: float, deadline: float
) -> list[dict[str, Any]]:
    """Seconds of the kernel for few rows cut otherwise: other template arguments, other splits of K."""
    variants = tuple(dict.fromkeys((*VARIANTS, *CUTS)))
    launch = machine.launcher(variants, DTYPE)
    records = []
    for N, K in shapes:
        layer = Layer(N, K, machine)
        for M in batches:
            usual, seconds = plan(M, N, K, machine.multiprocessors), dict[Plan, float]()
            fitting = [variant for variant in variants if M <= 8 * variant.column_tiles < 2 * M + 8]
            for variant in fitting:
                for splits in (None, *SPLITS):
                    cut = plan(M, N, K, machine.multiprocessors, variant, splits)
                    if cut in seconds or time.monotonic() > deadline:
                        continue
                    seconds[cut] = machine.seconds(layer.small_m(M, cut, launch), repeats=5, budget=0.01)
            best = [
                {
                    "variant": cut.kernel.name,
                    "splits": cut.splits,
                    "seconds": seconds[cut],
                    "of_copy_bandwidth": layer.packed_bytes / seconds[cut] / bandwidth,
                }
                for cut in sorted(seconds, key=lambda cut: seconds[cut])[:5]
            ]
            chosen = {"variant": usual.kernel.name, "splits": usual.splits, "seconds": seconds.get(usual)}
            records.append({"M": M, "N": N, "K": K, "chosen": chosen, "best": best})
            print(json.dumps(records[-1]), flush=True)
    return records


def tiles(machine: Gpu, shapes: list[Shape], batches: list[int], deadline: float) -> list[dict[str, Any]]:
    """Seconds of the kernel for many rows with every tile, and cuBLAS's on a dense weight."""
    launch = machine.launcher(tuple(TILES), DTYPE)
    records = []
    for N, K in shapes:
        layer = Layer(N, K, machine)
        for M in batches:
            if time.monotonic() > deadline:
                break
            dense = machine.seconds(layer.cublas(M), repeats=5, budget=0.02)
            seconds = {
                tile.name: machine.seconds(
                    layer.tiled(M, cut_into(tile, M, N, K, machine.multiprocessors), launch), repeats=5, budget=0.02
                )
                for tile in TILES
            }
            records.append({"M": M, "N": N, "K": K, "dense": dense, "tiles": seconds})
            print(json.dumps(records[-1]), flush=True)
    return records


PARTS = ("correctness", "decode", "graphs", "decode-quantized", "prefill", "prefill-quantized", "tiles", "cuts")


def main(
    out: Annotated[Path | None, typer.Option("--json", help="Directory to write results to.")] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Part to run, may be repeated: {', '.join(PARTS)}.")] = None,
    seconds: Annotated[float, typer.Option(help="After which no other part is begun.")] = 230.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal on the CPU, without the kernels.")] = False,
) -> None:
    """Exit with 1 if anything is wrong. Under a memory checker: --part correctness."""
    start = time.monotonic()
    chosen = part or PARTS
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"there is no part '{unknown.pop()}': {', '.join(PARTS)}")
    torch.manual_seed(0)
    machine = Rehearsal() if tiny else Gpu()
    shapes = [(48, 136)] if tiny else SHAPES
    bandwidth = machine.bandwidth()
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", flush=True)

    def raced(shapes: list[Shape], batches: list[int]) -> dict[str, Any]:
        return {"copy_bandwidth": bandwidth, "records": race(machine, shapes, batches, bandwidth)}

    prefill = PREFILL[:2] if tiny else PREFILL
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "correctness": lambda: correctness(machine, TINY_SHAPES if tiny else ODD_SHAPES),
        "decode": lambda: raced(shapes, DECODE),
        "graphs": lambda: {"ok": True} if tiny else graphs(machine),
        "decode-quantized": lambda: {"records": quantized.race(machine, shapes[:2], DECODE[::3], bandwidth)},
        "prefill": lambda: raced(shapes[:2], prefill),
        "prefill-quantized": lambda: {"records": quantized.race(machine, shapes[:2], prefill[::3], bandwidth)},
        "tiles": lambda: {"records": tiles(machine, shapes[:2], prefill[:1] if tiny else TILE_ROWS, start + seconds)},
        "cuts": lambda: {"records": cuts(machine, shapes, CUT_ROWS, bandwidth, start + seconds)},
    }
    ok = True
    for name in PARTS:
        if name not in chosen or time.monotonic() - start > seconds:
            continue
        result = runs[name]()
        ok &= result.get("ok", True)
        print(f"{name}: {time.monotonic() - start:.0f} s after the start", flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    raise typer.Exit(0 if ok else 1)


if __name__ == "__main__":
    typer.run(main)
