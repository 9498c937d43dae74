"""The ``upscale`` section of ``config.json``: which modules have experts, and the tensors of each.

Symbols: ``E`` experts, ``R`` the sum of their ranks, ``i``/``o`` in/out features, ``d`` width of a norm or an
embedding, ``V`` vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

FORMAT_VERSION = 1
LINEAR, EMBEDDING, NORM = "linear", "embedding", "norm"
LOW_RANK, DENSE, SPARSE = "low-rank", "dense", "sparse"
_BYTES = "gaps"  # the one tensor that holds no numbers of the model's format


def stored_dtype(tensor: str, dtype: torch.dtype) -> torch.dtype:
    """The format of an expert's tensor in a model of the format ``dtype``."""
    return torch.uint8 if tensor == _BYTES else dtype


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
        vectors: how its deltas are stored: "low-rank", "dense" or "sparse".
        stored: of "sparse", entries and bytes of positions that are stored for each expert; see ``sparse_upscaled``.
    """

    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    bias: bool
    kind: str = LINEAR
    tied: str | None = None
    vectors: str = LOW_RANK
    stored: tuple[int, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors ``<module>.experts.*``."""
        experts, total = len(self.ranks), sum(self.ranks)
        if self.tied:
            return {}
        if self.kind == NORM:
            wide = (experts, self.out_features)
            return {"scale": wide, "shift": wide} if self.bias else {"scale": wide}
        shapes: dict[str, tuple[int, ...]] = {
            LOW_RANK: {"down": (total, self.in_features), "up": (self.out_features, total)},
            DENSE: {"delta": (experts, self.out_features, self.in_features)},
            SPARSE: {name: (experts, size) for name, size in zip(("values", _BYTES), self.stored, strict=False)},
        }[self.vectors]
        return shapes | ({"bias": (experts, self.out_features)} if self.bias else {})

    @classmethod
    def from_config(cls, entry: Mapping) -> "ModuleLayout":
        """Parse an entry of ``modules``."""
        return cls(**{**entry, "ranks": tuple(entry["ranks"]), "stored": tuple(entry.get("stored", ()))})

    def to_config(self) -> dict:
        """The entry as plain JSON values, without what is the default."""
        entry: dict[str, Any] = {**self.__dict__, "ranks": list(self.ranks)}
        for name, default in (("kind", LINEAR), ("tied", None), ("vectors", LOW_RANK)):
            if entry[name] == default:
                del entry[name]
        stored = entry.pop("stored")
        return entry | ({"stored": list(stored)} if stored else {})


@dataclass(frozen=True)
class Layout:
    """The ``upscale`` section of ``config.json``: everything an engine must know before it reads a tensor.

    Attributes:
        method: that built it.
        experts: their names, in the order of all tensors.
        router: its settings.
        modules: what has experts, by name.
        heads: of a classifier, shapes of each expert's tensors of the head, stored as ``heads.<number>.<name>``.
        labels: of a classifier, the names of each expert's classes by their numbers.
    """

    method: str
    experts: tuple[str, ...]
    router: Mapping
    modules: Mapping[str, ModuleLayout]
    heads: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def from_config(cls, section: Mapping) -> "Layout":
        """Parse the section. Raises ValueError for a version that this code does not know."""
        if (version := section.get("format_version")) != FORMAT_VERSION:
            raise ValueError(
                f"format version {version} of the upscaled checkpoint is not {FORMAT_VERSION}; update upscale-zoo"
            )
        modules = {name: ModuleLayout.from_config(entry) for name, entry in section["modules"].items()}
        heads = {e: {name: tuple(s) for name, s in own.items()} for e, own in section.get("heads", {}).items()}
        return cls(
            section["method"], tuple(section["experts"]), section["router"], modules, heads, section.get("labels", {})
        )

    def to_config(self) -> dict:
        """The section as plain JSON values."""
        heads = {e: {name: list(shape) for name, shape in own.items()} for e, own in self.heads.items()}
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "experts": list(self.experts),
            "router": dict(self.router),
            "modules": {name: module.to_config() for name, module in self.modules.items()},
            **({"heads": heads, "labels": {e: dict(own) for e, own in self.labels.items()}} if heads else {}),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all experts' tensors, by their names in the checkpoint."""
        shapes = {
            f"{name}.experts.{tensor}": shape
            for name, module in self.modules.items()
            for tensor, shape in module.shapes().items()
        }
        for number, own in enumerate(self.heads.values()):
            shapes |= {f"heads.{number}.{name}": shape for name, shape in own.items()}
        return shapes
