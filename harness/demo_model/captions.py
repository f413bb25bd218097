"""What a clip shows, the sentence that says so, and the words the model knows.

Grammar, one token per word and at most 16 tokens:

    caption := object place [camera] | object "and" object place
    object  := "a" [size] colour shape motion
    place   := "in the desert" | "in the meadow" | "at night" | "in the snow" | "in the studio" | "by the sea"
    camera  := "while the camera pans left" | "while the camera pans right"

Two objects are named from left to right.
"""

import random
import re
from dataclasses import dataclass
from itertools import product

SIZES = ("small", "large")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES = ("ball", "cube", "cone", "ring")
MOTIONS = ("moves right", "moves left", "rises", "falls", "bounces", "circles", "grows", "shrinks")
PLACES = {
    "desert": "in the desert",
    "meadow": "in the meadow",
    "night": "at night",
    "snow": "in the snow",
    "studio": "in the studio",
    "sea": "by the sea",
}
GROUNDS = tuple(PLACES)
CAMERAS = {"left": "while the camera pans left", "right": "while the camera pans right"}
SPECIAL_TOKENS = ("<pad>", "<unk>")
HELD_OUT_COUNT = 96

_OBJECT = (
    rf"a (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) "
    rf"(?P<shape>{'|'.join(SHAPES)}) (?P<motion>{'|'.join(MOTIONS)})"
)
_TAIL = re.compile(
    rf"^(?P<objects>.*?) (?P<place>{'|'.join(PLACES.values())})"
    rf"(?: (?P<camera>{'|'.join(CAMERAS.values())}))?$"
)


@dataclass(frozen=True)
class SceneObject:
    """One object: `size` in SIZES or None for unsaid, `colour`, `shape` and `motion` from the tuples
    above.
    """

    size: str | None
    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two objects (left to right), a ground, and a camera direction or None."""

    objects: tuple[SceneObject, ...]
    ground: str
    camera: str | None = None


def caption(scene: Scene) -> str:
    """Returns the sentence for `scene`, for example "a large red ball moves right in the desert"."""
    phrases = []
    for item in scene.objects:
        size = f"{item.size} " if item.size else ""
        phrases.append(f"a {size}{item.colour} {item.shape} {item.motion}")
    sentence = f"{' and '.join(phrases)} {PLACES[scene.ground]}"
    return f"{sentence} {CAMERAS[scene.camera]}" if scene.camera else sentence


def parse(sentence: str) -> Scene:
    """Reads a caption back into a scene.

    Args:
        sentence: a caption of the grammar above; case and surplus blanks do not matter.

    Returns:
        The scene, so that `parse(caption(scene)) == scene`.

    Raises:
        ValueError: the sentence is not of the grammar; the message says which part.
    """
    tail = _TAIL.match(" ".join(sentence.lower().rstrip(".").split()))
    if tail is None:
        raise ValueError(f"expected a caption ending in one of {sorted(PLACES.values())}, got {sentence!r}")
    objects = []
    for phrase in tail["objects"].split(" and "):
        match = re.fullmatch(_OBJECT, phrase)
        if match is None:
            raise ValueError(f"expected 'a [size] colour shape motion', got {phrase!r}")
        objects.append(SceneObject(**match.groupdict()))
    if len(objects) > 2:
        raise ValueError(f"expected one or two objects, got {len(objects)}")
    ground = next(name for name, words in PLACES.items() if words == tail["place"])
    camera = next((name for name, words in CAMERAS.items() if words == tail["camera"]), None)
    return Scene(tuple(objects), ground, camera)


def vocabulary() -> tuple[str, ...]:
    """Returns every token in id order: the special tokens, then the words of the grammar, sorted."""
    phrases = (*SIZES, *COLOURS, *SHAPES, *MOTIONS, *PLACES.values(), *CAMERAS.values(), "a", "and")
    return (*SPECIAL_TOKENS, *sorted({word for phrase in phrases for word in phrase.split()}))


def unknown_words(prompt: str) -> list[str]:
    """Returns the words of `prompt` that the demo model has never seen, in order, without repeats."""
    known = set(vocabulary())
    words = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", prompt.lower())
    return list(dict.fromkeys(word for word in words if word not in known))


def combination(item: SceneObject, ground: str) -> tuple[str, str, str, str]:
    """Returns the (colour, shape, motion, ground) combination that training may or may not have seen."""
    return (item.colour, item.shape, item.motion, ground)


def held_out_combinations() -> frozenset[tuple[str, str, str, str]]:
    """Returns the 96 of 1,152 (colour, shape, motion, ground) combinations that no training clip shows."""
    everything = list(product(COLOURS, SHAPES, MOTIONS, GROUNDS))
    return frozenset(random.Random(20).sample(everything, HELD_OUT_COUNT))


_HELD_OUT = held_out_combinations()


def sample_scene(rng: random.Random, num_objects: int = 1, camera_probability: float = 0.0) -> Scene:
    """Draws a training scene: none of its objects is a held-out combination.

    Args:
        rng: source of randomness.
        num_objects: 1 or 2; two objects differ in colour.
        camera_probability: chance of a camera pan, for one object only (0 to 1).

    Returns:
        A scene; each size is left unsaid with probability 0.25.
    """
    ground = rng.choice(GROUNDS)
    objects: list[SceneObject] = []
    while len(objects) < num_objects:
        size = rng.choice(SIZES) if rng.random() < 0.75 else None
        item = SceneObject(size, rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(MOTIONS))
        repeated = any(item.colour == other.colour for other in objects)
        if not repeated and combination(item, ground) not in _HELD_OUT:
            objects.append(item)
    camera = rng.choice(tuple(CAMERAS)) if num_objects == 1 and rng.random() < camera_probability else None
    return Scene(tuple(objects), ground, camera)


def held_out_scenes() -> list[Scene]:
    """Returns the 96 single-object evaluation scenes, one per held-out combination, sizes alternating."""
    chosen = sorted(_HELD_OUT)
    return [
        Scene((SceneObject(SIZES[index % 2], colour, shape, motion),), ground)
        for index, (colour, shape, motion, ground) in enumerate(chosen)
    ]


def held_out_pairs(count: int = 48) -> list[Scene]:
    """Returns `count` two-object evaluation scenes, both objects held-out combinations of one ground."""
    rng = random.Random(21)
    scenes: list[Scene] = []
    while len(scenes) < count:
        ground = GROUNDS[len(scenes) % len(GROUNDS)]
        left, right = rng.sample([c for c in sorted(_HELD_OUT) if c[3] == ground], 2)
        if left[0] != right[0]:
            scenes.append(Scene(tuple(SceneObject(rng.choice(SIZES), *c[:3]) for c in (left, right)), ground))
    return scenes
