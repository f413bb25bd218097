"""MergeMap: which tokens are averaged into which, and what attention over the averages needs.

Destinations stand first, so that only the first merged keys have a size; all other tokens that stay follow.
Both keep their order, so that a block mask over the merged sequence still has neighbours in its blocks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.block_mask import BlockSparseMask
from core.errors import ParameterError
from kernels_common import attend_blocks, gather_tokens
from kernels_common.permutation import Tokens
from kernels_common.tensor_checks import check_extras
from kernels_common.triton_choice import runs_triton
from plugins.tome.partition import Partition


@dataclass(frozen=True)
class MergeMap:
    """Groups of tokens, each merged into one; most have one member.

    A group is a destination and, behind it, its sources; then come groups of one token each.

    Args:
        order (Tensor): tokens group by group, ``[B, H or 1, S]`` int32; H counts key heads.
        starts (Tensor): where each group begins in ``order``, and S, ``[B, H or 1, K + 1]`` int32.
        destinations (int): groups that may have several members; the first ones.
    """

    order: torch.Tensor
    starts: torch.Tensor
    destinations: int

    @property
    def length(self) -> int:
        """Tokens before merging, S."""
        return self.order.shape[-1]

    @property
    def merged_length(self) -> int:
        """Tokens after merging, K."""
        return self.starts.shape[-1] - 1

    def counts(self) -> torch.Tensor:
        """Tokens that each merged token stands for, ``[B, H or 1, K]`` int32."""
        return self.starts.diff(dim=-1)

    def sizes(self) -> torch.Tensor:
        """The counts of the destinations, ``[B, H or 1, destinations]`` int32; all others are 1."""
        return self.starts[..., : self.destinations + 1].diff(dim=-1)

    def groups(self) -> torch.Tensor:
        """The merged token that holds each token, ``[B, H or 1, S]`` int64."""
        places = torch.arange(self.length, dtype=torch.int32, device=self.order.device)
        places = places.expand(self.order.shape).contiguous()
        owners = torch.searchsorted(self.starts, places, right=True) - 1
        return torch.empty_like(owners).scatter_(-1, self.order.long(), owners)

    def for_heads(self, heads: int) -> "MergeMap":
        """The same groups for query heads that share key heads (GQA)."""
        own = self.order.shape[1]
        if own in (1, heads):
            return self
        order, starts = (part.repeat_interleave(heads // own, dim=1) for part in (self.order, self.starts))
        return MergeMap(order, starts, self.destinations)


def make_merge_map(similarity: torch.Tensor, place: torch.Tensor, partition: Partition, r: int) -> MergeMap:
    """Merge the ``r`` sources that are most similar to their destinations, without a synchronisation.

    Of equal similarities the source that comes first is merged first.

    Args:
        similarity (Tensor): of each source to its destination, ``[B, H or 1, Ns]``.
        place (Tensor): that destination's place in ``partition.destinations``, ``[B, H or 1, Ns]`` int64.
        partition (Partition): on the device of ``similarity``.
        r (int): sources to merge, 0 to Ns.

    Raises:
        ParameterError: ``r`` is no such number.
    """
    if type(r) is not int or not 0 <= r <= len(partition.sources):
        raise ParameterError(
            f"r must be a whole number of sources to merge, 0 to {len(partition.sources)}, got {r!r}"
        )
    merged = most_similar(similarity, r)
    length, sources = len(partition.order), partition.source_places
    shape, device = (*similarity.shape[:2], length), similarity.device
    stays = torch.ones(shape, dtype=torch.bool, device=device).index_copy_(-1, sources, ~merged)
    # As many stay in every head: their groups are counted, and all tokens sorted, as one row of all heads,
    # which takes a GPU less time than row by row. The group of a destination is its place.
    group = stays.flatten().cumsum(0, dtype=torch.int32).view(shape) - 1  # of the tokens that stay
    joined = place.to(torch.int32) + group[..., :1]
    group.index_copy_(-1, sources, torch.where(merged, joined, group.index_select(-1, sources)))
    ranks, order = (2 * group + ~stays).flatten().sort(stable=True)  # in every group first the one that stays
    begins = torch.arange(0, len(order), length, dtype=torch.int32, device=device).view(*shape[:2], 1)
    kept = length - r
    firsts = torch.arange(0, 2 * kept * begins.numel() + 1, 2, dtype=torch.int32, device=device)
    starts = torch.searchsorted(ranks, firsts, out_int32=True).unfold(0, kept + 1, kept)
    order = partition.order.to(torch.int32)[order.view(shape) - begins]
    return MergeMap(order, starts.view(*shape[:2], -1) - begins, len(partition.destinations))


def most_similar(similarity: torch.Tensor, r: int) -> torch.Tensor:
    """The ``r`` sources of the largest similarity, the first of equals, ``[B, H or 1, Ns]`` bool.

    NaN counts as the largest.
    """
    if r == 0:
        return torch.zeros_like(similarity, dtype=torch.bool)
    if runs_triton(similarity):
        from plugins.tome.kernels import most_similar_triton, supports_choice

        if supports_choice(similarity):
            return most_similar_triton(similarity, r)
    return most_similar_torch(similarity, r)


def most_similar_torch(similarity: torch.Tensor, r: int) -> torch.Tensor:
    """The plain form of `most_similar`, ``r`` at least 1."""
    similarity = similarity.nan_to_num(nan=float("inf"))
    threshold = similarity.topk(r, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, ties = similarity > threshold, similarity == threshold
    room = r - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= room))


def merge_tokens(tokens: Tokens, merge_map: MergeMap) -> Tokens:
    """Mean of every group, summed in fp32.

    Several tensors, such as key and value, are merged together: that is one launch on a GPU. Those that want
    a gradient are merged by the plain form, which has one.

    Args:
        tokens (Tensor or tuple[Tensor, ...]): ``[B, H, S, D]`` each, alike but for strides.
        merge_map (MergeMap): groups of S tokens.

    Returns:
        Tensor or tuple[Tensor, ...]: ``[B, H, K, D]`` each, in the dtype of ``tokens``.
    """
    parts = tokens if isinstance(tokens, tuple) else (tokens,)
    wants_grad = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if runs_triton(parts[0]) and not wants_grad:
        from plugins.tome.mean_kernels import group_means_triton

        merged = group_means_triton(parts, merge_map.order, merge_map.starts)
    else:
        merged = tuple(merge_tokens_torch(part, merge_map) for part in parts)
    return merged if isinstance(tokens, tuple) else merged[0]


def merge_tokens_torch(tokens: torch.Tensor, merge_map: MergeMap) -> torch.Tensor:
    """The plain form of `merge_tokens`, for one tensor."""
    batch, heads, _, head_dim = tokens.shape
    length = merge_map.merged_length
    rows = torch.arange(batch * heads, device=tokens.device).view(batch, heads, 1) * length
    total = torch.zeros(batch * heads * length, head_dim, dtype=torch.float32, device=tokens.device)
    total.index_add_(0, (rows + merge_map.groups()).flatten(), tokens.flatten(0, 2).float())
    mean = total.view(batch, heads, length, head_dim) / merge_map.counts()[..., None]
    return mean.to(tokens.dtype)


def unmerge_tokens(merged: torch.Tensor, merge_map: MergeMap) -> torch.Tensor:
    """Every token gets its group's row: ``[B, H, K, D]`` to ``[B, H, S, D]``."""
    return gather_tokens(merged, merge_map.groups())


