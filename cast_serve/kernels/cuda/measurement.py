"""Times of every product that a packed layer can be computed with, on this GPU, weights coming from its memory."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear

from cast_serve.kernels.cuda import cusparselt, nvrtc, tiled, warpgroup
from cast_serve.kernels.cuda.cusparselt import DEFAULT, Algorithm
from cast_serve.kernels.cuda.layout import from_fragments
from cast_serve.kernels.cuda.linear import (
    TYPES,
    Launch,
    Planner,
    expand,
    is_hopper,
    multiprocessors,
    packed_linear,
    quantize_rows,
    tiled_linear,
)
from cast_serve.kernels.cuda.plan import Kernel, Plan
from cast_serve.kernels.cuda.random_weights import QuantizedWeight, Weight
from cast_serve.kernels.cuda.source import source
from cast_serve.kernels.cuda.timing import copies, copy_bandwidth, seconds_per_call
from cast_serve.kernels.cuda.weight_only import IN_8_BITS, WEIGHT_ONLY, Method, weight_only_linear
from conversion.quantization.formats import INT8, Quantization

Call = Callable[[], Tensor]


class Gpu:
    """The current GPU, and what is measured there."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.multiprocessors = multiprocessors(self.device)
        self.capability = torch.cuda.get_device_capability(self.device)
        self.is_hopper = is_hopper(self.device.index)
        self.has_cusparselt = cusparselt.available()
        self.has_triton = importlib.util.find_spec("triton") is not None

    small_m = staticmethod(packed_linear)
    tiled = staticmethod(tiled_linear)
    expand = staticmethod(expand)
    quantize_rows = staticmethod(quantize_rows)
    weight_only = staticmethod(weight_only_linear)

    @staticmethod
    def triton(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None = None) -> Tensor:
        from cast_serve.kernels.cuda.triton_linear import triton_linear

        return triton_linear(x, values, bitmask, bias)

    @staticmethod
    def dense_quantized(
        x: Tensor, rows: Tensor, out_features: int, bits: int, group_size: int | None, bias: Tensor | None = None
    ) -> Tensor:
        from cast_serve.kernels.cuda.triton_dense import dense_quantized_linear

        return dense_quantized_linear(x, rows, out_features, bits, group_size, bias)

    copies = staticmethod(copies)
    seconds = staticmethod(seconds_per_call)

    def bandwidth(self) -> float:
        """Bytes/s of a copy, read and written."""
        return copy_bandwidth()

    def compile(self) -> None:
        """All kernels, on all cores at once. What cannot be compiled fails again where it is used."""
        architecture = nvrtc.target(self.capability)
        with ThreadPoolExecutor() as threads:
            for types in (*TYPES.values(), *WEIGHT_ONLY):
                threads.submit(nvrtc.cached_code, source(types, hopper=self.is_hopper), architecture)

    def launcher(self, linear: tuple[Kernel, ...], dtype: torch.dtype) -> Launch:
        """Launches other kernels than the usual ones."""
        from cast_serve.kernels.cuda.driver import kernels

        loaded = kernels(source(TYPES[dtype, dtype], linear, hopper=self.is_hopper), self.device.index)
        return lambda _, *launch: loaded.launch(*launch)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer.

    Attributes:
        calls: one for each copy of the weight, with the same inputs in turn for every candidate of a layer.
        weight_bytes: that a call reads.
        algorithm: of cuSPARSELt, the fastest.
        rounds_x: whether x is rounded to 8 bits.
    """

    calls: Sequence[Call]
    weight_bytes: int
    algorithm: Algorithm = DEFAULT
    rounds_x: bool = False


class Layer:
    """Copies of one random weight [N, K] of 16 bits in every form."""

    def __init__(self, N: int, K: int, machine: Gpu, dtype: torch.dtype = torch.bfloat16) -> None:
        self.N, self.K, self.machine, self.dtype = N, K, machine, dtype
        first = Weight(N, K, dtype, machine.device)
        dense, (fragments, metadata) = first.dense.to(dtype), first.packed
        self.dense_bytes, self.packed_bytes = dense.nbytes, fragments.nbytes + metadata.nbytes
        self.dense = [dense.clone() for _ in range(machine.copies(dense.nbytes))]
        self.packed = [(fragments.clone(), metadata.clone()) for _ in range(machine.copies(self.packed_bytes))]
        self._x: list[Tensor] = []
        self.compressed: list[Tensor] = []
        if machine.has_cusparselt and cusparselt.fits(N, K):
            self.compressed = _copies(machine, cusparselt.compress, dense)

    def _inputs(self, M: int) -> Iterator[Tensor]:
        """Random ones without end, the same whenever asked for with one M after the other."""
        if not self._x or len(self._x[0]) != M:
            self._x = [torch.randn(M, self.K, device=self.machine.device).to(self.dtype) for _ in range(8)]
        return cycle(self._x)

    def cublas(self, M: int) -> list[Call]:
        """Calls of torch's product, one for each copy of the dense weight."""
        return [partial(linear, x, dense) for x, dense in zip(self._inputs(M), self.dense, strict=False)]

    def small_m(
        self, M: int, cut: Plan | None = None, launch: Launch | None = None, overlap: bool = False
    ) -> list[Call]:
        """Calls of the kernel for few rows, one for each copy of the weight."""
        return self._packed_calls(M, partial(self.machine.small_m, cut=cut, launch=launch, overlap=overlap))

    def tiled(
        self, M: int, cut: Plan | None = None, launch: Launch | None = None, planner: Planner = tiled.plan
    ) -> list[Call]:
        """Calls of a kernel for many rows, one for each copy of the weight."""
        return self._packed_calls(M, partial(self.machine.tiled, planner=planner, cut=cut, launch=launch))

    def _packed_calls(self, M: int, multiply: Callable[..., Tensor]) -> list[Call]:
        pairs = zip(self._inputs(M), self.packed, strict=False)
        return [partial(multiply, x, fragments, metadata, self.N) for x, (fragments, metadata) in pairs]

    def triton(self, M: int) -> list[Call]:
        """Calls of the Triton kernel, one for each copy of the portable weight."""
        portable = [from_fragments(*packed, self.N, self.K) for packed in self.packed]
        return [partial(self.machine.triton, x, *weight) for x, weight in zip(self._inputs(M), portable, strict=False)]

    def _expanded(self, x: Tensor, fragments: Tensor, metadata: Tensor, out_features: int) -> Tensor:
        return linear(x, self.machine.expand(fragments, metadata, out_features, self.K))

    def candidates(self, M: int) -> dict[str, Candidate]:
        """By name: "dense" (cuBLAS on a dense weight) and those of `crossover.Method`."""
        found = {
            "dense": Candidate(self.cublas(M), self.dense_bytes),
            "small_m": Candidate(self.small_m(M), self.packed_bytes),
        }
        if M > 32:
            found["tiled"] = Candidate(self.tiled(M), self.packed_bytes)
            found["expanded"] = Candidate(self._packed_calls(M, self._expanded), self.packed_bytes)
        if M > 32 and self.machine.is_hopper:
            found["warpgroup"] = Candidate(self.tiled(M, planner=warpgroup.plan), self.packed_bytes)
        if self.compressed:
            algorithm = fastest(next(self._inputs(M)), self.compressed[0])
            pairs = zip(self._inputs(M), self.compressed, strict=False)
            calls = [partial(cusparselt.linear, x, weight, None, algorithm) for x, weight in pairs]
            found["cusparselt"] = Candidate(calls, self.packed_bytes, algorithm)
        return found


