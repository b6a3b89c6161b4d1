"""Checkpoint files of any origin, recognised by their content, never by their name.

A .pt file of the published training keeps its weights under "model" (DDP), "module" (DeepSpeed),
"state_dict", "ema", or is itself their dictionary (FSDP). torch.compile and DDP put prefixes in
front of the names. Of what else is in the file (optimizer, counters), only the training's arguments
are kept: they tell what shapes do not.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import errno
import itertools
import logging
import mmap
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen.checkpoints.names import Kind
from llamagen.support.errors import InputError, one_line
from llamagen.support.weights import NamedTensors, read_safetensors, safetensors_shapes

ZIP_MAGIC = b"PK\x03\x04"
"""Start of torch.save's files."""
PICKLE_MAGIC = b"\x80"
"""Their start before torch 1.6."""

_HOLDERS = ("model", "module", "state_dict", "ema")
"""Keys of the weights, first choice first. The published code reads an image tokenizer from its
moving average if there is one, a transformer never."""

_MARKS: dict[Kind, re.Pattern[str]] = {
    "image tokenizer": re.compile(r"(encoder|decoder)\.conv_blocks\.\d+\."),
    "transformer": re.compile(r"layers\.\d+\.attention\.wqkv\."),
}
"""Names that no other architecture in use has."""

_STATISTIC = "quantize.codebook_used"
"""A running statistic of the published training."""
_NOT_WEIGHTS = ("freqs_cis", "causal_mask", "k_cache", "v_cache")
"""Last words of names of tables and caches, which are stored beside weights."""

_log = logging.getLogger(__name__)


def load_pickle(path: Path, *, mapped: bool) -> Any:
    """Load what torch.save wrote, on the CPU; InputError if it is damaged, or asks for code to run.

    Only tensors, plain containers, numbers, strings and ``argparse.Namespace`` are built. With
    ``mapped``, for files that begin with ``ZIP_MAGIC``, tensors stay in the file until read.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # A damaged file can raise nearly anything.
        # EINVAL: it named a place outside of itself.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        detail = one_line(error) or type(error).__name__
        detail = detail if len(detail) <= 120 else f"{detail[:120]}..."
        reason = f"is truncated or not a checkpoint ({detail}); copy or download it again"
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = (
                f"was not loaded: it asks to run {asked[1].rstrip('.')}, which weights do not need "
                f"and which may harm this machine; get the file from its maker, best as "
                f".safetensors"
            )
        raise InputError(f"{path} {reason}") from error


def release_pages(tensor: Tensor) -> None:
    """Free the memory of a tensor of a mapped file; it is read from the file again if need be.

    Otherwise, as on other systems than Linux, pages stay in memory until the mapping ends. Only
    for tensors of ``load_pickle(..., mapped=True)`` that nobody has written to: changes are lost.
    """
    if sys.platform != "linux":
        return
    storage = tensor.untyped_storage()
    # Whole pages only: a neighbour's would merely be read once more, but the call wants them.
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened file with the weights of one of the two models."""

    source: str
    """For error messages."""
    kind: Kind
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every weight, under the names that the models use."""
    arguments: Mapping[str, Any]
    """Arguments of the training, if the file has them."""
    tensors: NamedTensors
    """The weights, read as they are iterated over, once."""

    def size(self, name: str, axis: int) -> int:
        """Return the length of one axis of a weight; InputError if there is none."""
        shape = self.shapes.get(name)
        if shape is None or len(shape) <= axis or shape[axis] < 1:
            found = "is missing" if shape is None else f"has shape {shape}"
            raise InputError(f"{self.source}: not this {self.kind}: weight {name} {found}")
        return shape[axis]

    def count(self, pattern: str) -> int:
        """Return the number of modules in a list: of the indices that ``pattern`` captures.

        If some are left out, the weights of the last are missing from the model then expected.
        """
        return len({match[1] for name in self.shapes if (match := re.match(pattern, name))})


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a .pt, .safetensors or other file with weights; no weight is read.

    InputError if the file is damaged, would run code, or holds neither of the two models.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
        return _from_pickle(path, mapped=start.startswith(ZIP_MAGIC))
    if start[8:9] == b"{":  # behind the length of safetensors' header
        return _from_safetensors(path)
    if not start:
        reason = "it is empty"
    elif start.startswith(b"version https://git-lfs"):
        reason = "it is a pointer of Git LFS; run `git lfs pull` where it comes from"
    else:
        reason = f"it begins with {start[:16]!r}"
    raise InputError(
        f"{path} is neither a .pt nor a .safetensors checkpoint: {reason}; download it again"
    )


def _from_safetensors(path: Path) -> Checkpoint:
    shapes = safetensors_shapes(path)
    names = _clean_names(shapes, path)
    if (kind := _kind_of(names)) is None:
        raise _neither(path, shapes)
    name_of = {stored: name for name, stored in names.items()}
    return Checkpoint(
        source=str(path),
        kind=kind,
        shapes={name: shapes[stored] for name, stored in names.items()},
        arguments={},
        tensors=((name_of[old], read) for old, read in read_safetensors(path) if old in name_of),
    )


def _from_pickle(path: Path, *, mapped: bool) -> Checkpoint:
    content = load_pickle(path, mapped=mapped)
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds a {type(content).__name__}, expected a dictionary of weights"
        )
    holders = {name: content[name] for name in _HOLDERS if isinstance(content.get(name), Mapping)}
    found: dict[str, tuple[Kind, dict[str, Tensor]]] = {}
    for holder, inner in (*holders.items(), ("", content)):
        weights = _weights(inner, path)
        if (kind := _kind_of(weights)) is not None:
            found[holder] = (kind, weights)
    if not found:
        raise _neither(path, next(iter(holders.values()), content))
    kind, weights = next(iter(found.values()))
    if "ema" in found and kind == "image tokenizer":
        kind, weights = found["ema"]
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return Checkpoint(
        source=str(path),
        kind=kind,
        shapes={name: tuple(tensor.shape) for name, tensor in weights.items()},
        arguments=arguments if isinstance(arguments, Mapping) else {},
        tensors=_read_once(weights, mapped=mapped),
    )


def _weights(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a dictionary by clean names."""
    stored = [name for name in content if isinstance(name, str) and torch.is_tensor(content[name])]
    return {name: content[old] for name, old in _clean_names(stored, path).items()}


