"""Options of the strategy: each changes the pattern, to what the functions give when called with it."""

import pytest
import torch

from core import AttentionContext, LevelMask, TokenLayout, call_generator
from core.testing import random_qkv
from kernels_common import gather_tokens, merge_by_lse, pooled_attention, select_mass, select_top_k
from plugins.gilbert_block.importance import block_importance
from plugins.gilbert_block.levels import level_caps, levels_by_mass, levels_by_rank
from plugins.gilbert_block.mask import adaptive_top_k, forced_blocks
from plugins.gilbert_block.rearranger import GilbertRearranger, rearranged
from plugins.gilbert_block.schedule import scheduled
from plugins.gilbert_block.strategy import DEFAULT_BOUNDS, GilbertBlockStrategy

LAYOUT = TokenLayout(20, 6, 11, 17)
LENGTH = LAYOUT.sequence_length
BLOCKS = (64, 64)
CONTEXT = AttentionContext(LAYOUT, layer_index=1, num_layers=2, step_index=3, num_steps=8)
ENDS = (0.9, 0.2)
NOW = scheduled(ENDS, 3, 8)


class Call:
    """Tensors of four query and two key heads, and what the functions make of them along the curve."""

    def __init__(self):
        self.query = 2 * random_qkv(LAYOUT, heads=4)[0]
        self.key = random_qkv(LAYOUT, heads=2)[1]
        self.order = GilbertRearranger(LAYOUT).order
        self.forced = forced_blocks(rearranged(LAYOUT), BLOCKS)

    def importance(self, seed=0, **options):
        source = call_generator(seed, CONTEXT, "cpu")
        options = {"samples": 8} | options
        return block_importance(self.query, self.key, BLOCKS, source, order=self.order, **options)

    def energy(self, tau=0.5, least=0.05, most=1.0, **options):
        bounds = {"min_blocks": least, "max_blocks": most, "include_crossing": True, "forced": self.forced}
        return select_mass(self.importance(**options), tau, BLOCKS, LENGTH, LENGTH, **bounds).to_blocks()

    def top_k(self, ratio=0.2):
        mask = select_top_k(self.importance(), ratio, BLOCKS, LENGTH, LENGTH, forced=self.forced)
        return mask.to_blocks()

    def adaptive(self, ratio=0.2):
        importance = self.importance()
        return adaptive_top_k(importance, ratio, BLOCKS, LENGTH, LENGTH, self.forced).to_blocks()

    def rank(self, bounds=DEFAULT_BOUNDS["rank"]):
        return levels_by_rank(self.importance(), bounds, self.forced)

    def mass(self, bounds=DEFAULT_BOUNDS["mass"], least=0.05):
        return levels_by_mass(self.importance(), bounds, least, self.forced)

    def capped(self, levels):
        """Levels no coarser than the keys of each head allow, which two query heads share."""
        caps = level_caps(gather_tokens(self.key, self.order), 64, (0.0, 0.0, 0.0))
        return levels.minimum(caps[:, [0, 0, 1, 1], None])


