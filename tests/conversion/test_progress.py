"""What progress says where there is no terminal to draw a bar on."""

from collections.abc import Iterator

import pytest

from conversion import progress
from conversion.progress import track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is four seconds after the last."""
    ticks: Iterator[int] = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))


@pytest.mark.usefixtures("clock")
def test_a_line_every_ten_seconds_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(8), "pruning")) == list(range(8))
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "pruning: 38% done, 0:00:20 left\npruning: 75% done, 0:00:08 left\n"


def test_short_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(track([1, 2], "adding")) == 3
    assert capsys.readouterr() == ("", "")
