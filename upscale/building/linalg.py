"""Low-rank factors of a delta, and what they leave behind. Pure functions on tensors, computed in float32."""

from dataclasses import dataclass

import torch
from torch import Tensor

from upscale.device import threads
from upscale.errors import NonFiniteError
from zoo.reading.product import Product

OVERSAMPLE = 16  # extra columns of the sketch (Halko, Martinsson & Tropp 2011, section 4.2 suggests 5 to 10)
POWER_ITERATIONS = 2
_ROWS = 1024  # of a matrix, taken at once
_CANCELLED = 1e-4  # below this share the difference of squares is float32 rounding: take the residual itself


@dataclass(frozen=True)
class LowRank:
    """``delta ~ up @ down`` with orthonormal rows in ``down`` and the singular values folded into ``up``.

    Attributes:
        down: [r, i] float32, right singular vectors, largest singular value first.
        up: [o, r] float32, left singular vectors times singular values.
        norm: Frobenius norm of the delta.
        left: Frobenius norm of ``delta - up @ down``.
    """

    down: Tensor
    up: Tensor
    norm: float
    left: float

    def to(self, device: str) -> "LowRank":
        """The same on another device."""
        return LowRank(self.down.to(device), self.up.to(device), self.norm, self.left)


def factor(delta: Tensor | Product, rank: int, *, exact: bool = False, seed: int = 0) -> LowRank:
    """Factor ``delta`` to ``rank`` by a randomised range finder, or by full SVD, with the error that this leaves.

    The error is measured, not estimated: ``up @ down`` is an orthogonal projection of ``delta``, so that
    ``|delta - up @ down|^2 = |delta|^2 - |up|^2`` (Halko, Martinsson & Tropp, SIAM Review 2011, algorithm 4.4 with
    the small SVD of section 5.1).

    Args:
        delta: [o, i], any float dtype and device; computed there in float32. Of factors the SVD is exact, and never of
            a matrix larger than their rank.
        rank: at least 0; clamped to min(o, i), and to the numerical rank of ``delta``.
        exact: full SVD, the reference.
        seed: of the sketch; same seed, same factors.

    Returns:
        LowRank, of rank 0 if ``delta`` or ``rank`` is zero.

    Raises:
        NonFiniteError: NaN or infinity in ``delta``.
    """
    if isinstance(delta, Product):
        with threads(1):  # of matrices so slim several only wait for each other
            return _of_product(delta, rank)
    delta = delta.float()
    norm = _finite(float(torch.linalg.vector_norm(delta)), delta)
    o, i = delta.shape
    if norm == 0.0 or rank == 0:
        return LowRank(delta.new_zeros(0, i), delta.new_zeros(o, 0), norm, norm)
    if exact or rank + OVERSAMPLE >= min(o, i):
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
    elif o < i:  # the small SVD then is of the shorter side
        v, s, u = (t.mT if t.ndim == 2 else t for t in _sketched_svd(delta.mT, rank, seed))
    else:
        u, s, v = _sketched_svd(delta, rank, seed)
    kept = min(rank, int((s > s[0] * max(o, i) * torch.finfo(torch.float32).eps).sum()))
    up, down = (u[:, :kept] * s[:kept]).contiguous(), v[:kept].contiguous()
    left = norm**2 - float(s[:kept].double().square().sum())
    if left > _CANCELLED * norm**2:
        return LowRank(down, up, norm, left**0.5)
    return LowRank(down, up, norm, _missed(delta, down, up))


def _missed(delta: Tensor, down: Tensor, up: Tensor) -> float:
    """Norm of ``delta - up @ down``, without a matrix as large as the delta."""
    parts = [torch.linalg.vector_norm(d - u @ down) for d, u in zip(delta.split(_ROWS), up.split(_ROWS), strict=True)]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def _finite(norm: float, delta: Tensor | Product) -> float:
    if not norm < float("inf"):
        raise NonFiniteError(f"a delta of shape {list(delta.shape)} has NaN or infinite values")
    return norm


def norm_of(delta: Tensor | Product) -> float:
    """Frobenius norm of a delta, in float32."""
    if isinstance(delta, Product):
        delta = _core(delta)[1]
    return float(torch.linalg.vector_norm(delta.float()))


def deviation(rows: Tensor) -> float:
    """How far the rows of a matrix [r, i] are from orthonormal: the largest entry of ``|rows rows^T - 1|``."""
    if not len(rows):
        return 0.0
    rows = rows.double()
    return float((rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).abs().max())


def allowed_deviation(dtype: torch.dtype) -> float:
    """What ``deviation`` may be for orthonormal rows that are stored in a dtype.

    Rounding moves a unit vector by half an eps at most, so that no product of two moves by more than an eps; four leave
    room for factors that were rounded before. In float32 the factoring itself, on any device, leaves more than that.
    """
    return max(1e-4, 4 * torch.finfo(dtype).eps)


def singular_values(product: Product) -> Tensor:
    """Singular values of a product [m, n] of rank r, largest first: [min(m, n, r)] float32."""
    return torch.linalg.svdvals(_core(product)[1])


def _core(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """``q c p.T`` with orthonormal columns in q [m, r] and p [n, r]: the small c [r, r] has all singular values."""
    q, left = torch.linalg.qr(product.left)
    p, right = torch.linalg.qr(product.right.mT)
    return q, left @ right.mT, p


def _of_product(product: Product, rank: int) -> LowRank:
    q, core, p = _core(product)
    norm = _finite(float(torch.linalg.vector_norm(core)), product)
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    least = (s[0] if len(s) else 0.0) * max(product.shape) * torch.finfo(torch.float32).eps
    kept = min(rank, int((s > least).sum()))
    down, up = (v[:kept] @ p.mT).contiguous(), (q @ (u[:, :kept] * s[:kept])).contiguous()
    return LowRank(down, up, norm, float(torch.linalg.vector_norm(s[kept:])))


def _sketched_svd(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of ``a`` [m, n] by subspace iteration: u [m, q], s [q], v [q, n]."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device
    q = torch.randn(a.shape[1], rank + OVERSAMPLE, generator=generator).to(a.device)
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(a.mT @ torch.linalg.qr(a @ q).Q).Q
    q = torch.linalg.qr(a @ q).Q
    u, s, v = torch.linalg.svd(q.mT @ a, full_matrices=False)
    return q @ u, s, v
