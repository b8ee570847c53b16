"""Timing alternatives side by side, so that a drift of the machine falls on all of them."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all timed calls of one candidate."""

    median: float
    low: float
    """25th percentile."""
    high: float
    """75th percentile."""
    turns: list[float]
    """The median of each turn."""


def times_as_fast(timing: Timing, others: Iterable[Timing]) -> float:
    """How many times as fast one is as the fastest of others, turn by turn, and the median of that.

    Medians of all turns would compare a machine that changes its speed in between with itself.
    """
    best = map(min, zip(*(other.turns for other in others), strict=True))
    return median(other / own for other, own in zip(best, timing.turns, strict=True))


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
    return {name: _timing(np.reshape(taken, (rounds, calls))) for name, taken in seconds.items()}


def _timing(turns: NDArray[np.float64]) -> Timing:
    low, middle, high = np.percentile(turns, [25, 50, 75]).tolist()
    return Timing(middle, low, high, np.median(turns, axis=1).tolist())
