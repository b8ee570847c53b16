"""One choice of a response: the engine's tokens become pieces of text, cut at the first stop."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cast_serve.engine.types import FinishReason, TokenEvent
from cast_serve.server.stop import StopStrings
from cast_serve.server.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token adds to a choice.

    Attributes:
        text: new text; empty while a character is unfinished or a stop string may be coming.
        tokens: (offset of its text in the choice, token) of each token whose text is now out, if log-probabilities
            were asked for. The token that stopped the text is not among them.
        finish_reason: set on the last delta.
    """

    text: str
    tokens: Sequence[tuple[int, TokenEvent]] = ()
    finish_reason: FinishReason | None = None


class ChoiceText:
    """Feeds on one generation's events.

    Attributes:
        completion_tokens: tokens generated so far, the stopping one included.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, logprobs: bool) -> None:
        self.completion_tokens = 0
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stops)
        self._logprobs = logprobs
        self._decoded = 0  # characters, held-back ones included
        self._shown = 0  # characters
        self._unshown: deque[tuple[int, int, TokenEvent]] = deque()  # start, end, token

    def feed(self, event: TokenEvent) -> Delta:
        self.completion_tokens += 1
        stopped_by_token = event.finish_reason == "stop"
        piece = "" if stopped_by_token else self._detokenizer.feed(event.token_id)
        if event.finish_reason is not None:
            piece += self._detokenizer.flush()
        text, stopped_by_text = self._stop.feed(piece)
        reason = "stop" if stopped_by_text else event.finish_reason
        if reason is not None:
            text += self._stop.flush()
        if not self._logprobs:
            return Delta(text, (), reason)
        if not stopped_by_token:
            self._unshown.append((self._decoded, self._decoded + len(piece), event))
        self._decoded += len(piece)
        self._shown += len(text)
        return Delta(text, self._tokens_shown(cut=stopped_by_text, last=reason is not None), reason)

    def _tokens_shown(self, *, cut: bool, last: bool) -> list[tuple[int, TokenEvent]]:
        """Tokens whose text is out: all of it while text goes on, any of it once a stop string has cut the text."""
        shown = []
        while self._unshown:
            start, end, event = self._unshown[0]
            if (start >= self._shown) if cut else (end > self._shown and not last):
                break
            shown.append((start, event))
            self._unshown.popleft()
        return shown
