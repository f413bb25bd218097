"""``python -m harness.recall``: how much of the true attention the blocks of a strategy hold.

    python -m harness.recall --strategies sparge gilbert-block:preset=demo --prompts 1

While a video is generated with dense attention, every strategy that decides by blocks is asked for its
blocks on the same queries and keys at a few denoising steps. Exit codes: 0 done, 2 bad input, 130
stopped with Ctrl-C.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from core import AttentionContext, AttentionStrategy, InstalledDenoiser, LevelMask
from core.block_mask import block_lengths
from core.strategy import AttentionResult, Capabilities, dense_result
from harness.command import make_parser, parse_options, require_at_least, run_command
from harness.errors import BenchError
from harness.generate import denoise
from harness.jobs import parse_spec
from harness.model_options import ModelOptions, add_model_options, read_model_options
from harness.tuning import sampled_steps
from kernels_common.block_importance import sample_blocks, sampled_sum_importance
from kernels_common.permutation import gather_tokens
from kernels_common.strategy import BlockSparseStrategy

SEED = 0


class Recall(NamedTuple):
    """What the blocks of one call hold, 0 to 1 each; 0-d tensors.

    Args:
        density (Tensor): executed share of the (query, key) pairs.
        listed (Tensor): share of the blocks that are seen at all, whole or pooled.
        held (Tensor): attention mass in these blocks, mean over queries and heads.
        worst (Tensor): the same of the head that loses most.
        best (Tensor): mass in as many blocks of every row, chosen by their true mass.
    """

    density: torch.Tensor
    listed: torch.Tensor
    held: torch.Tensor
    worst: torch.Tensor
    best: torch.Tensor


@torch.no_grad()
def recall_of(
    strategy: BlockSparseStrategy, query: torch.Tensor, key: torch.Tensor, context: AttentionContext
) -> Recall:
    """Compare the blocks of a strategy with the attention weights themselves.

    Args:
        strategy (BlockSparseStrategy): what chooses the blocks; they have at most 128 tokens.
        query (Tensor): ``[B, H, S, D]``.
        key (Tensor): ``[B, Hkv, S, D]``.
        context (AttentionContext): the call.
    """
    pattern = strategy.pattern(query, key, context)
    mask = pattern.mask
    key_order = pattern.order if pattern.key_order is None else pattern.key_order
    query = query if pattern.order is None else gather_tokens(query, pattern.order)
    key = key if key_order is None else gather_tokens(key, key_order)
    kept = mask.to_levels() > 0 if isinstance(mask, LevelMask) else mask.to_blocks()
    mass = true_mass(query, key, mask.block_size)
    kept = kept.expand(mass.shape)
    rows = block_lengths(mask.query_length, mask.block_size[0], query.device).double()
    weights = rows / rows.sum()
    held = (mass * kept).sum(-1) @ weights  # [B, H]
    rank = torch.arange(mass.shape[-1], device=query.device)
    best = (mass.sort(-1, descending=True).values * (rank < kept.sum(-1)[..., None])).sum(-1) @ weights
    listed = kept.double().mean()
    density = torch.as_tensor(pattern.density, dtype=torch.float64, device=query.device)
    return Recall(density, listed, held.mean(), held.min(), best.mean())


def true_mass(query: torch.Tensor, key: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """Attention mass of every block pair from all tokens, mean over the block's queries.

    Returns:
        Tensor: ``[B, H, Mq, Mk]`` fp64; rows sum to 1.
    """
    generator = torch.Generator(query.device).manual_seed(0)  # every token is drawn: no matter
    whole = [
        sample_blocks(part.shape[2], size, size, generator)
        for part, size in zip((query, key), block_size, strict=True)
    ]
    return sampled_sum_importance(query, key, *whole).double()


class RecallProbe(AttentionStrategy):
    """Dense attention that asks strategies for their blocks on the way."""

    name: ClassVar[str] = "recall-probe"
    capabilities: ClassVar[Capabilities] = Capabilities(gqa=True)

    def __init__(self, candidates: Sequence[BlockSparseStrategy], steps: Collection[int]) -> None:
        super().__init__()
        self._candidates = candidates
        self._steps = steps
        self.found: list[list[Recall]] = [[] for _ in candidates]

    def check_model(self, denoisers: Sequence[InstalledDenoiser]) -> None:
        """Let the candidates refuse the model."""
        for candidate in self._candidates:
            candidate.check_model(denoisers)

    def reset(self) -> None:
        """Forget what the candidates keep."""
        for candidate in self._candidates:
            candidate.reset()

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> AttentionResult:
        """The exact output; candidates are asked at the chosen steps."""
        if context.step_index in self._steps:
            for candidate, found in zip(self._candidates, self.found, strict=True):
                found.append(recall_of(candidate, query, key, context))
        return dense_result(query, key, value)


@dataclass(frozen=True)
class RecallConfig:
    """Checked settings of one call.

    Args:
        labels (list[str]): specs as given.
        strategies (list[BlockSparseStrategy]): what they name.
        model (ModelOptions): which model, and how.
        prompts (list[str]): prompts to generate.
        steps_measured (int): denoising steps to look at per prompt.
    """

    labels: list[str]
    strategies: list[BlockSparseStrategy]
    model: ModelOptions
    prompts: list[str]
    steps_measured: int


def parse_arguments(arguments: list[str]) -> RecallConfig:
    """Read the command line.

    Raises:
        BenchError: an option has a wrong value, or a strategy does not decide by blocks.
        SparseAttnError: a strategy does not exist or a parameter is wrong.
    """
    parser = make_parser("harness.recall", __doc__)
    parser.add_argument("--strategies", type=str, nargs="+", required=True, help="NAME or NAME:key=value,...")
    add_model_options(parser)
    parser.add_argument("--prompts", type=int, default=1, help="the first so many of the prompts file")
    parser.add_argument("--steps-measured", type=int, default=3, help="denoising steps to look at per prompt")
    options = parse_options(parser, arguments)
    require_at_least(options, 1, "prompts", "steps_measured")
    model = read_model_options(options)
    return RecallConfig(
        labels=options.strategies,
        strategies=[_block_strategy(text) for text in options.strategies],
        model=model,
        prompts=model.first_prompts(options.prompts, "--prompts"),
        steps_measured=options.steps_measured,
    )


def _block_strategy(text: str) -> BlockSparseStrategy:
    strategy = parse_spec(text).create()
    if not isinstance(strategy, BlockSparseStrategy):
        raise BenchError(f"strategy '{text}' does not decide by blocks, so there is no share that they hold")
    return strategy


def measure(config: RecallConfig) -> list[list[Recall]]:
    """Recall of every strategy at every measured call.

    Raises:
        BenchError: the model cannot be loaded.
    """
    model = config.model.load()
    steps = sampled_steps(0, model.settings.steps, config.steps_measured)
    probe = RecallProbe(config.strategies, steps)
    for prompt in config.prompts:
        denoise(model, probe, prompt, SEED)
    return probe.found


def table(labels: Sequence[str], found: Sequence[Sequence[Recall]]) -> str:
    """Markdown table of means over all calls; the worst head is the worst of all."""
    lines = [
        "| strategy | density | blocks seen | mass held | worst head | best choice of as many blocks |",
        "|---|---|---|---|---|---|",
    ]
    for label, calls in zip(labels, found, strict=True):
        columns = torch.stack([torch.stack(tuple(call)) for call in calls])
        mean, least = columns.mean(0).tolist(), float(columns[:, 3].min())
        figures = (mean[0], mean[1], mean[2], least, mean[4])
        lines.append(f"| {label} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and print.

    Args:
        argv (list[str], Optional): arguments without the program's name. Default: the process's own

    Returns:
        int: exit code, see the module.
    """
    return run_command("harness.recall", argv, _recall)


def _recall(arguments: list[str], command: str) -> None:
    config = parse_arguments(arguments)
    print(table(config.labels, measure(config)))


if __name__ == "__main__":
    sys.exit(main())
