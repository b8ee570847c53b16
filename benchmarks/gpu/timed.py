"""Times of calls of which some may not run."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from cast_serve.kernels.cuda.measurement import Call, Gpu

Key = TypeVar("Key")


def timed(
    machine: Gpu, calls: Iterable[tuple[Key, Sequence[Call]]], **limits: Any
) -> tuple[dict[Key, float], dict[str, str]]:
    """Seconds of each that runs, and why the others do not."""
    seconds: dict[Key, float] = {}
    failures: dict[str, str] = {}
    for key, each in calls:
        try:
            seconds[key] = machine.seconds(each, **limits)
        except Exception as failure:  # each library has its own; the others must still run
            failures[str(key)] = f"{type(failure).__name__}: {failure}"[:500]
    return seconds, failures
