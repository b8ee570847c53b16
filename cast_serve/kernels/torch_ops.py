"""torch.ops.cast24: registers the operators, and makes their panel layout.

    y = torch.ops.cast24.linear(x, values, bitmask, scale=None, bias=None)
    y = torch.ops.cast24.linear_packed(x, panel_values, panel_indices, out_features, bias=None)
    y = torch.ops.cast24.linear_quantized(x, panels, out_features, bits, sparse, group_size, float_activations=False,
                                          bias=None)
    rows = torch.ops.cast24.quantized_rows(ids, panels, num_rows, columns, bits, group_size)

x is [..., K], float32 or bfloat16, any strides; y is [..., N] of x's dtype; sums are float32. `linear` takes the
portable tensors and packs them anew at every call: slow, for tests and for tools. The other two are for serving:
`linear_packed` with what `prepack` returns, `linear_quantized` with what `prepack_quantized` returns. Quantized weights
see x rounded to 8 bits, with a scale for each row and group of columns, unless `float_activations`. All work under
torch.compile and with fake tensors. They are not differentiable: no gradient flows to x (torch warns when a backward
pass reaches them). Wrong shapes and dtypes raise RuntimeError.

`quantized_rows` reads rows `ids` (int64, any shape) of a dense quantized weight back: [..., K] float32. So an embedding
shares its panels with lm_head. IndexError where there is no such row.

On a GPU `linear` and `linear_packed` take bfloat16 and float16 weights; `cast_serve.kernels.cuda.torch_ops` says more.

Where the instruction set is "avx512bf16", bfloat16 weights meet x rounded to bfloat16; elsewhere x as it is.
"""

import math
from pathlib import Path

import torch

from cast_serve.kernels import library
from cast_serve.kernels.cuda import linear as cuda_linear
from cast_serve.kernels.cuda import torch_ops as cuda_ops
from conversion.errors import InputError
from conversion.quantization.formats import GROUP_SIZES, INT8, check_values
from conversion.quantized_panel import ROW_SCALE_GROUP

PANEL_ROWS = 16
HUGE_PAGE = 2 << 20


