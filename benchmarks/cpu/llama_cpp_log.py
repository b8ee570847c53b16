"""What llama.cpp says of its own accord."""

import ctypes

import llama_cpp


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Says nothing: failures come back as codes. Of the module, as llama.cpp may call it until the process ends."""


def silence() -> None:
    """Keep llama.cpp from printing."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
