"""Which product is the fastest for so many rows of x: as measured on this device, or as a model of the device has it.

`cast tune` measures. A table counts only for the device and the versions of driver, torch and cuSPARSELt that it was
measured with.
"""

import json
import os
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from cast_serve.kernels.cuda import tiled
from cast_serve.kernels.cuda.cusparselt import DEFAULT, Algorithm
from cast_serve.kernels.cuda.plan import Types
from cast_serve.kernels.cuda.weight_only import IN_8_BITS
from conversion.atomic import write_text
from conversion.quantization.formats import FORMATS

Method = Literal["small_m", "tiled", "warpgroup", "expanded", "cusparselt", "tiled_8_bit", "warpgroup_8_bit"]
"""The kernels for few and for many rows, and that for many on Hopper, on the packed weight; cuBLAS on the weight, made
dense for the call; cuSPARSELt on its own copy; the kernels for many rows again, x rounded to 8 bits."""
METHODS: tuple[Method, ...] = get_args(Method)
_MODELLED: tuple[Method, ...] = ("small_m", "tiled", "expanded", "cusparselt")
"""Chosen where nothing was measured. Not the kernel for Hopper: no GPU has confirmed its model yet; nor those that
round x, but on cuSPARSELt's copy, which is made for that."""
DENSE = "dense"
"""In tables also: cuBLAS on a dense weight, to compare with."""

Layer = tuple[int, int, str]
"""out_features, columns, and values as `values_name` says them."""
_VERSION = 6  # of the file that a table is kept in
_KERNEL_TYPES = {"int8": "W8", "float8_e4m3fn": "F8", "int4": "W4"}
_BITS = {"bfloat16": 16, "float16": 16} | {name: values.bits for name, values in FORMATS.items()}


@dataclass(frozen=True)
class Point:
    """One layer at one number of rows of x.

    Attributes:
        seconds: of a call, by method, and of "dense".
        algorithm: of cuSPARSELt, the fastest.
    """

    rows: int
    seconds: dict[str, float]
    algorithm: Algorithm = DEFAULT


@dataclass(frozen=True)
class Choice:
    method: Method
    algorithm: Algorithm = DEFAULT


@dataclass(frozen=True)
class Device:
    """What the model knows, mostly from data sheets.

    Attributes:
        bandwidth: of memory, bytes/s.
        flops: FLOP/s of dense 16-bit products.
        mma_flops: FLOP/s of mma.sp, zeros counted; on Hopper, whose full speed is wgmma's, about 0.6 of the double.
        cache_bandwidth: of the second-level cache, bytes/s, as others measured it.
    """

    bandwidth: float
    flops: float
    mma_flops: float
    cache_bandwidth: float
    multiprocessors: int


DEVICES = {
    "H200": Device(4.8e12, 989e12, 1.2e15, 5.5e12, 132),
    "H100": Device(3.35e12, 989e12, 1.2e15, 5.5e12, 132),
    "A100": Device(2.04e12, 312e12, 624e12, 4.5e12, 108),
    "RTX 4090": Device(1.008e12, 165e12, 330e12, 5e12, 128),
}


def values_name(values: str, group_size: int | None) -> str:
    """A dtype without "torch.", or a quantized format, and the columns that share a scale."""
    return values if group_size is None else f"{values} g{group_size}"


def modelled_device(name: str) -> Device:
    """The device of DEVICES whose name is part of `name`, or H100: only ratios of the numbers matter."""
    return next((device for known, device in DEVICES.items() if known in name), DEVICES["H100"])


