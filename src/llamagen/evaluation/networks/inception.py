"""Inception-v3 (arXiv 1512.00567) as FID uses it: the graph published with TensorFlow in 2015.

FID, sFID, Inception Score, precision and recall are defined by the outputs of this one graph, with
its peculiarities: resizing without half-pixel centres, average pooling that leaves padding out, a
maximum where the paper has an average in the last block, 1008 outputs for 1000 classes. Weights and
their names are those of the public conversion for torch.

Shapes: B images, C channels, H x W pixels, h x w positions of a feature map.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.checkpoints.sources import download_file
from llamagen.evaluation.features import NetworkOutput, require_images
from llamagen.evaluation.networks import weights
from llamagen.support import storage
from llamagen.support.errors import InputError
from llamagen.support.hub import is_repo_id
from llamagen.support.weights import digest

_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_FILE = weights.PublicFile(
    name=_NAME,
    url=f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_NAME}",
    # The file's name has its first eight digits; the whole is what several projects that pin
    # their weights record independently of each other.
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
"""The graph's weights, converted for torch (96 MB)."""

_SIDE = 299
"""Side in pixels of the square that the graph resizes images to."""
_PURPOSE = "the features of FID"
_REMEDY = f"give the path of {WEIGHTS_FILE.name} ({WEIGHTS_FILE.url})"


class _Layer(NamedTuple):
    """A convolution to ``width`` channels; with a stride above 1 it has no padding."""

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


_Branches = Mapping[str, tuple[_Layer | Mapping[str, _Layer], ...]]
"""Over the same input; layers one after another, and at the end perhaps a pair side by side."""
_Pool = Callable[[Tensor], Tensor]
_Plan = tuple[_Branches, _Pool, int | None]
"""Branches and a pooling beside them, with the channels of the convolution after it, if any."""

# There are fewer neighbours to average at the edges.
_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halved = partial(F.max_pool2d, kernel_size=3, stride=2)

_3x3, _5x5 = (3, 3), (5, 5)
_1x7, _7x1 = (1, 7), (7, 1)
_FORK = {"a": _Layer(384, (1, 3)), "b": _Layer(384, (3, 1))}


def _at_35(pooled: int) -> _Plan:
    branches = {
        "branch1x1": (_Layer(64),),
        "branch5x5": (_Layer(48), _Layer(64, _5x5)),
        "branch3x3dbl": (_Layer(64), _Layer(96, _3x3), _Layer(96, _3x3)),
    }
    return branches, _average, pooled


def _at_17(inner: int) -> _Plan:
    twice = (_Layer(inner, _7x1), _Layer(inner, _1x7), _Layer(inner, _7x1), _Layer(192, _1x7))
    branches = {
        "branch1x1": (_Layer(192),),
        "branch7x7": (_Layer(inner), _Layer(inner, _1x7), _Layer(192, _7x1)),
        "branch7x7dbl": (_Layer(inner), *twice),
    }
    return branches, _average, 192


def _at_8(pool: _Pool) -> _Plan:
    branches = {
        "branch1x1": (_Layer(320),),
        "branch3x3": (_Layer(384), _FORK),
        "branch3x3dbl": (_Layer(448), _Layer(384, _3x3), _FORK),
    }
    return branches, pool, 192


_35_TO_17 = {
    "branch3x3": (_Layer(384, _3x3, 2),),
    "branch3x3dbl": (_Layer(64), _Layer(96, _3x3), _Layer(96, _3x3, 2)),
}
_17_TO_8 = {
    "branch3x3": (_Layer(192), _Layer(320, _3x3, 2)),
    "branch7x7x3": (_Layer(192), _Layer(192, _1x7), _Layer(192, _7x1), _Layer(192, _3x3, 2)),
}
_BLOCKS: dict[str, _Plan] = {
    "Mixed_5b": _at_35(32),
    "Mixed_5c": _at_35(64),
    "Mixed_5d": _at_35(64),
    "Mixed_6a": (_35_TO_17, _halved, None),
    "Mixed_6b": _at_17(128),
    "Mixed_6c": _at_17(160),
    "Mixed_6d": _at_17(160),
    "Mixed_6e": _at_17(192),
    "Mixed_7a": (_17_TO_8, _halved, None),
    "Mixed_7b": _at_8(_average),
    "Mixed_7c": _at_8(_maximum),
}


