"""What a kernel is made for, and how one call of it is cut into blocks."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Types:
    """What a kernel is made for: names of types in csrc/, of the weight and of y."""

    weight: str
    output: str

    @property
    def in_8_bits(self) -> bool:
        """Whether products are of 8-bit values, rows of x rounded to the weight's type."""
        return self.weight in ("S8", "E4m3")


class Kernel(Protocol):
    """Template arguments of a linear kernel.

    Attributes:
        column_tiles: rows of x in a warp, by 8.
        warps: in a block.
        blocks: of a multiprocessor, for which registers are shared out.
    """

    @property
    def name(self) -> str: ...
    @property
    def column_tiles(self) -> int: ...
    @property
    def warps(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    def macro(self, types: Types) -> str:
        """What makes the kernel, in CUDA C++."""
        ...


@dataclass(frozen=True)
class Plan:
    """How one call is cut into blocks.

    Attributes:
        grid: of blocks; the second axis is splits of K.
        partial_bytes: of the sums of splits, 512 for each tile of 16 x 8; none without splits.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    row_tiles: int
    steps: int
    steps_per_split: int
    partial_bytes: int

    @property
    def splits(self) -> int:
        return self.grid[1]

    @property
    def counters(self) -> int:
        """One for each block of a split."""
        return self.grid[0] * self.grid[2]
