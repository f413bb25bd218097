"""How much attention mass the best blocks of keys hold, for each layer and head of the demo model.

For every query block of 64 tokens, key blocks of 64 tokens are ranked by the softmax mass that the block's
queries put on them;
the mass of the best 10, 25 and 50 % of key blocks says what a block-sparse method of that density could
keep at best.
Shape legend: H heads, S tokens (16 text + 4,080 video = 64 blocks of 64), L layers.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

BLOCK = 64
FRACTIONS = (0.10, 0.25, 0.50)


def block_mass(
    query: torch.Tensor, key: torch.Tensor, fractions: Sequence[float] = FRACTIONS
) -> torch.Tensor:
    """Returns the mass that the best key blocks hold, averaged over query blocks.

    Args:
        query: `(H, S, D)` after RoPE; S a multiple of 64.
        key: `(H, S, D)`.
        fractions: fractions of the key blocks that may be kept, 0 to 1; rounded down to whole blocks, at
            least one.

    Returns:
        `(H, len(fractions))` float32, 0 to 1.
    """
    heads, length, width = query.shape
    blocks = length // BLOCK
    kept = [max(1, int(fraction * blocks)) for fraction in fractions]
    result = []
    for head in range(heads):
        scores = query[head].float() @ key[head].float().T / width**0.5
        mass = (
            scores.softmax(-1).view(blocks, BLOCK, blocks, BLOCK).sum(3).mean(1)
        )  # (query block, key block)
        running = mass.sort(dim=1, descending=True).values.cumsum(1).mean(0)
        result.append(torch.stack([running[count - 1] for count in kept]))
    return torch.stack(result)


class _Recorder(TorchFunctionMode):
    """Sees every scaled dot-product attention call; records those made inside a transformer layer."""

    def __init__(self, transformer):
        super().__init__()
        self.layer = None
        self.total = {}
        self.calls = {}
        self._hooks = []
        for index, block in enumerate(transformer.transformer_blocks):
            self._hooks.append(block.register_forward_pre_hook(lambda *_, index=index: self._enter(index)))
            self._hooks.append(block.register_forward_hook(lambda *_: self._enter(None)))

    def _enter(self, layer) -> None:
        self.layer = layer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and self.layer is not None:
            layer, self.layer = self.layer, None
            pairs = zip(args[0], args[1], strict=True)
            mass = torch.stack([block_mass(query, key) for query, key in pairs]).mean(0).cpu()
            self.total[layer] = self.total.get(layer, 0) + mass
            self.calls[layer] = self.calls.get(layer, 0) + 1
        return function(*args, **(kwargs or {}))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def measure_attention_mass(
    pipeline, prompts: Sequence[str], call_arguments: dict, seed: int = 0
) -> torch.Tensor:
    """Generates each prompt and averages `block_mass` over prompts and denoising steps.

    Args:
        pipeline: the demo pipeline.
        prompts: captions.
        call_arguments: keyword arguments of the pipeline call.
        seed: seed of the first prompt; the next ones count up.

    Returns:
        `(L, H, 3)` float32, 0 to 1, for the best 10, 25 and 50 % of key blocks.
    """
    recorder = _Recorder(pipeline.transformer)
    try:
        for offset, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + offset)
            with recorder:
                pipeline(prompt, generator=generator, output_type="latent", **call_arguments)
    finally:
        recorder.remove()
    return torch.stack([recorder.total[layer] / recorder.calls[layer] for layer in sorted(recorder.total)])
