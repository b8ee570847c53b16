"""How commands end on what the user got wrong, or on being stopped: with one sentence."""

import sys
from collections.abc import Callable

from conversion.errors import InputError, Interrupted


def run(command: Callable[[], object]) -> None:
    """Run a command; exits with 2 after an InputError, with its own status after Interrupted."""
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
