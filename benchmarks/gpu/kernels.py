"""`python -m benchmarks.gpu.kernels`: the GPU kernels, right first and fast second.

In this order, each part written to a JSON file of its own as it ends: correctness at odd shapes; decode (1 to 64 rows
of x) beside cuBLAS and cuSPARSELt; CUDA graphs, streams and torch.compile; prefill; other cuts of the kernel for few
rows. Weights are read from memory: every call has its own copy, and copies are several times the second-level cache.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu.kernel_checks import SHAPES as ODD_SHAPES
from benchmarks.gpu.kernel_checks import TINY_SHAPES, Weight, correctness
from benchmarks.gpu.machines import Gpu, Machine, Rehearsal
from cast_serve.kernels.cuda import cusparselt, torch_ops
from cast_serve.kernels.cuda.linear import Launch
from cast_serve.kernels.cuda.small_m import VARIANTS, Plan, Variant, plan

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
DTYPE = torch.bfloat16

Call = Callable[[], object]
Shape = tuple[int, int]


class Layer:
    """Copies of one weight [N, K] in every form."""

    def __init__(self, N: int, K: int, machine: Machine) -> None:
        self.N, self.K, self.machine = N, K, machine
        first = Weight(N, K, DTYPE, machine.device)
        dense = first.dense.to(DTYPE)
        self.dense_bytes, self.packed_bytes = dense.nbytes, sum(part.nbytes for part in first.packed)
        self.dense = [dense.clone() for _ in range(machine.copies(dense.nbytes))]
        fragments, metadata = first.packed
        count = machine.copies(self.packed_bytes)
        self.packed = [(fragments.clone(), metadata.clone()) for _ in range(count)]
        self.compressed: list[Tensor] = []
        if machine.has_cusparselt:
            compressed = cusparselt.compress(dense)
            self.compressed = [compressed.clone() for _ in range(machine.copies(compressed.nbytes))]

    def inputs(self, M: int) -> list[Tensor]:
        return [torch.randn(M, self.K, device=self.machine.device).to(DTYPE) for _ in range(8)]

    def small_m(
        self, M: int, cut: Plan | None = None, launch: Launch | None = None, overlap: bool = False
    ) -> list[Call]:
        """Calls of the kernel for few rows, one for each copy of the weight."""
        x, call = cycle(self.inputs(M)), partial(self.machine.small_m, cut=cut, launch=launch, overlap=overlap)
        return [partial(call, next(x), fragments, metadata, self.N) for fragments, metadata in self.packed]

    def expanded(self, x: Tensor, fragments: Tensor, metadata: Tensor) -> Tensor:
        return linear(x, self.machine.expand(fragments, metadata, self.N, self.K))

    def candidates(self, M: int) -> dict[str, list[Call]]:
        """Calls by name, one for each copy of the weight."""
        x = cycle(self.inputs(M))
        found: dict[str, list[Call]] = {
            "cublas": [partial(linear, next(x), dense) for dense in self.dense],
            "small_m": self.small_m(M),
        }
        if self.machine.capability >= (9, 0):
            found["small_m overlapping"] = self.small_m(M, overlap=True)
        if M > 64:
            found["expanded"] = [partial(self.expanded, next(x), *packed) for packed in self.packed]
        if self.compressed:
            try:
                algorithm = cusparselt.search(next(x), self.compressed[0])
            except RuntimeError:
                algorithm = 0
            found["cusparselt"] = [
                partial(cusparselt.linear, next(x), compressed, None, algorithm) for compressed in self.compressed
            ]
        return found

    def weight_bytes(self, name: str) -> int:
        return self.dense_bytes if name == "cublas" else self.packed_bytes


def race(machine: Machine, shapes: list[Shape], batches: list[int], bandwidth: float) -> list[dict[str, Any]]:
    """Seconds of every candidate, its speed-up over cuBLAS, and its weight's bytes/s as a part of the copy's."""
    records: list[dict[str, Any]] = []
    for N, K in shapes:
        layer = Layer(N, K, machine)
        for M in batches:
            seconds: dict[str, float] = {}
            failures: dict[str, str] = {}
            for name, calls in layer.candidates(M).items():
                try:
                    seconds[name] = machine.seconds(calls)
                except RuntimeError as failure:
                    failures[name] = str(failure)
            rates = {name: layer.weight_bytes(name) / taken for name, taken in seconds.items()}
            speedup = {name: seconds["cublas"] / taken for name, taken in seconds.items() if "cublas" in seconds}
            of_copy = {name: rate / bandwidth for name, rate in rates.items()}
            records.append(
                {"M": M, "N": N, "K": K, "seconds": seconds, "failures": failures}
                | {"speedup_over_cublas": speedup, "of_copy_bandwidth": of_copy}
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
    machine: Machine, shapes: list[Shape], batches: list[int], bandwidth: float, deadline: float
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
                    "variant": cut.variant.name,
                    "splits": cut.splits,
                    "seconds": seconds[cut],
                    "of_copy_bandwidth": layer.packed_bytes / seconds[cut] / bandwidth,
                }
                for cut in sorted(seconds, key=lambda cut: seconds[cut])[:5]
            ]
            chosen = {"variant": usual.variant.name, "splits": usual.splits, "seconds": seconds.get(usual)}
            records.append({"M": M, "N": N, "K": K, "chosen": chosen, "best": best})
            print(json.dumps(records[-1]), flush=True)
    return records


def main(
    out: Annotated[Path | None, typer.Option("--json", help="Directory to write results to.")] = None,
    seconds: Annotated[float, typer.Option(help="After which no other part is begun.")] = 230.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal on the CPU, without the kernels.")] = False,
) -> None:
    """Exit with 1 if anything is wrong."""
    start = time.monotonic()

    def write(name: str, result: Any) -> None:
        print(f"{name}: {time.monotonic() - start:.0f} s after the start", flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")

    torch.manual_seed(0)
    machine = Rehearsal() if tiny else Gpu()
    shapes = [(48, 136)] if tiny else SHAPES
    right = correctness(machine, TINY_SHAPES if tiny else ODD_SHAPES)
    write("correctness", right)
    bandwidth = machine.bandwidth()
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", flush=True)
    write("decode", {"copy_bandwidth": bandwidth, "records": race(machine, shapes, DECODE, bandwidth)})
    in_graphs = graphs(machine) if isinstance(machine, Gpu) else {"ok": True}
    write("graphs", in_graphs)
    if time.monotonic() - start < seconds:
        batches = PREFILL[:2] if tiny else PREFILL
        write("prefill", {"copy_bandwidth": bandwidth, "records": race(machine, shapes[:2], batches, bandwidth)})
    if time.monotonic() - start < seconds:
        write("cuts", cuts(machine, shapes, CUT_ROWS, bandwidth, start + seconds))
    raise typer.Exit(0 if right["ok"] and in_graphs["ok"] else 1)


if __name__ == "__main__":
    typer.run(main)
