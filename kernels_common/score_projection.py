"""Queries and keys in a few dimensions whose products stand in for those in all of them.

A score ``q . k`` becomes ``(A q) . (B k)`` with A and B of R rows each. Over all pairs of the queries and
keys of a head, with second moments C_q and C_k, the mean squared error is ``tr(C_q E C_k E^T)``, where
``E = I - A^T B``. Softmax does not see what all scores of a row share, so keys are taken from their mean.

Shape letters: B batch, H key heads, N tokens, D head dimension, R directions.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from core.errors import LayoutError, ParameterError

Projection = Literal["none", "optimal", "pca", "channels", "random"]
PROJECTION_READS = {name: () if name == "none" else ("directions",) for name in get_args(Projection)}
"""Parameters that a strategy's ``projection`` reads, for `core.StrategyParameters.read_by`."""
POWER_ITERATIONS = 4
RIDGE = 1e-6  # on second moments whose inverse is taken, in units of their mean eigenvalue
GRAM_RIDGE = 1e-12  # the same where columns are made orthonormal; less, and rounding in fp64 could reach 0
SEED = 0


class ScoreMoments(NamedTuple):
    """Second moments of the queries and of the centred keys of every key head, ``[B, H, D, D]`` fp64 each."""

    query: torch.Tensor
    key: torch.Tensor


class ScoreProjection(NamedTuple):
    """``A^T`` and ``B^T``, ``[B, H, D, R]`` fp64 each: scores are ``(q @ query) . (k @ key)``."""

    query: torch.Tensor
    key: torch.Tensor


