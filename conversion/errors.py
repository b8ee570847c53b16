"""The one exception whose message is written for the person at the command line."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence: what is wrong, and how to mend it.

    The command line prints it without a traceback and exits with status 2; the server answers 4xx.
    """
