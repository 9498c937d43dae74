"""Are a checkpoint's bytes still those that were written? ``checksums.json`` knows."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.errors import CheckpointError
from zoo.reading.checkpoint import Checkpoint
from zoo.reading.folder import Folder, inside
from zoo.writing.checksums import CHECKSUMS

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, tensor
_THREADS = 4  # tensors read and hashed at once


@dataclass(frozen=True)
class Sums:
    """The content of ``checksums.json``: SHA-256 by tensor, and by file."""

    tensors: Mapping[str, str]
    files: Mapping[str, str]

    @classmethod
    def of(cls, directory: Path) -> "Sums | None":
        """Read it, None if there is none. Raises CheckpointError for a damaged one."""
        if not (directory / CHECKSUMS).is_file():
            return None
        said = Folder(directory).read_json(CHECKSUMS)
        tensors, files = said.get("tensors"), said.get("files")
        if not isinstance(tensors, dict) or not isinstance(files, dict):
            raise CheckpointError(f"{directory / CHECKSUMS}: no sums of tensors and files; fetch the file again")
        return cls(tensors, files)


def differing(
    directory: Path,
    look: Callable[[str, torch.Tensor], None] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The files and tensors that are missing or have other bytes than ``checksums.json`` says; without it, none.

    Args:
        directory: a checkpoint.
        look: is shown every tensor of it with its name, in one of several threads, while it is read for its hash.
        progress: called as tensors are done, with (bytes done, bytes in all, name).

    Raises:
        CheckpointError: a damaged ``checksums.json``, or no readable checkpoint.
    """
    said, model = Sums.of(directory) or Sums({}, {}), Checkpoint.open(directory)
    wanted = [name for name in model.tensors if look is not None or name in said.tensors]

    def one(name: str) -> str | None:
        tensor = model.read(name)
        if look is not None:
            look(name, tensor)
        return _of_tensor(tensor) if name in said.tensors else None

    found: dict[str, str | None] = {}
    done, total = 0, sum(model.tensors[name].nbytes for name in wanted)
    pool = ThreadPoolExecutor(max_workers=_THREADS)
    try:
        for name, digest in zip(wanted, pool.map(one, wanted), strict=True):
            found[name] = digest
            done += model.tensors[name].nbytes
            if progress:
                progress(done, total, name)
    finally:
        pool.shutdown(cancel_futures=True)
    files = [name for name, digest in said.files.items() if _of_file(inside(directory, directory / name)) != digest]
    return [*files, *(f"tensor {name}" for name, digest in said.tensors.items() if found.get(name) != digest)]


def _of_file(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _of_tensor(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
