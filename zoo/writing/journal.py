"""What is finished of a checkpoint in the making: one line a step, so that a killed build goes on where it was.

A line is a JSON array of the SHA-256 of what follows and what follows; the first is the key of the whole work. A line
that was not written to its end, or is damaged, ends the journal. Nothing waits for the disk: a line may be there
without its tensors' bytes, which have checksums of their own.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from zoo.writing.shard import Entry


@dataclass(frozen=True)
class Written:
    """A tensor of a finished step.

    Attributes:
        shard: number of its shard.
        entry: where it is there.
        digest: SHA-256 of its bytes.
    """

    shard: int
    entry: Entry
    digest: str


@dataclass(frozen=True)
class Step:
    """A finished step.

    Attributes:
        name: by which its maker knows it.
        tensors: that it wrote, in order.
        record: plain JSON values that its maker wants back.
    """

    name: str
    tensors: Mapping[str, Written]
    record: Any


class Journal:
    """The file of finished steps; ``found`` are those of a former process with the same key, the first ones on."""

    def __init__(self, path: Path, key: str):
        self._path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        contents = [_parsed(line) for line in lines]
        whole = contents.index(None) if None in contents else len(contents)
        same = whole and contents[0] == key
        self.found = [_step(content) for content in contents[1:whole]] if same else []
        self._ends = list(accumulate(map(len, lines[: len(self.found) + 1])))
        if same:
            self.keep(len(self.found))
        else:
            path.write_bytes(_line(key))

    def keep(self, count: int) -> None:
        """Forget all steps found but the first ``count``, and what follows them."""
        self.found = self.found[:count]
        os.truncate(self._path, self._ends[count])

    def append(self, step: Step) -> None:
        """Note that a step is finished. Raises OSError: the disk is full."""
        with self._path.open("ab") as file:
            file.write(_line(asdict(step)))


def _line(content: Any) -> bytes:
    return json.dumps([_sum(content), content], separators=(",", ":")).encode() + b"\n"


def _sum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _parsed(line: bytes) -> Any:
    """What a line says; None if it is damaged."""
    try:
        digest, content = json.loads(line)
    except (ValueError, TypeError):
        return None
    return content if line.endswith(b"\n") and digest == _sum(content) else None


def _step(content: Mapping) -> Step:
    tensors = {
        name: Written(w["shard"], Entry(**{**w["entry"], "shape": tuple(w["entry"]["shape"])}), w["digest"])
        for name, w in content["tensors"].items()
    }
    return Step(content["name"], tensors, content["record"])
