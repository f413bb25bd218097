"""What the page says under the videos of a strategy that merges tokens."""

from harness.page import describe_page
from tests.browser.synthetic_run import make_row, settings


def facts(**changes):
    rows = [make_row("dense", "p", 0, 0), make_row("tome:r=1000", "p", 0, 1, **changes)]
    tiles = describe_page(settings(), rows)["groups"][0]["tiles"]
    return [[fact["text"] for fact in tile["facts"]] for tile in tiles]


def test_sequence_lengths_before_and_after_merging():
    shares = {"merged_length": [[None, None], [None, 0.7], [0.6, 0.8]]}  # none in the dense warm-up
    dense, merged = facts(shares_by_layer=shares, tokens=4096, psnr_db=32.34)
    assert dense[-1] == "4,096 tokens"
    assert merged[-2:] == ["32.3 dB", f"{round(0.7 * 4096):,} tokens"]


def test_without_merging_there_is_no_such_figure():
    for shares in ({}, {"merged_length": [[None]]}, {"temporal_heads": [[0.5]]}):
        assert len(facts(shares_by_layer=shares)[1]) == 3
    assert len(facts(shares_by_layer={"merged_length": [[0.5]]}, tokens=None)[1]) == 3
