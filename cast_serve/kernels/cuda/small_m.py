"""The kernel for few rows of x: its variants, and how one call is cut into blocks."""

from dataclasses import dataclass
from functools import cache, cached_property

from cast_serve.kernels.cuda.layout import ROWS, STEP
from cast_serve.kernels.cuda.plan import Entry, Plan, Types


@dataclass(frozen=True)
class Variant:
    """Template arguments of `small_m_linear`, see csrc/small_m.cuh.

    Attributes:
        column_tiles: rows of x in a block, by 8.
        row_tiles: weight tiles of 16 rows in a warp.
        warps: in a block.
        warps_k: of these, how many share the columns of a weight tile; the others have tiles of their own.
        depth: steps of 64 columns that are on their way from memory.
        blocks: of a multiprocessor, for which registers are shared out.
    """

    column_tiles: int
    row_tiles: int = 1
    warps: int = 8
    warps_k: int = 1
    depth: int = 4
    blocks: int = 2

    @cached_property
    def entry(self) -> Entry:
        return Entry("small_m_" + "_".join(map(str, self._arguments)), 32 * self.warps)

    @property
    def _arguments(self) -> tuple[int, ...]:
        return (self.column_tiles, self.row_tiles, self.warps, self.warps_k, self.depth, self.blocks)

    def macro(self, types: Types) -> str:
        return types.macro("CAST24_SMALL_M", self.entry, self._arguments)


VARIANTS = (
    Variant(1, warps_k=4),
    Variant(2, warps_k=2),
    Variant(4),
    Variant(8, row_tiles=2, warps=4, depth=2),
)
"""For up to 8, 16, 32 and 64 rows of x. In the last, two weight tiles share each fragment of x from shared memory."""
MAX_ROWS = 8 * VARIANTS[-1].column_tiles


@cache
def plan(
    M: int, N: int, K: int, multiprocessors: int, variant: Variant | None = None, splits: int | None = None
) -> Plan:
    """Cut y [M, N] = x [M, K] W^T into blocks: K is split as far as that gives every multiprocessor its blocks.

    Args:
        variant, splits: instead of those chosen here.
    """
    if variant is None:
        variant = next((v for v in VARIANTS if 8 * v.column_tiles >= M), VARIANTS[-1])
    row_tiles, steps = -(-N // ROWS), -(-K // STEP)
    along_n = -(-row_tiles * variant.warps_k // (variant.row_tiles * variant.warps))
    along_m = -(-M // (8 * variant.column_tiles))
    if splits is None:
        splits = variant.blocks * multiprocessors // (along_n * along_m)
    splits = max(1, min(splits, steps // (variant.depth * variant.warps_k)))
    steps_per_split = -(-steps // splits)
    splits = -(-steps // steps_per_split)
    partial = along_m * splits * row_tiles * variant.column_tiles * 512 if splits > 1 else 0
    return Plan(variant, (along_n, splits, along_m), row_tiles, steps, steps_per_split, partial)
