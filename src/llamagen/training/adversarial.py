"""The two sides of adversarial training, as pure functions of a discriminator's logits.

A discriminator says "real" with a large logit. Logits may have any shape, one per image or one
per patch; every loss is a mean over them, computed in float32.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.support.errors import InputError
from llamagen.training.config import AdversarialLoss

_MAX_ADAPTIVE_WEIGHT = 1e4
_ADAPTIVE_EPS = 1e-4


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, of its logits on images and on reconstructions.

    Half the sum of both sides. "hinge" asks no more of a logit once it is right by a margin of 1.
    "vanilla" and "non-saturating" are the same here, the cross-entropy of real and fake.

    Raises:
        InputError: there is no such loss.
    """
    _require_known(kind)
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    # -log sigmoid(x) is softplus(-x), -log(1 - sigmoid(x)) is softplus(x).
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(kind: AdversarialLoss, fake: Tensor) -> Tensor:
    """What the judged model minimises, of the logits on its reconstructions.

    "hinge" is minus their mean. "vanilla" and "non-saturating" are both ``-log D``: the original
    ``log(1 - D)`` has no gradient where the discriminator is sure, which is where one is needed.

    Raises:
        InputError: there is no such loss.
    """
    _require_known(kind)
    fake = fake.float()
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor
) -> Tensor:
    """Weight that gives both losses an equal say in the decoder's last layer, as in VQGAN.

    Args:
        reconstruction_loss: scalar; all terms that compare pixels or features, weighted.
        generator_loss: scalar.
        last_layer: weights that both depend on.

    Returns:
        The ratio of the norms of their gradients, from 0 to 10,000, without a gradient of its own.
        The graphs of both losses stay, for the backward pass that follows.
    """
    norms = [
        torch.linalg.vector_norm(
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0], dtype=torch.float32
        )
        for loss in (reconstruction_loss, generator_loss)
    ]
    return (norms[0] / (norms[1] + _ADAPTIVE_EPS)).clamp(0.0, _MAX_ADAPTIVE_WEIGHT).detach()


def _require_known(kind: str) -> None:
    known = get_args(AdversarialLoss)
    if kind not in known:
        raise InputError(f"there is no adversarial loss {kind!r}; choose one of {', '.join(known)}")
