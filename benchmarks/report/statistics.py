"""Percentiles of requests, and ratios of rounds with their spread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.load.measurements import BenchResult, Level, RequestSample, Role

PERCENTILES = (50, 90, 99)

Verdict = Literal["better", "worse", "even"]


@dataclass(frozen=True)
class Metric:
    """A time that every request has one of (seconds; lower is better)."""

    key: str
    name: str
    meaning: str
    value: Callable[[RequestSample], float | None]


METRICS = (
    Metric("ttft", "TTFT", "time to first token", lambda sample: sample.ttft_s),
    Metric("tpot", "TPOT", "time per output token after the first", lambda sample: sample.tpot_s),
    Metric("end_to_end", "End to end", "time to the complete answer", lambda sample: sample.end_to_end_s),
)


def values(levels: Sequence[Level], metric: Metric) -> list[float]:
    """The metric of every successful request of these levels, in seconds."""
    found = (metric.value(sample) for level in levels for sample in level.succeeded)
    return [value for value in found if value is not None]


def percentiles(numbers: Sequence[float]) -> dict[int, float]:
    """p50, p90 and p99, linearly interpolated; NaN if there are no numbers."""
    if not numbers:
        return dict.fromkeys(PERCENTILES, float("nan"))
    return dict(zip(PERCENTILES, np.percentile(numbers, PERCENTILES).tolist(), strict=True))


@dataclass(frozen=True)
class Spread:
    """A value measured once per round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Spread":
        return cls(float(np.median(numbers)), min(numbers), max(numbers))

    def verdict(self, higher_is_better: bool) -> Verdict:
        """Judge a ratio sparse/dense: "even" where the rounds do not agree on the side of 1 they are on."""
        if self.low <= 1 <= self.high:
            return "even"
        return "better" if (self.low > 1) == higher_is_better else "worse"


@dataclass(frozen=True)
class Ratio:
    """Sparse divided by dense, of one quantity at one concurrency, round against round."""

    name: str
    concurrency: int
    spread: Spread
    higher_is_better: bool

    @property
    def verdict(self) -> Verdict:
        return self.spread.verdict(self.higher_is_better)


def throughput(result: BenchResult, role: Role, concurrency: int) -> Spread:
    """Generated tokens a second over the rounds."""
    return Spread.of([level.tokens_per_s for level in result.levels_of(role, concurrency)])


def ratios(result: BenchResult, concurrency: int) -> list[Ratio]:
    """Throughput and the medians of TTFT, TPOT and end-to-end time, sparse/dense, paired by round."""
    pairs = list(zip(result.levels_of("dense", concurrency), result.levels_of("sparse", concurrency), strict=True))
    found = [Ratio("tokens/s", concurrency, Spread.of([s.tokens_per_s / d.tokens_per_s for d, s in pairs]), True)]
    for metric in METRICS:
        per_round = [_median(s, metric) / _median(d, metric) for d, s in pairs]
        if np.isfinite(per_round).all():
            found.append(Ratio(metric.name, concurrency, Spread.of(per_round), False))
    return found


def _median(level: Level, metric: Metric) -> float:
    return percentiles(values([level], metric))[50]


def errors(result: BenchResult, role: Role) -> list[str]:
    """What went wrong, one entry for each failed request."""
    levels = (level for round_ in result.rounds_of(role) for level in round_.levels)
    return [sample.error for level in levels for sample in level.samples if sample.error is not None]


def resident_bytes(result: BenchResult, role: Role, concurrency: int) -> int:
    """Resident memory under this load in the last round, when every buffer that it needs has been used."""
    return result.levels_of(role, concurrency)[-1].resident
