"""How many codes of an image a forward pass draws: one, several of a row, or some of many rows."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from llamagen.config import Grid, SamplingConfig
from llamagen.generation.decode import generate_codes
from llamagen.generation.row_parallel import check_lag, generate_codes_row_parallel, most_codes_fed
from llamagen.generation.sequences import Blend
from llamagen.generation.speculative import generate_codes_in_parallel, looking_ahead_pays
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """What was asked for; by default what is fastest and changes no code."""

    window: int | None = None
    """Codes of each image that a pass looks at; 1 draws them one by one."""
    row_lag: int | None = None
    """Columns that a row is behind the row above it; approximate."""

    def __post_init__(self) -> None:
        if self.row_lag is not None:
            check_lag(self.row_lag)
            if self.window is not None:
                raise InputError("row_lag goes without window; give one of them")

    def codes_fed(self, grid: Grid) -> int:
        """Codes of an image that a pass is fed at most, so far as it was asked for."""
        if self.row_lag is not None:
            return most_codes_fed(grid, self.row_lag)
        return self.window or 1

    def draw(
        self,
        model: Transformer,
        condition: Tensor,
        *,
        sampling: SamplingConfig,
        known: Tensor | None = None,
        blend: Blend | None = None,
        **settings: Any,
    ) -> Tensor:
        """``generate_codes``, or what draws the same codes faster, or what was asked for.

        Raises:
            InputError: known codes or a blend were given, and several codes per pass asked for.
        """
        settings["sampling"] = sampling
        edited = known is not None or blend is not None
        if edited and (self.row_lag is not None or self.window not in (None, 1)):
            raise InputError(
                "codes of edited and blended images are drawn one by one; leave window and row_lag "
                "out"
            )
        if self.row_lag is not None:
            return generate_codes_row_parallel(model, condition, lag=self.row_lag, **settings).codes
        window = self.window
        if edited or (window is None and not looking_ahead_pays(model, len(condition), sampling)):
            window = 1
        if window == 1:
            return generate_codes(model, condition, known=known, blend=blend, **settings)
        return generate_codes_in_parallel(model, condition, window=window, **settings).codes
