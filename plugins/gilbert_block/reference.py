"""The method by its definition, in fp64 and loops, for one head. Slow and obvious.

Nothing here is shared with the other modules, which are tested against it.
"""

import math

import torch

LEVELS = (1, 2, 4, 8)


def importance(
    query: torch.Tensor, key: torch.Tensor, block_size: tuple[int, int], *, maximum: bool
) -> torch.Tensor:
    """Importance of all block pairs from all tokens, ``[Mq, Mk]``; rows sum to 1.

    Args:
        query (Tensor): ``[Nq, D]`` in the order of the blocks.
        key (Tensor): ``[Nk, D]``, likewise.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        maximum (bool): largest weight of a pair of blocks, else the sum of the weights.
    """
    weights = (query.double() @ key.double().T / math.sqrt(query.shape[1])).softmax(-1)
    cells = [rows.split(block_size[1], 1) for rows in weights.split(block_size[0])]
    found = torch.stack(
        [torch.stack([cell.max() if maximum else cell.sum() for cell in row]) for row in cells]
    )
    return found / found.sum(-1, keepdim=True)


def energy_row(row: torch.Tensor, tau: float, least: int, most: int, forced: torch.Tensor) -> torch.Tensor:
    """Kept blocks of one row, ``[Mk]`` bool: the fewest that hold ``tau`` of what is not forced.

    Args:
        row (Tensor): ``[Mk]`` importances.
        tau (float): share to hold.
        least (int): fewest blocks beside the forced ones.
        most (int): most of them.
        forced (Tensor): ``[Mk]`` bool.
    """
    free = [index for index in row.argsort(descending=True, stable=True).tolist() if not forced[index]]
    kept, held, total = forced.clone(), 0.0, sum(float(row[index]) for index in free)
    for rank, index in enumerate(free):
        if rank >= most or (rank >= least and held >= tau * total):
            break
        kept[index] = True
        held += float(row[index])
    return kept


def rank_row(row: torch.Tensor, bounds: tuple[float, ...], forced: torch.Tensor) -> torch.Tensor:
    """Levels of one row by rank, ``[Mk]`` int8; arguments as for `energy_row`."""
    levels = torch.zeros(len(row), dtype=torch.int8)
    free = [index for index in row.argsort(descending=True, stable=True).tolist() if not forced[index]]
    for rank, index in enumerate(free):
        ends = [max(math.floor(bound * len(row) + 1e-4), 1) for bound in bounds]
        fitting = [level for level, end in zip(LEVELS, ends, strict=True) if rank < end]
        levels[index] = fitting[0] if fitting else 0
    levels[forced] = 1
    return levels


def mass_row(row: torch.Tensor, bounds: tuple[float, ...], least: int, forced: torch.Tensor) -> torch.Tensor:
    """Levels of one row by cumulated share, ``[Mk]`` int8; arguments as for `energy_row`."""
    levels = torch.zeros(len(row), dtype=torch.int8)
    free = [index for index in row.argsort(descending=True, stable=True).tolist() if not forced[index]]
    shares = (row[free].double().cumsum(0) / row[free].double().sum()).tolist()
    rank = 0
    for level, bound in zip(LEVELS, bounds, strict=True):
        begun = rank
        while rank < len(free) and (shares[rank] <= bound or bound >= 1 or (level == 1 and rank < least - 1)):
            levels[free[rank]] = level
            rank += 1
        crosses = level == 1 or rank > begun
        if rank < len(free) and crosses:
            levels[free[rank]] = level
            rank += 1
    levels[forced] = 1
    return levels


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    levels: torch.Tensor,
    block_size: tuple[int, int],
) -> torch.Tensor:
    """Attention over levels, ``[Nq, D]`` fp64: every run of keys is one key with the logarithm of its length.

    Args:
        query (Tensor): ``[Nq, D]`` in the order of the blocks.
        key (Tensor): ``[Nk, D]``, likewise.
        value (Tensor): ``[Nk, D]``.
        levels (Tensor): ``[Mq, Mk]`` int8, 0 left out.
        block_size (tuple[int, int]): tokens of a (query block, key block).
    """
    rows = []
    for queries, row in zip(query.double().split(block_size[0]), levels, strict=True):
        keys, values, lengths = [], [], []
        for index, level in enumerate(row.tolist()):
            if level == 0:
                continue
            tokens = slice(index * block_size[1], (index + 1) * block_size[1])
            pairs = zip(key[tokens].double().split(level), value[tokens].double().split(level), strict=True)
            for run, run_values in pairs:
                keys.append(run.mean(0))
                values.append(run_values.mean(0))
                lengths.append(float(len(run)))
        scores = queries @ torch.stack(keys).T / math.sqrt(query.shape[1])
        rows.append((scores + torch.tensor(lengths).double().log()).softmax(-1) @ torch.stack(values))
    return torch.cat(rows)
