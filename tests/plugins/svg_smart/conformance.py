"""The conformance suite with sparse variants and heads of both classes, for the tests of each device."""

import torch

from core import AttentionContext
from core.testing import LAYOUTS, StrategyConformance, random_qkv
from plugins.svg_smart.strategy import SvgSmartStrategy


def planted_qkv(layout, **options):
    """Even heads look at tokens of their own frame, odd ones at their own place in all frames."""
    query, key, value = random_qkv(layout, **options)
    for first, group in enumerate((layout.token_frames(), layout.token_places())):
        codes = 0.7 * torch.randn(int(group.max()) + 2, query.shape[3])  # text has the last one
        code = codes[group].to(query)
        for part in (query, key):
            part[:, first::2] = 0.5 * part[:, first::2] + code
    return query, key, value


class PlantedConformance(StrategyConformance):
    strategy = SvgSmartStrategy

    def inputs(self, layout, **options):
        return planted_qkv(layout, device=self.device, **options)

    def test_calls_are_sparse(self):
        strategy = self.make()
        strategy(*self.inputs(LAYOUTS[0]), AttentionContext(LAYOUTS[0]))
        assert strategy.report().density < 0.9


class JudgedConformance(PlantedConformance):
    def test_heads_of_both_classes_are_recognised(self):
        strategy = self.make()
        strategy(*self.inputs(LAYOUTS[0]), AttentionContext(LAYOUTS[0]))
        assert strategy.report().shares_by_layer["temporal_heads"][0] == [0.5]
        assert next(iter(strategy._classes.values())).classes.tolist() == [[0, 1]]


# The suite probes a call again with other values; the decision of a step then stands.


class BandConformance(JudgedConformance):
    parameters = {"density": 0.65, "block_size": 64, "refresh_every": 2}
    full_density = {"density": 1.0}


class SinkConformance(JudgedConformance):
    parameters = {"density": 0.81, "block_size": 64, "sink": True, "refresh_every": 2}
    full_density = {"density": 1.0}


class FramesConformance(JudgedConformance):
    parameters = {"variant": "frames", "diagonal": 0, "block_size": 64, "refresh_every": 2}
    full_density = {"diagonal": 100}


class SemanticConformance(PlantedConformance):
    parameters = {
        "variant": "semantic",
        "block_size": 64,
        "query_clusters": 4,
        "key_clusters": 8,
        "mass": 0.3,
    }
    full_density = {"mass": 1.0}
