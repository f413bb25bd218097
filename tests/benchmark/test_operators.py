"""Time of every operator of ``kernels_common``, each backend that runs on the device, and of predictions."""

import functools

import pytest
import torch

from core import BlockSparseMask
from core.errors import UnsupportedCallError
from kernels_common import (
    attention,
    block_sparse_attention,
    gather_tokens,
    invert_permutation,
    merge_by_lse,
    scatter_tokens,
)
from plugins.svg_smart.bands import band_patterns
from plugins.svg_smart.patterns import head_patterns
from plugins.svg_smart.profiling import allowed_keys, pattern_errors, sample_rows
from plugins.svg_smart.reference import attention_reference
from plugins.svg_smart.strategy import select_patterns
from plugins.tome.matching import best_destinations, best_destinations_torch
from plugins.tome.merging import make_merge_map
from plugins.tome.partition import make_partition

BLOCK = (128, 128)
PREDICTIONS_IN_A_ROW = 20


def random_mask(call, density):
    """Random blocks per head, the diagonal always kept."""
    length, heads = call.query.shape[2], call.query.shape[1]
    count = -(-length // BLOCK[0])
    draw = torch.rand(heads, count, count, generator=torch.Generator().manual_seed(1))
    kept = (draw < density) | torch.eye(count, dtype=torch.bool)
    return BlockSparseMask.from_blocks(kept.to(call.query.device), BLOCK, length, length)


@torch.inference_mode()
def test_dense(call, timed, error_of, calls_in_a_row):
    error = error_of(call, attention(call.query, call.key, call.value))
    assert error < call.tolerance
    facts = {"density": 1.0, "max_error": error}
    dense = functools.partial(attention, call.query, call.key, call.value)
    timed(dense, call, "attention", calls_in_a_row, repeated=True, **facts)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@torch.inference_mode()
def test_block_sparse_attention(call, backend, density, timed, error_of):
    if backend == "triton" and call.query.device.type == "cpu":
        pytest.skip("triton runs on a CPU in its interpreter only, where a time means nothing")
    mask = random_mask(call, density)

    def run():
        return block_sparse_attention(call.query, call.key, call.value, mask, backend=backend)

    try:
        error = error_of(call, run(), mask)
    except UnsupportedCallError as reason:
        pytest.skip(str(reason))
    assert error < call.tolerance
    timed(run, call, "attention", density=float(mask.density()), max_error=error, backend=backend)


@torch.inference_mode()
def test_reordering_and_back(call, timed):
    length = call.query.shape[2]
    order = torch.randperm(length, generator=torch.Generator().manual_seed(2)).to(call.query.device)

    def run():
        return scatter_tokens(gather_tokens(call.query, order), order)

    assert torch.equal(run(), call.query)
    assert torch.equal(gather_tokens(gather_tokens(call.query, order), invert_permutation(order)), call.query)
    timed(run, call, "reordering")


@torch.inference_mode()
def test_merge_by_lse(call, timed, error_of):
    """Attention to the two halves of the keys, merged, is attention to all of them."""
    half = call.key.shape[2] // 2
    parts = [attend_half(call, slice(0, half)), attend_half(call, slice(half, None))]
    outputs, sums = zip(*parts, strict=True)

    def run():
        return merge_by_lse(outputs[0], sums[0], outputs[1], sums[1])[0]

    assert error_of(call, run()) < call.tolerance
    timed(run, call, "merging")


def attend_half(call, part):
    key, value = call.key[:, :, part], call.value[:, :, part]
    mask = BlockSparseMask.full(BLOCK, call.query.shape[2], key.shape[2], call.query.device)
    return block_sparse_attention(call.query, key, value, mask, return_lse=True)


@pytest.fixture
def timed_prediction(call, timed):
    """Time a prediction, on a GPU as in a model: many without waiting, behind a dense call.

    There the host runs ahead of the device, so that launching many small kernels costs nothing. What is timed
    holds the dense call; ``harness.microbench`` subtracts it.
    """

    def run(predict, **facts):
        on_gpu = call.query.device.type == "cuda"
        calls = PREDICTIONS_IN_A_ROW if on_gpu else 1

        def round_():
            if on_gpu:
                attention(call.query, call.key, call.value)
            for _ in range(calls):
                predict()

        timed(round_, call, "prediction", calls, with_dense=1 / calls if on_gpu else 0, **facts)

    return run


@torch.inference_mode()
def test_classes_of_svg_smart(call, timed_prediction):
    """Judging every head on 32 rows, and the mask and the token order that follow."""
    layout, tensors = call.context.layout, (call.query, call.key, call.value)
    band = band_patterns(layout, density=0.25, sink=False, block=BLOCK[0], keep="fraction")
    patterns = head_patterns(band).to(call.query.device)

    def errors_of_rows():
        rows = sample_rows(32, 0, call.context, call.query.device)
        return rows, pattern_errors(*tensors, rows, patterns)

    def run():
        _, errors = errors_of_rows()
        return select_patterns(patterns, (errors[1] < errors[0]).long())

    rows, errors = errors_of_rows()
    query, key, value = (part[-1:, -1:] for part in tensors)
    every = torch.ones(1, layout.sequence_length, dtype=torch.bool, device=rows.device)
    exact = attention_reference(query[:, :, rows], key, value, every)
    for found, keys in zip(errors[:, -1, -1], allowed_keys(patterns, rows), strict=True):
        output = attention_reference(query[:, :, rows], key, value, keys)
        assert found.item() == pytest.approx((output - exact).square().mean().item(), rel=5e-2)
    timed_prediction(run, sampled_rows=32)


@pytest.fixture
def matching(call):
    """Partition of the video, and the 45 % of it that are merged."""
    layout = call.context.layout
    partition = make_partition(layout, (4, 3, 3), seed=0, local=False).to(call.query.device)
    return partition, round(0.45 * layout.video_length)


@torch.inference_mode()
def test_matching_of_tome(call, timed_prediction, matching):
    """Every source's best destination, and the groups of what is merged."""
    partition, r = matching

    def run():
        similarity, best = best_destinations(call.key, call.value, partition, "kv_norm")
        return make_merge_map(similarity, best, partition, r)

    expected, _ = best_destinations_torch(call.key[-1:, -1:], call.value[-1:, -1:], partition)
    found, _ = best_destinations(call.key, call.value, partition, "kv_norm")
    assert (found[-1:, -1:] - expected).abs().max() < 1e-2
    assert run().merged_length == call.key.shape[2] - r
    timed_prediction(run, merged=r)


@torch.inference_mode()
def test_groups_of_tome(call, timed_prediction, matching):
    """The groups alone, which are part of the matching."""
    partition, r = matching
    similarity, best = best_destinations(call.key, call.value, partition, "kv_norm")

    def run():
        return make_merge_map(similarity, best, partition, r)

    assert (run().counts().sum(-1) == call.key.shape[2]).all()
    timed_prediction(run, merged=r)
