"""Cleaning of captions from the web by the rules of DeepFloyd-IF, as the published models expect.

The rules are a table, applied in order. They remove addresses, file names, article numbers and
advertising, and normalise punctuation. Some also change ordinary captions ("3x5 print" loses its
size); the models were trained so.
"""

from __future__ import annotations

import html
import re
import urllib.parse

from llamagen.support.errors import importing

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_QUOTES = "\"'"
_MAX_DASHES = 3
"""A caption with more dashes is a file name: dashes and underscores become spaces."""


_Rule = tuple[re.Pattern[str], str]
"""A pattern, and the replacement of its matches."""


def _rule(pattern: str, replacement: str = "") -> _Rule:
    return re.compile(pattern), replacement


def _address(scheme: str) -> _Rule:
    """Return the rule for web addresses: of one with a scheme, only the start is removed."""
    start = rf"{scheme}:(?:/{{1,3}}|[a-z0-9%])"
    domain = rf"[a-z0-9.\-]+\.(?:{_DOMAINS})[\w/\-]*\b/?(?!@)"
    return _rule(rf"\b(?:{start}|{domain})")


_BEFORE_HTML = (_rule("<person>", "person"), _address("https?"), _address("www"))

_SIGNS = (
    _rule(r"@\w+\b"),  # names on social networks
    _rule("[\u31c0-\u9fff]+"),  # Chinese, Japanese and Korean
    # One dash for all of Unicode's.
    _rule(
        "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030"
        "\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    _rule("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    _rule("[\u2018\u2019]", "'"),
    _rule("&quot;?"),
    _rule("&amp"),
    _rule(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    _rule(r"\d:\d\d\s+$"),
    _rule(r"\\n", " "),
    # Numbers of articles and pictures.
    _rule(r"#\d{1,3}\b"),
    _rule(r"#\d{5,}\b"),
    _rule(r"\b\d{6,}\b"),
    _rule(rf"\S+\.(?:{_FILE_TYPES})"),
    _rule(rf"[{_QUOTES}]{{2,}}", '"'),
    _rule(r"\.{2,}", " "),
    _rule(
        "[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\\[\\]{}|\\\\/*]+",
        " ",
    ),
    _rule(r"\s+\.\s+", " "),
)

_WORDS = (
    # Codes of products: letters and digits mixed.
    _rule(r"\b[a-z]{1,3}\d{3,15}\b"),
    _rule(r"\b[a-z]+\d+[a-z]+\b"),
    _rule(r"\b\d+[a-z]+\d+\b"),
    # Advertising.
    _rule(r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    _rule(r"(?:free\s)?download(?:\sfree)?"),
    _rule(r"\bclick\b\s(?:for|on)\s\w+"),
    _rule(rf"\b(?:{_FILE_TYPES})(?:\simages?)?"),
    _rule(r"\bpage\s+\d+\b"),
    _rule(r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    _rule("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b"),  # 1920x1080
    # Spaces where they belong.
    _rule(r"\b\s+:\s+", ": "),
    _rule(r"(\D[,./])\b", r"\1 "),
    _rule(r"\s+", " "),
)

_ENDS = (
    _rule(rf"^[{_QUOTES}]([\w\W]+)[{_QUOTES}]$", r"\1"),
    _rule(r"^['_,\-:;]"),
    _rule(r"['_,\-:+]$"),
    _rule(r"^\.\S+$"),
)

_DASHES = re.compile("[-_]")


def clean_caption(caption: str) -> str:
    """Return a caption cleaned as for the published models: twice. It may be empty.

    Raises InputError if packages are not installed.
    """
    return _clean_once(_clean_once(caption))


def _clean_once(caption: str) -> str:
    with importing("cleaning captions needs", "'llamagen[text]', or switch the cleaning off"):
        from bs4 import BeautifulSoup
        from ftfy import fix_text
    text = urllib.parse.unquote_plus(caption).strip().lower()
    text = str(BeautifulSoup(_apply(_BEFORE_HTML, text), "html.parser").text)
    text = _apply(_SIGNS, text)
    if len(_DASHES.findall(text)) > _MAX_DASHES:
        text = _DASHES.sub(" ", text)
    text = html.unescape(html.unescape(fix_text(text))).strip()
    text = _apply(_WORDS, text).strip()
    return _apply(_ENDS, text).strip()


def _apply(rules: tuple[_Rule, ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
