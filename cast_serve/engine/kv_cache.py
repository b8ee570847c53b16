"""The paged key-value cache: memory for all layers, and who holds which blocks."""

import mmap

import numpy as np

# Tokens of a block. What a head's keys fill in one block is what the kernel reads in one go: longer is faster. It costs
# no memory, since pages of a block that are not written are not resident.
BLOCK_TOKENS = 64


class BlockAllocator:
    """Hands out block numbers. The most recently freed go first, so that little used memory is never touched."""

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` block numbers; the caller has checked that so many are free."""
        assert count <= len(self._free), "more blocks taken than are free"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class CacheMemory:
    """Key and value caches of all layers: 2 * layers float32 `arrays` [blocks, BLOCK_TOKENS, kv_heads, head_dim].

    Pages become resident when they are first written. Huge pages are declined: they would make 2 MB per array resident
    for the first token.
    """

    def __init__(self, layers: int, blocks: int, kv_heads: int, head_dim: int) -> None:
        shape = (blocks, BLOCK_TOKENS, kv_heads, head_dim)
        self._maps = [_private_memory(int(np.prod(shape)) * 4) for _ in range(2 * layers)]
        self.arrays = [np.frombuffer(memory, np.float32).reshape(shape) for memory in self._maps]

    def release(self) -> None:
        """Give all pages back to the system; the caches read as zeros again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for memory in self._maps:
                memory.madvise(mmap.MADV_DONTNEED)


def _private_memory(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
