"""The renderer and the judge: masks, determinism, and the truth read back from pixels."""

import random

import pytest
import torch

from harness.demo_model.captions import Scene, SceneObject, caption, parse, sample_scene
from harness.demo_model.clips import render_clips, to_uint8
from harness.demo_model.judge import CHROMA_THRESHOLD, Judge, compare
from harness.demo_model.solids import COLOUR_VALUES

FEW = torch.linspace(0, 1, 3)


def scenes_of(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, 1 + index % 2) for index in range(count)]


@pytest.fixture(scope="module")
def judge():
    return Judge()


def test_shapes_and_range():
    clips = render_clips(scenes_of(2, 0), [0, 1])
    assert clips.frames.shape == (2, 17, 3, 192, 320)
    assert clips.masks.shape == (2, 2, 17, 192, 320)
    assert clips.frames.min() >= 0 and clips.frames.max() <= 1
    assert clips.masks[0, 1].sum() == 0  # one object only
    assert (clips.masks[1].sum((-2, -1)) > 500).all()


def test_mask_covers_exactly_the_coloured_pixels():
    scenes = scenes_of(12, 1)
    clips = render_clips(scenes, list(range(12)), FEW.expand(12, -1))
    chroma = clips.frames.amax(2) - clips.frames.amin(2)
    cover = clips.masks.amax(1)
    assert chroma[cover > 0.99].min() > CHROMA_THRESHOLD
    assert chroma[cover == 0].max() < CHROMA_THRESHOLD


@pytest.mark.parametrize("colour", COLOUR_VALUES)
def test_object_has_its_colour(colour):
    scene = Scene((SceneObject("large", colour, "ball", "rises"),), "studio")
    clips = render_clips([scene], [3], torch.tensor([[0.5]]))
    inside = clips.frames[0, 0][:, clips.masks[0, 0, 0] > 0.99].mean(1)
    distances = {name: (inside - 0.85 * torch.tensor(value)).norm() for name, value in COLOUR_VALUES.items()}
    assert min(distances, key=distances.get) == colour


def test_same_seed_same_pixels_whatever_the_batch():
    scenes = scenes_of(3, 2)
    together = to_uint8(render_clips(scenes, [5, 6, 7], FEW.expand(3, -1)).frames)
    alone = to_uint8(render_clips(scenes[1:2], [6], FEW[None]).frames)
    other = to_uint8(render_clips(scenes[1:2], [8], FEW[None]).frames)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(alone, other)


def test_two_objects_keep_to_their_halves():
    rng = random.Random(4)
    scenes = [sample_scene(rng, 2) for _ in range(24)]
    masks = render_clips(scenes, list(range(24)), FEW.expand(24, -1)).masks
    assert masks[:, 0, :, :, 160:].max() == 0
    assert masks[:, 1, :, :, :160].max() == 0


def test_moving_right_moves_right():
    scene = parse("a small red ball moves right in the snow")
    masks = render_clips([scene], [0]).masks[0, 0]
    centre = (masks.sum(1) * torch.arange(320)).sum(1) / masks.sum((1, 2))
    assert (centre.diff() > 0).all()
    assert 80 < centre[-1] - centre[0] <= 160


def test_camera_pan_moves_only_the_ground():
    still, moving = (
        parse("a red ball rises in the desert"),
        parse("a red ball rises in the desert while the camera pans left"),
    )
    clips = render_clips([still, moving], [9, 9])
    assert torch.equal(clips.masks[0], clips.masks[1])
    sky = clips.frames[:, :, :, 100:120, :40]
    assert torch.equal(sky[0, 0], sky[0, -1])
    assert not torch.equal(sky[1, 0], sky[1, -1])


def test_seeds_must_match_scenes():
    with pytest.raises(ValueError, match="as many seeds"):
        render_clips(scenes_of(2, 0), [1])


def test_judge_reads_rendered_clips(judge):
    """99 % of 200 clips, at 5 frames each to be quick."""
    wrong = []
    times = torch.linspace(0, 1, 5)
    scenes = scenes_of(200, 5)
    for start in range(0, 200, 20):
        batch = scenes[start : start + 20]
        frames = render_clips(batch, list(range(start, start + 20)), times.expand(20, -1)).frames
        for scene, clip in zip(batch, frames, strict=False):
            if not compare(scene, judge.judge(clip, len(scene.objects)))["all"]:
                wrong.append(caption(scene))
    assert len(wrong) <= 2, wrong


def test_judge_is_not_fooled(judge):
    scene = parse("a large red ball moves right in the desert")
    frames = render_clips([scene], [1]).frames[0]
    for other in (
        "a large blue ball moves right in the desert",
        "a large red cube moves right in the desert",
        "a large red ball moves left in the desert",
        "a large red ball moves right in the snow",
        "a small red ball moves right in the desert",
    ):
        outcome = compare(parse(other), judge.judge(frames, 1))
        assert [name for name, right in outcome.items() if not right and name != "all"] == [
            {"blue": "colour", "cube": "shape", "left": "motion", "snow": "ground", "small": "size"}[
                next(word for word in other.split() if word not in caption(scene).split())
            ]
        ]
    still = compare(scene, judge.judge(frames[:1].expand(17, -1, -1, -1), 1))
    assert not still["motion"]
    assert judge.judge(torch.full((17, 3, 192, 320), 0.5), 1).objects[0].colour is None
