"""The layout in which the CPU kernel reads quantized weights: 16 rows side by side, all that one pass needs in order.

A panel is one run of bytes. For each group of columns: the rows' scales, float32 [16], and the sums of their codes,
int16 [16]; then for each 32 columns which ones are kept, uint8 [16, 4], and the codes, in blocks of four a row. See
cast_serve/kernels/csrc/cast24.h, whose packing this agrees with byte for byte.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

from conversion.panel import ROWS, to_panels
from conversion.quantization.formats import INT4, INT8, Quantization, decode

WORD_COLUMNS = 32
ROW_SCALE_GROUP = 128
"""Columns of a panel's group where a row has one scale: activations are rounded group by group."""


def panel_group(quantization: Quantization) -> int:
    """Columns that share a scale in the panels."""
    return quantization.group_size or ROW_SCALE_GROUP


def panel_bytes(columns: int, quantization: Quantization, *, sparse: bool) -> int:
    """Bytes of one panel of a 2:4 or dense weight with this many columns."""
    groups, words = -(-columns // panel_group(quantization)), -(-columns // WORD_COLUMNS)
    header, index = 6 * ROWS, 4 * ROWS if sparse else 0  # scales and sums; kept columns
    values = WORD_COLUMNS // 2 if sparse else WORD_COLUMNS
    return groups * header + words * (index + values * ROWS * quantization.values.bits // 8)


def to_quantized_panels(stored: Tensor, bitmask: Tensor | None, scale: Tensor, quantization: Quantization) -> Tensor:
    """Rearrange a quantized weight [N, K] into panels of 16 rows, [ceil(N/16), bytes] uint8.

    Args:
        stored: codes of the kept values as the packed checkpoint stores them; of all values if `bitmask` is None.
        bitmask: [N, K/8] uint8, or None for a dense weight.
        scale: [N, G] float32.
        quantization: int8 or int4, and its groups.
    """
    assert quantization.values in (INT8, INT4)
    codes = decode(stored, quantization.values).to(torch.int8)
    rows, columns = codes.shape[0], codes.shape[1] * (1 if bitmask is None else 2)
    group = panel_group(quantization)
    panels, words, groups = -(-rows // ROWS), -(-columns // WORD_COLUMNS), -(-columns // group)
    group_words = group // WORD_COLUMNS
    kept = codes.shape[1] * WORD_COLUMNS // columns  # of a row in a word

    padded = pad(codes, (0, words * kept - codes.shape[1], 0, panels * ROWS - rows))
    by_block = padded.view(panels, ROWS, words, kept // 4, 4).permute(0, 2, 3, 1, 4)  # [P, words, blocks, 16, 4]
    if quantization.values is INT4:
        by_block = (by_block[:, :, 0::2] & 15) | (by_block[:, :, 1::2] & 15) << 4
    word_bytes = by_block.reshape(panels, words, -1).view(torch.uint8)
    if bitmask is not None:
        _, indices = to_panels(torch.zeros(codes.shape), bitmask)
        word_bytes = torch.cat((_places(indices.view(torch.int32)).flatten(2), word_bytes), dim=2)

    per_group = pad(padded, (0, groups * group_words * kept - padded.shape[1])).view(panels, ROWS, groups, -1)
    sums = per_group.sum(-1, dtype=torch.int16).transpose(1, 2).contiguous()
    scales = pad(scale.expand(rows, groups), (0, 0, 0, panels * ROWS - rows)).view(panels, ROWS, groups)
    header = torch.cat((_bytes(scales.transpose(1, 2)), _bytes(sums)), dim=2)  # [P, groups, 96]

    body = pad(word_bytes, (0, 0, 0, groups * group_words - words)).view(panels, groups, -1)
    whole = torch.cat((header, body), dim=2).view(panels, -1)
    return whole[:, : groups * header.shape[2] + words * word_bytes.shape[2]].contiguous()


def _places(words: Tensor) -> Tensor:
    """Turn index words of `conversion.panel`, int32 [..., 16], to bytes [..., 16, 4]: bits 8 b + 2 i to 2 b of byte i.

    So the columns of block b come down by one shift for all of its places.
    """
    places = torch.zeros(*words.shape, 4, dtype=torch.uint8)
    for block, place in itertools.product(range(4), range(4)):
        places[..., place] |= (words >> (8 * block + 2 * place) & 3).to(torch.uint8) << 2 * block
    return places


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
