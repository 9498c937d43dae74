"""The layers of an upscaled model: what the experts add to the output of one of the base's modules.

Symbols: ``B`` sequences, ``T`` tokens, ``E`` experts, ``r`` the rank of one expert, ``R`` the sum of the ranks,
``i``/``o`` in/out features, ``d`` width of a norm or an embedding, ``V`` vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layout_upscaled import ModuleLayout, stored_dtype


def spread(w: Tensor, ranks: Sequence[int]) -> Tensor:
    """Each expert's weight for each of its ``r`` columns: ``w`` [..., E] -> [..., R], same dtype.

    Or the weights of its ``k`` terms, [..., E * k], of which it has the first ``r``.
    """
    if (terms := w.shape[-1] // len(ranks)) > 1:
        return torch.cat([w[..., e * terms : e * terms + r] for e, r in enumerate(ranks)], dim=-1)
    if len(set(ranks)) == 1:
        return w.unsqueeze(-1).expand(*w.shape, ranks[0]).flatten(-2)
    return torch.cat([w[..., e : e + 1].expand(*w.shape[:-1], r) for e, r in enumerate(ranks)], dim=-1)


def mixture(z: Tensor, w: Tensor, ranks: Sequence[int], up: Tensor, bias: Tensor | None) -> Tensor:
    """What the experts add to a linear's output: ``(z * w) @ up.T + w @ bias``, whoever computed ``w``.

    Args:
        z: [..., R] projections ``x @ down.T`` of the input on every expert's directions.
        w: [..., E] routing weights.
        ranks: of each expert; their sum is R.
        up: [o, R] left singular vectors times singular values.
        bias: [E, o] bias deltas, or None.

    Returns:
        [..., o] in the dtype of ``z``.
    """
    w = w.to(z.dtype)
    y = F.linear(z * spread(w, ranks), up)
    return y if bias is None else y + w @ bias


class Experts(nn.Module):
    """The experts of one module, with the tensors that its layout names; uninitialised."""

    def __init__(self, name: str, layout: ModuleLayout, routing: Any, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.name, self.ranks, self.routing = name, layout.ranks, routing
        for tensor in ("bias", "shift"):
            setattr(self, tensor, None)
        for tensor, shape in layout.shapes().items():
            empty = torch.empty(shape, dtype=stored_dtype(tensor, dtype), device=device)
            setattr(self, tensor, nn.Parameter(empty, requires_grad=False))


class LinearExperts(Experts):
    """Low-rank experts of a linear: ``down`` [R, i], ``up`` [o, R] and, if any bias changed, ``bias`` [E, o]."""

    down: Tensor
    up: Tensor
    bias: Tensor | None

    def forward(self, args: tuple, y: Tensor) -> Tensor:
        """Add the experts' part to the base's output ``y`` [..., o] for its input ``args[0]`` [..., i]."""
        z = F.linear(args[0], self.down)
        w = self.routing.weights(self.name, y, args[0], z, self.ranks)
        return y + mixture(z, w, self.ranks, self.up, self.bias)


class TiedExperts(LinearExperts):
    """Experts of an output head that is tied to the embeddings: it uses theirs."""

    def share(self, embedding: "EmbeddingExperts") -> None:
        """Use the factors of ``embedding``, without owning them: they are saved and moved once."""
        self.__dict__["embedding"] = embedding

    @property
    def down(self) -> Tensor:
        """[R, d], of the embedding."""
        return self.__dict__["embedding"].down

    @property
    def up(self) -> Tensor:
        """[V, R], of the embedding."""
        return self.__dict__["embedding"].up


class EmbeddingExperts(Experts):
    """Low-rank experts of an embedding: ``down`` [R, d], ``up`` [V, R], the factors of its weight [V, d]."""

    down: Tensor
    up: Tensor
    once = False  # positions, which a model may embed once for all sequences

    def forward(self, args: tuple, y: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Add the experts' part to the embeddings ``y`` [..., d] of the tokens ``args[0]`` [...].

        ``scale`` is what the base's module multiplies its rows by.
        """
        z = F.embedding(args[0], self.up)
        w = self.routing.weights(self.name, y, once=self.once).to(y.dtype)
        return y + (z * spread(w, self.ranks)) @ self.down * scale


class NormExperts(Experts):
    """Deltas of a norm's gain and bias, as ``scale`` and ``shift`` [E, d] of its output.

    ``n * (g + dg) + b + db = y + y * dg/g + (db - b * dg/g)`` for ``y = n * g + b``: no layer, in any engine and fused
    or not, need be known from inside.
    """

    scale: Tensor
    shift: Tensor | None

    def forward(self, args: tuple, y: Tensor) -> Tensor:
        """Change the norm's output ``y`` [..., T, d], or of heads [..., T, h, d] or [..., h, T, d]."""
        if y.ndim == 4 and y.stride(1) < y.stride(2):  # a view of [B, T, h, d]: some models bring heads forward first
            return self.forward(args, y.transpose(1, 2)).transpose(1, 2)
        w = self.routing.weights(self.name, y).to(y.dtype)
        y = y + y * _like(w @ self.scale, y)
        return y if self.shift is None else y + _like(w @ self.shift, y)


def _like(value: Tensor, y: Tensor) -> Tensor:
    """[..., d] -> [..., 1, d] if ``y`` has a dimension of heads that weights know nothing of."""
    return value if value.ndim == y.ndim else value.unsqueeze(-2)
