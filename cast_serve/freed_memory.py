"""Memory that was freed and that the C library keeps all the same."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Give what is free in the heap back to the system, where the C library can; for after much has been loaded."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it, musl has not
        trim(0)
