"""What the packed layers of one process weigh, logged once they are all there."""

from collections import Counter

from vllm.logger import init_logger

from cast_serve.freed_memory import return_freed_memory

# vLLM shows what its own loggers say, and no others.
logger = init_logger("vllm.cast24")


class LoadReport:
    """Counts layers from `expect` to `packed`; the last one prints the sum."""

    def __init__(self) -> None:
        self._waiting = 0
        self.kernels: Counter[str] = Counter()
        self.packed_bytes = self.dense_bytes = 0

    def expect(self) -> None:
        self._waiting += 1

    def withdraw(self) -> None:
        """One layer less is coming."""
        self._waiting -= 1

    def packed(self, layer: str, kernel: str, packed_bytes: int, dense_bytes: int) -> None:
        """Note a layer whose weight is in a kernel's layout.

        Args:
            layer: its name.
            kernel: that multiplies by it.
            packed_bytes: that its weight takes.
            dense_bytes: that it would take dense, in the dtype of activations.
        """
        logger.debug("cast24: %s: %s, %d bytes packed, %d dense", layer, kernel, packed_bytes, dense_bytes)
        self.kernels[kernel] += 1
        self.packed_bytes += packed_bytes
        self.dense_bytes += dense_bytes
        self._waiting -= 1
        if self._waiting == 0:
            return_freed_memory()  # what the portable tensors took, or the weights would seem twice as large
            logger.info(
                "cast24: %s: %.1f MB of weights packed, %.1f MB dense",
                ", ".join(f"{count} layers in {kernel}" for kernel, count in self.kernels.items()),
                self.packed_bytes / 1e6,
                self.dense_bytes / 1e6,
            )
