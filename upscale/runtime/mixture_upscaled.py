"""The layers of an upscaled model: what is stored for each module, and what it adds to the base's output.

Symbols: ``B`` sequences, ``T`` tokens, ``E`` experts, ``r`` the rank of one expert, ``R`` the sum of the ranks,
``i``/``o`` in/out features, ``d`` width of a norm or an embedding, ``V`` vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FORMAT_VERSION = 1
LINEAR, EMBEDDING, NORM = "linear", "embedding", "norm"


def spread(w: Tensor, ranks: Sequence[int]) -> Tensor:
    """Repeat each expert's weight over its ``r`` columns: ``w`` [..., E] -> [..., R], same dtype."""
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


# ------------------------------------------------------------------------------------------------------------ layout
@dataclass(frozen=True)
class ModuleLayout:
    """What is stored for one module of the base.

    Attributes:
        in_features: i; of a norm, its width. An embedding is described as the output head of the same weight [V, d]:
            ``in_features`` is d and ``out_features`` V, so that tied heads and embeddings share their factors.
        out_features: o.
        ranks: of each expert; 0 for one that did not change it, and for all experts of a norm.
        bias: whether bias deltas are stored.
        kind: "linear", "embedding" or "norm".
        tied: the embedding whose factors this output head uses; it has none of its own.
    """

    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    bias: bool
    kind: str = LINEAR
    tied: str | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors ``<module>.experts.*``."""
        experts, total = len(self.ranks), sum(self.ranks)
        if self.tied:
            return {}
        if self.kind == NORM:
            wide = (experts, self.out_features)
            return {"scale": wide, "shift": wide} if self.bias else {"scale": wide}
        shapes = {"down": (total, self.in_features), "up": (self.out_features, total)}
        return shapes | ({"bias": (experts, self.out_features)} if self.bias else {})

    @classmethod
    def from_config(cls, entry: Mapping) -> "ModuleLayout":
        """Parse an entry of ``modules``."""
        return cls(**{**entry, "ranks": tuple(entry["ranks"])})

    def to_config(self) -> dict:
        """The entry as plain JSON values, without what is the default."""
        entry: dict[str, Any] = {**self.__dict__, "ranks": list(self.ranks)}
        if self.kind == LINEAR:
            del entry["kind"]
        if self.tied is None:
            del entry["tied"]
        return entry


@dataclass(frozen=True)
class Layout:
    """The ``upscale`` section of ``config.json``: everything an engine must know before it reads a tensor."""

    method: str
    experts: tuple[str, ...]
    router: Mapping
    modules: Mapping[str, ModuleLayout]

    @classmethod
    def from_config(cls, section: Mapping) -> "Layout":
        """Parse the section. Raises ValueError for a version that this code does not know."""
        if (version := section.get("format_version")) != FORMAT_VERSION:
            raise ValueError(
                f"format version {version} of the upscaled checkpoint is not {FORMAT_VERSION}; update upscale-zoo"
            )
        modules = {name: ModuleLayout.from_config(entry) for name, entry in section["modules"].items()}
        return cls(section["method"], tuple(section["experts"]), section["router"], modules)

    def to_config(self) -> dict:
        """The section as plain JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "experts": list(self.experts),
            "router": dict(self.router),
            "modules": {name: module.to_config() for name, module in self.modules.items()},
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all experts' tensors, by their names in the checkpoint."""
        return {
            f"{name}.experts.{tensor}": shape
            for name, module in self.modules.items()
            for tensor, shape in module.shapes().items()
        }


# ------------------------------------------------------------------------------------------------------------ layers
class Experts(nn.Module):
    """The experts of one module, with the tensors that its layout names; uninitialised."""

    def __init__(self, name: str, layout: ModuleLayout, routing: Any, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.name, self.ranks, self.routing = name, layout.ranks, routing
        for tensor in ("bias", "shift"):
            setattr(self, tensor, None)
        for tensor, shape in layout.shapes().items():
            empty = torch.empty(shape, dtype=dtype, device=device)
            setattr(self, tensor, nn.Parameter(empty, requires_grad=False))


class LinearExperts(Experts):
    """Low-rank experts of a linear: ``down`` [R, i], ``up`` [o, R] and, if any bias changed, ``bias`` [E, o]."""

    down: Tensor
    up: Tensor
    bias: Tensor | None

    def forward(self, args: tuple, y: Tensor) -> Tensor:
        """Add the experts' part to the base's output ``y`` [..., o] for its input ``args[0]`` [..., i]."""
        z = F.linear(args[0], self.down)
        w = self.routing.weights(self.name, y, z, self.ranks)
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
        """Change the norm's output ``y`` [..., d], or [..., heads, d]."""
        w = self.routing.weights(self.name, y).to(y.dtype)
        y = y + y * _like(w @ self.scale, y)
        return y if self.shift is None else y + _like(w @ self.shift, y)


def _like(value: Tensor, y: Tensor) -> Tensor:
    """[..., d] -> [..., 1, d] if ``y`` has a dimension of heads that weights know nothing of."""
    return value if value.ndim == y.ndim else value.unsqueeze(-2)
