"""The one error that means: what was asked for cannot be done, and why."""


class InputError(ValueError):
    """What a person asked for cannot be done; the message says what is wrong and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
