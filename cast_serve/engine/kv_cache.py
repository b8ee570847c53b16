"""The paged key-value cache: memory for all layers, and who holds which blocks."""

import mmap
from typing import Any

import numpy as np
from onnxruntime import OrtValue

from cast_serve.engine.manifest import Manifest

# Tokens of a block. What a head's keys fill in one block is what the kernel reads in one go: longer is faster. It costs
# no memory, since pages of a block that are not written are not resident.
BLOCK_TOKENS = 64

# How numpy holds a cache's dtype, and ONNX's number for it.
_STORED: dict[str, tuple[np.dtype[Any], int]] = {
    "float32": (np.dtype(np.float32), 1),
    "bfloat16": (np.dtype(np.uint16), 16),
}


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
    """Key and value caches of all layers, and the session's inputs that they are.

    Pages become resident when they are first written. Huge pages are declined: they would make 2 MB per array resident
    for the first token.

    Attributes:
        inputs: key_cache.i and value_cache.i of each layer [blocks, BLOCK_TOKENS, kv_heads, head_dim], in the
            manifest's dtype.
    """

    def __init__(self, manifest: Manifest, blocks: int) -> None:
        shape = (blocks, BLOCK_TOKENS, manifest.kv_num_heads, manifest.head_dim)
        names = [f"{which}_cache.{layer}" for layer in range(manifest.num_layers) for which in ("key", "value")]
        stored, onnx_type = _STORED[manifest.cache_dtype]
        self._maps = [_private_memory(int(np.prod(shape)) * stored.itemsize) for _ in names]
        arrays = (np.frombuffer(memory, stored).reshape(shape) for memory in self._maps)
        of = OrtValue.ortvalue_from_numpy_with_onnx_type
        self.inputs = {name: of(array, onnx_type) for name, array in zip(names, arrays, strict=True)}

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
