"""The Marlin-24 layout of quantized 2:4 weights: what compressed-tensors 0.14's `Marlin24Compressor` wrote, undone.

Kept codes, raised to be positive, lie transposed in 16 x 16 tiles, permuted as the kernel's fragments want them, and
several to a word; positions lie in the metadata layout of CUTLASS, and scales are permuted too.
"""

import torch
from torch import Tensor

TILE = 16


def codes(weight_packed: Tensor, meta: Tensor, bits: int) -> Tensor:
    """Dense codes [N, K], float32, of `weight_packed` [K/32, N * bits / 2] int32 and `meta` [K/32, 2N] int16."""
    rows, columns = dense_shape(meta.shape)
    words = weight_packed.long() & 0xFFFFFFFF
    per_word = 32 // bits
    permuted = torch.stack([words >> bits * i & (1 << bits) - 1 for i in range(per_word)], dim=-1).flatten(1)
    order = _weight_order(bits)
    tiles = torch.empty_like(permuted).view(-1, len(order))
    tiles[:, order] = permuted.view(-1, len(order))
    kept = tiles.view(columns // 2 // TILE, rows // TILE, TILE, TILE).transpose(1, 2).reshape(columns // 2, rows).T
    signed = (kept - (1 << bits - 1)).float().contiguous()
    return torch.zeros(rows, columns).scatter_(1, _kept_columns(meta, rows, columns), signed)


def scales(scale_packed: Tensor, columns: int) -> Tensor:
    """Scales [N, G], float32, of `scale_packed` [G, N], of a weight with this many columns."""
    groups = scale_packed.shape[0]
    if groups == 1 or columns // 2 <= 128:  # the compressor compared a group with the kept half of a row
        return scale_packed.T.float().contiguous()
    order = torch.tensor([8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)])
    unpermuted = torch.empty(scale_packed.numel() // 64, 64)
    unpermuted[:, order] = scale_packed.float().view(-1, 64)
    return unpermuted.view(groups, -1).T.contiguous()


def dense_shape(meta_shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, K) by the shape of `meta`."""
    blocks, width = meta_shape
    return width // 2, blocks * 32


def _kept_columns(meta: Tensor, rows: int, columns: int) -> Tensor:
    """Column [N, K/2] of each kept code: `meta` in order is [N, K/16], two bits for each place within a group of four.

    Where a row lies is CUTLASS's ColumnMajorInterleaved<2> as compressed-tensors had it; torch's differs.
    """
    row, column = torch.arange(rows)[:, None], torch.arange(columns // 16)[None, :]
    row = row // 64 * 64 + row % 64 // 8 * 4 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32
    swap = (row % 2 == 0).int() * (column % 2) - (row % 2) * (column % 2 == 0).int()  # 2 x 2 blocks are transposed
    row, column = row + swap, column - swap
    words = meta.flatten()[column // 2 * rows * 2 + row * 2 + column % 2].int()
    places = torch.stack([words >> 2 * i & 3 for i in range(8)], dim=-1).view(rows, columns // 2)
    return places + torch.arange(0, columns, 4).repeat_interleave(2)


def _weight_order(bits: int) -> Tensor:
    """Where each code of four neighbouring tiles was taken from."""
    order = []
    for lane in range(32):
        column = lane // 4
        rows = [2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4), 2 * (lane % 4 + 4) + 1]
        start = column // 2 * 256 + 8 * (column % 2)
        first = [16 * row + start + 4 * block for block in (0, 1) for row in rows]
        order += [place + i for i in range(4) for place in first]
    interleaved = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    return torch.tensor(order).view(-1, len(interleaved))[:, interleaved].flatten()
