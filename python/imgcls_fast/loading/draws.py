"""Names the columns of the sampler's random numbers.

Each position of a training batch gets COLUMNS uniform numbers in [0, 1), whatever is switched on, so that a change of one
strength leaves all other draws as they are.
"""

from __future__ import annotations

from typing import NamedTuple


class Draws(NamedTuple):
    """A column or a slice of columns for each random change."""

    area: slice  # of ten attempts at a crop
    ratio: slice  # of the same attempts
    left: int
    top: int
    flip: int
    color: slice  # brightness, contrast, saturation, hue


DRAW = Draws(area=slice(0, 20, 2), ratio=slice(1, 20, 2), left=20, top=21, flip=22, color=slice(23, 27))
COLUMNS = 28  # one is spare; a multiple of 4, the block of the random generator
DRAW_LAYOUT = 1  # recorded in checkpoints: another number whenever DRAW or COLUMNS change what a seed gives
