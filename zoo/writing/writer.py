"""Write a checkpoint: streaming, deterministic and atomic. Nothing is there until all of it is."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from zoo.errors import OutputError
from zoo.reading.checkpoint import DTYPES, INDEX, SINGLE, TensorSpec
from zoo.writing.part import part_bytes, part_file

SHARD_SIZE = 5_000_000_000  # bytes; the Hub's own default
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Shard:
    """One safetensors file, written as its tensors come.

    The header precedes the data but is known last, so its place is reserved: it is never longer than the header of
    the declared shapes, and the format allows spaces after it.
    """

    def __init__(self, path: Path, declared: Mapping[str, TensorSpec]):
        self.path, self.entries, self.end = path, {}, 0
        total = sum(spec.nbytes for spec in declared.values())
        longest = {name: _entry(spec.dtype, spec.shape, total, total) for name, spec in declared.items()}
        self.reserved = -(-len(_header(longest)) // 8) * 8
        self.file: BinaryIO = path.open("wb")
        self.file.seek(8 + self.reserved)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.entries[name] = _entry(tensor.dtype, tensor.shape, self.end, self.end + data.nbytes)
        self.file.write(data.data)
        self.end += data.nbytes

    def close(self) -> None:
        self.file.seek(0)
        self.file.write(self.reserved.to_bytes(8, "little") + _header(self.entries).ljust(self.reserved))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _entry(dtype: torch.dtype, shape, start: int, end: int) -> dict:
    return {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}


def _header(entries: Mapping[str, dict]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()


class Writer:
    """A checkpoint in the making, in a hidden directory beside ``out`` that ``commit`` renames to ``out``.

    Use as a context manager: leaving it without ``commit`` removes everything. After a kill the hidden directory is
    left; it has no ``config.json``, so nothing loads it, and the next Writer for the same ``out`` clears it.

    Args:
        out: the directory to make; must not exist.
        declared: every tensor that may be written, with its dtype and largest shape.
        shard_size: largest size of a shard's data in bytes; a larger single tensor has a shard of its own.

    Raises:
        OutputError: ``out`` exists, its parent cannot be written, another process builds it, or the disk has no room.
    """

    def __init__(self, out: str | Path, declared: Mapping[str, TensorSpec], *, shard_size: int = SHARD_SIZE):
        self.out = Path(out).absolute()
        if os.path.lexists(self.out):
            raise OutputError(f"{out}: exists already; choose another directory or remove it")
        self.work = self.out.with_name(f".{self.out.name}.partial")
        self.declared = dict(declared)
        self._opened: dict[int, _Shard] = {}
        self._made: list[Path] = []  # parents that were not there
        self._lock = self._claim()
        try:
            needed = sum(spec.nbytes for spec in self.declared.values())
            if needed > (free := shutil.disk_usage(self.work).free):
                raise OutputError(f"{out}: no space left: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
            self.shards = self._allot(shard_size)
        except BaseException:
            self._abandon()
            raise

    def _claim(self) -> int:
        try:
            self._made = [parent for parent in self.work.parents if not parent.exists()]
            self.work.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.work, os.O_RDONLY)
        except OSError as error:
            self._remove_parents()
            raise OutputError(f"{self.out}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock), self.work.stat()):  # renamed since by the one who held the lock
                raise BlockingIOError
        except OSError as error:
            os.close(lock)
            raise OutputError(f"{self.out}: another process is building it; wait for it or choose another") from error
        for left in self.work.iterdir():  # of a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return lock

    def _allot(self, shard_size: int) -> list[dict[str, TensorSpec]]:
        """Declared tensors by shard, in order. Item sizes do not mix in a shard, so that all data are aligned."""
        shards: list[dict[str, TensorSpec]] = []
        for itemsize in sorted({spec.dtype.itemsize for spec in self.declared.values()}, reverse=True):
            size = shard_size + 1  # full: the first tensor opens a shard
            for name, spec in self.declared.items():
                if spec.dtype.itemsize != itemsize:
                    continue
                if size + spec.nbytes > shard_size:
                    shards.append({})
                    size = 0
                shards[-1][name] = spec
                size += spec.nbytes
        return shards

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one declared tensor, any device, no larger than declared.

        Raises:
            OutputError: the disk is full.
            ValueError: not declared, written before, another dtype, or larger than declared (a bug in the caller).
        """
        number = next((n for n, shard in enumerate(self.shards) if name in shard), None)
        if number is None:
            raise ValueError(f"{name}: not declared")
        if number in self._opened and name in self._opened[number].entries:
            raise ValueError(f"{name}: written before")
        spec = self.declared[name]
        if tensor.dtype != spec.dtype or len(tensor.shape) != len(spec.shape):
            raise ValueError(f"{name}: declared {spec}, got {tuple(tensor.shape)} {tensor.dtype}")
        if any(size > most for size, most in zip(tensor.shape, spec.shape, strict=True)):
            raise ValueError(f"{name}: declared {spec}, got {tuple(tensor.shape)}")
        try:
            if number not in self._opened:
                self._opened[number] = _Shard(self.work / f"{number}.safetensors", self.shards[number])
            self._opened[number].write(name, tensor)
        except OSError as error:
            raise self._full(error) from error

    def commit(
        self,
        config: Mapping,
        files: Mapping[str, bytes | Path],
        parts: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Finish the shards, add ``files`` (bytes, or paths to copy), write ``config.json`` last, rename to ``out``.

        ``parts`` are small files of tensors beside the shards, by what their names begin with, as ``amend`` makes them.

        Raises:
            OutputError: the disk is full, or ``out`` was made meanwhile.
        """
        try:
            weight_map, total = {}, 0
            shards = [shard for _, shard in sorted(self._opened.items())]
            for number, shard in enumerate(shards, start=1):
                shard.close()
                name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                shard.path.rename(self.work / name)
                weight_map |= dict.fromkeys(shard.entries, name)
                total += shard.end
            for part, tensors in (parts or {}).items():
                file = part_file(part, tensors)
                self._put(file, part_bytes(tensors))
                weight_map |= dict.fromkeys(tensors, file)
            if len(shards) > 1:
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                self._put(INDEX, json.dumps(index, indent=2).encode() + b"\n")
            for name, content in files.items():
                self._put(name, content.read_bytes() if isinstance(content, Path) else content)
            self._put("config.json", json.dumps(config, indent=2).encode() + b"\n")
            os.fsync(self._lock)
            self.work.rename(self.out)
            os.close(self._lock)
        except OSError as error:
            raise self._full(error) from error

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data written so far."""
        return sum(shard.end for shard in self._opened.values())

    def _put(self, name: str, content: bytes) -> None:
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _full(self, error: OSError) -> OutputError:
        if error.errno == errno.ENOSPC:
            return OutputError(f"{self.out}: no space left; free some or choose another disk")
        return OutputError(f"{self.out}: cannot be written: {error.strerror}")

    def _abandon(self) -> None:
        for shard in self._opened.values():
            with suppress(OSError):  # the disk may be full
                shard.file.close()
        shutil.rmtree(self.work, ignore_errors=True)
        self._remove_parents()
        os.close(self._lock)

    def _remove_parents(self) -> None:
        for parent in self._made:
            with suppress(OSError):  # not made after all, or another process writes there too
                parent.rmdir()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.work.exists():
            self._abandon()
