"""torch.ops.cast24 on CUDA tensors: current stream, nothing waits for the GPU, so that calls can be captured in graphs.

    y = torch.ops.cast24.linear_cuda(x, fragments, metadata, compressed, out_features, bias=None)
    y = torch.ops.cast24.linear_quantized_cuda(
        x, panels, compressed, out_features, bits, group_size, float_activations=False, bias=None)

`linear`, `linear_packed`, `linear_quantized` and `quantized_rows` have the schemas that they have on the CPU, and take
what `prepack` and `prepack_quantized` return there for CUDA tensors. The other two also take cuSPARSELt's copy of the
weight, or None; which product is the fastest at x's rows `crossover` says. Quantized weights meet x rounded to 8 bits
in cuSPARSELt, and where a kernel that rounds it was measured to be the fastest. All take x of any shape [..., K] and
strides, rounded to a 16-bit type, and return x's dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cast_serve.kernels.cuda import cusparselt, dense_quantized, weight_only
from cast_serve.kernels.cuda.crossover import Layer, table, values_name
from cast_serve.kernels.cuda.linear import check, expand, is_portable, packed_linear, prepack, tiled_linear
from cast_serve.kernels.cuda.weight_only import PLANNERS, parts, weight_only_linear
from conversion.errors import InputError


def linear_cuda(
    x: Tensor, fragments: Tensor, metadata: Tensor, compressed: Tensor | None, out_features: int, bias: Tensor | None
) -> Tensor:
    """x [..., K] times a packed weight, plus bias [out_features]: [..., out_features] of x's dtype."""
    check("linear_cuda", x, fragments, metadata, out_features, bias)
    columns, dtype = x.shape[-1], fragments.dtype
    rows = x.reshape(-1, columns).to(dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    with torch.cuda.device_of(x):  # torch makes x's device the current one for its own operators only
        y = _multiply(rows, fragments, metadata, compressed, out_features, bias)
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def _multiply(
    rows: Tensor, fragments: Tensor, metadata: Tensor, compressed: Tensor | None, out_features: int, bias: Tensor | None
) -> Tensor:
    """rows [M, K] of the weight's dtype times it: [M, out_features]."""
    if is_portable(fragments):
        from cast_serve.kernels.cuda.triton_linear import triton_linear

        return triton_linear(rows, fragments, metadata, bias)
    M, columns = rows.shape
    layer = (out_features, columns, str(rows.dtype).removeprefix("torch."))
    choice = table(rows.device.index).choose(M, layer, compressed is not None)
    if choice.method == "small_m" or M == 0:
        return packed_linear(rows, fragments, metadata, out_features, bias)
    if planner := PLANNERS.get(choice.method):
        return tiled_linear(rows, fragments, metadata, out_features, bias, planner=planner)
    if choice.method == "cusparselt" and compressed is not None:
        return cusparselt.linear(rows, compressed, bias, choice.algorithm)
    return torch.nn.functional.linear(rows, expand(fragments, metadata, out_features, columns), bias)


def linear_packed(
    x: Tensor, panel_values: Tensor, panel_indices: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    return linear_cuda(x, panel_values, panel_indices, None, out_features, bias)


def linear(
    x: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    if scale is not None:
        raise RuntimeError("cast24::linear: on a GPU pack quantized values first, and call linear_quantized")
    try:
        packed = prepack(values, bitmask)
    except InputError as error:
        raise RuntimeError(f"cast24::linear: {error}") from None
    return linear_cuda(x, *packed, None, values.shape[0], bias)


def prepack_quantized(
    values: Tensor, bitmask: Tensor | None, scale: Tensor, group_size: int | None
) -> tuple[Tensor, int, int]:
    """What `linear_quantized` takes: (packed weight, bits, group size or 0 for one scale a row)."""
    bits = 4 if values.dtype == torch.uint8 else 8
    if bitmask is None:
        return dense_quantized.pack(values, scale, group_size), bits, group_size or 0
    return weight_only.pack(values, bitmask, scale, group_size), bits, group_size or 0


def rounds(panels: Tensor, out_features: int, columns: int, bits: int, group_size: int) -> bool:
    """Whether `linear_quantized_cuda` rounds x at some number of rows without cuSPARSELt, float activations apart."""
    return table(panels.device.index).rounds(_layer(panels, out_features, columns, bits, group_size))


def _layer(packed: Tensor, out_features: int, columns: int, bits: int, group_size: int) -> Layer:
    """What a table knows a quantized weight by."""
    values = "float8_e4m3fn" if packed.dtype == torch.float8_e4m3fn else f"int{bits}"
    return out_features, columns, values_name(values, group_size or None)


def linear_quantized(
    x: Tensor,
    panels: Tensor,
    out_features: int,
    bits: int,
    sparse: bool,
    group_size: int,
    float_activations: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """As on the CPU, with what `prepack_quantized` returns, group_size 0 for one scale a row.

    x keeps its 16 bits where the weight is dense, or float_activations says so, or no measurement says otherwise.
    """
    if sparse:
        return linear_quantized_cuda(x, panels, None, out_features, bits, group_size, float_activations, bias)
    from cast_serve.kernels.cuda.triton_dense import dense_quantized_linear

    rows, bias = _in_16_bits(x, out_features, bias)
    with torch.cuda.device_of(x):
        y = dense_quantized_linear(rows, panels, out_features, bits, group_size or None, bias)
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def linear_quantized_cuda(
    x: Tensor,
    panels: Tensor,
    compressed: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    float_activations: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """`linear_quantized`; `compressed` is cuSPARSELt's copy of an int8 or fp8 weight with one scale a row, or None."""
    rows, bias = _in_16_bits(x, out_features, bias)
    layer = _layer(panels, out_features, x.shape[-1], bits, group_size)
    with_cusparselt = compressed is not None and not float_activations
    choice = table(x.device.index).choose(rows.shape[0], layer, with_cusparselt, not float_activations)
    with torch.cuda.device_of(x):
        if choice.method == "cusparselt" and compressed is not None and len(rows):
            scale = parts(panels, out_features, x.shape[-1], bits, None).scale.flatten()[:out_features]
            y = cusparselt.linear_rounding(rows, compressed, scale, bias, choice.algorithm)
        else:
            method = "small_m" if choice.method == "cusparselt" or not len(rows) else choice.method
            y = weight_only_linear(rows, panels, out_features, bits, group_size or None, bias, method=method)
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def _in_16_bits(x: Tensor, out_features: int, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x [..., K] as rows [M, K], and the bias, both of a 16-bit type; RuntimeError where no kernel takes them."""
    if x.dim() < 1 or x.shape[-1] % 8 or x.shape[-1] == 0 or not x.is_floating_point():
        raise RuntimeError(
            f"cast24::linear_quantized: x must be floats [..., multiple of 8], not {list(x.shape)} {x.dtype}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise RuntimeError(f"cast24::linear_quantized: bias must have shape [{out_features}], not {list(bias.shape)}")
    dtype = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    return x.reshape(-1, x.shape[-1]).to(dtype), None if bias is None else bias.to(dtype).contiguous()


def quantized_rows(ids: Tensor, panels: Tensor, num_rows: int, columns: int, bits: int, group_size: int) -> Tensor:
    """As on the CPU; an id outside of the rows fails on the device, as in torch's own embedding."""
    if panels.shape != (num_rows, dense_quantized.row_bytes(columns, bits, group_size or None)):
        raise RuntimeError(f"cast24::quantized_rows: panels {list(panels.shape)} are not those of this weight")
    return dense_quantized.lookup(ids, panels, columns, bits, group_size or None)


def register() -> None:
    """Add the CUDA side of the operators that have one on the CPU, which is where they are defined."""
    torch.library.impl("cast24::linear_quantized", "cuda")(linear_quantized)
    torch.library.impl("cast24::quantized_rows", "cuda")(quantized_rows)
    torch.library.impl("cast24::linear", "cuda")(linear)
    torch.library.impl("cast24::linear_packed", "cuda")(linear_packed)


def _define(name: str, arguments: str, function: Callable[..., Tensor], out_features: int) -> None:
    """Define an operator that only GPUs have; `out_features` is the place of that argument, y's last axis."""
    torch.library.define(f"cast24::{name}", f"({arguments}) -> Tensor")
    torch.library.impl(f"cast24::{name}", "cuda")(function)

    @torch.library.register_fake(f"cast24::{name}")
    def _(*given: Any) -> Tensor:
        fake: Tensor = given[0].new_empty((*given[0].shape[:-1], given[out_features]))
        return fake


_define(
    "linear_cuda",
    "Tensor x, Tensor fragments, Tensor metadata, Tensor? compressed, int out_features, Tensor? bias=None",
    linear_cuda,
    out_features=4,
)
_define(
    "linear_quantized_cuda",
    "Tensor x, Tensor panels, Tensor? compressed, int out_features, int bits, int group_size, "
    "bool float_activations=False, Tensor? bias=None",
    linear_quantized_cuda,
    out_features=3,
)
