"""Classes of images from the values of a column or the names of folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llamagen.support.errors import InputError

_MAX_CLASSES = 1_000_000


def sort_names(names: set[str]) -> list[str]:
    """Sort names of classes: alphabetically, but numbers by their value."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def classes_of(
    values: Sequence[Any], where: str, *, class_names: Sequence[str] | None = None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return labels and class names for a column of labels.

    Integers are labels already, of classes named "0", "1" and so on; anything else is the name of
    a class.

    Args:
        values: one per image.
        where: their table, for messages.
        class_names: the classes there may be; by default those that occur.

    Returns:
        A label of each image, and the names of all classes.

    Raises:
        InputError: a value is missing, a number is negative or too large, or a class is none of
            ``class_names``.
    """
    missing = next((i for i, value in enumerate(values) if value is None or value == ""), None)
    if missing is not None:
        raise InputError(f"row {missing} of {where} has no label; give it one or remove the row")
    if all(_is_number(value) for value in values):
        labels = [int(value) for value in values]
        count = max(labels, default=0) + 1 if class_names is None else len(class_names)
        if count > _MAX_CLASSES:
            raise InputError(f"{where} has the label {count - 1}; is it a label at all?")
        for row, label in enumerate(labels):
            if not 0 <= label < count:
                raise InputError(
                    f"row {row} of {where} has the label {label}, but the classes are 0 to "
                    f"{count - 1}"
                )
        return tuple(labels), tuple(class_names or map(str, range(count)))
    names = [str(value) for value in values]
    classes = tuple(sort_names(set(names)) if class_names is None else class_names)
    index = {name: label for label, name in enumerate(classes)}
    for row, name in enumerate(names):
        if name not in index:
            raise InputError(
                f"row {row} of {where} has the class {name!r}, which the training images do not "
                f"have; rename it or remove the row"
            )
    return tuple(index[name] for name in names), classes


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.removeprefix("-").isdecimal()
    return isinstance(value, int) and not isinstance(value, bool)
