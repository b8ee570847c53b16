"""What `vllm serve` and the like print last when a packed checkpoint is refused: the sentence, without a traceback."""

import sys
from collections.abc import Iterator
from types import TracebackType

from conversion.errors import InputError


def show_refusals_plainly() -> None:
    """Print an InputError that nobody catches as one line; other errors are shown as before. May be called again."""
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook()


class _Hook:
    def __init__(self) -> None:
        self._others = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        refusal = next((each for each in _chain(error) if isinstance(each, InputError)), None)
        if refusal is None:
            self._others(kind, error, traceback)
        else:
            print(f"error: {refusal}", file=sys.stderr)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it came from; vLLM's configuration is checked by pydantic, which keeps causes in a list."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        for details in seen.errors() if hasattr(seen, "errors") else ():
            if isinstance(cause := details.get("ctx", {}).get("error"), BaseException):
                yield cause
        seen = seen.__cause__ or seen.__context__
