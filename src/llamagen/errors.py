"""The one exception that means "what you gave me cannot be used"."""


class InputError(ValueError):
    """Bad input from the caller: a value, a file's content, a combination of settings.

    The message is one line that names the input, the reason and the remedy. The command line
    prints it without a traceback and exits with status 2; every other exception is a bug or a
    fault of the machine.
    """
