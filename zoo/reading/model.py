"""What every part of the package asks of a model's weights, whatever files they lie in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from zoo.reading.product import Product


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Model(Protocol):
    """A model's configuration and tensors, known before any weight is read.

    ``Checkpoint`` is one, ``Adapter`` a base with a LoRA on it, ``View`` one whose tensors are arranged like a group's.
    """

    @property
    def path(self) -> Path:
        """Its directory."""
        ...

    @property
    def config(self) -> Mapping:
        """``config.json``."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Its tensors by name."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold its weights."""
        ...

    @property
    def nbytes(self) -> int:
        """Size of its own tensors: what keeping it costs beside its base."""
        ...

    @property
    def companions(self) -> Mapping[str, Path | bytes]:
        """Tokenizer and other files that travel with it."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        ...

    def known_rank(self, name: str) -> int | None:
        """The most that a matrix's difference from the base's can have as its rank; None if only reading would tell."""
        ...

    def product(self, name: str) -> Product | None:
        """A matrix's difference from the base's, where it is stored as factors or is known to be zero."""
        ...
