"""The kernel for many rows of x: its tiles, and how one call is cut into blocks."""

import math
from dataclasses import dataclass
from functools import cache, cached_property

from cast_serve.kernels.cuda.layout import ROWS, STEP
from cast_serve.kernels.cuda.plan import Entry, Plan, Types


@dataclass(frozen=True)
class Tile:
    """Template arguments of `tiled_linear`, see csrc/tiled.cuh.

    Attributes:
        column_tiles: rows of x in a warp, by 8.
        row_tiles: weight tiles of 16 rows in a warp.
        warps_m, warps_n: of a block, along rows of x and along rows of the weight.
        blocks: of a multiprocessor, for which registers are shared out.
    """

    column_tiles: int
    row_tiles: int = 4
    warps_m: int = 2
    warps_n: int = 4
    blocks: int = 1

    @cached_property
    def entry(self) -> Entry:
        return Entry("tiled_" + "_".join(map(str, self._arguments)), 32 * self.warps_m * self.warps_n)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of y that a block makes."""
        return 8 * self.column_tiles * self.warps_m, ROWS * self.row_tiles * self.warps_n

    @property
    def _arguments(self) -> tuple[int, ...]:
        return (self.column_tiles, self.row_tiles, self.warps_m, self.warps_n, self.blocks)

    def macro(self, types: Types) -> str:
        return types.macro("CAST24_TILED", self.entry, self._arguments)


WEIGHT_BYTES = {"Bf16": 72, "Fp16": 72, "W8": 40, "F8": 40, "W4": 24, "S8": 40, "E4m3": 40}
"""Of a row of the weight in a step of 64 columns; a row of x has 128, or 64 where it was rounded to 8 bits."""


def tiles(types: Types) -> tuple[Tile, ...]:
    """Tiles by size, the last as large as registers allow (scales of groups take some).

    A large tile reads less from the second-level cache for each product, a small one leaves no multiprocessor idle
    where y is small.
    """
    large = Tile(4) if types.weight in ("W8", "F8", "W4") else Tile(8)
    return (Tile(4, warps_n=2, blocks=2), Tile(4, warps_m=4, warps_n=2), large)


_STAGES = 4
"""Steps below which a split is not worth its start."""


def cut_into(tile: Tile, M: int, N: int, K: int, multiprocessors: int, at_once: int = 1) -> Plan:
    """Cut y [M, N] = x [M, K] W^T into such tiles, and K where there would be fewer of them than multiprocessors.

    `at_once` steps are walked together: two where x is rounded to 8 bits.

    Blocks of the same columns of y, which read the same part of the weight, come one after the other.
    """
    rows, columns = tile.shape
    along_m, along_n, steps = -(-M // rows), -(-N // columns), -(-K // STEP)
    splits = max(1, min(multiprocessors // (along_m * along_n), steps // _STAGES))
    steps_per_split = at_once * -(-steps // (at_once * splits))
    splits = -(-steps // steps_per_split)
    partial = along_m * along_n * splits * 4 * rows * columns if splits > 1 else 0
    return Plan(tile, (along_m, splits, along_n), -(-N // ROWS), steps, steps_per_split, partial)


@dataclass(frozen=True)
class Work:
    """What the busiest multiprocessor has to do: bytes from the second-level cache, and products, zeros counted."""

    bytes: int
    products: int


def work(cut: Plan, tile: Tile, multiprocessors: int, types: Types) -> Work:
    """Of a call cut into tiles."""
    rows, columns = tile.shape
    blocks = -(-math.prod(cut.grid) // multiprocessors)
    of_step = STEP * types.x_bytes * rows + WEIGHT_BYTES[types.weight] * columns
    # sums of splits are written once, and read by the block that adds them up
    sums = 4 * rows * columns * (1 + cut.splits) if cut.splits > 1 else 0
    steps = blocks * min(cut.steps, cut.steps_per_split)
    return Work(steps * of_step + blocks * sums, steps * STEP * rows * columns)


@cache
def best(M: int, N: int, K: int, multiprocessors: int, types: Types) -> tuple[Plan, Work]:
    """Of the tiles for `types` those with which the busiest multiprocessor reads least: see `crossover` for why."""
    at_once = 2 // types.x_bytes
    cuts = [(cut_into(tile, M, N, K, multiprocessors, at_once), tile) for tile in tiles(types)]
    found = [(cut, work(cut, tile, multiprocessors, types)) for cut, tile in cuts]
    return min(found, key=lambda each: each[1].bytes)


def plan(M: int, N: int, K: int, multiprocessors: int, types: Types) -> Plan:
    """Cut y [M, N] = x [M, K] W^T into tiles."""
    return best(M, N, K, multiprocessors, types)[0]
