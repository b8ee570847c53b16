"""Run cells one after the other, saying how many are left and how long they will take."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console

from benchmarks.comparison.study import Cell, Study


def run_cells(
    study: Study, cells: Sequence[Cell], finished: Callable[[list[dict[str, Any]]], None], console: Console
) -> list[dict[str, Any]]:
    """Return the records of `cells`, reusing finished ones.

    `finished` is called with all that are there, again after each new one, and at the end.
    """
    done = {number: record for number, cell in enumerate(cells) if (record := study.finished(cell)) is not None}
    if done:
        console.print(f"{len(done)} of {len(cells)} cells are there already")
        finished([record for _, record in sorted(done.items())])
    seconds, tokens = 0.0, 0
    for number, cell in enumerate(cells):
        if number not in done:
            left = [c for n, c in enumerate(cells) if n >= number and n not in done]
            console.rule(f"cell {number + 1} of {len(cells)}: {cell.label}{_time_left(left, seconds, tokens)}")
            start = time.monotonic()
            done[number] = study.run(cell)
            if cell.tokens is not None:
                seconds, tokens = seconds + time.monotonic() - start, tokens + cell.tokens
            if "failed" in done[number]:
                console.print(f"{cell.label} failed: {done[number]['failed']}")
            finished([record for _, record in sorted(done.items())])
    records = [record for _, record in sorted(done.items())]
    finished(records)
    return records


def _time_left(cells: Sequence[Cell], seconds: float, tokens: int) -> str:
    """By what a trained token took so far; nothing is known before the first trained cell."""
    if not tokens:
        return ""
    left = seconds / tokens * sum(cell.tokens or 0 for cell in cells)
    return f", about {timedelta(seconds=round(left))} left"
