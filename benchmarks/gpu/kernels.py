"""`python -m benchmarks.gpu.kernels`: the GPU kernels, right first and fast second.

In this order, each part in a JSON file of its own that grows with it: correctness at odd shapes; decode (1 to 64 rows
of x) beside cuBLAS, on a dense weight, and cuSPARSELt; CUDA graphs, streams and torch.compile; decode with quantized
weights; prefill, quantized weights too; Hopper's own kernel, right and fast; other tiles of the kernel for many rows,
other cuts of the one for few. Weights are read from memory: each call has its own copy, and copies are several times
the cache.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu import quantized
from benchmarks.gpu.graphs import graphs
from benchmarks.gpu.hopper import hopper
from benchmarks.gpu.kernel_checks import DTYPE, TINY_SHAPES, correctness
from benchmarks.gpu.kernel_checks import SHAPES as ODD_SHAPES
from benchmarks.gpu.machines import Rehearsal
from benchmarks.gpu.timed import timed
from cast_serve.kernels.cuda.measurement import Candidate, Gpu, Layer
from cast_serve.kernels.cuda.small_m import VARIANTS, Variant, plan
from cast_serve.kernels.cuda.tiled import Tile, cut_into
from conversion.atomic import write_text

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)]
DECODE = [1, 2, 4, 8, 16, 32, 64]
PREFILL = [128, 256, 512, 1024, 2048, 4096, 8192]
CUT_ROWS = [1, 8, 16, 32, 64]
SPLITS = [1, 2, 3, 4, 6, 8, 12, 16]
CUTS = [
    *[Variant(1, warps_k=k, depth=4) for k in (1, 2, 4, 8)],
    *[Variant(1, warps_k=k, depth=2, blocks=3) for k in (2, 4, 8)],
    *[Variant(1, warps_k=2, depth=8), Variant(1, warps_k=4, depth=8)],
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

Shape = tuple[int, int]
Record = dict[str, Any]


def race(machine: Gpu, shapes: list[Shape], batches: list[int], bandwidth: float) -> Iterator[Record]:
    """Seconds of every candidate, its speed-up over dense, and its weight's bytes/s as a part of the copy's."""
    for N, K in shapes:
        layer = Layer(N, K, machine)
        for M in batches:
            candidates = layer.candidates(M)
            candidates.pop("warpgroup", None)  # see hopper.py
            if machine.capability >= (9, 0):
                candidates["small_m overlapping"] = Candidate(layer.small_m(M, overlap=True), layer.packed_bytes)
            if machine.has_triton and M <= 64:
                candidates["triton"] = Candidate(layer.triton(M), layer.packed_bytes)
            seconds, failures = timed(machine, ((name, candidate.calls) for name, candidate in candidates.items()))
            rates = {name: candidates[name].weight_bytes / taken for name, taken in seconds.items()}
            speedup = {name: seconds["dense"] / taken for name, taken in seconds.items() if "dense" in seconds}
            of_copy = {name: rate / bandwidth for name, rate in rates.items()}
            results = [
                f"{name} {taken * 1e6:.1f} us ({rates[name] / 1e9:.0f} GB/s, x {speedup.get(name, 0):.2f})"
                for name, taken in seconds.items()
            ]
            print(f"{N} x {K}, M = {M}: {', '.join([*results, *(f'{name} failed' for name in failures)])}", flush=True)
            yield (
                {"M": M, "N": N, "K": K, "seconds": seconds, "failures": failures}
                | {"speedup_over_dense": speedup, "of_copy_bandwidth": of_copy}
            )


def cuts(machine: Gpu, shapes: list[Shape], batches: list[int], bandwidth: float) -> Iterator[Record]:
    """Seconds of the kernel for few rows cut otherwise: other template arguments, other splits of K."""
    variants = tuple(dict.fromkeys((*VARIANTS, *CUTS)))
    launch = machine.launcher(variants, DTYPE)
    for N, K in shapes:
        layer = Layer(N, K, machine)
        for M in batches:
            usual = plan(M, N, K, machine.multiprocessors)
            fitting = [variant for variant in variants if M <= 8 * variant.column_tiles < 2 * M + 8]
            tried = [plan(M, N, K, machine.multiprocessors, v, splits) for v in fitting for splits in (None, *SPLITS)]
            calls = ((cut, layer.small_m(M, cut, launch)) for cut in dict.fromkeys(tried))
            seconds, failures = timed(machine, calls, repeats=5, budget=0.01)
            best = [
                {
                    "variant": cut.kernel.entry.name,
                    "splits": cut.splits,
                    "seconds": seconds[cut],
                    "of_copy_bandwidth": layer.packed_bytes / seconds[cut] / bandwidth,
                }
                for cut in sorted(seconds, key=lambda cut: seconds[cut])[:5]
            ]
            chosen = {"variant": usual.kernel.entry.name, "splits": usual.splits, "seconds": seconds.get(usual)}
            record = {"M": M, "N": N, "K": K, "chosen": chosen, "best": best, "failures": failures}
            print(json.dumps(record), flush=True)
            yield record


def tiles(machine: Gpu, shapes: list[Shape], batches: list[int]) -> Iterator[Record]:
    """Seconds of the kernel for many rows with every tile, and cuBLAS's on a dense weight."""
    launch = machine.launcher(tuple(TILES), DTYPE)
    for N, K in shapes:
        layer = Layer(N, K, machine)
        for M in batches:
            cuts = {tile.entry.name: cut_into(tile, M, N, K, machine.multiprocessors) for tile in TILES}
            calls = {name: layer.tiled(M, cut, launch) for name, cut in cuts.items()} | {"dense": layer.cublas(M)}
            seconds, failures = timed(machine, calls.items(), repeats=5, budget=0.02)
            record = {"M": M, "N": N, "K": K, "seconds": seconds, "failures": failures}
            print(json.dumps(record), flush=True)
            yield record


