"""Names of a model's classes, and lookup by name."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
import logging
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import llamagen.support.storage as storage
from llamagen.support.errors import InputError
from llamagen.support.names import as_index, normal_name

FILE_NAME = "labels.json"

_log = logging.getLogger(__name__)


class RecordedName(str):
    """A class, or a text, in an image's metadata: no index, but with one to tell it from namesakes.

    ``class_index`` is -1 if it is not known.
    """

    class_index: int

    def __new__(cls, name: str, class_index: int) -> Self:
        """See the class."""
        self = super().__new__(cls, name)
        self.class_index = class_index
        return self


@dataclass(frozen=True)
class Labels:
    """Class names in the order of their indices, with aliases."""

    names: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...] = ()
    """Further names per class, such as WordNet ids; empty if there are none at all."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the name of a class."""
        return self.names[index]

    def find(self, text: str | int) -> int:
        """Return the index of a class by its index, name or alias.

        A text is a name as it is spelt, else as Unicode composes it, else in any case, else an
        index in ASCII digits. InputError, with similar names, if no class has this name, or more
        than one.
        """
        if not isinstance(text, str):
            index = operator.index(text)
        elif (named := self._named(text)) is not None:
            return named
        else:
            number = None if isinstance(text, RecordedName) else as_index(text)
            if number is None or (self._has_numbers and number >= len(self)):
                raise InputError(f"there is no class {text!r}; {self._suggestion(_folded(text))}")
            index = number
            if self._has_numbers:
                _log.warning("no class is named %s; read as an index, %r", text, self.names[index])
        if not 0 <= index < len(self):
            raise InputError(f"there is no class {index}; this model has 0 to {len(self) - 1}")
        return index

    def match(self, names: Iterable[str], source: str) -> dict[str, int]:
        """Return the class here of each name in ``source`` that is one; see ``find``.

        If they are all numbers, and no class here is named by one, they are indices, which is
        logged. InputError if a name has several classes.
        """
        wanted = list(dict.fromkeys(names))
        found, numbers = ({name: f(name) for name in wanted} for f in (self._named, as_index))
        if wanted and not self._has_numbers and None not in numbers.values():
            _log.warning("the classes of %s are numbers, no names: read as indices", source)
            found = numbers
        return {name: at for name, at in found.items() if at is not None and at < len(self)}

    def match_all(self, names: Iterable[str], source: str, known: str) -> dict[str, int]:
        """See ``match``; InputError if a name is no class here, of ``known`` images or models."""
        names = list(names)
        found = self.match(names, source)
        if missing := [name for name in names if name not in found]:
            raise InputError(
                f"{source} has a class {missing[0]!r} that {known} do not have; rename or remove it"
            )
        return found

    def save(self, path: Path) -> None:
        """Write JSON: a list of objects with a name and aliases."""
        entries = [
            {"name": name, "aliases": aliases} if aliases else {"name": name}
            for name, aliases in self._entries()
        ]
        storage.write_json(path, entries)

    def _named(self, text: str) -> int | None:
        """Return the class of a name or alias; None if there is none, InputError if several."""
        for form, classes in zip(_FORMS, self._spellings, strict=True):
            found = classes.get(form(text), ())
            if isinstance(text, RecordedName) and text.class_index in found:
                return text.class_index
            if len(found) > 1:
                indices, names = map(str, found), (repr(self.names[index]) for index in found)
                raise InputError(
                    f"class {text!r} is ambiguous: it names {', '.join(indices)} "
                    f"({', '.join(names)}); give a name as it is spelt, or the number"
                )
            if found:
                return found[0]
        return None

    @functools.cached_property
    def _spellings(self) -> tuple[dict[str, list[int]], ...]:
        """Classes by their names and aliases, in each of ``_FORMS``."""
        tables: tuple[dict[str, list[int]], ...] = tuple({} for _ in _FORMS)
        for index, (name, aliases) in enumerate(self._entries()):
            for form, table in zip(_FORMS, tables, strict=True):
                for key in {form(text) for text in (name, *aliases)}:
                    table.setdefault(key, []).append(index)
        return tables

    @functools.cached_property
    def _has_numbers(self) -> bool:
        """Whether a name or alias is a number."""
        return any(as_index(name) is not None for name in self._spellings[0])

    def _entries(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        return zip(self.names, self.aliases or ((),) * len(self), strict=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file of ``save``, or a list of names; InputError if it holds something else."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            return cls._from_entries(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{path} is not a list of class names ({error}); expected [{{"name": "cat"}}, ...]'
            ) from error

    @classmethod
    def imagenet(cls) -> Self:
        """Return those of ImageNet-1k, in the order of the public models (sorted WordNet ids)."""
        resource = importlib.resources.files("llamagen") / "assets" / "imagenet_classes.json"
        return cls._from_entries(json.loads(resource.read_text(encoding="utf-8")))

    @classmethod
    def numbered(cls, count: int) -> Self:
        """Return names for classes of which only the number is known."""
        return cls(tuple(f"class {index}" for index in range(count)))

    @classmethod
    def _from_entries(cls, entries: object) -> Self:
        if not isinstance(entries, list):
            raise TypeError(f"found a {type(entries).__name__}")
        plain = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
        names = tuple(str(entry["name"]) for entry in plain)
        aliases = tuple(tuple(map(str, entry.get("aliases", ()))) for entry in plain)
        return cls(names, aliases if any(aliases) else ())

    def _suggestion(self, wanted: str) -> str:
        known = {_folded(name): name for name in self.names}
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
        # Words of longer names, such as "retriever".
        near += [name for name in known if wanted in name.split() and name not in near]
        if near:
            return "did you mean " + " or ".join(repr(known[name]) for name in near[:5]) + "?"
        sample = ", ".join(self.names[:5])
        return f"this model has {len(self)} classes: {sample}{', ...' if len(self) > 5 else ''}"


def _folded(text: str) -> str:
    text = normal_name(normal_name(text).casefold())
    if re.fullmatch(r"-?[0-9]+", text):
        # So "1" finds "01", but never "-1".
        return re.sub(r"(?<![0-9])0+(?=[0-9])", "", text)
    return " ".join(text.replace("_", " ").replace("-", " ").split()) or text


_FORMS: tuple[Callable[[str], str], ...] = (str, normal_name, _folded)
"""Spellings of a name, the most exact first."""
