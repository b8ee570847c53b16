"""A CPU in the GPU's place, to rehearse everything around the kernels."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cast_serve.kernels.cuda.dense_quantized import lookup
from cast_serve.kernels.cuda.layout import from_fragments
from cast_serve.kernels.cuda.linear import Launch
from cast_serve.kernels.cuda.measurement import Gpu
from cast_serve.kernels.cuda.plan import Kernel
from cast_serve.kernels.cuda.weight_only import IN_8_BITS, Method, parts
from conversion.packed import unpack24


class Rehearsal(Gpu):
    """The CPU, without our kernels: products of the unpacked weight, each timed once."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.multiprocessors = 132
        self.capability = (9, 0)
        self.is_hopper = True
        self.has_cusparselt = False
        self.has_triton = True

    @staticmethod
    def small_m(
        x: Tensor,
        fragments: Tensor,
        metadata: Tensor,
        out_features: int,
        bias: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        y = x.float() @ Rehearsal.expand(fragments, metadata, out_features, x.shape[1]).float().T
        return (y if bias is None else y + bias.float()).to(x.dtype)

    @staticmethod
    def tiled(x: Tensor, *weight: Any, **options: Any) -> Tensor:
        return Rehearsal.small_m(x, *weight, **options)

    @staticmethod
    def expand(fragments: Tensor, metadata: Tensor, out_features: int, columns: int, **_: Any) -> Tensor:
        values, bitmask = from_fragments(fragments, metadata, out_features, columns)
        return unpack24(values.float(), bitmask).to(values.dtype)

    @staticmethod
    def triton(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x.float() @ unpack24(values.float(), bitmask).T
        return (y if bias is None else y + bias.float()).to(x.dtype)

    @staticmethod
    def dense_quantized(
        x: Tensor, rows: Tensor, out_features: int, bits: int, group_size: int | None, bias: Tensor | None = None
    ) -> Tensor:
        y = x.float() @ lookup(torch.arange(out_features), rows, x.shape[1], bits, group_size).T
        return (y if bias is None else y + bias.float()).to(x.dtype)

    @staticmethod
    def quantize_rows(x: Tensor, dtype: torch.dtype, **_: Any) -> tuple[Tensor, Tensor]:
        scale = x.float().abs().amax(1) / torch.tensor(127.0 if dtype == torch.int8 else 448.0)
        scaled = x.float() / scale[:, None]
        return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale

    @staticmethod
    def weight_only(
        x: Tensor,
        packed: Tensor,
        out_features: int,
        bits: int,
        group_size: int | None,
        bias: Tensor | None = None,
        *,
        method: Method = "small_m",
        **_: Any,
    ) -> Tensor:
        dense, wide = Rehearsal.unpacked_weight_only(packed, out_features, x.shape[1], bits, group_size), x.float()
        if method in IN_8_BITS:
            rounded, scale = Rehearsal.quantize_rows(x, packed.dtype if packed.is_floating_point() else torch.int8)
            wide = rounded.float() * scale[:, None]
        y = wide @ dense.T
        return (y if bias is None else y + bias.float()).to(x.dtype)

    @staticmethod
    def unpacked_weight_only(packed: Tensor, N: int, K: int, bits: int, group_size: int | None) -> Tensor:
        fragments, metadata, scale = parts(packed, N, K, bits, group_size)
        row_tiles, steps = metadata.shape[:2]
        if bits == 8:
            floats = packed.dtype == torch.float8_e4m3fn
            codes = fragments.view(torch.float8_e4m3fn).half() if floats else fragments.short() - 128
        else:
            low_and_high = torch.stack((fragments & 15, fragments >> 4), -1).short() - 8
            # bytes of tile h are a + 2 c: value i = 4 a + 2 b + c, b the half
            codes = low_and_high.view(row_tiles, steps, 32, 2, 2, 2, 2).permute(0, 1, 2, 3, 5, 6, 4)
        in_order = codes.reshape(row_tiles, steps, 32, 2, 8).transpose(2, 3).reshape(row_tiles, 2 * steps, 32, 8)
        values, bitmask = from_fragments(in_order.contiguous(), metadata, N, K)
        dense = unpack24(values.float(), bitmask)
        scales = scale.transpose(1, 2).reshape(-1, scale.shape[1])[:N]
        return dense * scales.repeat_interleave(group_size or K, 1)[:, :K]

    @staticmethod
    def copies(nbytes: int) -> int:
        return 2

    def bandwidth(self) -> float:
        return 1e9

    @staticmethod
    def seconds(calls: Sequence[Callable[[], object]], *, repeats: int = 10, budget: float = 0.05) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    def compile(self) -> None:
        pass

    def launcher(self, linear: tuple[Kernel, ...], dtype: torch.dtype) -> Launch:
        def launch(*_: Any) -> None:
            raise NotImplementedError

        return launch
