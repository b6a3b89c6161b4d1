"""Exceptions for bad input."""


class InputError(ValueError):
    """Bad input: a value, the content of a file, a combination of settings.

    The message is one line with the input, the reason and the remedy. The command line prints it
    without a traceback and exits with status 2; other exceptions are bugs or faults of the machine.
    """


class NotFiniteError(InputError):
    """Infinite or NaN logits of a transformer, due to its precision or its weights.

    A server's client, who chose neither, gets another status than for bad input.
    """
