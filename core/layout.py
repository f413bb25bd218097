"""TokenLayout: how the tokens of one sequence map to text and to the video grid."""

from dataclasses import dataclass

import torch

from core.errors import LayoutError


@dataclass(frozen=True)
class TokenLayout:
    """Places of text and video tokens in one sequence.

    Video tokens are row-major with width fastest: token ``f * height * width + y * width + x``.

    Args:
        text_length (int): text tokens in the sequence, >= 0.
        frames (int): frames of the token grid (latent frames over the temporal patch), >= 1.
        height (int): token rows of one frame, >= 1.
        width (int): token columns of one frame, >= 1.
        text_first (bool): text stands before the video tokens. Default: True (CogVideoX, Flux);
            HunyuanVideo has it last.

    Raises:
        LayoutError: a size is not an integer or out of range.
    """

    text_length: int
    frames: int
    height: int
    width: int
    text_first: bool = True

    def __post_init__(self) -> None:
        for field, least in (("text_length", 0), ("frames", 1), ("height", 1), ("width", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise LayoutError(f"TokenLayout.{field} must be an integer >= {least}, got {value!r}")

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def video_length(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def sequence_length(self) -> int:
        return self.text_length + self.video_length

    @property
    def video_start(self) -> int:
        """Index of the first video token."""
        return self.text_length if self.text_first else 0

    @property
    def text_start(self) -> int:
        """Index of the first text token."""
        return 0 if self.text_first else self.video_length

    @property
    def video_slice(self) -> slice:
        return slice(self.video_start, self.video_start + self.video_length)

    @property
    def text_slice(self) -> slice:
        return slice(self.text_start, self.text_start + self.text_length)

    def token_frames(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Frame of every token.

        Returns:
            Tensor: ``[S]`` int64; -1 for text tokens.
        """
        frames = torch.full((self.sequence_length,), -1, dtype=torch.int64, device=device)
        video = torch.arange(self.video_length, device=device)
        frames[self.video_slice] = video // self.tokens_per_frame
        return frames

    def token_places(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Row-major place of every token inside its frame.

        Returns:
            Tensor: ``[S]`` int64; -1 for text tokens.
        """
        places = torch.full((self.sequence_length,), -1, dtype=torch.int64, device=device)
        video = torch.arange(self.video_length, device=device)
        places[self.video_slice] = video % self.tokens_per_frame
        return places

    def describe(self) -> str:
        """One phrase for messages: ``226 text + 13x30x45 video = 17776 tokens``."""
        grid = f"{self.frames}x{self.height}x{self.width}"
        return f"{self.text_length} text + {grid} video = {self.sequence_length} tokens"