def prepack(values: torch.Tensor, bitmask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (panel_values, panel_indices), the layout that `linear_packed` takes.

    Args:
        values: [N, K/2] float32 or bfloat16, kept values in ascending column order.
        bitmask: [N, K/8] uint8, bit c%8 of byte c//8 set where column c is kept.

    Returns:
        panel_values: [P, K/4, 2, 16] float32 or [P, K/4, 16, 2] bfloat16, P = ceil(N / 16).
        panel_indices: [P, ceil(K/32), 16] uint32.
        On a GPU, for bfloat16 and float16, the layout of `cuda.layout.to_fragments`.

    Raises:
        InputError: wrong shapes or dtypes, or a group that does not keep exactly two (named by row and group).
    """
    if values.is_cuda:
        return cuda_linear.prepack(values, bitmask)
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"prepack: values must be float32 or bfloat16, not {values.dtype}")
    if values.dim() != 2 or values.shape[1] % 4 != 0 or values.shape[1] == 0:
        raise InputError(f"prepack: values must be [N, K/2] with K a multiple of 8, not {list(values.shape)}")
    rows, columns = values.shape[0], values.shape[1] * 2
    _check_bitmask(bitmask, rows, columns)
    values, bitmask = values.contiguous(), bitmask.contiguous()
    panels, groups = -(-rows // PANEL_ROWS), columns // 4
    bf16 = values.dtype == torch.bfloat16
    panel_values = _empty((panels, groups, PANEL_ROWS, 2) if bf16 else (panels, groups, 2, PANEL_ROWS), values.dtype)
    panel_indices = _empty((panels, -(-groups // 8), PANEL_ROWS), torch.uint32)
    pack = library().cast24_prepack_bf16 if bf16 else library().cast24_prepack_f32
    bad = pack(values.data_ptr(), bitmask.data_ptr(), rows, columns, panel_values.data_ptr(), panel_indices.data_ptr())
    if bad >= 0:
        raise InputError(_not_two(bad, groups))
    return panel_values, panel_indices


def prepack_quantized(
    values: torch.Tensor, bitmask: torch.Tensor | None, scale: torch.Tensor, group_size: int | None = None
) -> tuple[torch.Tensor, int, int]:
    """Return (panels, bits, group size of the panels): what `linear_quantized` takes.

    Args:
        values: codes [N, K/2] int8, or [N, K/4] uint8 with two int4 in each, the earlier one in the low half; of a
            dense weight [N, K] int8 or [N, K/2] uint8. On a GPU also [N, K/2] float8_e4m3fn.
        bitmask: [N, K/8] uint8, or None for a dense weight.
        scale: [N, 1] or [N, ceil(K / group_size)] float32.
        group_size: columns of one scale: 32, 64, 128 or 256; None for one scale per row.

    Returns:
        panels: [P, bytes] uint8, P = ceil(N / 16); on a GPU what `cuda.weight_only.pack` makes, or of a dense weight
            `cuda.dense_quantized.pack`, with group size 0 for one scale a row.

    Raises:
        InputError: wrong shapes or dtypes, -128, or a group that does not keep exactly two (named by row and group).
    """
    if values.is_cuda:
        return cuda_ops.prepack_quantized(values, bitmask, scale, group_size)
    if values.dtype not in (torch.int8, torch.uint8) or values.dim() != 2:
        raise InputError(f"prepack: quantized values must be int8 or uint8 matrices, not {values.dtype}")
    if values.dtype == torch.int8:
        check_values(values, INT8)
    bits = 8 if values.dtype == torch.int8 else 4
    rows, columns = values.shape[0], values.shape[1] * 8 // bits * (1 if bitmask is None else 2)
    if columns % 8 or not values.numel():
        raise InputError(f"prepack: the number of columns must be a positive multiple of 8, not {columns}")
    if bitmask is not None:
        _check_bitmask(bitmask, rows, columns)
    if group_size is not None and group_size not in GROUP_SIZES:
        raise InputError(f"prepack: group size {group_size} has no kernel: use {', '.join(map(str, GROUP_SIZES))}")
    scale_columns, group = group_size or columns, group_size or ROW_SCALE_GROUP
    if scale.dtype != torch.float32 or scale.shape != (rows, -(-columns // scale_columns)):
        raise InputError(
            f"prepack: scale must be float32 {[rows, -(-columns // scale_columns)]}, not {scale.dtype} "
            f"{list(scale.shape)}"
        )
    panels = _empty(
        (-(-rows // PANEL_ROWS), library().cast24_quantized_panel_bytes(bits, bitmask is not None, columns, group)),
        torch.uint8,
    )
    values, scale = values.contiguous(), scale.contiguous()
    mask = None if bitmask is None else bitmask.contiguous()
    bad = library().cast24_prepack_quantized(
        values.data_ptr(),
        None if mask is None else mask.data_ptr(),
        scale.data_ptr(),
        scale_columns,
        rows,
        columns,
        bits,
        group,
        panels.data_ptr(),
    )
    if bad >= 0:
        raise InputError(_not_two(bad, columns // 4))
    return panels, bits, group


def _check_bitmask(bitmask: torch.Tensor, rows: int, columns: int) -> None:
    if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, columns // 8):
        raise InputError(
            f"prepack: bitmask must be uint8 {[rows, columns // 8]}, not {bitmask.dtype} {list(bitmask.shape)}"
        )


def _not_two(bad: int, groups: int) -> str:
    return (
        f"prepack: the bitmask does not keep exactly two in row {bad // groups}, group {bad % groups}: "
        "the checkpoint is damaged, convert it again"
    )


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

    @torch.library.register_fake("cast24::linear_quantized")
    def _(
        x: torch.Tensor,
        panels: torch.Tensor,
        out_features: int,
        bits: int,
        sparse: bool,
        group_size: int,
        float_activations: bool = False,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], out_features))

    @torch.library.custom_op("cast24::quantized_rows", mutates_args=(), device_types="cpu")
    def quantized_rows(
        ids: torch.Tensor, panels: torch.Tensor, num_rows: int, columns: int, bits: int, group_size: int
    ) -> torch.Tensor:
        size = library().cast24_quantized_panel_bytes(bits, False, columns, group_size)
        if panels.dtype != torch.uint8 or panels.shape != (-(-num_rows // PANEL_ROWS), size):
            raise RuntimeError(f"cast24::quantized_rows: panels {list(panels.shape)} are not those of this weight")
        if ids.dtype != torch.int64:
            raise RuntimeError(f"cast24::quantized_rows: ids must be int64, not {ids.dtype}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_rows:
            raise IndexError(f"cast24::quantized_rows: an id is outside the {num_rows} rows")
        ids, panels = ids.contiguous(), panels.contiguous()
        out = torch.empty((*ids.shape, columns), dtype=torch.float32)
        library().cast24_quantized_rows(
            ids.data_ptr(), ids.numel(), panels.data_ptr(), columns, bits, group_size, out.data_ptr()
        )
        return out

    @quantized_rows.register_fake
    def _(
        ids: torch.Tensor, panels: torch.Tensor, num_rows: int, columns: int, bits: int, group_size: int
    ) -> torch.Tensor:
        return panels.new_empty((*ids.shape, columns), dtype=torch.float32)


_register()
cuda_ops.register()
