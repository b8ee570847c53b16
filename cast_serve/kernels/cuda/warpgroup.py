"""The kernel for many rows of x that only Hopper runs (sm_90a): its tiles, and how one call is cut into blocks."""

from dataclasses import dataclass
from functools import cache, cached_property

from cast_serve.kernels.cuda.layout import ROWS, STEP
from cast_serve.kernels.cuda.plan import Entry, Plan, Types
from cast_serve.kernels.cuda.tiled import WEIGHT_BYTES

COLUMNS = 128
"""Of y, that a block makes: rows of the weight."""
_STAGES = 6
"""Buffers of 128 bytes of rows of x: 192 KB at most, and further ahead than memory is behind."""
_BARRIERS = 1024
"""Bytes of shared memory for barriers; as much again is lost to alignment."""
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

    @property
    def blocks(self) -> int:
        return 1

    @cached_property
    def entry(self) -> Entry:
        shared_bytes = 128 * self.rows * _STAGES + 2 * _BARRIERS
        return Entry(f"warpgroup_{self.rows}_{self.cluster}", 384, self.cluster, shared_bytes)

    @property
    def box_rows(self) -> int:
        """Of x, that each block of a cluster fetches for all."""
        return self.rows // self.cluster

    def macro(self, types: Types) -> str:
        return types.macro("CAST24_WARPGROUP", self.entry, (self.rows, self.cluster, _STAGES))


TILES = (WarpgroupTile(128, 2), WarpgroupTile(128, 4), WarpgroupTile(256, 2), WarpgroupTile(256, 4))


def cut_into(tile: WarpgroupTile, M: int, N: int, K: int) -> Plan:
    """Cut y [M, N] = x [M, K] W^T into such tiles, panel by panel of the weight's rows."""
    clusters, steps = -(-N // (COLUMNS * tile.cluster)), -(-K // STEP)
    panels = -(-clusters * tile.cluster // _PANEL)
    panel = -(-clusters // panels) * tile.cluster
    return Plan(tile, (panel, 1, panels * -(-M // tile.rows)), -(-N // ROWS), steps, steps, 0)


def _cycles(tile: WarpgroupTile, M: int, N: int, K: int, multiprocessors: int, types: Types) -> float:
    """A guess at what the busiest multiprocessor takes: bytes of the second-level cache, or those of shared memory."""
    clusters = -(-N // (COLUMNS * tile.cluster)) * -(-M // tile.rows)
    # a cluster lies within one of the GPU's parts, of 16 or 18 multiprocessors or fewer: larger ones leave some idle
    at_once = max(1, int(multiprocessors * (1.0 if tile.cluster == 2 else 0.9)) // tile.cluster)
    of_step = STEP * types.x_bytes * tile.box_rows + WEIGHT_BYTES[types.weight] * COLUMNS
    # 5.5 TB/s shared by 132 at 1.75 GHz; x is written once and read by two warpgroups, 128 bytes a cycle, which takes
    # longer than the products
    return -(-clusters // at_once) * -(-K // STEP) * max(of_step / 24, 1.5 * types.x_bytes * tile.rows)


@cache
def plan(M: int, N: int, K: int, multiprocessors: int, types: Types) -> Plan:
    """Cut y [M, N] = x [M, K] W^T into the tiles with which it should take least."""
    return cut_into(min(TILES, key=lambda tile: _cycles(tile, M, N, K, multiprocessors, types)), M, N, K)
