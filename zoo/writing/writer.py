"""Write a checkpoint: streaming, deterministic, atomic and resumable. Nothing is there until all of it is."""

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

import torch

from zoo.errors import OutputError
from zoo.reading.model import Extent, TensorSpec
from zoo.reading.shards import INDEX, SINGLE
from zoo.writing.checksums import CHECKSUMS, checksums
from zoo.writing.journal import Journal, Step, Written
from zoo.writing.part import part_bytes, part_file
from zoo.writing.place import Place
from zoo.writing.shard import Shard

SHARD_SIZE = 5_000_000_000  # bytes; the Hub's own default
_THREADS = 4


class Writer:
    """A checkpoint in the making, in a hidden directory beside ``out``, put in its place by ``commit``.

    Use as a context manager: leaving it without ``commit`` removes everything. After a kill the hidden directory is
    left; it has no ``config.json``, so nothing loads it. The next Writer for the same ``out`` clears it or, with the
    same ``fingerprint``, takes the steps that were finished for ``done``, if their bytes are still what was written.

    Args:
        out: the directory to make; must not exist.
        declared: every tensor that may be written, with its dtype and largest shape.
        shard_size: largest size of a shard's data in bytes; a larger single tensor has a shard of its own.
        most: bytes that will be written, at most; by default those of all that is declared.
        fingerprint: of everything that decides the bytes; None: nothing is resumed.
        replace: ``out`` is a checkpoint, whose place the new one takes in one step. It must not be written meanwhile.

    Raises:
        OutputError: ``out`` exists (with ``replace``: does not), its parent cannot be written, another process writes
            it, or the disk has no room.
    """

    def __init__(
        self,
        out: str | Path,
        declared: Mapping[str, TensorSpec],
        *,
        shard_size: int = SHARD_SIZE,
        most: int | None = None,
        fingerprint: str | None = None,
        replace: bool = False,
    ):
        self._at = Place(out, replace=replace)
        self.out, self.work = self._at.out, self._at.work
        self.declared = dict(declared)
        self._opened: dict[int, Shard] = {}
        self._digests: dict[str, Future[str]] = {}
        self._left = Event()
        self._copies: dict[str, Future[None]] = {}
        self._unfinished: list[str] = []  # tensors of no step yet
        self._unnoted: deque[tuple[str, list[str], Any]] = deque()  # steps that the journal does not have yet
        self._records: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(max_workers=_THREADS)  # copies and hashes while the next tensors are made
        try:
            self.shards = self._allot(shard_size)
            self._number = {name: number for number, shard in enumerate(self.shards) for name in shard}
            self._journal = self._resumed(fingerprint, shard_size)
            whole = sum(spec.nbytes for spec in self.declared.values()) if most is None else most
            needed = whole - self.nbytes
            if needed > (free := shutil.disk_usage(self.work).free):
                raise OutputError(f"{out}: no space left: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
        except BaseException:
            self._leave()
            raise

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

    def _resumed(self, fingerprint: str | None, shard_size: int) -> Journal:
        """The journal of this work; what an equal one that was killed finished is taken up, all else is cleared."""
        declared = {name: [str(spec.dtype), list(spec.shape)] for name, spec in self.declared.items()}
        key = hashlib.sha256(json.dumps([fingerprint, shard_size, declared]).encode()).hexdigest()
        path = self.work / "journal.jsonl"
        if fingerprint is None:
            path.unlink(missing_ok=True)
        journal = Journal(path, key)
        written = {number for step in journal.found for number in _numbers(step)}
        for number, name in _names(written).items():  # killed in ``commit``
            if (self._at.whole / name).is_file():
                (self._at.whole / name).rename(self._place(number))
        self._at.clear(keep=[path, *map(self._place, written)])
        for count, step in enumerate(journal.found):
            if not all(self._shard(t.shard).digest(t.entry) == t.digest for t in step.tensors.values()):
                journal.keep(count)
                break
            for name, tensor in step.tensors.items():
                self._shard(tensor.shard).readmit(name, tensor.entry)
                self._digests[name] = Future()
                self._digests[name].set_result(tensor.digest)
            self._records[step.name] = step.record
        return journal

    def done(self, step: str) -> Any:
        """The record of a step that a killed process finished, whose tensors need not be written; else None."""
        return self._records.get(step)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one declared tensor, any device, no larger than declared.

        Raises:
            OutputError: the disk is full.
            ValueError: not declared, written before, another dtype, or larger than declared (a bug in the caller).
        """
        self._require_missing(name)
        spec = self.declared[name]
        if tensor.dtype != spec.dtype or len(tensor.shape) != len(spec.shape):
            raise ValueError(f"{name}: declared {spec}, got {tuple(tensor.shape)} {tensor.dtype}")
        if any(size > most for size, most in zip(tensor.shape, spec.shape, strict=True)):
            raise ValueError(f"{name}: declared {spec}, got {tuple(tensor.shape)}")
        try:
            shard = self._shard(self._number[name])
            entry = shard.write(name, tensor)
        except OSError as error:
            raise self._full(error) from error
        self._digests[name] = self._pool.submit(shard.digest, entry)
        self._unfinished.append(name)

    def copy(self, name: str, extent: Extent, digest: Future[str]) -> None:
        """Append one declared tensor, of just the declared shape, from the bytes of another file. Does not wait for it.

        Args:
            name: of the tensor.
            extent: its bytes.
            digest: their SHA-256.

        Raises:
            OutputError: ``out`` cannot be written.
            ValueError: not declared, written before, or another size (a bug in the caller).
        """
        self._require_missing(name)
        if extent.nbytes != self.declared[name].nbytes:
            raise ValueError(f"{name}: declared {self.declared[name]}, got {extent.nbytes} bytes")
        try:
            shard = self._shard(self._number[name])
        except OSError as error:
            raise self._full(error) from error
        entry = shard.reserve(name, self.declared[name])
        self._copies[name] = self._pool.submit(shard.copy, entry, extent, self._left)
        self._digests[name] = digest
        self._unfinished.append(name)

    def _require_missing(self, name: str) -> None:
        if name not in self.declared:
            raise ValueError(f"{name}: not declared")
        if name in self._digests:
            raise ValueError(f"{name}: written before")

    def finish(self, step: str, record: Any) -> None:
        """Note that all tensors written since the last step are one step, not to be done again after a kill.

        Args:
            step: its name; ``done`` is asked for it.
            record: plain JSON values that ``done`` gives back; not None.

        Raises:
            OutputError: the disk is full.
            CheckpointError: what was to be copied cannot be read any more.
        """
        names, self._unfinished = self._unfinished, []
        self._unnoted.append((step, names, record))
        self._note(wait=False)

    def _note(self, *, wait: bool) -> None:
        """Note the steps whose tensors are all in their places by now, in order; or wait until all are."""
        try:
            while self._unnoted and (wait or all(self._in_place(name) for name in self._unnoted[0][1])):
                step, names, record = self._unnoted.popleft()
                self._journal.append(Step(step, {name: self._written(name) for name in names}, record))
        except OSError as error:
            raise self._full(error) from error

    def _in_place(self, name: str) -> bool:
        return self._digests[name].done() and (name not in self._copies or self._copies[name].done())

    def _written(self, name: str) -> Written:
        """Wait for a tensor. Raises OSError: it cannot be written."""
        if name in self._copies:
            self._copies[name].result()
        number = self._number[name]
        return Written(number, self._opened[number].entries[name], self._digests[name].result())

    def commit(
        self,
        config: Mapping,
        files: Mapping[str, bytes | Path],
        parts: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Finish the shards, add ``files`` and ``checksums.json``, write ``config.json`` last, put it all at ``out``.

        Args:
            config: ``config.json``.
            files: bytes, or paths to copy.
            parts: small files of tensors beside the shards, by what their names begin with, as ``amend`` makes them.

        Raises:
            OutputError: the disk is full, or ``out`` was made meanwhile.
            CheckpointError: what was to be copied cannot be read any more.
        """
        self._note(wait=True)
        try:
            digests = {name: self._written(name).digest for name in self._digests}
            self._at.whole.mkdir(exist_ok=True)
            weight_map: dict[str, str] = {}
            for number, name in _names(self._opened).items():
                shard = self._opened[number]
                shard.close()
                shard.path.rename(self._at.whole / name)
                weight_map |= dict.fromkeys(shard.entries, name)
            for part, tensors in (parts or {}).items():
                file = part_file(part, tensors)
                self._put(file, part_bytes(tensors))
                weight_map |= dict.fromkeys(tensors, file)
            if len(self._opened) > 1:
                index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
                self._put(INDEX, json.dumps(index, indent=2).encode() + b"\n")
            contents = {name: c.read_bytes() if isinstance(c, Path) else c for name, c in files.items()}
            for name, content in {**contents, CHECKSUMS: checksums(digests, contents)}.items():
                self._put(name, content)
            self._put("config.json", json.dumps(config, indent=2).encode() + b"\n")
            self._at.publish()
        except OSError as error:
            raise self._full(error) from error
        self._leave()

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data written so far."""
        return sum(shard.end for shard in self._opened.values())

    def _shard(self, number: int) -> Shard:
        if number not in self._opened:
            self._opened[number] = Shard(self._place(number), self.shards[number])
        return self._opened[number]

    def _place(self, number: int) -> Path:
        return self.work / f"{number}.safetensors"

    def _put(self, name: str, content: bytes) -> None:
        path = self._at.whole / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _full(self, error: OSError) -> OutputError:
        if error.errno == errno.ENOSPC:
            return OutputError(f"{self.out}: no space left; free some or choose another disk")
        return OutputError(f"{self.out}: cannot be written: {error.strerror}")

    def _leave(self) -> None:
        self._left.set()
        self._pool.shutdown(cancel_futures=True)
        for shard in self._opened.values():
            with suppress(OSError):  # the disk may be full
                shard.abandon()
        self._at.leave()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._at.held:
            self._leave()


def _numbers(step: Step) -> set[int]:
    return {tensor.shard for tensor in step.tensors.values()}


def _names(numbers: Collection[int]) -> dict[int, str]:
    """What shards are called in the end, by their numbers."""
    if len(numbers) == 1:
        return dict.fromkeys(numbers, SINGLE)
    return {
        number: f"model-{place:05d}-of-{len(numbers):05d}.safetensors"
        for place, number in enumerate(sorted(numbers), start=1)
    }
