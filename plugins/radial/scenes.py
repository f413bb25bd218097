"""Scenes: which frames may look at which, from scene boundaries and an adjacency matrix.

Own definition; the paper has no scenes. A frame looks at the frames of its own scene and of the scenes that
the adjacency matrix allows, within the radial band. Text, and with the sink frame 0, stay visible to all.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from core.block_mask import BlockSparseMask
from core.errors import LayoutError, ParameterError
from core.layout import TokenLayout
from plugins.radial.mask import radial_mask

Unit = Literal["latent", "pixel"]


def token_frame(
    frame: int,
    unit: Unit,
    *,
    temporal_compression: int = 4,
    temporal_patch: int = 1,
    front_padding: int = 0,
) -> int:
    """Frame of the token grid that holds a latent or pixel frame.

    A causal video autoencoder puts pixel frame 0 into latent 0 and the pixel frames ``c (t - 1) + 1`` to ``c
    t`` into latent t, so pixel frame x lies in latent ``floor((x + c - 1) / c)``; latent y lies in token
    frame ``floor((y + front_padding) / temporal_patch)``.

    Args:
        frame (int): frame number from 0, in ``unit``.
        unit (str): ``"latent"`` or ``"pixel"``.
        temporal_compression (int): pixel frames per latent, c. Default: 4
        temporal_patch (int): latents per token frame; 2 for CogVideoX1.5. Default: 1
        front_padding (int): latents that the model puts in front; 1 for CogVideoX1.5 with an odd number of
            latents. Default: 0

    Returns:
        int: token frame from 0.
    """
    latent = frame
    if unit == "pixel":
        latent = (frame + temporal_compression - 1) // temporal_compression
    # The first scene takes the padding in front of it.
    return (latent + front_padding) // temporal_patch if latent else 0


def scene_numbers(frames: int, starts: Sequence[int]) -> torch.Tensor:
    """Scene of every token frame, ``[F]`` int64: the last one that starts at or before it.

    Args:
        frames (int): frames of the token grid, F.
        starts (Sequence[int]): first token frame of each scene, from 0, ascending.
    """
    return torch.searchsorted(torch.tensor(list(starts)), torch.arange(frames), right=True) - 1


def check_scenes(
    boundaries: Sequence[int], adjacency: Sequence[Sequence[bool]] | torch.Tensor | None
) -> tuple[list[int], torch.Tensor]:
    """Starts of the scenes and their adjacency matrix with the diagonal set.

    Args:
        boundaries (Sequence[int]): frames where scenes start, from 0; one more than scenes if the last is the
            end.
        adjacency (Sequence[Sequence[bool]] | Tensor, Optional): ``[k, k]``; row i tells which scenes scene i
            may look at. None: every boundary is a start, and each scene sees itself only.

    Returns:
        tuple[list[int], Tensor]: k starts in the unit of ``boundaries``, and ``[k, k]`` bool.

    Raises:
        ParameterError: the boundaries do not ascend from 0, or the matrix does not fit them.
    """
    starts = list(boundaries)
    if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
        raise ParameterError(f"scene boundaries must ascend strictly from 0, got {starts}")
    if adjacency is None:
        return starts, torch.eye(len(starts), dtype=torch.bool)
    sizes = {len(row) for row in adjacency}
    scenes = len(adjacency)
    if sizes != {scenes} or scenes not in (len(starts), len(starts) - 1):
        raise ParameterError(
            f"{len(starts)} scene boundaries need a square matrix of {len(starts)} scenes, or of "
            f"{len(starts) - 1} if the last boundary is the end; got {scenes} rows of {sorted(sizes)}"
        )
    matrix = torch.as_tensor(adjacency, dtype=torch.bool) | torch.eye(scenes, dtype=torch.bool)
    return starts[:scenes], matrix


def visible_frames(
    frames: int,
    boundaries: Sequence[int],
    adjacency: Sequence[Sequence[bool]] | torch.Tensor | None = None,
    *,
    unit: Unit = "latent",
    **geometry: int,
) -> torch.Tensor:
    """Frames of the token grid that each frame may look at.

    Frames after the last start belong to the last scene, whatever end is given.

    Args:
        frames (int): frames of the token grid, F.
        boundaries (Sequence[int]): see `check_scenes`.
        adjacency (Sequence[Sequence[bool]] | Tensor, Optional): see `check_scenes`. Default: own scene only
        unit (str): unit of the boundaries, ``"latent"`` or ``"pixel"`` frames. Default: ``"latent"``
        **geometry: ``temporal_compression``, ``temporal_patch``, ``front_padding`` of `token_frame`.

    Returns:
        Tensor: ``[F, F]`` bool; row i are the frames that frame i may look at.

    Raises:
        ParameterError: see `check_scenes`; or a scene starts after the last frame, or holds no token frame of
            its own.
    """
    given, matrix = check_scenes(boundaries, adjacency)
    starts = [token_frame(start, unit, **geometry) for start in given]
    if starts[-1] >= frames:
        raise ParameterError(
            f"scene boundaries {given} in {unit} frames start at the token frames {starts}, but there "
            f"are only {frames}; check the unit of the boundaries"
            + (", or give an adjacency matrix if the last one is the end" if adjacency is None else "")
        )
    if len(set(starts)) < len(starts):
        raise ParameterError(
            f"scene boundaries {given} in {unit} frames start at the token frames {starts}; "
            "every scene needs a token frame of its own, so merge the scenes that share one"
        )
    scene = scene_numbers(frames, starts)
    return matrix[scene[:, None], scene]


class SceneAwareMaskMap:
    """Radial masks of one video whose frames are split into scenes; built once per set of options.

    Example::

        mask_map = SceneAwareMaskMap(13 * 1350, 13, scene_boundaries=[0, 15, 30, 45],
                                     scene_adjacency_matrix=torch.eye(3), unit="pixel")
        mask = mask_map.block_mask(text_length=226, decay_factor=0.5)

    Args:
        video_token_num (int): video tokens of the sequence, a multiple of ``num_frame``.
        num_frame (int): frames of the token grid, F.
        scene_boundaries (Sequence[int], Optional): frames where scenes start, see `check_scenes`. Default:
            one scene
        scene_adjacency_matrix (Sequence[Sequence[bool]] | Tensor, Optional): ``[k, k]``. Default: own scene
            only
        unit (str): unit of the boundaries, ``"latent"`` or ``"pixel"`` frames. Default: ``"latent"``
        **geometry: ``temporal_compression``, ``temporal_patch``, ``front_padding`` of `token_frame`.

    Attributes:
        visible (Tensor): ``[F, F]`` bool; row i are the frames that frame i may look at.

    Raises:
        LayoutError: the tokens do not divide into the frames.
        ParameterError: see `visible_frames`.
    """

    def __init__(
        self,
        video_token_num: int,
        num_frame: int,
        scene_boundaries: Sequence[int] | None = None,
        scene_adjacency_matrix: Sequence[Sequence[bool]] | torch.Tensor | None = None,
        *,
        unit: Unit = "latent",
        **geometry: int,
    ) -> None:
        if num_frame < 1 or video_token_num < num_frame or video_token_num % num_frame:
            raise LayoutError(f"{video_token_num} video tokens do not divide into {num_frame} frames")
        if scene_boundaries is None and scene_adjacency_matrix is not None:
            raise ParameterError("scene_adjacency_matrix needs scene_boundaries")
        self.video_token_num = video_token_num
        self.num_frame = num_frame
        boundaries = (0,) if scene_boundaries is None else scene_boundaries
        self.visible = visible_frames(num_frame, boundaries, scene_adjacency_matrix, unit=unit, **geometry)
        self._masks: dict[Any, BlockSparseMask] = {}

    def block_mask(
        self,
        *,
        text_length: int = 0,
        text_first: bool = True,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> BlockSparseMask:
        """The mask of ``text_length`` text tokens and the video; equal arguments give the same object.

        Args:
            text_length (int): text tokens of the sequence. Default: 0
            text_first (bool): text stands before the video. Default: True
            device (torch.device | str): where the mask goes. Default: ``"cpu"``
            **options: ``block_size``, ``rule``, ``decay_factor``, ``sink``, ``keep``, ``threshold`` of
                `radial_mask`.

        Returns:
            BlockSparseMask: batch and head dimensions of size 1.

        Raises:
            ParameterError: an option is out of range.
        """
        wanted = (text_length, text_first, str(device), tuple(sorted(options.items())))
        if wanted not in self._masks:
            layout = TokenLayout(
                text_length, self.num_frame, 1, self.video_token_num // self.num_frame, text_first
            )
            self._masks[wanted] = radial_mask(layout, visible=self.visible, **options).to(device)
        return self._masks[wanted]
