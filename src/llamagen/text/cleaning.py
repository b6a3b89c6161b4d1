"""Cleaning of captions from the web by the rules of DeepFloyd-IF, as the published models expect.

The rules are a table, applied in order. They remove addresses, file names, article numbers and
advertising, and normalise punctuation. Some also change ordinary captions ("3x5 print" loses its
size); the models were trained so.
"""

from __future__ import annotations

import html
import re
import urllib.parse
from collections.abc import Mapping

from llamagen.support.errors import importing

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_QUOTES = "\"'"
_MAX_DASHES = 3
"""A caption with more dashes is a file name: dashes and underscores become spaces."""

# Of an address with a scheme, only the start is removed.
_ADDRESS = rf"\b(?:%s:(?:/{{1,3}}|[a-z0-9%%])|[a-z0-9.\-]+\.(?:{_DOMAINS})[\w/\-]*\b/?(?!@))"

# Each table has patterns and the replacements of their matches.
_BEFORE_HTML = {"<person>": "person", _ADDRESS % "https?": "", _ADDRESS % "www": ""}

_SIGNS = {
    r"@\w+\b": "",  # names on social networks
    "[\u31c0-\u9fff]+": "",  # Chinese, Japanese and Korean
    # One dash for all of Unicode's.
    "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030"
    "\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+": "-",
    "[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]": '"',
    "[\u2018\u2019]": "'",
    "&quot;?": "",
    "&amp": "",
    r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}": " ",  # IP addresses
    r"\d:\d\d\s+$": "",
    r"\\n": " ",
    # Numbers of articles and pictures.
    r"#\d{1,3}\b": "",
    r"#\d{5,}\b": "",
    r"\b\d{6,}\b": "",
    rf"\S+\.(?:{_FILE_TYPES})": "",
    rf"[{_QUOTES}]{{2,}}": '"',
    r"\.{2,}": " ",
    "[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~"
    "()\\[\\]{}|\\\\/*]+": " ",
    r"\s+\.\s+": " ",
}

_WORDS = {
    # Codes of products: letters and digits mixed.
    r"\b[a-z]{1,3}\d{3,15}\b": "",
    r"\b[a-z]+\d+[a-z]+\b": "",
    r"\b\d+[a-z]+\d+\b": "",
    # Advertising.
    r"(?:worldwide\s+)?(?:free\s+)?shipping": "",
    r"(?:free\s)?download(?:\sfree)?": "",
    r"\bclick\b\s(?:for|on)\s\w+": "",
    rf"\b(?:{_FILE_TYPES})(?:\simages?)?": "",
    r"\bpage\s+\d+\b": "",
    r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b": " ",
    "\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b": "",  # 1920x1080
    # Spaces where they belong.
    r"\b\s+:\s+": ": ",
    r"(\D[,./])\b": r"\1 ",
    r"\s+": " ",
}

_ENDS = {
    rf"^[{_QUOTES}]([\w\W]+)[{_QUOTES}]$": r"\1",
    r"^['_,\-:;]": "",
    r"['_,\-:+]$": "",
    r"^\.\S+$": "",
}


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
    if text.count("-") + text.count("_") > _MAX_DASHES:
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(fix_text(text))).strip()
    text = _apply(_WORDS, text).strip()
    return _apply(_ENDS, text).strip()


def _apply(rules: Mapping[str, str], text: str) -> str:
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    return text
