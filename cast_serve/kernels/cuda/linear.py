"""y = x W^T + bias on a GPU, W packed, and what else the kernels of csrc/ do."""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cast_serve.kernels.cuda import nvrtc, tiled
from cast_serve.kernels.cuda.arguments import (
    ExpandArguments,
    LinearArguments,
    QuantizeArguments,
    WarpgroupArguments,
)
from cast_serve.kernels.cuda.layout import STEP, to_fragments
from cast_serve.kernels.cuda.plan import Entry, Plan, Types
from cast_serve.kernels.cuda.small_m import plan
from cast_serve.kernels.cuda.source import source
from cast_serve.kernels.cuda.tensor_map import TensorMap
from cast_serve.kernels.cuda.warpgroup import WarpgroupTile
from conversion.errors import InputError
from conversion.packed import check_bitmask

TYPES = {
    (torch.bfloat16, torch.bfloat16): Types("Bf16", "Bf16"),
    (torch.float16, torch.float16): Types("Fp16", "Fp16"),
    (torch.int8, torch.bfloat16): Types("S8", "Bf16"),
    (torch.int8, torch.float16): Types("S8", "Fp16"),
    (torch.float8_e4m3fn, torch.bfloat16): Types("E4m3", "Bf16"),
    (torch.float8_e4m3fn, torch.float16): Types("E4m3", "Fp16"),
}
"""By dtypes of products' operands, x and the weight, and of y."""
DTYPES = {"Bf16": torch.bfloat16, "Fp16": torch.float16}

Launch = Callable[[Types, Entry, tuple[int, int, int], ctypes.Structure, bool], None]
"""Of a kernel for these types: types, kernel, grid, arguments, overlap."""
Planner = Callable[[int, int, int, int, Types], Plan]
"""M, N, K, multiprocessors, types: the kernel for many rows of x that computes that, and how."""


def launch_on_gpu(
    types: Types, entry: Entry, grid: tuple[int, int, int], arguments: ctypes.Structure, overlap: bool
) -> None:
    from cast_serve.kernels.cuda.driver import kernels

    device = torch.cuda.current_device()
    kernels(source(types, hopper=is_hopper(device)), device).launch(entry, grid, arguments, overlap)


