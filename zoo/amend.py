"""Change a small part of a finished checkpoint in place: a file of tensors and ``config.json``, all or nothing."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from zoo.checkpoint import INDEX
from zoo.errors import OutputError


def amend(
    directory: str | Path, part: str, tensors: Mapping[str, Tensor], config: Mapping, files: Mapping[str, bytes]
) -> None:
    """Replace the checkpoint's file of tensors ``part-*.safetensors`` and its ``config.json``.

    The new file lies beside the old one until ``config.json``, which names the tensors that count, is renamed into
    place: a reader sees the old state or the new one, whenever the process is killed.

    Args:
        directory: a finished checkpoint.
        part: what the file's name begins with.
        tensors: its content; give them names that change with their values, see ``content_key``.
        config: the new ``config.json``.
        files: further files, written after it.

    Raises:
        OutputError: the directory cannot be written, or another process writes it.
    """
    directory = Path(directory)
    try:
        with _locked(directory):
            old = [path for path in directory.glob(f"{part}-*.safetensors")]
            new = directory / f"{part}-{content_key(tensors)}.safetensors"
            if tensors:
                _put(new, save(dict(tensors), metadata={"format": "pt"}))
            index = directory / INDEX
            if index.is_file():  # readers of sharded checkpoints look at no file that it does not name
                _list(index, dict.fromkeys(tensors, new.name), ())
            _put(directory / "config.json", json.dumps(config, indent=2).encode() + b"\n")
            for name, content in files.items():
                _put(directory / name, content)
            gone = [path for path in old if path != new or not tensors]
            if index.is_file():
                _list(index, {}, [name for path in gone for name in _names(path) if name not in tensors])
            for path in gone:
                path.unlink()
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {error.strerror or error}") from error


def content_key(tensors: Mapping[str, Tensor]) -> str:
    """Eight hexadecimal digits that follow from the values of ``tensors``, in their order, whatever their names."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(save({"": tensor.contiguous()}))
    return digest.hexdigest()[:8]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OutputError(f"{directory}: another process is writing it; wait for it") from error
    finally:
        os.close(lock)


def _put(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _list(index: Path, added: Mapping[str, str], removed) -> None:
    content = json.loads(index.read_text())
    names = {k: v for k, v in content["weight_map"].items() if k not in removed} | added
    content["weight_map"] = dict(sorted(names.items()))
    _put(index, json.dumps(content, indent=2).encode() + b"\n")