class QuantizedLayer:
    """Copies of one random quantized weight [N, K] in every form, and of a dense one of 16 bits; x is bfloat16."""

    def __init__(self, N: int, K: int, machine: Gpu, quantization: Quantization) -> None:
        self.N, self.K, self.machine, self.quantization = N, K, machine, quantization
        values, group_size = quantization.values, quantization.group_size
        first = QuantizedWeight(N, K, values, group_size, machine.device)
        dense = first.dense.bfloat16()
        self.dense = [dense.clone() for _ in range(machine.copies(dense.nbytes))]
        self.packed = [first.packed.clone() for _ in range(machine.copies(first.packed.nbytes))]
        self.compressed: list[Tensor] = []
        if machine.has_cusparselt and cusparselt.takes(values.dtype, group_size, N, K):
            self.compressed = _copies(machine, cusparselt.compress_codes, first.stored, first.bitmask)
        self.scale = first.scale.flatten()

    def candidates(self, M: int) -> dict[str, Candidate]:
        """By name, as `Layer.candidates`."""
        machine, bits, group_size = self.machine, self.quantization.values.bits, self.quantization.group_size
        x = [torch.randn(M, self.K, device=machine.device).bfloat16() for _ in range(8)]

        def calls(multiply: Callable[..., Tensor], weights: list[Tensor], *rest: object) -> list[Call]:
            return [partial(multiply, each, weight, *rest) for each, weight in zip(cycle(x), weights, strict=False)]

        def packed(method: Method) -> Candidate:
            multiplied = calls(partial(machine.weight_only, method=method), self.packed, self.N, bits, group_size)
            return Candidate(multiplied, self.packed[0].nbytes, rounds_x=method in IN_8_BITS)

        found = {"dense": Candidate(calls(linear, self.dense), self.dense[0].nbytes), "small_m": packed("small_m")}
        if M > 32:
            methods: list[Method] = ["tiled", "expanded"]
            if machine.is_hopper:
                methods.append("warpgroup")
            methods += methods_in_8_bits(machine, self.quantization)
            found |= {method: packed(method) for method in methods}
        if self.compressed:
            algorithm = fastest(x[0].to(self.quantization.values.dtype), self.compressed[0])
            multiply = partial(cusparselt.linear_rounding, w_scale=self.scale, bias=None, algorithm=algorithm)
            found["cusparselt"] = Candidate(
                calls(multiply, self.compressed), self.compressed[0].nbytes, algorithm, rounds_x=True
            )
        return found


def methods_in_8_bits(machine: Gpu, quantization: Quantization) -> list[Method]:
    """The kernels that multiply such a weight by x rounded to its type; mma.sp of 8-bit floats not all GPUs have."""
    if quantization.values.bits != 8 or quantization.group_size is not None:
        return []
    found: list[Method] = ["warpgroup_8_bit"] if machine.is_hopper else []
    if quantization.values is INT8 or machine.capability == (8, 9) or machine.capability[0] == 12:
        found.append("tiled_8_bit")
    return found


def _copies(machine: Gpu, compress: Callable[..., Tensor], *weight: Tensor) -> list[Tensor]:
    """Of what cuSPARSELt makes of a weight; none if it refuses it, and then it says why."""
    try:
        compressed = compress(*weight)
    except RuntimeError as error:
        warnings.warn(f"cuSPARSELt does not take {list(weight[0].shape)} {weight[0].dtype}: {error}", stacklevel=2)
        return []
    return [compressed.clone() for _ in range(machine.copies(compressed.nbytes))]


def fastest(x: Tensor, compressed: Tensor) -> Algorithm:
    """cuSPARSELt's choice; its usual algorithm at a shape where it finds none, or where torch does not search."""
    try:
        return cusparselt.search(x, compressed)
    except (RuntimeError, AttributeError):
        return DEFAULT
