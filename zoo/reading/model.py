"""What every part of the package asks of a model's weights, whatever files they lie in."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from zoo.errors import CheckpointError
from zoo.reading.product import Product

_BLOCK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Extent:
    """Bytes of a file.

    Attributes:
        file: which.
        start: place of the first.
        nbytes: how many.
    """

    file: Path
    start: int
    nbytes: int

    def blocks(self) -> Iterator[bytes]:
        """The bytes, some at a time; fewer if the file ends before. Raises CheckpointError: they cannot be read."""
        place, end = self.start, self.start + self.nbytes
        try:
            with self.file.open("rb", buffering=0) as file:
                while block := os.pread(file.fileno(), min(_BLOCK, end - place), place):
                    yield block
                    place += len(block)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read any more ({error.strerror}); start again") from error


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor as its file's header describes it; ``start`` is the place of its first byte, where that is told."""

    file: Path = field(compare=False)
    start: int | None = field(default=None, compare=False)

    @property
    def extent(self) -> Extent | None:
        """Where its bytes lie; None in a pickle, and on the Hub."""
        return None if self.start is None else Extent(self.file, self.start, self.nbytes)


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
    def own_tensors(self) -> Mapping[str, TensorInfo]:
        """Those that its files hold, as these name them."""
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

    def extent(self, name: str) -> Extent | None:
        """Where the bytes of a tensor lie as ``read`` gives them; None if it makes them."""
        ...

    def known_rank(self, name: str) -> int | None:
        """The most that a matrix's difference from the base's can have as its rank; None if only reading would tell."""
        ...

    def product(self, name: str) -> Product | None:
        """A matrix's difference from the base's, where it is stored as factors or is known to be zero."""
        ...


def files(model: Model) -> list[Path]:
    """The files that hold a model's weights, sorted."""
    return sorted({info.file for info in model.own_tensors.values()})
