"""The exceptions whose messages are written for the person at the command line."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence: what is wrong, and how to mend it.

    The command line prints it without a traceback and exits with status 2; the server answers 4xx.
    """


class Interrupted(Exception):
    """Work was asked to stop and did; the message says what is kept and how to go on.

    The command line prints it without a traceback and exits with status 143, as for SIGTERM.
    """

    status = 143
