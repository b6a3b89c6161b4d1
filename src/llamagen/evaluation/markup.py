"""Words and numbers as an evaluation's page shows them."""

from __future__ import annotations

import html
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import TypeGuard

NOTHING = "\N{EN DASH}"
"""Stands where there is no value."""

_DIGITS = 4
"""Significant ones that are shown of a measured number."""
_PLAIN_EXPONENTS = range(-4, 9)
"""Powers of ten of numbers that are written out."""
_MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPT = str.maketrans(
    "0123456789-",
    "\N{SUPERSCRIPT ZERO}\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}\N{SUPERSCRIPT THREE}"
    "\N{SUPERSCRIPT FOUR}\N{SUPERSCRIPT FIVE}\N{SUPERSCRIPT SIX}\N{SUPERSCRIPT SEVEN}"
    "\N{SUPERSCRIPT EIGHT}\N{SUPERSCRIPT NINE}\N{SUPERSCRIPT MINUS}",
)
# Bytes of file names that are not UTF-8 arrive as surrogates, which no page can hold; control
# characters have no place in HTML either.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_IDENTIFIER = re.compile(r"[a-z0-9_]+")
_SPELLINGS = {
    "clip": "CLIP",
    "fid": "FID",
    "kid": "KID",
    "lpips": "LPIPS",
    "psnr": "PSNR",
    "rfid": "rFID",
    "sfid": "sFID",
    "ssim": "SSIM",
}


def escaped(text: object) -> str:
    """Text from anywhere, safe between tags and within quotes."""
    return html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text)))


def spelled(name: str) -> str:
    """The name of a metric or setting for people: "best_fid" as "best FID"."""
    if not _IDENTIFIER.fullmatch(name):
        return name
    return " ".join(_SPELLINGS.get(word, word) for word in name.split("_"))


def is_number(value: object) -> TypeGuard[float]:
    """Also NumPy's numbers; truth values are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number_text(value: float | numbers.Integral) -> str:
    """A measured number, to about four significant digits."""
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}".replace("-", _MINUS)
    if not math.isfinite(value):
        return _in_words(value)
    if value == 0:
        return "0"
    decimals, exponent = _rounded(value)
    if exponent in _PLAIN_EXPONENTS:
        return fixed_text(value, max(0, decimals - exponent))
    return power_text(value, decimals)


def fixed_text(value: float, decimals: int) -> str:
    """A number with so many decimals."""
    if not math.isfinite(value):
        return _in_words(value)
    text = f"{value:,.{decimals}f}"
    # What is rounded to zero has no sign.
    return text.replace("-", _MINUS if text.strip("-0.,") else "")


def power_text(value: float, decimals: int) -> str:
    """A finite number as a multiple of a power of ten."""
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    if float(mantissa) == 0:
        return "0"
    power = str(int(exponent)).translate(_SUPERSCRIPT)
    return f"{mantissa.replace('-', _MINUS)} \N{MULTIPLICATION SIGN} 10{power}"


def column_texts(values: Sequence[object]) -> list[str]:
    """The cells of a column; numbers of similar size get the same decimals."""
    measured = [
        abs(float(value))
        for value in values
        if is_number(value) and math.isfinite(value) and value != 0
    ]
    low, high = min(measured, default=1.0), max(measured, default=1.0)
    if all(isinstance(value, numbers.Integral) for value in values if is_number(value)):
        return [value_text(value) for value in values]
    # Of what lies further apart, common decimals would show too much or too little.
    if high > 100 * low or low < 10**_PLAIN_EXPONENTS.start or high >= 10**_PLAIN_EXPONENTS.stop:
        return [value_text(value) for value in values]
    decimals = max([0, *(digits - exponent for digits, exponent in map(_rounded, measured))])
    return [
        fixed_text(value, decimals) if is_number(value) else value_text(value) for value in values
    ]


def value_text(value: object) -> str:
    """Any value of a table."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number_text(value) if is_number(value) else str(value)


def setting_text(value: object) -> str:
    """A setting: unlike what was measured, with all its digits, as one would type it."""
    if is_number(value) and math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{spelled(str(k))} {setting_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(setting_text, value)) or NOTHING
    return value_text(value)


def _rounded(value: float) -> tuple[int, int]:
    """Decimals of the rounded number's mantissa, without zeros at the end; and its exponent."""
    mantissa, exponent = f"{value:.{_DIGITS - 1}e}".split("e")
    return len(mantissa.strip("-").rstrip("0")) - 2, int(exponent)


def _in_words(value: float) -> str:
    if math.isnan(value):
        return "not a number"
    return "infinite" if value > 0 else "minus infinite"
