"""The Triton forms against the plain ones; on a CPU in Triton's interpreter."""

import importlib

import pytest
import torch

from core import AttentionContext, TokenLayout
from plugins.tome.kernels import MatchConfig, best_destinations_triton, most_similar_triton, near_triton
from plugins.tome.matching import best_destinations_torch
from plugins.tome.mean_kernels import MeanConfig, group_means_triton
from plugins.tome.merging import make_merge_map, merge_tokens_torch, most_similar_torch
from plugins.tome.partition import make_partition
from plugins.tome.strategy import TomeStrategy

LAYOUT = TokenLayout(5, 3, 4, 5)
CELL = (2, 2, 2)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request, device):
    if request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes bf16 wrongly; runs on a GPU")
    return request.param


@pytest.fixture
def make_tokens(generator, device):
    def make(layout, dtype, *, batch=2, heads=2, head_dim=64, transposed=False):
        shape = (batch, layout.sequence_length, heads, head_dim)
        if not transposed:
            shape = (batch, heads, layout.sequence_length, head_dim)
        tokens = torch.randn(shape, generator=generator).to(device, dtype)
        return tokens.transpose(1, 2) if transposed else tokens

    return make


def check_matching(key, value, layout, local, **options):
    partition = make_partition(layout, CELL, seed=1, local=local).to(key.device)
    similarity, place = best_destinations_triton(key, value, partition, **options)
    expected, _ = best_destinations_torch(key.double(), None if value is None else value.double(), partition)
    # Any destination that is as similar as the best, up to fp32 sums of 2 D terms, is right.
    own = [part.double() for part in (key, value) if part is not None]
    own = own + [part.norm(dim=-1, keepdim=True) for part in own] if value is not None else own
    features = torch.nn.functional.normalize(torch.cat(own, -1), dim=-1)
    found = features[:, :, partition.destinations].gather(
        2, place[..., None].expand(*place.shape, features.shape[-1])
    )
    reached = (features[:, :, partition.sources] * found).sum(-1)
    assert (similarity - expected).abs().max() < 2.0**-18
    assert (reached - expected).abs().max() < 2.0**-18


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("with_values", [False, True])
def test_matching_equals_the_plain_form(make_tokens, dtype, local, with_values):
    key, value = make_tokens(LAYOUT, dtype), make_tokens(LAYOUT, dtype)
    check_matching(key, value if with_values else None, LAYOUT, local)


@pytest.mark.parametrize("head_dim", [16, 40, 128])
def test_matching_of_other_head_dims_and_memory_orders(make_tokens, head_dim):
    key = make_tokens(LAYOUT, torch.float32, head_dim=head_dim, transposed=True)
    value = make_tokens(LAYOUT, torch.float32, head_dim=head_dim)
    check_matching(key, value, LAYOUT, local=False)


def test_matching_over_several_tiles(make_tokens, dtype):
    """More destinations than a step holds, more sources than a program, and text behind the video."""
    layout = TokenLayout(3, 3, 6, 13, text_first=False)
    key, value = (make_tokens(layout, dtype, batch=1, heads=1, head_dim=16) for _ in range(2))
    for tiles in (1, 2):
        check_matching(key, value, layout, local=False, config=MatchConfig(tile_c=16, tiles=tiles))
    check_matching(key, value, layout, local=True, config=MatchConfig(tile_c=16, tiles=2))


@pytest.mark.parametrize("local", [False, True])
def test_destinations_that_all_point_away(make_tokens, dtype, local):
    """Similarities below zero, more than one step of them: what fills up the last is never found."""
    layout = TokenLayout(3, 3, 6, 13)
    key = make_tokens(layout, dtype).abs() + 0.5
    partition = make_partition(layout, CELL, seed=1, local=local)
    key[:, :, partition.destinations] *= -1
    check_matching(key, None, layout, local=local, config=MatchConfig(tile_c=16))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("with_values", [False, True])
def test_what_is_no_number_finds_some_destination(make_tokens, dtype, with_values):
    layout = TokenLayout(3, 3, 6, 13)
    key, value = make_tokens(layout, dtype), make_tokens(layout, dtype)
    partition = make_partition(layout, CELL, seed=1, local=False).to(key.device)
    key[:, :, partition.sources[::3], 0] = float("nan")
    key[:, 1:, partition.destinations[::2]] = float("inf")
    value[:, :, partition.sources[1::3]] = float("-inf")
    for part in (key, value):
        part[:, 0, partition.destinations] = float("nan")
    values = value if with_values else None
    _, place = best_destinations_triton(key, values, partition, config=MatchConfig(tile_c=16))
    assert ((place >= 0) & (place < len(partition.destinations))).all()


