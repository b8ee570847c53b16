"""The kernel for many rows of x that only Hopper runs (sm_90a): its tiles, and how one call is cut into blocks."""

from dataclasses import dataclass
from functools import cache, cached_property

from cast_serve.kernels.cuda.layout import ROWS, STEP
from cast_serve.kernels.cuda.plan import Entry, Plan, Types
from cast_serve.kernels.cuda.tiled import WEIGHT_BYTES

COLUMNS = 128
"""Of y, that a block makes: rows of the weight."""
_SHARED = 227 << 10
_BARRIERS = 1024
"""Bytes of a block's shared memory, and of that for barriers; as much again is lost to alignment."""
_PANEL = 16
"""Blocks along the weight's rows that run at about the same time: together 9 MB of a weight of 4096 columns."""


@dataclass(frozen=True)
class WarpgroupTile:
    """Template arguments of `warpgroup_linear`, see csrc/warpgroup.cuh.

    Attributes:
        rows: of x in a block.
        cluster: blocks that have the same rows of x, and fetch them together.
    """

    rows: int
    cluster: int
    blocks: int = 1

    @property
    def stages(self) -> int:
        """Buffers of 64 columns of x; more than six are further ahead than any memory is behind."""
        return min(6, (_SHARED - 2 * _BARRIERS) // (128 * self.rows))

    @cached_property
    def entry(self) -> Entry:
        shared_bytes = 128 * self.rows * self.stages + 2 * _BARRIERS
        return Entry(f"warpgroup_{self.rows}_{self.cluster}", 384, self.cluster, shared_bytes)

    @property
    def box_rows(self) -> int:
        """Of x, that each block of a cluster fetches for all."""
        return self.rows // self.cluster

    def macro(self, types: Types) -> str:
        return types.macro("CAST24_WARPGROUP", self.entry, (self.rows, self.cluster, self.stages))


TILES = (WarpgroupTile(128, 2), WarpgroupTile(128, 4), WarpgroupTile(256, 2), WarpgroupTile(256, 4))


def tiles(types: Types) -> tuple[WarpgroupTile, ...]:
    """None for products in 8 bits."""
    return () if types.in_8_bits else TILES


def cut_into(tile: WarpgroupTile, M: int, N: int, K: int) -> Plan:
    """Cut y [M, N] = x [M, K] W^T into such tiles, panel by panel of the weight's rows."""
    along_n = -(-N // (COLUMNS * tile.cluster)) * tile.cluster
    panel = min(_PANEL, along_n)
    steps = -(-K // STEP)
    return Plan(tile, (panel, 1, -(-along_n // panel) * -(-M // tile.rows)), -(-N // ROWS), steps, steps, 0)


def _cycles(tile: WarpgroupTile, M: int, N: int, K: int, multiprocessors: int, types: Types) -> float:
    """A guess at what the busiest multiprocessor takes: its bytes from the second-level cache, or its products."""
    along_n = -(-N // (COLUMNS * tile.cluster)) * tile.cluster
    at_once = max(1, multiprocessors // tile.cluster) * tile.cluster
    waves = -(-along_n * -(-M // tile.rows) // at_once)
    of_step = 128 * tile.box_rows + WEIGHT_BYTES[types.weight] * COLUMNS
    # 5.5 TB/s shared by 132 at 1.75 GHz; 4096 products a cycle with half of them zeros, of which copies cost a fifth
    return waves * -(-K // STEP) * max(of_step / 24, tile.rows * COLUMNS * STEP / (0.8 * 4096))


@cache
def plan(M: int, N: int, K: int, multiprocessors: int, types: Types) -> Plan:
    """Cut y [M, N] = x [M, K] W^T into the tiles with which it should take least."""
    return cut_into(min(TILES, key=lambda tile: _cycles(tile, M, N, K, multiprocessors, types)), M, N, K)
