"""Files of images in memory: those that forms bring, and those that are fetched by URL.

Nothing of a form reaches the file system, whatever its size.
"""

from __future__ import annotations

import dataclasses
import io
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from llamagen.data.images import to_rgb
from llamagen.support.errors import InputError, one_line
from llamagen.support.pictures import DECODING_ERRORS

_Form = TypeVar("_Form", bound=BaseModel)

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that Pillow may read. It knows more, some of which run other programs."""


class _Parser(MultiPartParser):
    spool_max_size = sys.maxsize


async def read_form(
    request: Request, kind: type[_Form], files: Mapping[str, bool]
) -> tuple[_Form, dict[str, bytes]]:
    """Return the fields and the files of a form; ``files`` says of each if it must be there.

    Raises RequestValidationError if a field is refused, InputError if anything else is wrong.
    """
    if request.headers.get("content-type", "").split(";")[0].strip() != "multipart/form-data":
        raise InputError("the body is no form; send multipart/form-data")
    try:
        parser = _Parser(request.headers, request.stream(), max_files=4, max_fields=64)
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, "message", "damaged")
        raise InputError(f"the form cannot be read ({reason})") from error
    fields: dict[str, str] = {}
    found: dict[str, bytes] = {}
    for given, value in form.multi_items():
        # As OpenAI's clients call the members of a list.
        name = given.removesuffix("[]")
        if name in fields or name in found:
            raise InputError(f"{name} is given twice; give it once")
        if isinstance(value, UploadFile):
            found[name] = await value.read()
        else:
            fields[name] = value
    for name in files.keys() & fields.keys():
        raise InputError(f"{name} is no file; send one")
    for name in found.keys() - files.keys():
        raise InputError(f"{name} is a file, but this API takes none of this name; leave it out")
    for name, needed in files.items():
        if needed and name not in found:
            raise InputError(f"{name} is missing; send an image file")
    try:
        return kind.model_validate(fields), found
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(errors) from error


def form_schema(kind: type[BaseModel], files: Mapping[str, bool]) -> dict[str, Any]:
    """Return the API's description of a form that ``read_form`` reads."""
    schema = kind.model_json_schema()
    for name, needed in files.items():
        schema["properties"][name] = {"type": "string", "format": "binary"}
        if needed:
            schema["required"].append(name)
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def open_upload(content: bytes, name: str, *, max_pixels: int, convert: bool = True) -> Image.Image:
    """Return the image of a file that was sent in the field ``name``, or raise InputError.

    It is upright and RGB with ``convert``. It may have ``max_pixels``, or Pillow's own limit.
    """
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
    if not content:
        raise InputError(f"{name} is an empty file; send an image")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            # Known before anything is unpacked.
            if image.width * image.height <= limit:
                image.load()
                return to_rgb(image) if convert else image
    except UnidentifiedImageError as error:
        text = f"{name} is no image of a known format; send a PNG, for example"
        raise InputError(text) from error
    except DECODING_ERRORS as error:
        reason = one_line(error) or "damaged"
        raise InputError(f"{name} cannot be read as an image ({reason})") from error
    raise InputError(
        f"{name} has {image.width}x{image.height} pixels, but no more than {limit} are taken; "
        f"make it smaller"
    )


class StoredFile(NamedTuple):
    """File of an image."""

    content: bytes
    media_type: str
    expires: float


@dataclasses.dataclass(kw_only=True)
class FileStore:
    """Holds files, under names nobody can guess, until they expire or newer ones need their memory.

    A file is kept for ``lifetime`` seconds; all may take ``memory`` bytes. Not for several threads.
    """

    lifetime: float
    memory: int
    clock: Callable[[], float] = time.monotonic
    _files: dict[str, StoredFile] = dataclasses.field(default_factory=dict, init=False)
    """The oldest first."""

    def add(self, content: bytes, media_type: str) -> str:
        """Keep a file; return its name."""
        self._forget_expired()
        name = secrets.token_urlsafe(24)
        self._files[name] = StoredFile(content, media_type, self.clock() + self.lifetime)
        sizes = [len(file.content) for file in self._files.values()]
        while len(sizes) > 1 and sum(sizes) > self.memory:
            sizes.pop(0)
            del self._files[next(iter(self._files))]
        return name

    def get(self, name: str) -> StoredFile | None:
        """Return the file of this name; None if there is none any more."""
        self._forget_expired()
        return self._files.get(name)

    def _forget_expired(self) -> None:
        now = self.clock()
        self._files = {name: file for name, file in self._files.items() if file.expires > now}
