"""How commands end on what the user got wrong, or on being stopped: with one sentence."""

import signal
import sys
from collections.abc import Callable

from conversion.errors import InputError, Interrupted


def run(command: Callable[[], object]) -> None:
    """Run a command; exits with 2 after an InputError, with its own status after Interrupted, with 143 on SIGTERM."""
    exit_on_sigterm()
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def exit_on_sigterm() -> None:
    """Leave by an exception when told to stop, so that half-written files go and processes that were started stop."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
