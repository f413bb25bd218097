from types import SimpleNamespace

import torch

from core.schedule import StepTracker


def walk(tracker, timesteps):
    return [(tracker.advance(timestep), tracker.step_index) for timestep in timesteps]


def test_without_a_schedule_changes_are_steps_and_a_rise_is_a_new_video():
    tracker = StepTracker(None)
    assert walk(tracker, [999, 999, 500, 20, 999, 500]) == [
        (True, 0), (False, 0), (False, 1), (False, 2), (True, 0), (False, 1),
    ]  # fmt: skip
    assert tracker.num_steps is None


def test_with_a_schedule_the_step_is_the_place_in_it():
    scheduler = SimpleNamespace(timesteps=torch.tensor([999, 749, 499, 249]))
    tracker = StepTracker(SimpleNamespace(scheduler=scheduler))
    assert walk(tracker, [749, 749, 249]) == [(True, 1), (False, 1), (False, 3)]
    assert tracker.num_steps == 4
    scheduler.timesteps = torch.tensor([999, 749, 499, 249])
    assert walk(tracker, [749, 499]) == [(True, 1), (False, 2)], "a new list is a new video"


def test_one_step_schedules_restart():
    scheduler = SimpleNamespace(timesteps=torch.tensor([999]))
    tracker = StepTracker(SimpleNamespace(scheduler=scheduler))
    assert walk(tracker, [999]) == [(True, 0)]
    scheduler.timesteps = torch.tensor([999])
    assert walk(tracker, [999]) == [(True, 0)]


def test_a_list_may_repeat_timesteps():
    scheduler = SimpleNamespace(timesteps=torch.tensor([999, 500, 500, 20]))
    tracker = StepTracker(SimpleNamespace(scheduler=scheduler))
    assert walk(tracker, [999, 500, 500, 20]) == [(True, 0), (False, 1), (False, 1), (False, 2)]


def test_calls_at_one_timestep_are_told_apart():
    tracker = StepTracker(None)
    calls = []
    for timestep in (999, 999, 500, 500, 500, 999, 999):
        tracker.advance(timestep)
        calls.append(tracker.call_in_step)
    assert calls == [0, 1, 0, 1, 2, 0, 1]


def test_a_constant_timestep_does_not_count_without_end():
    tracker = StepTracker(None)
    for _ in range(9):
        tracker.advance(500)
    assert tracker.call_in_step == 3
