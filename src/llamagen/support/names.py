"""What names, numbers and prompts that users write are, before anybody looks them up."""

from __future__ import annotations

import unicodedata

_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and signs that look like spaces."""
_INVISIBLE = frozenset(("Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp"))
"""Categories of Unicode."""
_MAX_DIGITS = 18


def normal_name(text: str) -> str:
    """Return a name in Unicode's composed form (NFC), without spaces around it.

    A Mac's folders have decomposed names, which look the same.
    """
    return unicodedata.normalize("NFC", text).strip()


def as_index(text: str) -> int | None:
    """Return the number that a text is, in ASCII digits; None for any other text."""
    text = text.strip()
    is_number = text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS
    return int(text) if is_number else None


def is_visible(text: str) -> bool:
    """Return whether a text is more than spaces, zero-width characters, and marks without letters.

    Control characters count as such, characters that Unicode does not define yet as visible.
    """
    return any(
        sign not in _BLANKS and unicodedata.category(sign) not in _INVISIBLE for sign in text
    )
