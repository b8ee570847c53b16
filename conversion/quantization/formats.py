"""The number formats of quantized values, and how a packed checkpoint stores them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from conversion.errors import InputError
from conversion.packed import unpack24

GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class ValueFormat:
    """Codes that times a scale give a weight.

    Attributes:
        name: `value_dtype` in config.json.
        bits: of one code.
        dtype: of the stored tensor.
        lowest: least code.
        highest: greatest code.
        default_group: group size that --quantize takes when none is named; None is one scale per row.
    """

    name: str
    bits: int
    dtype: torch.dtype
    lowest: int
    highest: int
    default_group: int | None

    def round(self, codes: Tensor) -> Tensor:
        """Return the nearest codes (ties to even; out of range: the last one), in the dtype of `codes`."""
        inside = codes.clamp(self.lowest, self.highest)
        return inside.to(self.dtype).to(codes.dtype) if self.dtype.is_floating_point else inside.round()


INT8 = ValueFormat("int8", 8, torch.int8, -127, 127, None)
INT4 = ValueFormat("int4", 4, torch.uint8, -8, 7, 64)
FP8 = ValueFormat("float8_e4m3fn", 8, torch.float8_e4m3fn, -448, 448, None)
FORMATS = {value_format.name: value_format for value_format in (INT8, INT4, FP8)}


@dataclass(frozen=True)
class Quantization:
    """How the kept values of a packed checkpoint are quantized.

    Attributes:
        values: their number format.
        group_size: dense columns that share a scale (they hold half as many kept values; the last group of a row is
            shorter where K is no multiple); None is one scale per row.
    """

    values: ValueFormat
    group_size: int | None

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise InputError(f"group size {self.group_size} is not supported: use {', '.join(map(str, GROUP_SIZES))}")
        if self.values is INT4 and self.group_size is None:
            raise InputError("4-bit values need scales per group: name a group size")

    @classmethod
    def named(cls, name: str, group_size: int | None = None) -> "Quantization":
        """Return what `cast convert --quantize NAME` stands for: int8, int4 or fp8, with the default group size."""
        formats = {"int8": INT8, "int4": INT4, "fp8": FP8}
        if name not in formats:
            raise InputError(f"cannot quantize to '{name}': use one of {', '.join(formats)}")
        return cls(formats[name], formats[name].default_group if group_size is None else group_size)

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> "Quantization | None":
        """Return what a config.json's quantization_config says; None if its values are floating point.

        Raises:
            InputError: its group size is none that the format allows.
        """
        name = config.get("value_dtype")
        return cls(FORMATS[name], config.get("group_size")) if name in FORMATS else None

    def as_config(self) -> dict[str, Any]:
        """What `of_config` reads."""
        return {"value_dtype": self.values.name, "group_size": self.group_size}

    def groups(self, columns: int) -> int:
        """Scales per row of a weight with this many dense columns."""
        return groups_of(columns, self.group_size)

    def by_group(self, dense: Tensor) -> Tensor:
        """[N, K] -> [N, G, columns of a group], a short last group filled up with zeros."""
        groups = self.groups(dense.shape[1])
        size = self.group_size or dense.shape[1]
        return pad(dense, (0, groups * size - dense.shape[1])).unflatten(1, (groups, size))

    def spread(self, scale: Tensor, columns: int) -> Tensor:
        """Scales [N, G] -> [N, columns], each repeated over the columns of its group."""
        return scale.repeat_interleave(self.group_size or columns, dim=1)[:, :columns]

    def stored_shape(self, rows: int, codes: int) -> tuple[int, int]:
        """Shape of weight_values of `rows` rows with so many codes each: K / 2 of a 2:4 weight, K of a dense one."""
        return rows, codes * self.values.bits // 8


def groups_of(columns: int, group_size: int | None) -> int:
    """Groups of `group_size` that so many columns make, the last one maybe shorter; None is one for all."""
    return 1 if group_size is None else -(-columns // group_size)


def encode(codes: Tensor, value_format: ValueFormat) -> Tensor:
    """Codes [N, K/2], or [N, K] of a dense weight, any dtype -> the tensor that is stored.

    Four-bit codes are two's complement, two per byte, the earlier one in the low half: [N, K/4] uint8, so that a byte
    is the two kept values of one group of four columns.
    """
    codes = codes.float() + 0.0  # -0.0 + 0.0 is +0.0
    if value_format is INT4:
        halves = codes.to(torch.int8).view(torch.uint8) & 15
        return halves[:, 0::2] | halves[:, 1::2] << 4
    return codes.to(value_format.dtype)


def decode(stored: Tensor, value_format: ValueFormat) -> Tensor:
    """What `encode` took, as float32."""
    if value_format is INT4:
        halves = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1).to(torch.int8)
        return ((halves ^ 8) - 8).float()
    return stored.float()


def dequantize(stored: Tensor, bitmask: Tensor | None, scale: Tensor, quantization: Quantization) -> Tensor:
    """Return the dense weight [N, K], float32: every kept code times the scale of its row and group.

    Args:
        stored: weight_values.
        bitmask: [N, K/8] uint8; None where all codes are stored.
        scale: [N, G] float32.
        quantization: how they belong together.
    """
    codes = decode(stored, quantization.values)
    codes = codes if bitmask is None else unpack24(codes, bitmask)
    return codes * quantization.spread(scale, codes.shape[1])


def check_values(stored: Tensor, value_format: ValueFormat) -> None:
    """InputError if a stored value is none that quantization writes: -128, or NaN in 8-bit floats."""
    wrong = stored == -128 if value_format is INT8 else stored.isnan()
    if wrong.any():
        raise InputError(f"the values hold {stored[wrong][0].item()}, which is no code: the file is damaged")


def check_scale(scale: Tensor) -> None:
    """InputError if a scale is zero or not finite."""
    if not (scale.isfinite() & (scale != 0)).all():
        raise InputError("a scale is zero or not finite: the file is damaged")
