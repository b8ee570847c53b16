"""The layout that the CPU kernel reads: 16 rows side by side.

One group of 16 rows is two vectors of values; the kernel broadcasts the group's four inputs into every 128-bit lane and
lets each row pick its two by index. Made from the portable format when a model is exported or loaded.
"""

import torch
from torch import Tensor

from conversion.errors import InputError
from conversion.packed import bitmask_nibbles

ROWS = 16
GROUPS_PER_WORD = 8

# Nibble -> column of slot 0 in bits 0-1, column of slot 1 in bits 2-3.
_CODES = torch.tensor([0, 0, 0, 4, 0, 8, 9, 0, 0, 12, 13, 0, 14, 0, 0, 0], dtype=torch.int32)
_PADDING = 4  # columns 0 and 1


def to_panels(values: Tensor, bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """Rearrange a packed weight into panels of 16 rows.

    With P = ceil(N/16) panels and G = K/4 groups, rows padded with zeros:

    Args:
        values: [N, K/2], float32 or bfloat16.
        bitmask: [N, K/8] uint8.

    Returns:
        values: float32 [P, G, 2, 16], or bfloat16 [P, G, 16, 2] (a row's two values share a 32-bit word).
        indices: uint32 [P, ceil(G/8), 16]; group g has 4 bits from bit 4*(g%8) of word g//8: the columns (0..3) of slot
            0 and of slot 1. Padding has columns 0 and 1.

    Raises:
        InputError: another dtype, shapes that do not belong together, or an invalid nibble.
    """
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"the CPU kernel takes float32 or bfloat16 values, not {values.dtype}")
    nibbles = bitmask_nibbles(bitmask)
    rows, groups = nibbles.shape
    if values.shape != (rows, 2 * groups):
        raise InputError(f"values {list(values.shape)} do not fit a bitmask of {list(bitmask.shape)}")
    panels = -(-rows // ROWS)
    words = -(-groups // GROUPS_PER_WORD)

    padded = values.new_zeros(panels * ROWS, 2 * groups)
    padded[:rows] = values
    by_row = padded.view(panels, ROWS, groups, 2)
    order = (0, 2, 3, 1) if values.dtype == torch.float32 else (0, 2, 1, 3)
    panel_values = by_row.permute(order).contiguous()

    codes = torch.full((panels * ROWS, words * GROUPS_PER_WORD), _PADDING, dtype=torch.int32)
    codes[:rows, :groups] = _CODES[nibbles.int()]
    by_word = codes.view(panels, ROWS, words, GROUPS_PER_WORD)
    packed_words = torch.zeros(panels, ROWS, words, dtype=torch.int32)
    for i in range(GROUPS_PER_WORD):
        packed_words |= by_word[..., i] << 4 * i
    return panel_values, packed_words.transpose(1, 2).contiguous().view(torch.uint32)
