"""Progress with the time left: a bar on a terminal, a line every ten seconds elsewhere. Both go to stderr."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_INTERVAL_S = 10.0

Item = TypeVar("Item")


@contextmanager
def shown_progress(
    description: str, total: int, show: bool = True, amounts: tuple[ProgressColumn, ...] = (TaskProgressColumn(),)
) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts what is done of `total`, shown if `show`; `amounts` are the bar's numbers."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not show:
        yield lambda done: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(description, total=total)
            yield lambda done: progress.advance(task, done)
    else:
        yield _Lines(description, total, console).advance


def byte_progress(description: str, total: int, show: bool) -> AbstractContextManager[Callable[[int], None]]:
    """`shown_progress` of bytes."""
    return shown_progress(description, total, show, (DownloadColumn(), TransferSpeedColumn()))


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield `items`, counting each as done when the next is asked for."""
    with shown_progress(description, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own, and leave its setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Lines:
    def __init__(self, description: str, total: int, console: Console) -> None:
        self._description = description
        self._total = total
        self._console = console
        self._done = 0
        self._start = self._last_line = time.monotonic()

    def advance(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._last_line < LINE_INTERVAL_S or not self._done:
            return
        self._last_line = now
        left = (now - self._start) * (self._total - self._done) / self._done
        self._console.print(
            f"{self._description}: {self._done / self._total:.0%} done, {timedelta(seconds=round(left))} left"
        )
