"""Change a small part of a finished checkpoint in place: a file of tensors and ``config.json``, all or nothing."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.errors import OutputError
from zoo.reading.shards import INDEX
from zoo.writing.checksums import CHECKSUMS, amended
from zoo.writing.lock import hold
from zoo.writing.part import part_bytes, part_file


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
        files: further files, written after it; ``checksums.json`` follows them.

    Raises:
        OutputError: the directory cannot be written, or another process writes it.
    """
    directory = Path(directory)
    try:
        with _locked(directory):
            for left in directory.glob(f".{part}-*.partial"):  # by a process that was killed
                left.unlink()
            old = list(directory.glob(f"{part}-*.safetensors"))
            new = directory / part_file(part, tensors)
            if tensors:
                _put(new, part_bytes(tensors))
            index = directory / INDEX
            if index.is_file():  # readers of sharded checkpoints look at no file that it does not name
                _list(index, dict.fromkeys(tensors, new.name), ())
            _put(directory / "config.json", json.dumps(config, indent=2).encode() + b"\n")
            for name, content in files.items():
                _put(directory / name, content)
            if (sums := directory / CHECKSUMS).is_file():
                _put(sums, amended(sums.read_bytes(), files))
            gone = [path for path in old if path != new or not tensors]
            if index.is_file():
                _list(index, {}, [path.name for path in gone])
            for path in gone:
                path.unlink()
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {error.strerror or error}") from error


def discard(directory: str | Path, part: str) -> None:
    """Forget the files ``part-*.safetensors`` that are missing or damaged, so that what remains can be read.

    Raises:
        OutputError: the directory cannot be written, or another process writes it.
    """
    directory = Path(directory)
    index = directory / INDEX
    try:
        with _locked(directory):
            listed = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
            files = {path.name for path in directory.glob(f"{part}-*.safetensors")}
            bad = {name for name in files | listed if name.startswith(f"{part}-") and not _readable(directory / name)}
            if listed & bad:
                _list(index, {}, bad)
            for name in files & bad:
                (directory / name).unlink()
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        lock = hold(directory)
    except BlockingIOError as error:
        raise OutputError(f"{directory}: another process is writing it; wait for it") from error
    try:
        yield
    finally:
        os.close(lock)


def _put(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _list(index: Path, added: Mapping[str, str], gone: Collection[str]) -> None:
    """Name the tensors ``added``, by file, in the index, and none of the files ``gone``."""
    content = json.loads(index.read_text())
    names = {name: file for name, file in content["weight_map"].items() if file not in gone} | dict(added)
    content["weight_map"] = dict(sorted(names.items()))
    _put(index, json.dumps(content, indent=2).encode() + b"\n")