PARTS = (
    "correctness",
    "decode",
    "graphs",
    "decode-quantized",
    "prefill",
    "prefill-quantized",
    "hopper",
    "tiles",
    "cuts",
)


def main(
    out: Annotated[Path | None, typer.Option("--json", help="Directory to write results to.")] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Part to run, may be repeated: {', '.join(PARTS)}.")] = None,
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

    prefill, odd_shapes = (PREFILL[:2], TINY_SHAPES) if tiny else (PREFILL, ODD_SHAPES)
    checks: dict[str, Callable[[], Record]] = {
        "correctness": lambda: correctness(machine, odd_shapes),
        "graphs": lambda: {"ok": True} if tiny else graphs(machine),
    }
    races: dict[str, Callable[[], Iterator[Record]]] = {
        "decode": lambda: race(machine, shapes, DECODE, bandwidth),
        "decode-quantized": lambda: quantized.race(machine, shapes[:2], DECODE[::3], bandwidth),
        "prefill": lambda: race(machine, shapes[:2], prefill, bandwidth),
        "prefill-quantized": lambda: quantized.race(machine, shapes[:2], prefill[::3], bandwidth),
        "hopper": lambda: hopper(machine, odd_shapes, shapes[:2], prefill[::2]),
        "tiles": lambda: tiles(machine, shapes[:2], prefill[:1] if tiny else TILE_ROWS),
        "cuts": lambda: cuts(machine, shapes, CUT_ROWS, bandwidth),
    }

    def write(name: str, result: Record) -> None:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / f"{name}.json", json.dumps(result, indent=1) + "\n")

    ok = True
    for name in PARTS:
        if name not in chosen:
            continue
        if name in checks:
            result = checks[name]()
            ok &= result["ok"]
            write(name, result)
        else:
            records: list[Record] = []
            for record in races[name]():
                records.append(record)
                ok &= record.get("ok", True)
                write(name, {"copy_bandwidth": bandwidth, "records": records})
        print(f"{name}: {time.monotonic() - start:.0f} s after the start", flush=True)
    raise typer.Exit(0 if ok else 1)


if __name__ == "__main__":
    typer.run(main)
