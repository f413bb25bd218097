import torch

from kernels_common import merge_by_lse


def attend(scores, value):
    return torch.softmax(scores, -1) @ value, torch.logsumexp(scores, -1)


def test_merging_two_key_sets_is_attention_over_both(generator):
    scores = torch.randn(2, 3, 5, 40, generator=generator) * 5
    value = torch.randn(2, 3, 40, 8, generator=generator)
    merged, lse = merge_by_lse(
        *attend(scores[..., :13], value[..., :13, :]), *attend(scores[..., 13:], value[..., 13:, :])
    )
    expected, expected_lse = attend(scores.double(), value.double())
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_an_empty_part_adds_nothing_whatever_it_holds(generator):
    output, lse = torch.randn(1, 2, 4, 8, generator=generator), torch.randn(1, 2, 4, generator=generator)
    garbage, empty = torch.full_like(output, float("nan")), torch.full_like(lse, float("-inf"))
    for merged, merged_lse in (
        merge_by_lse(output, lse, garbage, empty),
        merge_by_lse(garbage, empty, output, lse),
    ):
        torch.testing.assert_close(merged, output)
        torch.testing.assert_close(merged_lse, lse)
    nothing, nothing_lse = merge_by_lse(garbage, empty, garbage, empty)
    assert not nothing.any()
    assert nothing_lse.isneginf().all()


def test_large_scores_do_not_overflow():
    one, two = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 3.0)
    lse = torch.full((1, 1, 1), 1e4)
    merged, merged_lse = merge_by_lse(one, lse, two, lse)
    torch.testing.assert_close(merged, torch.full_like(one, 2.0))
    torch.testing.assert_close(merged_lse, lse + torch.log(torch.tensor(2.0)))


def test_sixteen_bit_outputs_keep_their_dtype(generator):
    output = torch.randn(1, 1, 4, 8, generator=generator).bfloat16()
    lse = torch.zeros(1, 1, 4)
    merged, _ = merge_by_lse(output, lse, output, lse)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, output)
