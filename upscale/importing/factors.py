"""Factors of our format for an expert that comes with a gate of its own. Pure functions on tensors."""

import torch
from torch import Tensor

from upscale.building.linalg import allowed_deviation, deviation


def orthonormal(gate: Tensor) -> bool:
    """Whether the rows of ``gate`` [g, i] are orthonormal, as finely as its dtype can say."""
    return deviation(gate) <= allowed_deviation(gate.dtype)


def factors(left: Tensor, right: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``down`` with orthonormal rows, the first of them the gate's, and ``up``, so that ``up @ down = left @ right``.

    Our projection router looks at the first rows of ``down``, so the gate's come first whatever the expert's factors
    are; what these reach beyond the gate follows. A gate of the expert's own leading singular vectors, as SMILE makes
    it, is the case in which nothing is added: the result is the expert's singular value decomposition.

    Args:
        left: [o, k] float, left singular vectors or any other factor.
        right: [k, i], right singular vectors times singular values.
        gate: [g, i], orthonormal rows; g may be 0. Its dtype says how finely all three are rounded.

    Returns:
        down [r, i] and up [o, r], float32; ``g <= r <= min(g + k, i)``.
    """
    eps = torch.finfo(gate.dtype).eps
    left, right, gate = left.double(), right.double(), gate.double()
    basis = torch.linalg.qr(gate.mT).Q.mT
    beyond = right - right @ basis.mT @ basis
    size = torch.linalg.vector_norm(right, dim=1)
    none = max(size.tolist(), default=0.0) * max(left.shape[0], right.shape[1]) * torch.finfo(torch.float32).eps
    new = beyond[torch.linalg.vector_norm(beyond, dim=1) > 2 * eps * size + none]  # the rest is rounding
    down = torch.cat([gate, torch.linalg.qr(torch.cat([basis, new]).mT).Q.mT[len(gate) :]])
    return down.float(), (left @ (right @ down.mT)).float()
