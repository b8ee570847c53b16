"""Ratios of timings."""

import pytest

from benchmarks.timing import Timing, interleave, times_as_fast


def test_a_machine_that_changes_its_speed_between_turns_changes_no_ratio() -> None:
    dense = Timing(4.0, 2.0, 4.0, [4.0, 4.0, 2.0, 2.0, 4.0])
    other = Timing(5.0, 3.0, 5.0, [5.0, 5.0, 3.0, 3.0, 5.0])
    sparse = Timing(1.0, 1.0, 2.0, [2.0, 2.0, 1.0, 1.0, 2.0])
    assert times_as_fast(sparse, [dense, other]) == 2.0
    assert times_as_fast(other, [dense]) == pytest.approx(0.8)


def test_each_turn_has_its_median() -> None:
    timings = interleave({"a": lambda _: None, "b": lambda _: None}, rounds=3, calls=4, pause=0.0)
    for timing in timings.values():
        assert len(timing.turns) == 3
        assert 0 <= min(timing.turns) <= timing.median <= max(timing.turns)
