"""What was measured, and comparisons in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from benchmarks.cpu.job import Turn
from benchmarks.report.statistics import Spread

VALUES = ("fp32", "bf16", "int8", "int4")


@dataclass
class Measured:
    """One candidate's measurements.

    Attributes:
        name, family, values: see Candidate.
        weight_bytes: on disk.
        perplexity: on the held-out windows; None where there is no text.
        turns: one for each round.
    """

    name: str
    family: str
    values: str
    weight_bytes: int
    perplexity: float | None
    turns: list[Turn] = field(default_factory=list)

    def speed(self, users: int) -> list[float]:
        """Output tokens per second end to end, by round."""
        return [turn.speeds[users].tokens_per_s for turn in self.turns]

    def decoding(self, users: int) -> list[float]:
        """Output tokens per second once the prompts are read, by round."""
        return [turn.speeds[users].decoded_per_s for turn in self.turns]

    def prefill(self) -> list[float]:
        """Tokens of the long prompt per second, by round."""
        return [turn.prefill_per_s for turn in self.turns]

    @property
    def weight_memory(self) -> int | None:
        """Bytes that loading the weights made resident, median over the rounds; None where that is not known."""
        known = [turn.weight_memory for turn in self.turns if turn.weight_memory is not None]
        return round(median(known)) if known else None

    @property
    def peak_memory(self) -> int:
        """Median over the rounds, bytes."""
        return round(median(turn.peak_memory for turn in self.turns))


Rate = Callable[[Measured], list[float]]
"""A speed by round."""


def rates(concurrency: Sequence[int]) -> dict[str, Rate]:
    """Every speed that is compared, by name."""
    found: dict[str, Rate] = {f"{users} at once": partial(_speed, users=users) for users in concurrency}
    return found | {"prefill": Measured.prefill}


def _speed(measured: Measured, users: int) -> list[float]:
    return measured.speed(users)


@dataclass(frozen=True)
class Rival:
    """What a user would pick instead: in each speed the fastest of several."""

    name: str
    candidates: list[Measured]

    def fastest(self, rate: Rate) -> Measured:
        return max(self.candidates, key=lambda measured: median(rate(measured)))

    def ratio(self, measured: Measured, rate: Rate) -> Spread:
        """How many times as fast `measured` is as the fastest, round against round."""
        rounds = zip(rate(measured), rate(self.fastest(rate)), strict=True)
        return Spread.of([mine / other for mine, other in rounds])


def rivals(found: Sequence[Measured]) -> list[Rival]:
    """The fastest dense one of each number format, and each of llama.cpp's."""
    dense = [
        Rival(f"dense {values}", [m for m in found if m.family == "dense" and m.values == values]) for values in VALUES
    ]
    others = [Rival(m.name, [m]) for m in found if m.family == "llama.cpp"]
    return [rival for rival in dense if rival.candidates] + others
