"""Are a checkpoint's bytes still those that were written? ``checksums.json`` knows."""

import hashlib
from pathlib import Path

import torch

from zoo.reading.checkpoint import Checkpoint
from zoo.reading.folder import Folder
from zoo.writing.checksums import CHECKSUMS


def differing(directory: Path) -> list[str]:
    """The tensors and files that are missing or have other bytes than ``checksums.json`` says; without it, none.

    Raises:
        CheckpointError: a damaged ``checksums.json``, or no readable checkpoint.
    """
    if not (directory / CHECKSUMS).is_file():
        return []
    said = Folder(directory).read_json(CHECKSUMS)
    model = Checkpoint.open(directory)
    files = [name for name, digest in said["files"].items() if _of_file(directory / name) != digest]
    tensors = [
        f"tensor {name}"
        for name, digest in said["tensors"].items()
        if name not in model.tensors or _of_tensor(model.read(name)) != digest
    ]
    return [*files, *tensors]


def _of_file(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _of_tensor(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