def merged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: torch.Tensor,
    block_mask: BlockSparseMask | None = None,
) -> tuple[torch.Tensor, str]:
    """Attention over merged keys: ``softmax(query key^T / sqrt(D) + log(sizes)) value``.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): merged, ``[B, Hkv, K, D]``.
        value (Tensor): merged, ``[B, Hkv, K, D]``.
        sizes (Tensor): `MergeMap.sizes`, ``[B, Hkv or 1, at most K]`` int32; keys past them have size 1.
        block_mask (BlockSparseMask, Optional): blocks of merged keys to look at. Default: all, by torch's own
            kernel (the fastest on a CPU; on a GPU it would have a logarithm in memory for every pair)

    Returns:
        tuple[Tensor, str]: ``[B, Hq, Nq, D]`` and the backend that ran, ``"sdpa"`` without a ``block_mask``.

    Raises:
        LayoutError: shapes, dtypes or devices do not fit together.
    """
    check_extras(query, key, None, None, sizes)
    if block_mask is not None:
        result = attend_blocks(query, key, value, block_mask, key_sizes=sizes)
        return result.output, result.backend
    bias = F.pad(sizes.to(torch.float32).log(), (0, key.shape[2] - sizes.shape[2]))
    groups = query.shape[1] // bias.shape[1]
    mask = (bias.repeat_interleave(groups, dim=1) if bias.shape[1] > 1 else bias)[:, :, None]
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output, "sdpa"
