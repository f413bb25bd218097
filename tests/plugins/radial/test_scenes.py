import pytest
import torch

from core import AttentionContext, LayoutError, ParameterError, TokenLayout
from core.testing import random_qkv
from plugins.radial.mask import pair_widths, radial_mask
from plugins.radial.reference import element_mask
from plugins.radial.scenes import SceneAwareMaskMap, scene_numbers, token_frame, visible_frames
from plugins.radial.strategy import RadialStrategy

CHAIN = [[True, True, False], [False, True, True], [False, False, True]]


def test_pixel_frames_fall_into_the_latents_of_a_causal_autoencoder():
    # Counted instead of computed: pixel frame 0 alone, then groups of four.
    latent_of = [0] + [1 + group for group in range(12) for _ in range(4)]
    assert [token_frame(pixel, "pixel") for pixel in range(49)] == latent_of
    assert [token_frame(pixel, "pixel") for pixel in (0, 15, 30, 45)] == [0, 4, 8, 12]
    assert [token_frame(pixel, "pixel", temporal_compression=1) for pixel in range(5)] == [0, 1, 2, 3, 4]


def test_padded_temporal_patches():
    # 21 latents behind one of padding, in pairs: (padding, 0), (1, 2), ..., (19, 20).
    pairs = [0] + [1 + group for group in range(10) for _ in range(2)]
    found = [token_frame(latent, "latent", temporal_patch=2, front_padding=1) for latent in range(21)]
    assert found == pairs
    assert token_frame(45, "pixel", temporal_patch=2, front_padding=1) == 6


def test_a_frame_on_a_boundary_belongs_to_the_new_scene():
    assert scene_numbers(7, [0, 3, 5]).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_starts_and_starts_with_end_are_the_same_scenes():
    by_starts = visible_frames(13, [0, 15, 30], CHAIN, unit="pixel")
    with_end = visible_frames(13, [0, 15, 30, 45], CHAIN, unit="pixel")
    assert torch.equal(by_starts, with_end)
    scene = [0] * 4 + [1] * 4 + [2] * 5  # frames after the given end stay with the last scene
    for i in range(13):
        for j in range(13):
            assert bool(by_starts[i, j]) == CHAIN[scene[i]][scene[j]]


def test_own_scene_is_always_visible():
    nothing = torch.zeros(2, 2)
    assert torch.equal(visible_frames(4, [0, 2], nothing), visible_frames(4, [0, 2]))


@pytest.mark.parametrize("sink", [False, True])
def test_own_scene_only_is_block_diagonal(sink):
    layout = TokenLayout(6, 7, 1, 10)
    visible = visible_frames(7, [0, 3, 5])
    pairs = pair_widths(layout, rule="paper", decay_factor=1e6, block=16, sink=sink, visible=visible)
    scene = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    expected = scene[:, None] == scene
    expected[:, 0] |= sink
    assert torch.equal(pairs == 9, expected) and torch.equal(pairs == -1, ~expected)
    allowed = element_mask(layout, rule="paper", decay_factor=1e6, block=16, sink=sink, visible=visible)
    tokens = expected.repeat_interleave(10, 0).repeat_interleave(10, 1)
    assert torch.equal(allowed[6:, 6:], tokens) and allowed[:6].all() and allowed[:, :6].all()


def test_one_scene_is_the_plain_mask():
    plain = radial_mask(TokenLayout(16, 6, 1, 40), block_size=(64, 64))
    for boundaries, adjacency in ((None, None), ([0], None), ([0], [[False]]), ([0, 6], [[True]])):
        scenes = SceneAwareMaskMap(240, 6, boundaries, adjacency)
        mask = scenes.block_mask(text_length=16, block_size=(64, 64))
        assert torch.equal(mask.to_blocks(), plain.to_blocks())


def test_mask_map_limits_the_radial_mask_and_keeps_it():
    scenes = SceneAwareMaskMap(
        13 * 64,
        13,
        scene_boundaries=[0, 15, 30, 45],
        scene_adjacency_matrix=CHAIN,
        unit="pixel",
    )
    options = {"block_size": (64, 64), "sink": False, "keep": "cover"}
    mask = scenes.block_mask(text_length=64, **options)
    assert scenes.block_mask(text_length=64, **options) is mask
    assert scenes.block_mask(text_length=0, **options) is not mask
    plain = radial_mask(TokenLayout(64, 13, 1, 64), **options).to_blocks()[0, 0]
    expected = plain.clone()
    expected[1:, 1:] &= scenes.visible  # a frame is a block here
    assert torch.equal(mask.to_blocks()[0, 0], expected)
    assert not torch.equal(expected, plain) and not torch.equal(expected, expected.T)


def test_strategy_takes_scenes():
    layout = TokenLayout(64, 6, 8, 8)
    strategy = RadialStrategy(block_size=64, scene_boundaries=[0, 4, 6], scene_adjacency=[[1, 0], [1, 1]])
    strategy(*random_qkv(layout), AttentionContext(layout))
    visible = torch.tensor([[j < 4 or i >= 4 for j in range(6)] for i in range(6)])
    expected = radial_mask(layout, block_size=(64, 64), visible=visible)
    assert strategy.report().density == pytest.approx(float(expected.density()), abs=1e-12)
    assert strategy.report().density < float(radial_mask(layout, block_size=(64, 64)).density())


def test_pixel_units_of_the_strategy():
    layout = TokenLayout(0, 11, 8, 8)
    query = torch.zeros(1, 1, layout.sequence_length, 64)
    common = {"block_size": 64, "scene_adjacency": CHAIN}
    pixel = RadialStrategy(
        scene_boundaries=[0, 41, 61], scene_unit="pixel", temporal_patch=2, front_padding=1, **common
    )
    # Latents 11 and 16, in pairs behind a padded one.
    token = RadialStrategy(scene_boundaries=[0, 6, 8], **common)
    masks = [part.planned(query, AttentionContext(layout)).mask.to_blocks() for part in (pixel, token)]
    assert torch.equal(*masks)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"scene_boundaries": [1, 4]}, "scene_boundaries.*ascend strictly from 0"),
        ({"scene_boundaries": [0, 4, 4]}, "scene_boundaries.*ascend strictly from 0"),
        ({"scene_boundaries": []}, "scene_boundaries.*ascend strictly from 0"),
        ({"scene_boundaries": [0, 2, 4], "scene_adjacency": [[1]]}, "scene_adjacency.*square matrix of 3"),
        (
            {"scene_boundaries": [0, 2], "scene_adjacency": [[1, 0], [1]]},
            "scene_adjacency.*square matrix of 2",
        ),
        ({"scene_adjacency": [[1]]}, "scene_adjacency: needs scene_boundaries"),
        ({"scene_boundaries": [0], "scene_unit": "seconds"}, "scene_unit"),
    ],
)
def test_wrong_scenes_raise_when_the_strategy_is_built(values, message):
    with pytest.raises(ParameterError, match=message):
        RadialStrategy(**values)


def test_scenes_that_do_not_fit_the_video_raise():
    with pytest.raises(ParameterError, match="check the unit"):
        visible_frames(13, [0, 15, 30])
    with pytest.raises(ParameterError, match="if the last one is the end"):
        visible_frames(13, [0, 5, 13])
    with pytest.raises(ParameterError, match="token frame of its own"):
        visible_frames(13, [0, 1, 3], unit="pixel")
    with pytest.raises(LayoutError, match="do not divide"):
        SceneAwareMaskMap(100, 13)
    with pytest.raises(ParameterError, match="needs scene_boundaries"):
        SceneAwareMaskMap(26, 13, scene_adjacency_matrix=[[True]])
