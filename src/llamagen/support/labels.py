"""Names of a model's classes, and lookup by name."""

from __future__ import annotations

import difflib
import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import llamagen.support.storage as storage
from llamagen.support.errors import InputError

FILE_NAME = "labels.json"


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
        """Return the index of a class by its index, name or alias, in any case.

        InputError, with similar names, if no class has this name, or more than one.
        """
        if isinstance(text, int) or text.strip().isdecimal():
            index = int(text)
            if not 0 <= index < len(self):
                raise InputError(f"there is no class {index}; this model has 0 to {len(self) - 1}")
            return index
        wanted = _folded(text)
        found = [
            index
            for index, (name, aliases) in enumerate(self._entries())
            if wanted in map(_folded, (name, *aliases))
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"class {text!r} is ambiguous: it names {', '.join(map(str, found))}; "
                f"give the number instead"
            )
        raise InputError(f"there is no class {text!r}; {self._suggestion(wanted)}")

    def save(self, path: Path) -> None:
        """Write JSON: a list of objects with a name and aliases."""
        entries = [
            {"name": name, "aliases": aliases} if aliases else {"name": name}
            for name, aliases in self._entries()
        ]
        storage.write_json(path, entries)

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
    return " ".join(text.replace("_", " ").replace("-", " ").casefold().split())
