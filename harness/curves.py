"""Which of the compared strategies are one method at several settings of one parameter: a curve."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

from harness.jobs import split_label

FEWEST = 3


def curve_names(labels: Sequence[str]) -> dict[str, str]:
    """The curve of every label that lies on one.

    Labels share a curve if they differ in the value of one parameter only; largest curves come first.

    Args:
        labels (Sequence[str]): labels of a run, ``name`` or ``name:key=value,key=value``.

    Returns:
        dict[str, str]: by label, the label of its curve, which lacks the varied parameter.
    """
    possible = {label: dict(_curves(label)) for label in labels}
    names: dict[str, str] = {}
    while True:
        sizes = Counter(curve for label in labels if label not in names for curve in possible[label])
        if not sizes or sizes.most_common(1)[0][1] < FEWEST:
            return names
        curve = sizes.most_common(1)[0][0]
        names |= {label: possible[label][curve] for label in labels if curve in possible[label]}


def _curves(label: str) -> Iterator[tuple[Hashable, str]]:
    """Identity and label of each curve that a label could be a point of."""
    name, pairs = split_label(label)
    for varied in pairs:
        fixed = [f"{key}={value}" for key, value in pairs.items() if key != varied]
        yield (name, varied, frozenset(fixed)), name + (":" if fixed else "") + ",".join(fixed)
