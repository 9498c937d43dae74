"""Read a checkpoint lazily: configuration and headers first, then one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.errors import CheckpointError
from zoo.reading.companions import companions
from zoo.reading.folder import Folder
from zoo.reading.model import Extent, TensorInfo
from zoo.reading.product import Product
from zoo.reading.shards import read, tensors_of


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: ``config``, the headers of its tensors, and a reader for each.

    Attributes:
        path: the directory.
        config: ``config.json``.
        tensors: by name, from the headers of all shards.
    """

    path: Path
    config: Mapping
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, where: str | Path | Folder, *, allow_pickle: bool = False) -> "Checkpoint":
        """Read ``config.json`` and every shard's header; no weights.

        Args:
            where: the directory, or a folder whose weights may still be on the Hub.
            allow_pickle: see ``shards.tensors_of``.

        Raises:
            CheckpointError: not a model, an adapter, weights only as pickle, a shard missing or damaged.
        """
        folder = where if isinstance(where, Folder) else Folder(Path(where))
        if is_adapter(folder):
            raise CheckpointError(f"{folder.path}: a LoRA adapter, not a full checkpoint; merge it into its base first")
        return cls(folder.path, folder.read_json("config.json"), tensors_of(folder, allow_pickle=allow_pickle))

    @property
    def own_tensors(self) -> Mapping[str, TensorInfo]:
        """See Model."""
        return self.tensors

    @property
    def nbytes(self) -> int:
        """See Model."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def companions(self) -> Mapping[str, Path | bytes]:
        """See Model."""
        return companions(self.path)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype, on the CPU."""
        return read(self.tensors[name], name)

    def extent(self, name: str) -> Extent | None:
        """See Model."""
        return self.tensors[name].extent

    def known_rank(self, name: str) -> int | None:
        """See Model: a full checkpoint knows nothing of its base."""
        return None

    def product(self, name: str) -> Product | None:
        """See Model: a full checkpoint knows nothing of its base."""
        return None


def is_adapter(folder: Folder) -> bool:
    """Whether a directory holds a PEFT adapter and no model of its own."""
    names = folder.names()
    return "adapter_config.json" in names and "config.json" not in names
