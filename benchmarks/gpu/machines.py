"""What the kernels' checks and timings run on: the GPU, or for a rehearsal of everything around them the CPU."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cast_serve.kernels.cuda import cusparselt
from cast_serve.kernels.cuda.layout import from_fragments
from cast_serve.kernels.cuda.linear import TYPES, Launch, expand, multiprocessors, small_m_linear
from cast_serve.kernels.cuda.small_m import Plan, Variant, source
from cast_serve.kernels.cuda.timing import copies, copy_bandwidth, seconds_per_call
from conversion.packed import unpack24


class Gpu:
    """The current GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.multiprocessors = multiprocessors(self.device)
        self.capability = torch.cuda.get_device_capability(self.device)
        self.has_cusparselt = cusparselt.available()

    small_m = staticmethod(small_m_linear)
    expand = staticmethod(expand)
    copies = staticmethod(copies)

    def bandwidth(self) -> float:
        return copy_bandwidth()

    def seconds(self, calls: Sequence[Callable[[], object]], repeats: int = 10, budget: float = 0.05) -> float:
        return seconds_per_call(calls, repeats=repeats, budget=budget)

    def launcher(self, variants: tuple[Variant, ...], dtype: torch.dtype) -> Launch:
        """Launches other variants than the usual ones."""
        from cast_serve.kernels.cuda.driver import kernels

        loaded = kernels(source(TYPES[dtype, dtype], variants), self.device.index)
        return lambda _, *launch: loaded.launch(*launch)


class Rehearsal:
    """The CPU, without our kernels: products of the unpacked weight, each timed once."""

    device = torch.device("cpu")
    multiprocessors = 132
    capability = (8, 9)
    has_cusparselt = False

    @staticmethod
    def small_m(
        x: Tensor,
        fragments: Tensor,
        metadata: Tensor,
        out_features: int,
        bias: Tensor | None = None,
        *,
        x_scale: Tensor | None = None,
        w_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        cut: Plan | None = None,
        overlap: bool = False,
        launch: Launch | None = None,
    ) -> Tensor:
        y = x.float() @ Rehearsal.expand(fragments, metadata, out_features, x.shape[1]).float().T
        if x_scale is not None and w_scale is not None:
            y = y * x_scale[:, None] * w_scale
        return (y if bias is None else y + bias.float()).to(dtype or x.dtype)

    @staticmethod
    def expand(fragments: Tensor, metadata: Tensor, out_features: int, columns: int) -> Tensor:
        values, bitmask = from_fragments(fragments, metadata, out_features, columns)
        return unpack24(values.float(), bitmask).to(values.dtype)

    @staticmethod
    def copies(nbytes: int) -> int:
        return 2

    def bandwidth(self) -> float:
        return 1e9

    def seconds(self, calls: Sequence[Callable[[], object]], repeats: int = 10, budget: float = 0.05) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    def launcher(self, variants: tuple[Variant, ...], dtype: torch.dtype) -> Launch:
        def launch(*_: Any) -> None:
            raise NotImplementedError

        return launch


Machine = Gpu | Rehearsal
