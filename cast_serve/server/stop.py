"""Stop strings: cut the text before the first one, and hold text back only while it could still become one."""

from collections.abc import Sequence


class StopStrings:
    """Watches one choice's text as it arrives in pieces.

    The outcome does not depend on how the text is cut into pieces: the stop string that is completed first wins, as if
    the text had come character by character.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Return the text that may be shown now, and whether a stop string was met (then nothing may follow)."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = len(text) - self._could_match(text)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """Return what is still held back; the text ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _could_match(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        return max(
            next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
            for stop in self._stops
        )
