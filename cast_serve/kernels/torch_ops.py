"""torch.ops.cast24: registers the operators, and makes their panel layout.

    y = torch.ops.cast24.linear(x, values, bitmask, scale=None, bias=None)
    y = torch.ops.cast24.linear_packed(x, panel_values, panel_indices, out_features, bias=None)

x is [..., K], float32 or bfloat16, any strides; y is [..., N] of x's dtype; sums are float32. `linear` takes the
portable tensors and packs them anew at every call: slow, for tests and for tools. `linear_packed` is the one to serve
with. Both work under torch.compile and with fake tensors. They are not differentiable: no gradient flows to x (torch
warns when a backward pass reaches them). Wrong shapes and dtypes raise RuntimeError.
"""

import math
from pathlib import Path

import torch

from cast_serve.kernels import library
from conversion.errors import InputError

PANEL_ROWS = 16
HUGE_PAGE = 2 << 20


def prepack(
    values: torch.Tensor, bitmask: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (panel_values, panel_indices), the layout that `linear_packed` takes.

    Args:
        values: [N, K/2] float32 or bfloat16, kept values in ascending column order.
        bitmask: [N, K/8] uint8, bit c%8 of byte c//8 set where column c is kept.
        scale: must be None; quantized values have no CPU kernel yet.

    Returns:
        panel_values: [P, K/4, 2, 16] float32 or [P, K/4, 16, 2] bfloat16, P = ceil(N / 16).
        panel_indices: [P, ceil(K/32), 16] uint32.

    Raises:
        InputError: wrong shapes or dtypes, or a group that does not keep exactly two (named by row and group).
    """
    if scale is not None:
        raise InputError("prepack: scale must be None, because quantized values have no CPU kernel yet")
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"prepack: values must be float32 or bfloat16, not {values.dtype}")
    if values.dim() != 2 or values.shape[1] % 4 != 0 or values.shape[1] == 0:
        raise InputError(f"prepack: values must be [N, K/2] with K a multiple of 8, not {list(values.shape)}")
    rows, columns = values.shape[0], values.shape[1] * 2
    if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, columns // 8):
        raise InputError(
            f"prepack: bitmask must be uint8 {[rows, columns // 8]}, not {bitmask.dtype} {list(bitmask.shape)}"
        )
    values, bitmask = values.contiguous(), bitmask.contiguous()
    panels, groups = -(-rows // PANEL_ROWS), columns // 4
    bf16 = values.dtype == torch.bfloat16
    panel_values = _empty((panels, groups, PANEL_ROWS, 2) if bf16 else (panels, groups, 2, PANEL_ROWS), values.dtype)
    panel_indices = _empty((panels, -(-groups // 8), PANEL_ROWS), torch.uint32)
    pack = library().cast24_prepack_bf16 if bf16 else library().cast24_prepack_f32
    bad = pack(values.data_ptr(), bitmask.data_ptr(), rows, columns, panel_values.data_ptr(), panel_indices.data_ptr())
    if bad >= 0:
        raise InputError(
            f"prepack: the bitmask does not keep exactly two in row {bad // groups}, group {bad % groups}: "
            "the checkpoint is damaged, convert it again"
        )
    return panel_values, panel_indices


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that starts on a huge page if it fills one: packing asks for huge pages wherever a whole one fits."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    memory = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)  # what is never written takes no memory
    start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + size].view(dtype).view(shape)


def _register() -> None:
    extension = Path(__file__).parent / "_torch.so"
    if not extension.exists():
        raise ImportError(
            "cast_serve was built without torch: install torch, then run pip install --no-build-isolation -e . again"
        )
    torch.ops.load_library(extension)

    @torch.library.register_fake("cast24::linear")
    def _(
        x: torch.Tensor,
        values: torch.Tensor,
        bitmask: torch.Tensor,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], values.shape[0]))

    @torch.library.register_fake("cast24::linear_packed")
    def _(
        x: torch.Tensor,
        panel_values: torch.Tensor,
        panel_indices: torch.Tensor,
        out_features: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], out_features))


_register()
