"""The order in which the CUDA kernels read a 2:4 weight: that of operand A of mma.sp, so nothing is rearranged there.

A tile is 16 rows by 32 columns; of it each of 32 lanes holds 16 bytes of kept values, which have 16 bits. A step is two
tiles, 64 columns, for which each lane holds one 32-bit word of metadata: for every kept value the 2 bits that say where
in its group of four it stands. Padding is zeros, kept in columns 0 and 1.

Lane, register and bit positions are those of PTX ISA 9.7.14.6.2, "Matrix fragments for mma.sp", m16n8k32, selector 0
for the first tile of a step, 1 for the second.
"""

import torch
from torch import Tensor

from conversion.errors import InputError
from conversion.packed import VALID_NIBBLES, check_bitmask

ROWS, STEP, LANES = 16, 64, 32

# Nibble of kept columns -> positions of the first and the second one, 2 bits each; 0 is not valid.
_POSITIONS = [0] * 16
for _nibble in VALID_NIBBLES:
    _first, _second = (column for column in range(4) if _nibble >> column & 1)
    _POSITIONS[_nibble] = _first | _second << 2


def to_fragments(values: Tensor, bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (fragments, metadata) of a weight, on its device.

    Args:
        values: [N, K/2] of a type of 16 bits, the kept values in ascending column order.
        bitmask: [N, K/8] uint8, bit c%8 of byte c//8 set where column c is kept.

    Returns:
        fragments: [ceil(N/16), 2 ceil(K/64), 32, 8] of values' dtype.
        metadata: [ceil(N/16), ceil(K/64), 32] uint32.

    Raises:
        InputError: wrong shapes or dtypes, or a group that does not keep exactly two (named by row and group).
    """
    if values.dim() != 2 or values.dtype.itemsize != 2 or values.shape[1] % 4 or not values.numel():
        raise InputError(
            f"values must be a matrix [N, K/2] of a type of 16 bits with K a multiple of 8, not "
            f"{list(values.shape)} {values.dtype}"
        )
    rows, columns = values.shape[0], values.shape[1] * 2
    if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, columns // 8):
        raise InputError(f"bitmask must be uint8 {[rows, columns // 8]}, not {bitmask.dtype} {list(bitmask.shape)}")
    row_tiles, steps = -(-rows // ROWS), -(-columns // STEP)

    nibbles = torch.stack((bitmask & 15, bitmask >> 4), dim=-1).flatten(1)
    positions = torch.tensor(_POSITIONS, device=bitmask.device)[nibbles.int()]
    if not positions.all():
        check_bitmask(bitmask.cpu())  # raises, and says where
    padding = (0, steps * STEP // 4 - columns // 4, 0, row_tiles * ROWS - rows)
    positions = torch.nn.functional.pad(positions, padding, value=_POSITIONS[0b0011])
    kept = torch.nn.functional.pad(values, (0, padding[1] * 2, 0, padding[3]))

    # row = 8 half + g; a register holds the values of the same lane and row in one group of the tile's columns
    fragments = kept.view(row_tiles, 2, 8, steps * 2, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    # a lane's word: 4 groups of row g, then of g + 8; lanes 0 and 1 of four the first tile, 2 and 3 the second
    words = positions.view(row_tiles, 2, 8, steps, 4, 4).permute(0, 3, 2, 4, 1, 5).flatten(-2)
    shifts = torch.arange(0, 32, 4, device=words.device)
    metadata = (words << shifts).sum(-1).to(torch.int32).view(torch.uint32)
    return fragments.reshape(row_tiles, steps * 2, LANES, 8), metadata.reshape(row_tiles, steps, LANES)


def from_fragments(fragments: Tensor, metadata: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the portable (values [rows, columns/2], bitmask [rows, columns/8]) that `to_fragments` was given."""
    row_tiles, steps = metadata.shape[:2]
    values = fragments.view(row_tiles, steps * 2, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6)
    values = values.reshape(row_tiles * ROWS, steps * STEP // 2)[:rows, : columns // 2].contiguous()

    shifts = torch.arange(0, 32, 4, device=metadata.device)
    words = (metadata.view(torch.int32).long()[..., None] >> shifts) & 15
    positions = words.view(row_tiles, steps, 8, 4, 2, 4).permute(0, 4, 2, 1, 3, 5)
    positions = positions.reshape(row_tiles * ROWS, steps * STEP // 4)[:rows, : columns // 4]
    nibbles = 1 << (positions & 3) | 1 << (positions >> 2)
    return values, (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
