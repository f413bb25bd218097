"""What plugins register beside strategies: presets and metrics."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Preset:
    """A named parameter set of one strategy.

    Args:
        strategy (str): registered name of the strategy it configures.
        name (str): name of the preset, unique within the strategy.
        parameters (dict): values for the strategy's parameters.
        description (str): when to use it and where the values come from.
    """

    strategy: str
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    description: str = ""


@dataclass(frozen=True)
class Metric:
    """One figure about a generated video.

    Args:
        name (str): column in the results, with its unit as suffix (``psnr_db``).
        compute (Callable): ``compute(video, reference)``; both ``[F, H, W, 3]`` uint8 arrays, the
            reference made with dense attention from the same prompt, seed and settings, or None for
            the dense video itself. Returns a number, or None where it does not apply.
        higher_is_better (bool): direction of the metric. Default: True
        description (str): what it measures and its source.
    """

    name: str
    compute: Callable[[np.ndarray, np.ndarray | None], float | None]
    higher_is_better: bool = True
    description: str = ""
