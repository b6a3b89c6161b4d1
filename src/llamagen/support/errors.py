"""The exception that means "what you gave me cannot be used", and one kind of it."""


class InputError(ValueError):
    """Bad input from the caller: a value, a file's content, a combination of settings.

    The message is one line that names the input, the reason and the remedy. The command line
    prints it without a traceback and exits with status 2; every other exception is a bug or a
    fault of the machine.
    """


class NotFiniteError(InputError):
    """A transformer's logits are infinite or no numbers: its precision or its weights are to blame.

    Whoever chose neither, as a server's client, has done nothing wrong.
    """
