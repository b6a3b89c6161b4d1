"""Exceptions for bad input, and for optional packages that are missing."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: a value, the content of a file, a combination of settings.

    The message is one line with the input, the reason and the remedy. The command line prints it
    without a traceback and exits with status 2; other exceptions are bugs or faults of the machine.
    """

    def __str__(self) -> str:
        # Names of files, columns and classes may have line breaks in them.
        return " ".join(super().__str__().splitlines())


class NotFiniteError(InputError):
    """Infinite or NaN logits of a transformer, due to its precision or its weights.

    A server's client, who chose neither, gets another status than for bad input.
    """


@contextlib.contextmanager
def importing(who: str, package: str) -> Iterator[None]:
    """Import optional packages in the block; InputError, which says what to install, if one fails.

    ``who`` needs them, such as "curves need"; ``package`` is pip's argument, and other remedies.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{who} a package that cannot be imported ({one_line(error)}); install it with pip "
            f"install {package}"
        ) from error


def one_line(reason: object) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(reason).split())
