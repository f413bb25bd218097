"""Captions: grammar, vocabulary, held-out combinations."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from harness.demo_model import DEMO_DEFAULTS, unknown_words
from harness.demo_model.captions import (
    COLOURS,
    GROUNDS,
    MOTIONS,
    SHAPES,
    caption,
    combination,
    held_out_combinations,
    held_out_pairs,
    held_out_scenes,
    parse,
    sample_scene,
    vocabulary,
)

PROMPTS = Path(__file__).parents[3] / "prompts.txt"


def test_caption_round_trip_and_length():
    rng = random.Random(0)
    for index in range(500):
        scene = sample_scene(rng, 1 + index % 2, 0.3)
        sentence = caption(scene)
        assert parse(sentence) == scene
        assert len(sentence.split()) <= DEMO_DEFAULTS.max_sequence_length
        assert unknown_words(sentence) == []


def test_parse_accepts_case_and_full_stop():
    assert parse("A large Red ball  bounces by the sea.") == parse("a large red ball bounces by the sea")


@pytest.mark.parametrize(
    "sentence", ["a red ball bounces", "a pink ball bounces at night", "a red ball at night"]
)
def test_parse_rejects_other_sentences(sentence):
    with pytest.raises(ValueError, match="expected"):
        parse(sentence)


def test_unknown_words_in_order_without_repeats():
    assert unknown_words("A tiny red ball, a tiny dragon!") == ["tiny", "dragon"]


def test_training_never_shows_held_out_combinations():
    rng = random.Random(1)
    held_out = held_out_combinations()
    for index in range(3000):
        scene = sample_scene(rng, 1 + index % 2)
        assert not any(combination(item, scene.ground) in held_out for item in scene.objects)


def test_evaluation_scenes_are_held_out_and_cover_every_word():
    singles, pairs = held_out_scenes(), held_out_pairs()
    assert len(singles) == len(set(singles)) == 96
    assert len(pairs) == 48
    assert all(len(scene.objects) == 2 for scene in pairs)
    held_out = held_out_combinations()
    assert all(
        combination(item, scene.ground) in held_out for scene in singles + pairs for item in scene.objects
    )
    for position, names in enumerate((COLOURS, SHAPES, MOTIONS, GROUNDS)):
        assert {combination(scene.objects[0], scene.ground)[position] for scene in singles} == set(names)


def test_prompts_file_is_in_the_grammar():
    prompts = PROMPTS.read_text().splitlines()
    assert len(prompts) == len(set(prompts)) >= 20
    assert [caption(parse(prompt)) for prompt in prompts] == prompts


def test_vocabulary_is_unique_and_starts_with_padding():
    words = vocabulary()
    assert words[0] == "<pad>"
    assert len(words) == len(set(words))


def test_import_is_light():
    code = (
        "import sys, harness.demo_model; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROMPTS.parent)