@pytest.mark.parametrize("head_dim", [16, 40])
def test_destinations_are_gathered_with_their_lengths(make_tokens, dtype, head_dim):
    key = make_tokens(LAYOUT, dtype, head_dim=head_dim, transposed=True)
    value = make_tokens(LAYOUT, dtype, head_dim=head_dim)
    partition = make_partition(LAYOUT, CELL, seed=1, local=False).to(key.device)
    near = near_triton((key, value), partition.destinations, 16)
    filling = partition.destinations[:1].expand(-len(partition.destinations) % 16)
    tokens = torch.cat([partition.destinations, filling])
    assert len(filling) and near.scale.shape[2] == len(tokens)
    wide = []
    for part, found in zip((key, value), near.tokens, strict=True):
        assert torch.equal(found, part[:, :, tokens])
        wide.append(part[:, :, tokens].double().norm(dim=-1))
    for parts, length in zip(near.lengths.double().split(8, dim=-1), wide, strict=True):
        high, same, middle, again, low, once_more, *unused = parts.unbind(-1)
        assert ((high + middle + low - length).abs() <= 2.0**-21 * length).all()
        assert torch.equal(high, same) and torch.equal(high, once_more) and torch.equal(middle, again)
        assert not any(column.any() for column in unused)
    expected = 1 / (2 * (wide[0].square() + wide[1].square())).sqrt()
    assert ((near.scale - expected).abs() <= 2.0**-20 * expected).all()


@pytest.mark.parametrize("local", [False, True])
def test_the_first_of_equal_destinations_is_taken(make_tokens, dtype, local):
    key, value = (make_tokens(LAYOUT, dtype).sign() for _ in range(2))
    partition = make_partition(LAYOUT, CELL, seed=1, local=local).to(key.device)
    for part in (key, value):
        part[:, :, partition.destinations[1::2]] = part[:, :, partition.destinations[1:2]]
        part[:, :, partition.destinations[0::2]] = part[:, :, partition.destinations[0:1]]
    # Whole numbers and one length for all: both forms compute the same, so that ties are ties.
    similarity, place = best_destinations_triton(key, value, partition, config=MatchConfig(tile_c=16))
    candidates = partition.candidates.expand(len(partition.tiles), -1)
    for tile, row in zip(partition.tiles, candidates, strict=True):
        firsts = torch.stack([row[row % 2 == parity].min() for parity in (0, 1)])
        assert torch.isin(place[:, :, tile.long()], firsts).all()
    assert torch.isfinite(similarity).all()


def test_zero_tokens_give_no_nan(make_tokens):
    key, value = (make_tokens(LAYOUT, torch.float32) for _ in range(2))
    partition = make_partition(LAYOUT, CELL, seed=1, local=False).to(key.device)
    for part in (key, value):
        part[:, :, partition.sources[::3]] = 0
        part[:, :, partition.destinations[:2]] = 0
    for values in (None, value):
        similarity, place = best_destinations_triton(key, values, partition)
        assert not similarity[..., ::3].any() and torch.isfinite(similarity).all()
        assert ((place >= 0) & (place < len(partition.destinations))).all()


@pytest.fixture
def make_map(generator, device):
    def make(layout, r, batch=2, heads=2, crowded=False):
        partition = make_partition(layout, CELL, seed=0, local=False).to(device)
        shape = (batch, heads, len(partition.sources))
        similarity = torch.rand(shape, generator=generator).to(device)
        destinations = 2 if crowded else len(partition.destinations)
        place = torch.randint(destinations, shape, generator=generator).to(device)
        return make_merge_map(similarity, place, partition, r)

    return make


