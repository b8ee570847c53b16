"""Whether the kernels give the same in CUDA graphs, on several streams at once, overlapping, and compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.kernel_checks import DTYPE
from cast_serve.kernels.cuda import cusparselt, torch_ops
from cast_serve.kernels.cuda.measurement import Gpu, Layer, QuantizedLayer
from cast_serve.kernels.cuda.random_weights import Weight
from cast_serve.kernels.cuda.small_m import plan
from cast_serve.kernels.cuda.timing import captured

N, K = 1536, 8192
"""So many columns that few rows of x have K split: their blocks meet at the counters."""
TURNS = 40

Found = dict[str, Any]


class Operator:
    """`torch.ops.cast24.linear_cuda` with a weight [N, K] and a bias."""

    def __init__(self, machine: Gpu) -> None:
        self.machine, device = machine, machine.device
        self.weight, self.bias = Weight(N, K, DTYPE, device), torch.randn(N, device=device).to(DTYPE)
        self.compressed = cusparselt.compress(self.weight.dense.to(DTYPE)) if machine.has_cusparselt else None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.cast24.linear_cuda(x, *self.weight.packed, self.compressed, N, self.bias)
        return y * 2

    def inputs(self, M: int) -> Tensor:
        return torch.randn(M, K, device=self.machine.device).to(DTYPE)


def close(y: Tensor, expected: Tensor) -> bool:
    return torch.allclose(y, expected, rtol=2e-2, atol=2e-2 * K**0.5)


def capture(call: Callable[[], Any]) -> tuple[Callable[[], None], Tensor]:
    """What replays a call, and where its result then is."""
    results: list[Tensor] = []
    graph = captured([lambda: results.append(call())])
    return graph.replay, results[0]


def in_graph(layer: Operator, M: int) -> Found:
    """The operator, new inputs for each replay."""
    x = layer.inputs(M)
    layer(x)
    choice = torch_ops.table(x.device.index).choose(M, (N, K, "bfloat16"), layer.compressed is not None)
    replay, y = capture(lambda: layer(x))
    same = []
    for _ in range(3):
        x.normal_()
        replay()
        same.append(close(y, layer(x)))
    return {"method": choice.method, "ok": all(same)}


def method_in_graph(make: Callable[[], Layer | QuantizedLayer], method: str) -> Found:
    """One way to compute a layer, whatever the operator would choose."""
    call = make().candidates(64)[method].calls[0]
    expected: Any = call()
    replay, y = capture(call)
    same = []
    for _ in range(3):
        y.zero_()
        replay()
        same.append(close(y, expected))
    return {"ok": all(same)}


def on_streams(layer: Operator) -> Found:
    """Calls at the same time have counters of their own: the same bits as alone."""
    x = layer.inputs(7)
    cut = plan(7, N, K, layer.machine.multiprocessors)
    streams, expected, results = [torch.cuda.Stream() for _ in range(4)], layer(x), list[Tensor]()
    torch.cuda.synchronize()
    for turn in range(TURNS):
        with torch.cuda.stream(streams[turn % 4]):
            results.append(layer(x))
    torch.cuda.synchronize()
    return {"splits": cut.splits, "ok": cut.splits > 1 and all(torch.equal(result, expected) for result in results)}


def overlapping(machine: Gpu) -> Found:
    """A chain of calls, each of which begins before the one is over whose result it takes: the same bits as in turn."""
    weights = [Weight(K, K, DTYPE, machine.device).packed for _ in range(2)]
    x = torch.randn(5, K, device=machine.device).to(DTYPE)

    def chain(overlap: bool) -> Tensor:
        product = x
        for turn in range(8):
            product = machine.small_m(product, *weights[turn % 2], K, overlap=overlap)
        return product

    expected = chain(False)
    replay, y = capture(lambda: chain(True))
    same = []
    for _ in range(TURNS):
        y.zero_()
        replay()
        same.append(torch.equal(y, expected))
    return {"ok": all(same) and bool(expected.isfinite().all())}


def compiled(layer: Operator) -> Found:
    product = torch.compile(layer.__call__, fullgraph=True, dynamic=True)
    return {"ok": all(close(product(x), layer(x)) for x in map(layer.inputs, (2, 40)))}


def graphs(machine: Gpu) -> Found:
    """Every test by name, with "ok" or what it failed with; "ok" if all of them are."""
    layer = Operator(machine)
    tests: dict[str, Callable[[], Found]] = {
        f"graph, M = {M}": partial(in_graph, layer, M) for M in (1, 16, 64, 300, 1024)
    }
    methods = ("small_m", "tiled", "expanded", *(["cusparselt"] if machine.has_cusparselt else []))
    tests |= {f"graph, {method}": partial(method_in_graph, partial(Layer, N, K, machine), method) for method in methods}
    tests |= {"streams": partial(on_streams, layer), "torch.compile": partial(compiled, layer)}
    if machine.capability >= (9, 0):
        tests["overlapping"] = partial(overlapping, machine)
    found: Found = {}
    for name, test in tests.items():
        try:
            found[name] = test()
        except Exception as failure:  # a compiler has many; the other tests must still run
            found[name] = {"ok": False, "failure": f"{type(failure).__name__}: {failure}"[:2000]}
        print(f"{name}: {'ok' if found[name]['ok'] else found[name]}", flush=True)
    return {"ok": all(entry["ok"] for entry in found.values()), **found}
