"""StepTracker: the denoising step of a call, read from its timestep."""

from typing import Any

import torch

MOST_CALLS = 4
"""Calls at one timestep that are told apart; without a bound, loops at a constant timestep would not end."""


class StepTracker:
    """Turns timesteps into step indices and notices where a new video begins.

    With a pipeline the step is the timestep's place in the scheduler's list, and a new list means a
    new video. Without one the step advances when the timestep changes and a rising timestep means a
    new video; denoising runs from high to low. ``call_in_step`` counts the calls at one timestep.

    Args:
        pipeline (Any, Optional): object whose ``scheduler.timesteps`` is the current schedule.
    """

    def __init__(self, pipeline: Any | None) -> None:
        self._pipeline = pipeline
        self._schedule: Any | None = None
        self._values: list[float] = []
        self._timestep: float | None = None
        self.step_index = 0
        self.call_in_step = 0

    @property
    def num_steps(self) -> int | None:
        return len(self._values) or None

    def advance(self, timestep: float) -> bool:
        """Take the timestep of the next denoiser call; True if it is the first of a new video."""
        renewed = self._read_schedule()
        previous, self._timestep = self._timestep, timestep
        started = renewed or previous is None or timestep > previous
        again = timestep == previous and not started
        self.call_in_step = min(self.call_in_step + 1, MOST_CALLS - 1) if again else 0
        if timestep in self._values:
            self.step_index = self._values.index(timestep)
        elif started:
            self.step_index = 0
        elif timestep != previous:
            self.step_index += 1
        return started

    def _read_schedule(self) -> bool:
        scheduler = getattr(self._pipeline, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        if schedule is self._schedule:
            return False
        self._schedule = schedule
        timesteps = [] if schedule is None else torch.as_tensor(schedule).tolist()
        self._values = list(dict.fromkeys(float(timestep) for timestep in timesteps))
        return True