def reduce_tokens(
    query: torch.Tensor, key: torch.Tensor, method: Projection, directions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys in few dimensions, found from these very tokens. Nothing waits for the device.

    The factor on the scores stays that of all dimensions, ``1 / sqrt(D)``.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        method (str): see :func:`score_projection`, or ``"none"``.
        directions (int): R; the tokens come back as they are from D on.

    Returns:
        tuple[Tensor, Tensor]: ``[B, Hq, Nq, R]`` and ``[B, Hkv, Nk, R]``, in their dtypes.

    Raises:
        LayoutError: shapes do not fit together.
        ParameterError: ``method`` or ``directions`` is not one of those.
    """
    if method == "none" or directions >= query.shape[3]:
        return query, key
    return project_tokens(query, key, score_projection(score_moments(query, key), method, directions))


def project_tokens(
    query: torch.Tensor, key: torch.Tensor, projection: ScoreProjection
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A q`` and ``B k``, computed in fp32 (fp64 for fp64 tokens), in the dtypes of the tokens."""
    group = query.shape[1] // key.shape[1]
    bases = (projection.query.repeat_interleave(group, 1), projection.key)
    low_query, low_key = (
        (_precise(tokens) @ _like(basis, tokens)).to(tokens.dtype)
        for tokens, basis in zip((query, key), bases, strict=True)
    )
    return low_query, low_key


def score_moments(query: torch.Tensor, key: torch.Tensor) -> ScoreMoments:
    """Moments of the tokens of a call; the query heads of one key head count together.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.

    Raises:
        LayoutError: shapes do not fit together.
    """
    shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
    if not query.dim() == key.dim() == 4 or not (query.numel() and key.numel()):
        raise LayoutError(f"queries and keys must be [B, H, N, D] and not empty, got {shapes}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise LayoutError(f"queries and keys must share B and D, Hq be a multiple of Hkv; got {shapes}")
    grouped = query.reshape(*key.shape[:2], -1, query.shape[3])
    keys = _precise(key)
    return ScoreMoments(second_moment(grouped), second_moment(keys - keys.mean(2, keepdim=True)))


def second_moment(tokens: torch.Tensor) -> torch.Tensor:
    """Mean of ``x x^T`` over the tokens of ``[B, H, N, D]``: ``[B, H, D, D]`` fp64."""
    tokens = _precise(tokens)
    return (tokens.mT @ tokens).double() / tokens.shape[2]


def score_projection(moments: ScoreMoments, method: Projection, directions: int) -> ScoreProjection:
    """A and B for scores like those that the moments were taken from.

    Args:
        moments (ScoreMoments): of :func:`score_moments`, or means of several.
        method (str): ``"optimal"``, :func:`optimal_projection`; ``"pca"``, :func:`principal_projection`;
            ``"channels"``, :func:`channel_projection`; ``"random"``, :func:`random_projection` with the
            same draw at every call.
        directions (int): R, from 1 to D.

    Raises:
        ParameterError: ``method`` or ``directions`` is not one of those.
    """
    dim = moments.key.shape[-1]
    if not 1 <= directions <= dim:
        raise ParameterError(f"directions must be from 1 to the head dimension {dim}, got {directions}")
    if method == "channels":
        return channel_projection(moments, directions)
    source = torch.Generator(moments.key.device).manual_seed(SEED)
    if method == "random":
        return random_projection(moments, directions, source)
    if method == "pca":
        return principal_projection(moments, directions, source)
    if method == "optimal":
        return optimal_projection(moments, directions, source)
    raise ParameterError(f"a projection must be optimal, pca, channels or random, got {method!r}")


def optimal_projection(moments: ScoreMoments, directions: int, generator: torch.Generator) -> ScoreProjection:
    """The A and B of least mean squared error of the scores.

    ``A^T B`` is the best approximation of the identity of rank R in the metrics of both moments (Eckart and
    Young): with ``C_q = L L^T`` and U the leading eigenvectors of ``L^T C_k L``, ``A^T = L^-T U`` and
    ``B^T = L U``. The error is the sum of the eigenvalues that are left out (:func:`score_spectrum`). U is
    found by a few power iterations from random directions.

    Args:
        moments (ScoreMoments): of the scores.
        directions (int): R.
        generator (torch.Generator): source of the first directions, on the device of the moments.
    """
    factor = _cholesky(moments.query, RIDGE)
    basis = _leading_directions(factor.mT @ moments.key @ factor, directions, generator)
    return ScoreProjection(torch.linalg.solve_triangular(factor.mT, basis, upper=True), factor @ basis)


def principal_projection(
    moments: ScoreMoments, directions: int, generator: torch.Generator
) -> ScoreProjection:
    """Principal components of the keys for both sides (Loki, arXiv 2406.02542); arguments as above."""
    basis = _leading_directions(moments.key, directions, generator)
    return ScoreProjection(basis, basis)


def channel_projection(moments: ScoreMoments, directions: int) -> ScoreProjection:
    """The R channels in which queries times keys are largest in the mean square (arXiv 2408.07092)."""
    dim = moments.key.shape[-1]
    strength = moments.query.diagonal(dim1=-2, dim2=-1) * moments.key.diagonal(dim1=-2, dim2=-1)
    chosen = F.one_hot(strength.topk(directions).indices, dim).mT.to(strength.dtype)
    return ScoreProjection(chosen, chosen)


def random_projection(moments: ScoreMoments, directions: int, generator: torch.Generator) -> ScoreProjection:
    """Random orthonormal directions, the same for all heads; products are unbiased over the draw."""
    dim = moments.key.shape[-1]
    basis = _orthonormal(_draw(dim, directions, generator)).expand(*moments.key.shape[:-1], -1)
    return ScoreProjection(basis, basis * (dim / directions))


def score_spectrum(moments: ScoreMoments) -> torch.Tensor:
    """Squared singular values of the scores in falling order, ``[B, H, D]``; waits for the device.

    Their sum is the mean squared score (keys centred), that of all but the first R the least error that R
    directions can have.
    """
    values, vectors = torch.linalg.eigh(moments.query)
    root = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return torch.linalg.eigvalsh(root.mT @ moments.key @ root).clamp(min=0).flip(-1)


def score_error(moments: ScoreMoments, projection: ScoreProjection) -> torch.Tensor:
    """Mean squared error of the scores over all pairs that the moments were taken from, ``[B, H]``."""
    lost = -projection.query @ projection.key.mT
    lost.diagonal(dim1=-2, dim2=-1).add_(1)
    return ((moments.query @ lost) * (lost @ moments.key)).sum((-2, -1))


def _leading_directions(moment: torch.Tensor, directions: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal ``[B, H, D, R]`` columns close to the span of the leading eigenvectors."""
    basis = _draw(moment.shape[-1], directions, generator).expand(*moment.shape[:-1], -1)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(moment @ basis)
    return _orthonormal(basis)  # what one pass leaves of very unequal columns


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Columns of the same span with ``Q^T Q = I``; columns that are missing from the span come out as 0.

    By the Cholesky factor of their products: ``torch.linalg.qr`` takes one matrix after the other on GPUs.
    """
    factor = _cholesky(columns.mT @ columns, GRAM_RIDGE)
    return torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)


def _cholesky(moment: torch.Tensor, ridge: float) -> torch.Tensor:
    """Lower factor of a moment with a ridge; unlike ``torch.linalg.cholesky`` it waits for no device."""
    ridged = moment.clone()
    diagonal = ridged.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * diagonal.mean(-1, keepdim=True) + torch.finfo(moment.dtype).tiny
    return torch.linalg.cholesky_ex(ridged).L


def _draw(dim: int, directions: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(dim, directions, generator=generator, device=generator.device, dtype=torch.float64)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _like(basis: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return basis.to(torch.promote_types(tokens.dtype, torch.float32))
