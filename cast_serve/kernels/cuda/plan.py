"""What a kernel is made for, and how one call of it is cut into blocks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """A function of a module, and what does not change from launch to launch.

    Attributes:
        threads: of a block.
        cluster: blocks along the grid's first axis that run together, as the kernel was compiled.
        shared_bytes: of shared memory that a block has besides what the kernel declares.
    """

    name: str
    threads: int
    cluster: int = 1
    shared_bytes: int = 0


@dataclass(frozen=True)
class Types:
    """What a kernel is made for: names of types in csrc/, of the weight and of y."""

    weight: str
    output: str

    @property
    def in_8_bits(self) -> bool:
        """Whether products are of 8-bit values, rows of x rounded to the weight's type."""
        return self.weight in ("S8", "E4m3")

    @property
    def x_bytes(self) -> int:
        """Of a value of x in products."""
        return 1 if self.in_8_bits else 2

    def macro(self, name: str, entry: Entry, arguments: Iterable[int]) -> str:
        """The macro `name` that makes a kernel for these types with such template arguments."""
        return f"{name}({entry.name}, {self.weight}, {self.output}, {', '.join(map(str, arguments))})"


class Kernel(Protocol):
    """Template arguments of a linear kernel.

    Attributes:
        entry: that is made of it.
        blocks: of a multiprocessor, for which registers are shared out.
    """

    @property
    def entry(self) -> Entry: ...
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
