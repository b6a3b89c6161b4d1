"""What requests of common clients ask for beside what this API does.

Fields and values that this API does not have are left out, and the answer says so.
"""

from __future__ import annotations

from llamagen.config import Order, sampling_settings
from llamagen.generation.request import MAX_SEED
from llamagen.serving.schemas import RequestBody
from llamagen.support.errors import InputError

_SEEDS = MAX_SEED - 16_000
"""Those that leave room for the seeds of all images of a request."""
_USUAL = {"quality": ("auto", "standard"), "style": (), "moderation": ("auto", "low")}
"""Values of fields that have no effect, but are no mistake either."""


def settle(body: RequestBody, order: Order, *, strict: bool) -> tuple[RequestBody, list[str]]:
    """Return a request as a model of this order answers it, and what was left out of it.

    Raises InputError for the first such thing if ``strict``.
    """
    values: dict[str, int | None] = {}
    found = [f"{name} is no parameter of this API" for name in body.model_extra or ()]
    for name, usual in _USUAL.items():
        value = getattr(body, name)
        if value is not None and value not in usual:
            found.append(f"{name} is {value!r}, of which this API has none")
    for setting in sampling_settings():
        if setting.random_order and order == "raster" and getattr(body, setting.name) is not None:
            found.append(f"{setting.name} is for models of random order, and this one's is raster")
            values[setting.name] = None
    if body.seed == -1:
        values["seed"] = None
    elif body.seed is not None and body.seed > _SEEDS:
        values["seed"] = body.seed % (_SEEDS + 1)
        found.append(f"seed is {body.seed}, above {_SEEDS}; {values['seed']} stands for it")
    if strict and (found or body.seed == -1):
        raise InputError(f"{(found or ['seed is -1'])[0]}; leave it out")
    return body.model_copy(update=values), found