def _clean_names(stored: Iterable[str], path: Path) -> dict[str, str]:
    """Return stored names of weights by their names without the prefixes of wrappers.

    torch.compile's ``_orig_mod.`` may be anywhere, DDP's ``module.`` at the start or behind it.
    """
    names: dict[str, str] = {}
    for old in stored:
        name = re.sub(r"^(module\.)+", "", old.replace("_orig_mod.", ""))
        if name == _STATISTIC:
            continue
        if name.rpartition(".")[2] in _NOT_WEIGHTS:
            _log.warning("%s: %s is extra: it is no weight, and left out", path, old)
            continue
        if name in names:
            raise InputError(
                f"{path} holds two weights {name}, as {names[name]} and {old}; keep one of them"
            )
        names[name] = old
    return names


def _kind_of(names: Iterable[str]) -> Kind | None:
    return next((kind for name in names for kind, mark in _MARKS.items() if mark.match(name)), None)


def _neither(path: Path, content: Mapping[Any, Any]) -> InputError:
    names = [*map(str, itertools.islice(content, 3)), "..."][: len(content)]
    reason = f" of this architecture: it holds {', '.join(names)}" if names else ": it is empty"
    return InputError(f"{path} is neither an image tokenizer nor a transformer{reason}")


def _read_once(weights: dict[str, Tensor], *, mapped: bool) -> NamedTensors:
    """Yield each weight, and drop it once the next is asked for."""
    for name in list(weights):
        tensor = weights.pop(name)
        yield name, lambda tensor=tensor: tensor  # type: ignore[misc]
        if mapped:
            release_pages(tensor)