def modelled_seconds(method: Method, M: int, layer: Layer, device: Device) -> float:
    """A guess, not a measurement: bytes over bandwidth or operations over a part of the peak, the longer of the two."""
    launch, (N, K, values) = 3e-6, layer
    name = values.partition(" ")[0]
    bits = _BITS[name]
    dense_bytes, flops, in_out = 2.0 * N * K, 2.0 * M * N * K, 2.0 * M * (N + K)
    packed_bytes = N * K * (bits / 2 + 1) / 8  # half of the values, and two bits for each of them
    if method == "small_m":  # reads the weight anew for each 64 rows
        memory = (packed_bytes * -(-M // 64) + in_out) / device.bandwidth
        return max(memory, flops / (0.4 * device.flops)) + launch
    if method == "tiled":
        types = Types(_KERNEL_TYPES.get(name, "Bf16"), "Bf16")
        _, work = tiled.best(M, N, K, device.multiprocessors, types)
        products = 2.0 * work.products * device.multiprocessors / (0.6 * device.mma_flops)
        cached = work.bytes * device.multiprocessors / device.cache_bandwidth
        return max((packed_bytes + in_out) / device.bandwidth, products, cached) + launch
    if method == "cusparselt":  # 1.5 times cuBLAS where there is enough to do
        tiles = 2.0 * max(M, 128) * N * K * bits / 16
        return max((packed_bytes + in_out) / device.bandwidth, tiles / (0.7 * 1.5 * device.flops)) + 3 * launch
    expansion = (packed_bytes + dense_bytes) / device.bandwidth
    product = max((dense_bytes + in_out) / device.bandwidth, flops / (0.7 * device.flops))
    return expansion + product + 2 * launch


class Table:
    """Times by layer; those of unknown layers are modelled."""

    def __init__(self, points: dict[Layer, list[Point]], device: Device) -> None:
        self.points = {layer: sorted(found, key=lambda point: point.rows) for layer, found in points.items()}
        self.device = device
        self._choices: dict[tuple[int, Layer, bool, bool], Choice] = {}

    def choose(self, M: int, layer: Layer, with_cusparselt: bool, with_rounding: bool = False) -> Choice:
        """The fastest at M rows, by the measurement at the next larger number of rows.

        Args:
            with_cusparselt: whether its copy of the weight is there.
            with_rounding: whether the kernels may round x to 8 bits.
        """
        key = (max(M, 1), layer, with_cusparselt, with_rounding)
        if key not in self._choices:
            self._choices[key] = self._choose(*key)
        return self._choices[key]

    def rounds(self, layer: Layer) -> bool:
        """Whether it chooses a kernel that rounds x at some number of rows."""
        chosen = [self.choose(point.rows, layer, False, with_rounding=True) for point in self.points.get(layer, [])]
        return any(choice.method in IN_8_BITS for choice in chosen)

    def _choose(self, M: int, layer: Layer, with_cusparselt: bool, with_rounding: bool) -> Choice:
        refused = {*(() if with_cusparselt else ("cusparselt",)), *(() if with_rounding else IN_8_BITS)}
        allowed = [method for method in METHODS if method not in refused]
        measured = self.points.get(layer)
        if measured is None:
            modelled = [method for method in _MODELLED if method in allowed]
            return Choice(min(modelled, key=lambda method: modelled_seconds(method, M, layer, self.device)))
        point = measured[min(bisect_left([point.rows for point in measured], M), len(measured) - 1)]
        known = [method for method in allowed if method in point.seconds]
        best = min(known, key=lambda method: point.seconds[method])
        return Choice(best, point.algorithm if best == "cusparselt" else DEFAULT)


def circumstances() -> dict[str, Any]:
    """What a measurement depends on."""
    from cuda.bindings import driver

    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver.cuDriverGetVersion()[1],
        "torch": torch.__version__,
        "cusparselt": torch.backends.cusparselt.version(),
    }


def table_path(device: str) -> Path:
    """Where the table of the device of this name is kept; CAST24_TUNING names another file."""
    if path := os.environ.get("CAST24_TUNING"):
        return Path(path)
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "cast-serve" / "tuning" / f"{device.replace(' ', '-')}.json"


def save(points: dict[Layer, list[Point]], where: dict[str, Any]) -> Path:
    """Write the table of `where`, keeping layers measured earlier under the same circumstances."""
    path = table_path(where["device"])
    merged = _read(path, where) | points
    layers = [
        {
            "out_features": layer[0],
            "columns": layer[1],
            "values": layer[2],
            "points": [vars(point) for point in found],
        }
        for layer, found in merged.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"version": _VERSION, **where, "layers": layers}, indent=1) + "\n")
    return path


def load(where: dict[str, Any]) -> Table:
    """The table measured under these circumstances; without one, the model's."""
    return Table(_read(table_path(where["device"]), where), modelled_device(where["device"]))


def _read(path: Path, where: dict[str, Any]) -> dict[Layer, list[Point]]:
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text())
    if any(stored.get(key) != value for key, value in {"version": _VERSION, **where}.items()):
        return {}
    return {
        (layer["out_features"], layer["columns"], layer["values"]): [
            Point(point["rows"], point["seconds"], Algorithm(*point["algorithm"])) for point in layer["points"]
        ]
        for layer in stored["layers"]
    }


@cache
def table(device: int) -> Table:
    """The table of the device with this index, read once in a process."""
    with torch.cuda.device(device):
        return load(circumstances())
