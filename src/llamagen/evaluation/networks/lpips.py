"""LPIPS, a perceptual distance of images (arXiv 1801.03924).

Both images go through VGG16; at five depths the squared differences of their features are weighted
by a head that was fitted to people's judgements.

Shapes: B images, C channels, H x W pixels, h x w positions of a feature map.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llamagen.support.storage as storage
from llamagen.evaluation.networks import weights
from llamagen.support.errors import InputError

FILE_NAME = "lpips-vgg16.safetensors"
"""All weights in one file of 59 MB, as ``save_lpips`` writes it and the cache holds it."""

HEADS_FILE = weights.PublicFile(
    name="vgg.pth",
    url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
    "v0.1/vgg.pth",
    # Computed from the file in the repository (commit 082bb24) and in the package lpips 0.1.4,
    # which are the same; their MD5 is the one that taming-transformers gives, d507d734...
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)
"""The heads (7 kB)."""

TRUNK_FILE = weights.PublicFile(
    name="vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    # The file's name has its first eight digits; the whole is what several projects that pin
    # their weights record independently of each other.
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
"""VGG16 with its classifier, which is nine tenths of it (553 MB)."""

# The small one first: if the network lacks a file, little has been downloaded in vain.
_PUBLIC_FILES = (HEADS_FILE, TRUNK_FILE)
_REMEDY = (
    f"give the folder with {TRUNK_FILE.name} ({TRUNK_FILE.url}) and {HEADS_FILE.name} "
    f"({HEADS_FILE.url}), or train without LPIPS: perceptual_weight 0"
)

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Of each of VGG16's five stages."""
_MIN_SIDE = 2 ** (len(_WIDTHS) - 1)
"""Pixels of which one position is left in the last stage."""
_PURPOSE = "the perceptual loss"


class Lpips(nn.Module):
    """LPIPS 0.1 with VGG16, with the state-dict keys of the two public files.

    Its weights take no gradient, images do; it stays in eval mode.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: tuple[int, ...] = _WIDTHS) -> None:
        """A network with arbitrary weights; other ``widths`` than VGG16's are for tests."""
        super().__init__()
        layers: list[nn.Module] = []
        self._taps = set[int]()
        """The last layer of each stage."""
        channels = 3
        for stage, (width, convolutions) in enumerate(zip(widths, _CONVOLUTIONS, strict=True)):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self._taps.add(len(layers) - 1)
            # The identity stands in for the dropout with which heads are fitted.
            head = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{stage}", nn.ModuleDict({"model": head}))
        self.features = nn.Sequential(*layers)
        # For images in [-1, 1] to have about the mean and deviation that VGG16 was trained with.
        # Not on the current device, which is "meta" for weights that are read later.
        values = {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}
        for name, each in values.items():
            buffer = torch.tensor(each, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Return distances (B,) of images (B, 3, H, W) in [-1, 1] to references, in float32.

        Sides are at least 16 pixels. Under autocast VGG16 computes in its precision, everything
        else in float32.
        """
        if images.shape != references.shape or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"images of shape {tuple(images.shape)} cannot be compared with references of "
                f"shape {tuple(references.shape)}; LPIPS needs both as (B, 3, H, W)"
            )
        height, width = images.shape[-2:]
        if min(height, width) < _MIN_SIDE:
            raise InputError(
                f"images of {width}x{height} pixels are too small for LPIPS: both sides must be "
                f"at least {_MIN_SIDE}; train on larger images or with perceptual_weight 0"
            )
        distances = images.new_zeros(len(images), dtype=torch.float32)
        # Stage by stage: features of references, which need no gradient, are dropped at once.
        stages = zip(self._features(images), self._features(references), strict=True)
        for stage, (a, b) in enumerate(stages):
            head = self.get_submodule(f"lin{stage}.model")
            with torch.autocast(images.device.type, enabled=False):
                a, b = (F.normalize(each.float(), dim=1, eps=1e-10) for each in (a, b))
                distances = distances + head((a - b).square()).mean((1, 2, 3))
        return distances

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """VGG16's features (B, C, h, w) at the end of each stage."""
        x = (images - self.shift) / self.scale
        # As in the tokenizer: convolutions are faster in this layout, if weights have it as well.
        x = x.contiguous(memory_format=torch.channels_last)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self._taps:
                yield x


def load_lpips(source: Path | None = None) -> Lpips:
    """Load LPIPS on the CPU.

    ``source`` is a file with all weights (``save_lpips``), or a folder with that file or with the
    two public ones. Without it they are taken from the cache (``storage.cache_folder``), or
    downloaded into it; for several processes see ``weights.cached``. FileNotFoundError or
    InputError if a file is missing or damaged, or the download failed.
    """
    if source is not None:
        return _from_files(_local_files(Path(source).expanduser()))
    cached = storage.cache_folder() / FILE_NAME
    if cached.is_file():
        try:
            return _from_files([cached])
        except InputError as error:
            raise InputError(f"{error}; without that file it is downloaded again") from error
    cache = weights.writable_cache(_PURPOSE)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".lpips.") as folder:
        paths = [Path(folder) / file.name for file in _PUBLIC_FILES]
        for file, path in zip(_PUBLIC_FILES, paths, strict=True):
            weights.download(file, path, purpose=_PURPOSE, remedy=_REMEDY)
        model = _from_files(paths)
    save_lpips(model, cached)
    return model


def save_lpips(model: Lpips, path: Path) -> None:
    """Write all weights atomically into one .safetensors file, which ``load_lpips`` reads."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    storage.write_bytes(path, safetensors.torch.save(state, metadata={"format": "pt"}))


def _local_files(source: Path) -> list[Path]:
    """The files that hold all weights together."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; {_REMEDY}")
    for whole in (source, source / FILE_NAME):
        if whole.is_file():
            return [whole]
    files = [source / file.name for file in _PUBLIC_FILES]
    if missing := [path.name for path in files if not path.is_file()]:
        raise InputError(
            f"{source} holds no weights of LPIPS: {' and '.join(missing)} not found; {_REMEDY}"
        )
    return files


def _from_files(paths: list[Path]) -> Lpips:
    """The network whose weights ``paths`` hold together, without VGG16's classifier."""
    found = itertools.chain.from_iterable(weights.read(path).items() for path in paths)
    tensors = {name: tensor for name, tensor in found if not name.startswith("classifier.")}
    source = " and ".join(map(str, paths))
    for part, prefix in (("VGG16", "features."), ("the heads of LPIPS", "lin")):
        if not any(name.startswith(prefix) for name in tensors):
            first = ", ".join(list(tensors)[:3]) or "no weights"
            raise InputError(f"{source} lacks {part}, it holds {first}; {_REMEDY}")
    model = weights.build(Lpips, tensors, source=source, kind="LPIPS network")
    for name, tensor in tensors.items():
        if name.startswith("lin") and bool((tensor < 0).any()):
            raise InputError(
                f"{source}: weight {name} holds numbers below 0, which no distance can have; get "
                f"{HEADS_FILE.name} from {HEADS_FILE.url}"
            )
    return model
