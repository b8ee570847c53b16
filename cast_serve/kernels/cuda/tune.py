"""Measures every way to compute a model's packed layers, over rows of x, for `crossover` to choose by."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cast_serve.kernels.cuda import measurement
from cast_serve.kernels.cuda.crossover import DENSE, METHODS, Layer, Point, values_name
from cast_serve.kernels.cuda.cusparselt import DEFAULT
from cast_serve.kernels.cuda.measurement import Gpu
from cast_serve.kernels.cuda.weight_only import check_group_size
from conversion.packed_checkpoint import PackedCheckpoint
from conversion.quantization.formats import FORMATS, Quantization

ROWS = tuple(1 << power for power in range(14))
"""1 to 8192."""
HOPELESS = 4.0
"""A method this many times as slow as the best is not measured at more rows, if it was slower at fewer already."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def layers_of(directory: Path) -> list[Layer]:
    """The packed layers of a checkpoint by shape, also fused (qkv, gate and up) as vLLM runs them.

    Raises:
        InputError: not a packed checkpoint, or one with groups of columns that GPUs have no kernel for.
    """
    checkpoint = PackedCheckpoint(directory)
    values = _values(checkpoint)
    shapes = {name: checkpoint.linear_shape(name) for name in checkpoint.sparse_layers}
    found = [(*shape, values) for shape in shapes.values()]
    for parts in _FUSED:
        for name, (_, columns) in shapes.items():
            stem = name.removesuffix(parts[0])
            together = [shapes[stem + part] for part in parts if stem + part in shapes]
            if name.endswith(parts[0]) and len(together) == len(parts):
                found.append((sum(rows for rows, _ in together), columns, values))
    return sorted(set(found))


def _values(checkpoint: PackedCheckpoint) -> str:
    quantization = checkpoint.quantization
    if quantization is not None:
        check_group_size(quantization.group_size)
        return values_name(quantization.values.name, quantization.group_size)
    # GPUs run 16-bit weights; what is stored as float32 becomes bfloat16 there
    dtype = checkpoint.value_dtype if checkpoint.value_dtype.itemsize == 2 else torch.bfloat16
    return values_name(str(dtype).removeprefix("torch."), None)


def tune(
    machine: Gpu, layers: Iterable[Layer], rows: Sequence[int] = ROWS, advance: Callable[[int], None] = lambda _: None
) -> dict[Layer, list[Point]]:
    """Measure every layer at every number of rows; `advance` counts the measurements."""
    return {layer: _tune_layer(machine, layer, rows, advance) for layer in layers}


def _tune_layer(machine: Gpu, layer: Layer, rows: Sequence[int], advance: Callable[[int], None]) -> list[Point]:
    measured = _copies(machine, layer)
    points: list[Point] = []
    hopeless: set[str] = set()
    for M in rows:
        seconds: dict[str, float] = {}
        candidates = measured.candidates(M)
        expected = candidates[DENSE].calls[0]()
        for name, candidate in candidates.items():
            if name in hopeless:
                continue
            try:
                right = _agree(candidate.calls[0](), expected, candidate.rounds_x)
                taken = machine.seconds(candidate.calls)
                right &= _agree(candidate.calls[0](), expected, candidate.rounds_x)  # now that the GPU is busy
            except torch.AcceleratorError:
                raise  # nothing runs on the GPU after that
            except RuntimeError:  # a library refuses this shape: it is not chosen for it
                continue
            if right:
                seconds[name] = taken
            else:
                warnings.warn(f"{name} computes {layer} wrongly at {M} rows and is not used there", stacklevel=2)
        best = min(seconds[name] for name in METHODS if name in seconds)
        slow = {name for name, taken in seconds.items() if taken > HOPELESS * best and name != DENSE}
        if points:
            hopeless |= {name for name in slow if points[-1].seconds.get(name, 0.0) > HOPELESS * _best(points[-1])}
        algorithm = candidates["cusparselt"].algorithm if "cusparselt" in candidates else DEFAULT
        points.append(Point(M, seconds, algorithm))
        advance(1)
    return points


def _agree(y: Tensor, expected: Tensor, rounds_x: bool) -> bool:
    """Whether they differ by no more than rounding, to 16 bits (0.05 of what values are) or of x to 8 (0.14).

    A step of 64 columns that is left out makes 0.3 with 14,336 columns, more with fewer.
    """
    expected = expected.float()
    limit = expected.square().mean().sqrt() * (0.25 if rounds_x else 0.125)
    return bool((y.float() - expected).abs().max() < limit)


def _copies(machine: Gpu, layer: Layer) -> measurement.Layer | measurement.QuantizedLayer:
    N, K, values = layer
    name, _, group_size = values.partition(" g")
    if name not in FORMATS:
        return measurement.Layer(N, K, machine, getattr(torch, name))
    quantization = Quantization(FORMATS[name], int(group_size) if group_size else None)
    return measurement.QuantizedLayer(N, K, machine, quantization)


def _best(point: Point) -> float:
    return min(point.seconds[name] for name in METHODS if name in point.seconds)
