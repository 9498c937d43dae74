"""One safetensors file of a checkpoint, written as its tensors come."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch

from zoo.reading.model import Extent, TensorSpec
from zoo.reading.shards import DTYPES

_LARGE = 16 << 20  # bytes of a copy that is worth synchronising by itself
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a shard's header.

    Attributes:
        dtype: as safetensors names it.
        shape: of the tensor.
        start, end: where its bytes lie in the shard's data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def header(self) -> dict:
        """As the format has it."""
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": [self.start, self.end]}


class Shard:
    """A file in the making, new or left by a process that was killed; then ``readmit`` what is whole before ``write``.

    The header precedes the data but is known last, so its place is reserved: it is never longer than the header of
    the declared shapes, and the format allows spaces after it.
    """

    def __init__(self, path: Path, declared: Mapping[str, TensorSpec]):
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.end = 0
        total = sum(spec.nbytes for spec in declared.values())
        longest = {name: Entry(_NAMES[s.dtype], s.shape, total, total) for name, s in declared.items()}
        self._reserved = -(-len(_header(longest)) // 8) * 8
        self._file = path.open("r+b" if path.is_file() else "w+b", buffering=0)

    def readmit(self, name: str, entry: Entry) -> None:
        """Take a tensor for written, whose bytes were found whole by their ``digest``; in the order of their places."""
        self.entries[name], self.end = entry, entry.end

    def write(self, name: str, tensor: torch.Tensor) -> Entry:
        """Append a tensor of any device. Raises OSError: the disk is full."""
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        entry = self.reserve(name, TensorSpec(tuple(tensor.shape), tensor.dtype))
        self._put(data.data, self._place(entry.start))
        return entry

    def reserve(self, name: str, spec: TensorSpec) -> Entry:
        """Make a place for a tensor, after all others; ``copy`` fills it."""
        entry = Entry(_NAMES[spec.dtype], spec.shape, self.end, self.end + spec.nbytes)
        self.entries[name], self.end = entry, entry.end
        return entry

    def copy(self, entry: Entry, extent: Extent, left: Event) -> None:
        """Fill the place of a tensor with bytes of another file, until ``left`` is set; may run beside ``write``.

        Raises:
            OSError: the disk is full.
            CheckpointError: the other file cannot be read.
        """
        place = self._place(entry.start)
        for block in extent.blocks():
            if left.is_set():
                return
            self._put(block, place)
            place += len(block)
        if extent.nbytes >= _LARGE:
            os.fdatasync(self._file.fileno())  # while there is time: ``close`` waits for all of it

    def digest(self, entry: Entry) -> str:
        """SHA-256 of the bytes of a tensor as they are in the file; may run beside ``write``."""
        digest = hashlib.sha256()
        for block in Extent(self.path, self._place(entry.start), entry.end - entry.start).blocks():
            digest.update(block)
        return digest.hexdigest()

    def _put(self, data: bytes | memoryview, place: int) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._file.fileno(), left, place)
            left, place = left[written:], place + written

    def close(self) -> None:
        """Write the header, and everything to the disk."""
        header = _header(self.entries).ljust(self._reserved)
        self._file.truncate(self._place(self.end))
        self._put(self._reserved.to_bytes(8, "little") + header, 0)
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _place(self, offset: int) -> int:
        return 8 + self._reserved + offset


def _header(entries: Mapping[str, Entry]) -> bytes:
    tensors = {name: entry.header() for name, entry in entries.items()}
    return json.dumps({"__metadata__": {"format": "pt"}, **tensors}, separators=(",", ":")).encode()
