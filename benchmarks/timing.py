"""Timing alternatives side by side, so that a drift of the machine falls on all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all timed calls of one candidate."""

    median: float
    low: float
    """25th percentile."""
    high: float
    """75th percentile."""


def interleave(
    candidates: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    calls: int,
    pause: float = 0.03,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every candidate in turn, round after round, each round starting with another one.

    Args:
        candidates: by name; called with a counter, by which they rotate inputs and weights so that no call finds its
            data in a cache because the call before it left it there.
        rounds: turns per candidate; calls: timed calls per turn, after one that is not timed (it wakes the threads).
        pause: seconds between turns, for the threads that the candidate before left spinning.
        after_round: called after each round, to show progress.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    counter = dict.fromkeys(names, 0)
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            for call in range(calls + 1):
                start = time.perf_counter()
                candidates[name](counter[name])
                elapsed = time.perf_counter() - start
                counter[name] += 1
                if call > 0:
                    seconds[name].append(elapsed)
        after_round()
    return {name: Timing(*np.percentile(taken, [50, 25, 75]).tolist()) for name, taken in seconds.items()}
