"""A small file of tensors beside a checkpoint's shards, whose name follows from its content."""

import hashlib
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def part_file(part: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of a small file of tensors beside a checkpoint's shards; it changes with their values."""
    return f"{part}-{content_key(tensors)}.safetensors"


def part_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of such a file."""
    return save(dict(tensors), metadata={"format": "pt"})


def content_key(tensors: Mapping[str, Tensor]) -> str:
    """Eight hexadecimal digits that follow from the values of ``tensors``, in their order, whatever their names."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(save({"": tensor.contiguous()}))
    return digest.hexdigest()[:8]