ENERGY, TOP_K, ADAPTIVE = {"tau": 0.5}, {"selection": "topk"}, {"selection": "adaptive-topk"}
RANK, MASS = {"selection": "rank"}, {"selection": "mass"}
ALIKE = {"similarity_thresholds": (0.0, 0.0, 0.0)}
LOW = {"projection": "pca", "directions": 32}
CASES = {
    "tau": (ENERGY, {"tau": 0.3}, lambda call: call.energy(0.3)),
    "tau of a schedule": ({"tau": ENDS[0]}, {"tau": ENDS}, lambda call: call.energy(NOW)),
    "min_ratio": (ENERGY, {"min_ratio": 0.7}, lambda call: call.energy(least=0.7)),
    "min_ratio of a schedule": (
        {"tau": 0.1, "min_ratio": ENDS[0]},
        {"min_ratio": ENDS},
        lambda call: call.energy(0.1, least=NOW),
    ),
    "max_ratio": (ENERGY, {"max_ratio": 0.2}, lambda call: call.energy(most=0.2)),
    "max_ratio of a schedule": (
        {"tau": 1.0, "max_ratio": ENDS[0]},
        {"max_ratio": ENDS},
        lambda call: call.energy(1.0, most=NOW),
    ),
    "samples": (ENERGY, {"samples": 16}, lambda call: call.energy(samples=16)),
    "seed": (ENERGY, {"seed": 5}, lambda call: call.energy(seed=5)),
    "importance max": (ENERGY, {"importance": "max"}, lambda call: call.energy(estimator="max")),
    "importance mean": (
        ENERGY,
        {"importance": "mean", "samples": 32},
        lambda call: call.energy(estimator="mean"),
    ),
    "projection": (ENERGY, {"projection": "pca"}, lambda call: call.energy(projection="pca")),
    "directions": (ENERGY | LOW, {"directions": 16}, lambda call: call.energy(**LOW | {"directions": 16})),
    "directions kept": (ENERGY, LOW, lambda call: call.energy(**LOW)),
    "topk": (ADAPTIVE, TOP_K, lambda call: call.top_k()),
    "keep_ratio of topk": (TOP_K, {"keep_ratio": 0.4}, lambda call: call.top_k(0.4)),
    "keep_ratio of a schedule": (
        TOP_K | {"keep_ratio": ENDS[0]},
        {"keep_ratio": ENDS},
        lambda call: call.top_k(NOW),
    ),
    "adaptive-topk": (TOP_K, ADAPTIVE, lambda call: call.adaptive()),
    "keep_ratio of adaptive-topk": (ADAPTIVE, {"keep_ratio": 0.1}, lambda call: call.adaptive(0.1)),
    "rank": (ENERGY, RANK | {"tau": 0.95}, lambda call: call.rank()),
    "bounds of rank": (RANK, {"bounds": (0.1, 0.1, 0.4, 0.9)}, lambda call: call.rank((0.1, 0.1, 0.4, 0.9))),
    "mass": (RANK, MASS, lambda call: call.mass()),
    "bounds of mass": (MASS, {"bounds": (0.2, 0.3, 0.4, 0.9)}, lambda call: call.mass((0.2, 0.3, 0.4, 0.9))),
    "min_ratio of mass": (MASS, {"min_ratio": 0.8}, lambda call: call.mass(least=0.8)),
    "min_ratio of mass of a schedule": (
        MASS | {"min_ratio": ENDS[0]},
        {"min_ratio": ENDS},
        lambda call: call.mass(least=NOW),
    ),
    "similarity_thresholds of rank": (RANK, ALIKE, lambda call: call.capped(call.rank())),
    "similarity_thresholds of mass": (MASS, ALIKE, lambda call: call.capped(call.mass())),
}


def levels_of(options, call):
    mask = GilbertBlockStrategy(**{"block_size": 64, "samples": 8} | options)
    mask = mask.pattern(call.query, call.key, CONTEXT).mask
    return (mask.to_levels() if isinstance(mask, LevelMask) else mask.to_blocks()).to(torch.int8)


@pytest.mark.parametrize("case", CASES)
def test_options_reach_the_functions(case):
    base, changed, expected = CASES[case]
    call = Call()
    found = levels_of(base | changed, call)
    assert torch.equal(found, expected(call).to(torch.int8))
    assert not torch.equal(found, levels_of(base, call))


@pytest.mark.parametrize("options", [RANK, MASS, {"tau": 0.3, "remainder": True}], ids=str)
def test_attention_over_two_parts_of_the_keys_merges_to_one(options):
    """Every block of the strategy's levels goes to one of two masks; log-sum-exps put them together again."""
    call = Call()
    value = random_qkv(LAYOUT, heads=2)[2]
    levels = levels_of(options, call)
    first = torch.rand(levels.shape) < 0.5
    query, key, value = (gather_tokens(part, call.order).double() for part in (call.query, call.key, value))

    def attend(part):
        mask = LevelMask.from_levels(part, BLOCKS, LENGTH, LENGTH)
        return pooled_attention(query, key, value, mask, return_lse=True)

    whole, lse = attend(levels)
    merged, merged_lse = merge_by_lse(*attend(levels * first), *attend(levels * ~first))
    assert (merged - whole).abs().max() < 5e-6 and (merged_lse - lse).abs().max() < 5e-6
