"""The packed form of one 2:4 weight: kept values, and a bitmask that says where they were.

A group is 4 consecutive columns of a row; a nibble of the bitmask describes one group, bit c for column c.
"""

import torch
from torch import Tensor

from conversion.errors import InputError

PATTERN = "2:4"
VALUES_SUFFIX = ".weight_values"
BITMASK_SUFFIX = ".weight_bitmask"
SCALE_SUFFIX = ".weight_scale"

# Nibbles with exactly two bits set: the only ones that a valid bitmask holds.
VALID_NIBBLES = (0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100)

# Nibble of nonzero columns -> nibble of kept columns. A group with fewer than two nonzeros also keeps its first zeros;
# 0 marks a group with more than two.
_KEPT = torch.tensor([3, 3, 3, 3, 5, 5, 6, 0, 9, 9, 10, 0, 12, 0, 0, 0], dtype=torch.uint8)
_BITS = torch.tensor([[bool(nibble >> column & 1) for column in range(4)] for nibble in range(16)])


def pack24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 weight.

    Args:
        weight: [N, K], any floating dtype and any strides, K a multiple of 8, at most two nonzeros in every group.

    Returns:
        values: [N, K/2] in weight's dtype, the two kept values of each group in ascending column order, -0.0 as +0.0.
        bitmask: [N, K/8] uint8, bit c%8 of byte c//8 set where column c is kept; every nibble has exactly two bits
            (a group with fewer than two nonzeros keeps its first zeros).

    Raises:
        InputError: not a matrix, K not a multiple of 8, NaN or infinity, or a group with more than two nonzeros; the
            first offending row and group are named.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputError(f"a 2:4 weight is a floating-point matrix [N, K], not {list(weight.shape)} {weight.dtype}")
    rows, columns = weight.shape
    if columns % 8:
        raise InputError(f"the input size must be a multiple of 8 to be packed, and {columns} is not")
    weight = weight.detach().cpu().contiguous()
    if not weight.isfinite().all():
        row, column = _first(~weight.isfinite())
        raise InputError(f"row {row}, group {column // 4} holds {weight[row, column].item()}: weights must be finite")

    nonzero = _to_nibbles((weight != 0).view(rows, columns // 4, 4))
    kept = _KEPT[nonzero.int()]
    if not kept.all():
        row, group = _first(kept == 0)
        raise InputError(
            f"row {row}, group {group} (columns {4 * group} to {4 * group + 3}) has "
            f"{int(nonzero[row, group].item()).bit_count()} nonzeros, and 2:4 allows two"
        )
    values = weight[_BITS[kept.int()].view(rows, columns)].view(rows, columns // 2)
    values += 0.0  # -0.0 + 0.0 is +0.0
    bitmask = kept[:, 0::2] | kept[:, 1::2] << 4
    return values, bitmask


def unpack24(values: Tensor, bitmask: Tensor) -> Tensor:
    """Restore the dense weight [N, K] of `values` [N, K/2] and `bitmask` [N, K/8] uint8, in values' dtype.

    Raises:
        InputError: the two shapes do not belong together, or a nibble of the bitmask does not keep exactly two columns;
            the first such row and group are named.
    """
    kept = kept_columns(bitmask)
    rows, columns = kept.shape
    if values.shape != (rows, columns // 2):
        raise InputError(
            f"values {list(values.shape)} and bitmask {list(bitmask.shape)} do not belong together: "
            "they must be [N, K/2] and [N, K/8]"
        )
    return values.new_zeros(rows, columns).masked_scatter_(kept, values.contiguous())


def check_bitmask(bitmask: Tensor) -> None:
    """InputError, naming the first row and group, unless every nibble of a bitmask [N, K/8] has exactly two bits."""
    if bitmask.dim() != 2 or bitmask.dtype != torch.uint8:
        raise InputError(f"a bitmask is a uint8 matrix [N, K/8], not {list(bitmask.shape)} {bitmask.dtype}")
    pairs = (bitmask & 0x55) + (bitmask >> 1 & 0x55)  # bits set in each two
    valid = (pairs & 0x33) + (pairs >> 2 & 0x33) == 0x22
    if not valid.all():
        row, byte = _first(~valid)
        low, high = int(bitmask[row, byte]) & 15, int(bitmask[row, byte]) >> 4
        group, nibble = (2 * byte, low) if low not in VALID_NIBBLES else (2 * byte + 1, high)
        raise InputError(
            f"row {row}, group {group} of the bitmask is {nibble:04b}, which does not keep exactly two of four "
            "columns: the file is damaged"
        )


def bitmask_nibbles(bitmask: Tensor) -> Tensor:
    """Split a bitmask [N, K/8] into one nibble per group, [N, K/4] uint8; InputError on an invalid nibble."""
    check_bitmask(bitmask)
    return torch.stack((bitmask & 15, bitmask >> 4), dim=-1).flatten(1)


def kept_columns(bitmask: Tensor) -> Tensor:
    """The mask [N, K] bool, True where kept, of a bitmask [N, K/8]; InputError on an invalid nibble."""
    check_bitmask(bitmask)
    columns = bitmask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bitmask.device) & 1
    return columns.flatten(1).bool()


def _to_nibbles(columns: Tensor) -> Tensor:
    """[..., 4] bool -> [...] uint8, bit c from column c."""
    bits = columns.view(torch.uint8)
    return bits[..., 0] | bits[..., 1] << 1 | bits[..., 2] << 2 | bits[..., 3] << 3


def _first(where: Tensor) -> tuple[int, int]:
    """Row and column of the first True of a matrix, in row-major order."""
    flat = int(where.flatten().to(torch.uint8).argmax())
    return flat // where.shape[1], flat % where.shape[1]