@pytest.mark.parametrize("count", [5, 1000, 1024])
def test_the_choice_of_sources_equals_the_plain_form(generator, device, count):
    similarity = torch.randn(2, 3, count, generator=generator).clamp(-1, 1)
    similarity[0, 0] = torch.randint(-2, 3, (count,), generator=generator) / 2
    similarity[0, 1] = similarity[0, 1].abs()
    similarity[0, 2, ::2] = 0.0
    similarity[1, 0, 1::2] = -0.0
    similarity[1, 1, ::3] = float("nan")
    similarity[1, 2, ::3] = float("-inf")
    similarity = similarity.to(device)
    for r in (1, count // 2, count - 1, count):
        assert torch.equal(most_similar_triton(similarity, r), most_similar_torch(similarity, r))


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("r", [1, 30])
def test_means_equal_the_plain_form(make_tokens, make_map, dtype, r, crowded):
    tokens, merge_map = make_tokens(LAYOUT, dtype), make_map(LAYOUT, r, crowded=crowded)
    (merged,) = group_means_triton((tokens,), merge_map.order, merge_map.starts)
    expected = merge_tokens_torch(tokens.double(), merge_map)
    rounding = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    assert merged.dtype == dtype and merged.is_contiguous()
    assert ((merged - expected).abs() <= rounding * expected.abs() + 2.0**-20).all()
    alone = merge_map.counts() == 1
    assert torch.equal(merged[alone], merge_tokens_torch(tokens, merge_map)[alone])


CONFIGS = [MeanConfig(1, 4, 1, 16), MeanConfig(64, 1, 2, 4), MeanConfig(8, 4, 8, 8), MeanConfig(8, 2, 1000)]


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_means_of_other_tiles_memory_orders_and_one_map_for_all_heads(make_tokens, make_map, config, crowded):
    tokens = make_tokens(LAYOUT, torch.float32, heads=3, head_dim=40, transposed=True)
    merge_map = make_map(LAYOUT, 30, heads=1, crowded=crowded)
    (merged,) = group_means_triton((tokens,), merge_map.order, merge_map.starts, config=config)
    expected = merge_tokens_torch(tokens.double(), merge_map)
    assert (merged - expected).abs().max() < 2.0**-20


def test_means_of_several_tensors_are_those_of_each(make_tokens, make_map):
    tokens = tuple(make_tokens(LAYOUT, torch.float32, transposed=transposed) for transposed in (False, True))
    merge_map = make_map(LAYOUT, 30)
    merged = group_means_triton(tokens, merge_map.order, merge_map.starts)
    assert len(merged) == 2
    for part, found in zip(tokens, merged, strict=True):
        assert torch.equal(found, group_means_triton((part,), merge_map.order, merge_map.starts)[0])


@on_gpu
@pytest.mark.parametrize("merge_queries", [False, True])
@pytest.mark.parametrize("metric", ["kv_norm", "k", "mean_k"])
def test_strategy_on_a_gpu_equals_a_cpu(make_tokens, metric, merge_queries):
    layout = TokenLayout(7, 6, 9, 10)
    tensors = [make_tokens(layout, torch.float32, heads=4) for _ in range(3)]
    options = {"cell": CELL, "metric": metric, "merge_queries": merge_queries}
    outputs = []
    for device in ("cuda", "cpu"):
        strategy = TomeStrategy(**options)
        moved = [part.to(device) for part in tensors]
        outputs.append(strategy(*moved, AttentionContext(layout)).cpu())
        backend = "triton" if device == "cuda" else "sdpa"
        assert strategy.report().backends == {backend: 1}
    # Of two similarities that differ by less than fp32 resolves either may win: few rows may differ.
    rows = (outputs[0] - outputs[1]).abs().amax(-1) > 1e-4
    assert rows.float().mean() < 0.01


@on_gpu
@pytest.mark.parametrize("merge_queries", [False, True])
def test_the_backend_of_the_report_is_the_one_that_ran(make_tokens, merge_queries, monkeypatch):
    """Many tokens in bf16 with whole blocks, whose backend depends on the GPU."""
    # The package exports a function of the module's name.
    module = importlib.import_module("kernels_common.block_sparse_attention")
    ran = []
    original = module.block_sparse_attention_op
    monkeypatch.setattr(
        module,
        "block_sparse_attention_op",
        lambda *arguments: ran.append(arguments[-1]) or original(*arguments),
    )
    layout = TokenLayout(7, 6, 18, 20)
    tensors = [make_tokens(layout, torch.bfloat16, heads=4) for _ in range(3)]
    strategy = TomeStrategy(ratio=0.2, merge_queries=merge_queries)
    strategy(*tensors, AttentionContext(layout))
    assert strategy.report().backends == {ran[0]: 1} and len(ran) == 1


@on_gpu
def test_calls_do_not_synchronise(make_tokens):
    layout = TokenLayout(7, 6, 9, 10)
    tensors = [make_tokens(layout, torch.bfloat16, heads=4) for _ in range(3)]
    for options in ({}, {"merge_queries": True, "gap": 2}, {"candidates": "local", "metric": "mean_k"}):
        strategy = TomeStrategy(cell=CELL, nan_guard="off", **options)
        strategy(*tensors, AttentionContext(layout))  # plans and compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(1, 4):
                strategy(*tensors, AttentionContext(layout, step_index=step))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_two_equal_calls_give_equal_bits(make_tokens):
    layout = TokenLayout(7, 9, 16, 20)
    tensors = [make_tokens(layout, torch.bfloat16, heads=4) for _ in range(3)]
    outputs = [TomeStrategy(ratio=0.7)(*tensors, AttentionContext(layout)) for _ in range(2)]
    assert torch.equal(*outputs)


@on_gpu
def test_new_lengths_do_not_recompile(make_tokens):
    from plugins.tome.kernels import best_destination_kernel, near_kernel
    from plugins.tome.mean_kernels import group_mean_kernel

    def compiled():
        functions = (near_kernel, best_destination_kernel, group_mean_kernel)
        return sum(len(cache[0]) for function in functions for cache in function.device_caches.values())

    def run(layout):
        tensors = [make_tokens(layout, torch.bfloat16) for _ in range(3)]
        TomeStrategy(ratio=0.5, cell=CELL)(*tensors, AttentionContext(layout))

    run(TokenLayout(7, 6, 9, 10))
    before = compiled()
    for layout in (TokenLayout(226, 5, 8, 8), TokenLayout(0, 4, 7, 13), TokenLayout(16, 6, 8, 16)):
        run(layout)
    assert compiled() == before