def packed_linear(
    x: Tensor,
    fragments: Tensor,
    metadata: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    types: Types | None = None,
    group_steps: int | None = None,
    cut: Plan | None = None,
    overlap: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """Multiply by a weight in the layout of `layout.to_fragments`.

    Args:
        x: [M, K] bfloat16 or float16, any strides, K a multiple of 8; or int8 or float8_e4m3fn as `quantize_rows` has
            it for products.
        fragments, metadata: of a weight [out_features, K] of x's dtype, or of what `types` says.
        bias: [out_features] of y's dtype.
        x_scale: [M] float32, of x in 8 bits.
        w_scale: [row tiles, groups, 16] float32, of a quantized weight, of `group_steps` steps each.
        dtype: of y, bfloat16 or float16; default x's.
        types: of the kernel, for a quantized weight, see `weight_only`.
        cut: the kernel, and the call cut into blocks: `small_m.plan`, which is the default and reads the weight once
            for each 64 rows of x, `tiled.plan`, or `warpgroup.plan` on Hopper.
        overlap: begin to read the weight while the stream's previous kernel still runs (sm_90 and newer), which must
            not be one that writes the weight.

    Returns:
        [M, out_features], sums in float32 or int32, of 8-bit floats with the 13 bits that their products are added up
        with on GPUs before Blackwell. Nothing waits for the GPU; memory comes from torch's allocator.
    """
    M, K = x.shape
    y = x.new_empty(M, out_features, dtype=dtype or x.dtype)
    if M == 0:
        return y
    x = in_rows_of_16_bytes(x)
    cut = cut or plan(M, out_features, K, multiprocessors(x.device))
    partial, counters = None, None
    if cut.splits > 1:
        partial = torch.empty(cut.partial_bytes // 4, dtype=torch.int32, device=x.device)
        counters = ring(x.device).take(cut.counters)

    def pointer(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    arguments = LinearArguments(
        *map(pointer, (fragments, metadata, x, x_scale, w_scale, bias, y, partial)),
        counters,
        x.stride(0) * x.itemsize,
        *(M, out_features, K, cut.row_tiles, cut.steps, cut.steps_per_split),
        *_groups(w_scale, group_steps),
    )
    types, launch = types or TYPES[fragments.dtype, y.dtype], launch or launch_on_gpu
    if isinstance(cut.kernel, WarpgroupTile):
        sizes = K, M, x.stride(0) * x.itemsize, 128 // x.itemsize, cut.kernel.box_rows
        boxes = TensorMap(x.data_ptr(), x.itemsize, *sizes)
        launch(types, cut.kernel.entry, cut.grid, WarpgroupArguments(boxes, arguments), overlap)
    else:
        launch(types, cut.kernel.entry, cut.grid, arguments, overlap)
    return y


def tiled_linear(
    x: Tensor,
    fragments: Tensor,
    metadata: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    planner: Planner = tiled.plan,
    cut: Plan | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """`packed_linear` of 16-bit types by a kernel for many rows of x: `planner`'s, `tiled.plan` or `warpgroup.plan`."""
    types = TYPES[fragments.dtype, x.dtype]
    cut = cut or planner(len(x), out_features, x.shape[1], multiprocessors(x.device), types)
    return packed_linear(x, fragments, metadata, out_features, bias, cut=cut, launch=launch)


def in_rows_of_16_bytes(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows do not overlap and start at multiples of 16 bytes: kernels read as many at once."""
    M, K = x.shape
    per_read = 16 // x.itemsize
    if x.stride(1) == 1 and x.stride(0) >= K and x.stride(0) % per_read == 0 and x.data_ptr() % 16 == 0:
        return x
    aligned = x.new_empty(M, -(-K // per_read) * per_read)[:, :K]
    return aligned.copy_(x)


def _groups(w_scale: Tensor | None, group_steps: int | None) -> tuple[int, int]:
    """How many scales a row has, and how many steps share one."""
    if w_scale is None or group_steps is None:
        return 1, 1
    return w_scale.shape[1], group_steps


def expand(
    fragments: Tensor,
    metadata: Tensor,
    out_features: int,
    columns: int,
    *,
    w_scale: Tensor | None = None,
    types: Types | None = None,
    group_steps: int | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """The dense weight [out_features, columns] of a packed one; with scales and types as for `packed_linear`."""
    types = types or TYPES[fragments.dtype, fragments.dtype]
    dtype = DTYPES[types.output]
    dense = torch.empty(out_features, columns, dtype=dtype, device=fragments.device)
    row_tiles, steps = metadata.shape[:2]
    scales = None if w_scale is None else w_scale.data_ptr()
    pointers = (fragments.data_ptr(), metadata.data_ptr(), scales, dense.data_ptr())
    sizes = (out_features, columns, row_tiles, steps, *_groups(w_scale, group_steps))
    arguments = ExpandArguments(*pointers, *sizes)
    (launch or launch_on_gpu)(types, Entry("expand", 256), (-(-row_tiles * steps // 8), 1, 1), arguments, False)
    return dense


def quantize_rows(
    x: Tensor, dtype: torch.dtype, *, for_products: bool = False, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Round x [M, K], bfloat16 or float16, to int8 or float8_e4m3fn: (values [M, K], scale [M] float32 of each row).

    for_products: values [M, K up to a multiple of 64], as `packed_linear` takes them, groups of four columns in another
        order (`in_8_bits` of csrc/weights.cuh): so a weight in the order for products in 16 bits serves those in 8.
    """
    M, K = x.shape
    unit = STEP if for_products else 16  # rows start at multiples of 16 bytes
    quantized = torch.empty(M, -(-K // unit) * unit, dtype=dtype, device=x.device)
    quantized = quantized if for_products else quantized[:, :K]
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    if M > 0:
        x = in_rows_of_16_bytes(x)
        pointers = (x.data_ptr(), quantized.data_ptr(), scale.data_ptr())
        arguments = QuantizeArguments(*pointers, x.stride(0), quantized.stride(0), K, for_products)
        entry = Entry("quantize_rows", 256)
        (launch or launch_on_gpu)(TYPES[dtype, x.dtype], entry, (M, 1, 1), arguments, False)
    return quantized, scale


def prepack(values: Tensor, bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """`to_fragments`, and what a first call would have to do before it; without NVRTC the tensors as they are.

    Raises:
        InputError: values of other types, wrong shapes, a damaged bitmask, or neither NVRTC nor Triton.
    """
    if (values.dtype, values.dtype) not in TYPES:
        raise InputError(f"on GPUs values must be bfloat16 or float16, not {values.dtype}")
    if not nvrtc.available() and importlib.util.find_spec("triton") is not None:
        check_bitmask(bitmask)
        if values.dim() != 2 or values.shape[1] % 4 or bitmask.shape != (values.shape[0], values.shape[1] // 4):
            raise InputError(f"{list(values.shape)} values and a bitmask {list(bitmask.shape)} are not of one weight")
        return values.contiguous(), bitmask.contiguous()
    prepare(TYPES[values.dtype, values.dtype], values.device)
    return to_fragments(values, bitmask)


def is_portable(packed: Tensor) -> bool:
    """Whether the first tensor of `prepack` is in the portable format, which `triton_linear` multiplies by."""
    return packed.dim() == 2


def prepare(types: Types, device: torch.device) -> None:
    """Compile and load the kernels of these types and make the counters: nothing that a graph could capture."""
    ring(device)
    if device.type == "cuda":
        from cast_serve.kernels.cuda.driver import kernels

        index = torch.cuda.current_device() if device.index is None else device.index
        kernels(source(types, hopper=is_hopper(index)), index)


class Ring:
    """Zeros on a device, of which each call takes the next ones; kernels leave them as zeros.

    So calls that run at the same time have counters of their own: a stream holds about a thousand calls at most, and
    the ring serves many times that. Graphs keep those that they were captured with.
    """

    SIZE = 1 << 20

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("cast24: the first call on a device cannot be captured in a graph: make one before")
        self.zeros = torch.zeros(self.SIZE, dtype=torch.int32, device=device)
        self._start, self._next = self.zeros.data_ptr(), 0

    def take(self, count: int) -> int:
        """The address of `count` zeros."""
        first = self._next if self._next + count <= self.SIZE else 0
        self._next = first + count
        return self._start + first * self.zeros.itemsize


_rings: dict[torch.device, Ring] = {}
_multiprocessors: dict[torch.device, int] = {}


def ring(device: torch.device) -> Ring:
    if device not in _rings:
        _rings[device] = Ring(device)
    return _rings[device]


@cache
def is_hopper(device: int) -> bool:
    """Whether the GPU with this index runs sm_90a's code."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 for the CPU, where only tests come."""
    if device.type != "cuda":
        return 1
    if device not in _multiprocessors:
        _multiprocessors[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _multiprocessors[device]


def check(op: str, x: Tensor, fragments: Tensor, metadata: Tensor, out_features: int, bias: Tensor | None) -> None:
    """RuntimeError, as of the operators on the CPU, where shapes or dtypes do not belong together."""
    if x.dim() < 1 or x.shape[-1] % 8 or x.shape[-1] == 0:
        raise RuntimeError(f"cast24::{op}: the last axis of x must be a multiple of 8, x has shape {list(x.shape)}")
    if fragments.dtype not in (torch.bfloat16, torch.float16) or not x.is_floating_point():
        raise RuntimeError(f"cast24::{op}: on a GPU weights are bfloat16 or float16, not {fragments.dtype}")
    expected: tuple[tuple[int, ...], tuple[int, ...]]
    if is_portable(fragments):
        expected, word = ((out_features, x.shape[-1] // 2), (out_features, x.shape[-1] // 8)), torch.uint8
    else:
        row_tiles, steps = -(-out_features // 16), -(-x.shape[-1] // STEP)
        expected, word = ((row_tiles, 2 * steps, 32, 8), (row_tiles, steps, 32)), torch.uint32
    if out_features < 1 or (fragments.shape, metadata.shape) != expected:
        raise RuntimeError(
            f"cast24::{op}: {list(fragments.shape)} and {list(metadata.shape)} are not the packed form of a weight "
            f"{[out_features, x.shape[-1]]}"
        )
    if metadata.dtype != word or not fragments.is_contiguous() or not metadata.is_contiguous():
        raise RuntimeError(f"cast24::{op}: the packed weight must be contiguous, its metadata {word}")
    if bias is not None and bias.shape != (out_features,):
        raise RuntimeError(f"cast24::{op}: bias must have shape [{out_features}], not {list(bias.shape)}")
