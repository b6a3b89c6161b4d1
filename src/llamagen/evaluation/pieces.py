"""Results for many images, as artifacts of .npz pieces that all processes of a run make."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llamagen.support import distributed
from llamagen.support.artifact import Artifact, Format, MakePiece, Settings

PIECE = 256
"""Images of a piece."""

_FORMAT = Format(
    name="llamagen-evaluation",
    version=1,
    noun="results",
    settings_name="settings.json",
    piece_name="piece",
    suffixes=(".npz",),
    has_header=False,
)


def pieces_of(folder: Path, settings: Settings, count: int, **form: object) -> Artifact:
    """Return the results for ``count`` images in a folder; ``form`` are fields of ``Format``."""
    own = dataclasses.replace(_FORMAT, **form)  # type: ignore[arg-type]
    found = Artifact(folder, own, settings, items=count, piece_size=PIECE)
    found.rank, found.world_size = distributed.rank(), distributed.world_size()
    return found


def named_pieces(root: Path, kind: str, settings: Settings, count: int) -> Artifact:
    """Return results in a folder of their own in ``root``: other settings have another folder."""
    pieces = pieces_of(root, settings, count, noun=kind)
    pieces.folder = root / f"{kind.replace(' ', '-')}-{pieces.identity}"
    return pieces


def make_pieces(pieces: Artifact, make_piece: MakePiece, description: str) -> None:
    """Make the pieces that are not there yet; called in every process of a run.

    Each process makes its share and returns once all are there. Progress is shown on a terminal,
    under ``description``.

    Raises:
        InputError: the folder was begun with other settings, or is in use.
        OSError: the disk is full, or the folder cannot be written to.
    """
    is_shown = distributed.is_main()
    with pieces.begin(), pieces.progress_bar(description, "image", shown=is_shown) as bar:
        pieces.make(make_piece, bar.update)
    distributed.barrier()
