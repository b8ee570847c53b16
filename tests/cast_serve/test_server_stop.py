"""Stop strings: the same cut however the text is split, and nothing held back for nothing."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cast_serve.server.stop import StopStrings

TEXT = st.text("ab ", max_size=20)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3)


def reference(text: str, stops: list[str]) -> str:
    """Read character by character until a stop string is complete."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def run(pieces: list[str], stops: list[str]) -> str:
    matcher, shown = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        shown += text
        if stopped:
            return shown
    return shown + matcher.flush()


@given(TEXT, STOPS, st.lists(st.integers(0, 20)))
def test_cut_does_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run(pieces, stops) == reference(text, stops)


@given(TEXT, STOPS)
def test_holds_back_only_what_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    for i, char in enumerate(text):
        shown, stopped = matcher.feed(char)
        if stopped:
            return
        held = matcher._held
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert text[: i + 1].endswith(shown + held)


def test_without_stop_strings_text_passes() -> None:
    assert StopStrings([]).feed("abc") == ("abc", False)
