"""SpargeAttn's block map by its definition, in fp64: Gram matrices, full sorts, loops. Slow and obvious.

Nothing here is shared with `prediction`, which is tested against it.
"""

import torch


def self_similarity(block: torch.Tensor) -> float:
    """Mean cosine of all pairs of rows of ``[n, D]``, the Gram matrix written out."""
    units = block.double() / block.double().norm(dim=-1, keepdim=True)
    return float((units @ units.T).mean())


def block_map(
    query: torch.Tensor,
    key: torch.Tensor,
    block_size: tuple[int, int],
    *,
    topk: float | None = None,
    cdf: float | None = None,
    similarity_threshold: float = -1.0,
    causal: bool = False,
) -> torch.Tensor:
    """Kept blocks of one head, ``[Mq, Mk]`` bool; none is forced but unlike ones and, if causal, own ones.

    Args:
        query (Tensor): ``[Nq, D]``.
        key (Tensor): ``[Nk, D]``.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        topk (float, Optional): share of all key blocks that a row keeps.
        cdf (float, Optional): share of the estimated attention that the kept blocks hold at most.
        similarity_threshold (float): blocks of at most this self-similarity are kept. Default: none is
        causal (bool): no query sees a later key. Default: False
    """
    query_blocks = query.double().split(block_size[0])
    key_blocks = (key.double() - (0 if causal else key.double().mean(0))).split(block_size[1])
    alike = [self_similarity(block) > similarity_threshold for block in key_blocks]
    kept = torch.zeros(len(query_blocks), len(key_blocks), dtype=torch.bool)
    for row, block in enumerate(query_blocks):
        first, last = row * block_size[0], (row + 1) * block_size[0] - 1
        starts = [column * block_size[1] for column in range(len(key_blocks))]
        visible = torch.tensor([not causal or start <= last for start in starts])
        past = torch.tensor([not causal or start + block_size[1] <= first for start in starts])
        scores = torch.stack([block.mean(0) @ other.mean(0) for other in key_blocks])
        scores = scores * query.shape[1] ** -0.5
        scores[~(torch.tensor(alike) & past)] = float("-inf")
        shares = scores.softmax(0).nan_to_num(0.0)
        ranked, order = shares.sort(descending=True, stable=True)
        if topk is not None:
            number = int(topk * len(key_blocks) + 1e-9)
        else:
            assert cdf is not None
            number = len(key_blocks) if cdf >= 1 else int((ranked.cumsum(0) <= cdf).sum())
        chosen = [int(index) for index in order if alike[int(index)] and past[int(index)]][: max(number, 1)]
        kept[row, chosen] = True
        kept[row] |= ~torch.tensor(alike) | ~past
        if not self_similarity(block) > similarity_threshold:
            kept[row] = True
        kept[row] &= visible
    return kept