class InceptionV3(nn.Module):
    """A ``FeatureNetwork``, with the state-dict keys of the public file; nothing is trained."""

    name = "Inception-v3 (2015, as FID uses it)"

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvUnit(3, _Layer(32, _3x3, 2))
        self.Conv2d_2a_3x3 = _ConvUnit(32, _Layer(32, _3x3, padded=False))
        self.Conv2d_2b_3x3 = _ConvUnit(32, _Layer(64, _3x3))
        self.Conv2d_3b_1x1 = _ConvUnit(64, _Layer(80))
        self.Conv2d_4a_3x3 = _ConvUnit(80, _Layer(192, _3x3, padded=False))
        width = 192
        for name, plan in _BLOCKS.items():
            block = _Block(width, *plan)
            self.add_module(name, block)
            width = block.width
        # The first and the last seven are no classes of ImageNet, but count all the same.
        self.fc = nn.Linear(width, 1008)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in eval mode: statistics are those of the training, never of a batch."""
        return super().train(False)

    class_names: tuple[str, ...] = ()

    @classmethod
    def from_weights(
        cls, source: str | Path | None = None, *, device: torch.device | str = "cpu"
    ) -> Self:
        """Load the network.

        ``source`` is a .pth or .safetensors file, a folder with the public file, an address
        (https://...) or a file on the hub ("owner/name/file"). Without it the public file is taken
        from the cache (``storage.cache_folder``), from torch.hub's, or downloaded. Under its own
        name only the known content is accepted. InputError if there is no such file.
        """
        path = _locate(source)
        try:
            found = weights.read(path)
            # Some conversions have counters of the training.
            state = {k: v for k, v in found.items() if not k.endswith(".num_batches_tracked")}
            model = weights.build(cls, state, source=str(path), kind="Inception-v3 of 2015")
        except InputError as error:
            raise InputError(f"{error}; {_REMEDY}") from error
        return model.to(device)

    @property
    def fingerprint(self) -> str:
        """Digest of its weights: features of others cannot be compared."""
        return f"inception-2015-12-05/{digest('', self.state_dict().items(), torch.float32)}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> NetworkOutput:
        """Return features of uint8 (B, 3, H, W), in float32 also under autocast, without TF32.

        2048 pooled numbers at least 0 for FID, precision and recall; 2023 for sFID: 17 rows of 17
        positions of 7 channels; 1008 logits without the bias that the last layer has.
        """
        require_images(images)
        with torch.autocast(images.device.type, enabled=False), _exact_convolutions(images.device):
            x = (resize_bilinear(images.float(), _SIDE) - 128.0) / 128.0
            x = x.contiguous(memory_format=torch.channels_last).to(self.fc.weight.dtype)
            x = _halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
            x = _halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (B, 192, 35, 35)
            for name in _BLOCKS:
                x = self.get_submodule(name)(x)
                # mixed_6 in the graph; seven channels give 2023 numbers, about as many as in the
                # pool (arXiv 2103.03841, and ADM's evaluator), in TensorFlow's order.
                if name == "Mixed_6d":
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            pool = x.mean((2, 3))
            logits = F.linear(pool, self.fc.weight)
        return NetworkOutput(pool.float(), spatial.float(), logits.float())


class _Block(nn.Module):
    """Branches over the same input, their channels joined: (B, C_in, h, w) -> (B, C_out, ...)."""

    def __init__(self, inputs: int, branches: _Branches, pool: _Pool, pooled: int | None) -> None:
        super().__init__()
        self._pool = pool
        self._branches: list[list[list[str]]] = []
        """Of each branch and step, the names of the layers: one, or two side by side."""
        self.width = pooled or inputs
        for branch, steps in branches.items():
            width, names = inputs, []
            for number, step in enumerate(steps, start=1):
                # As the public file calls them.
                name = branch if len(steps) == 1 else f"{branch}_{number}"
                layers = {"": step} if isinstance(step, _Layer) else step
                for end, layer in layers.items():
                    self.add_module(name + end, _ConvUnit(width, layer))
                width = sum(layer.width for layer in layers.values())
                names.append([name + end for end in layers])
            self._branches.append(names)
            self.width += width
        self.branch_pool = _ConvUnit(inputs, _Layer(pooled)) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for branch in self._branches:
            found = [x]
            for names in branch:
                found = [self.get_submodule(name)(found[0]) for name in names]
            parts += found
        return torch.cat([*parts, self.branch_pool(self._pool(x))], dim=1)


class _ConvUnit(nn.Module):
    """Convolution, normalisation, ReLU: (B, C_in, h, w) -> (B, C_out, ...)."""

    def __init__(self, inputs: int, layer: _Layer) -> None:
        super().__init__()
        height, width = layer.kernel
        padding = (height // 2, width // 2) if layer.padded and layer.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, layer.width, layer.kernel, layer.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.width, eps=1e-3)
        # The public file has no such counters.
        self.bn.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def resize_bilinear(images: Tensor, side: int) -> Tensor:
    """Resize float32 (B, C, H, W) to (B, C, side, side) as TensorFlow's ResizeBilinear did in 2015.

    A pixel is a point at its upper left corner, there is no antialiasing, and the last row and
    column are repeated. Other ways of resizing change FID (arXiv 2104.11222).
    """
    top, bottom, down = (each.to(images.device) for each in _neighbours(images.shape[-2], side))
    left, right, across = (each.to(images.device) for each in _neighbours(images.shape[-1], side))
    x = images[..., left]
    x = x + (images[..., right] - x) * across  # (B, C, H, side)
    upper = x[..., top, :]
    return upper + (x[..., bottom, :] - upper) * down[:, None]


def _neighbours(size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of ``side`` new pixels: the two old ones around it, and its distance to the first.

    On the CPU and in float32 as in TensorFlow: other rounding may give other neighbours.
    """
    scale = torch.tensor(size, dtype=torch.float32) / side
    positions = torch.arange(side, dtype=torch.float32) * scale
    first = positions.floor()
    lower = first.long()
    return lower, (lower + 1).clamp(max=size - 1), positions - first


@contextlib.contextmanager
def _exact_convolutions(device: torch.device) -> Iterator[None]:
    """Switch TF32 off, which rounds factors to 10 bits."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    # torch does not let its old switch be used once somebody has used the new one.
    is_new = hasattr(cudnn, "conv")
    owner, name = (cudnn.conv, "fp32_precision") if is_new else (cudnn, "allow_tf32")
    before = getattr(owner, name)
    setattr(owner, name, "ieee" if is_new else False)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _locate(source: str | Path | None) -> Path:
    """Return the file that ``source`` means, downloaded if it is not here."""
    if source is None:
        shared = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS_FILE.name)
        if shared.is_file() and not (storage.cache_folder() / WEIGHTS_FILE.name).is_file():
            return _checked(shared)
        return weights.cached(WEIGHTS_FILE, purpose=_PURPOSE, remedy=_REMEDY)
    text = str(source)
    if re.match(r"https?://", text):
        return weights.cached(_at_address(text), purpose=_PURPOSE, remedy=_REMEDY)
    path = Path(source).expanduser()
    if path.is_dir():
        path /= WEIGHTS_FILE.name
    if path.is_file():
        return _checked(path)
    on_hub = re.fullmatch(r"([^/]+/[^/]+)/(.+)", text)
    # With the first folder of a path here, the path is meant.
    if on_hub and is_repo_id(on_hub[1]) and not Path(on_hub[1]).parent.is_dir():
        return _checked(download_file(on_hub[1], on_hub[2]))
    raise InputError(
        f"{path} does not exist, and {text} is no address (https://...) and no file on the hub "
        f"(owner/name/file) either; {_REMEDY}"
    )


def _checked(path: Path) -> Path:
    """Return ``path``; under the public file's name it must have its content."""
    if path.name == WEIGHTS_FILE.name:
        remedy = f"get it again from {WEIGHTS_FILE.url}, or remove it"
        weights.require_checksum(path, WEIGHTS_FILE.sha256, remedy=remedy)
    return path


def _at_address(url: str) -> weights.PublicFile:
    """A file on the web, as the cache keeps it."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if name == WEIGHTS_FILE.name:
        return dataclasses.replace(WEIGHTS_FILE, url=url)
    # Another address may give another file under the same name.
    prefix = storage.short_digest([url.encode()])
    return weights.PublicFile(name=f"{prefix}-{name}", url=url, sha256=None)
