"""torch.ops.cast24 on CUDA tensors: current stream, nothing waits for the GPU, so that calls can be captured in graphs.

    y = torch.ops.cast24.linear_cuda(x, fragments, metadata, compressed, out_features, bias=None)

`linear` and `linear_packed` have the schemas that they have on the CPU; linear_packed takes what `prepack` returns, the
layout of `layout.to_fragments`. linear_cuda also takes cuSPARSELt's copy of the weight, or None, and uses it where
that is the fastest. All take x of any shape [..., K] and strides, rounded to the weight's dtype, and return x's dtype.
"""

import torch
from torch import Tensor

from cast_serve.kernels.cuda import cusparselt
from cast_serve.kernels.cuda.crossover import table
from cast_serve.kernels.cuda.layout import to_fragments
from cast_serve.kernels.cuda.linear import check, expand, small_m_linear
from conversion.errors import InputError


def linear_cuda(
    x: Tensor, fragments: Tensor, metadata: Tensor, compressed: Tensor | None, out_features: int, bias: Tensor | None
) -> Tensor:
    """x [..., K] times a packed weight, plus bias [out_features]: [..., out_features] of x's dtype."""
    check("linear_cuda", x, fragments, metadata, out_features, bias)
    columns, dtype = x.shape[-1], fragments.dtype
    rows = x.reshape(-1, columns).to(dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    layer = (out_features, columns, str(dtype).removeprefix("torch."))
    choice = table(x.device.index).choose(rows.shape[0], layer, compressed is not None)
    if choice.method == "small_m" or rows.shape[0] == 0:
        y = small_m_linear(rows, fragments, metadata, out_features, bias)
    elif choice.method == "cusparselt" and compressed is not None:
        y = cusparselt.linear(rows, compressed, bias, choice.algorithm)
    else:
        y = torch.nn.functional.linear(rows, expand(fragments, metadata, out_features, columns), bias)
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def linear_packed(
    x: Tensor, panel_values: Tensor, panel_indices: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    return linear_cuda(x, panel_values, panel_indices, None, out_features, bias)


def linear(
    x: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    if scale is not None:
        raise RuntimeError("cast24::linear: quantized values have no kernel on GPUs yet")
    try:
        fragments, metadata = to_fragments(values, bitmask)
    except InputError as error:
        raise RuntimeError(f"cast24::linear: {error}") from None
    return linear_cuda(x, fragments, metadata, None, values.shape[0], bias)


def register() -> None:
    """Add the CUDA side of the operators that have one on the CPU, which is where they are defined."""
    torch.library.impl("cast24::linear", "cuda")(linear)
    torch.library.impl("cast24::linear_packed", "cuda")(linear_packed)


def _define() -> None:
    torch.library.define(
        "cast24::linear_cuda",
        "(Tensor x, Tensor fragments, Tensor metadata, Tensor? compressed, int out_features, Tensor? bias=None) "
        "-> Tensor",
    )
    torch.library.impl("cast24::linear_cuda", "cuda")(linear_cuda)

    @torch.library.register_fake("cast24::linear_cuda")
    def _(
        x: Tensor,
        fragments: Tensor,
        metadata: Tensor,
        compressed: Tensor | None,
        out_features: int,
        bias: Tensor | None = None,
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], out_features))


_define()
