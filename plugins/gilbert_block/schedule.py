"""Parameters that change over the denoising steps."""

import math

# The sigmoid runs over -6 to 6: within a quarter of a per cent of its ends at the first and last step.
REACH = 6.0


def scheduled(ends: tuple[float, float], step: int, num_steps: int | None) -> float:
    """Value at one step on the way from the first to the last, along a sigmoid over all steps.

    Args:
        ends (tuple[float, float]): values before the first and after the last step.
        step (int): denoising step, from 0.
        num_steps (int, Optional): steps of the schedule; where it is unknown the first value stays.
    """
    first, last = ends
    if num_steps is None or num_steps < 2 or first == last:
        return first
    x = REACH * (2.0 * min(step, num_steps - 1) / (num_steps - 1) - 1.0)
    return first + (last - first) / (1.0 + math.exp(-x))
