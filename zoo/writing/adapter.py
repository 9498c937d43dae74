"""Write a LoRA adapter of PEFT: streaming and atomic, as a checkpoint is."""

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from zoo.errors import OutputError
from zoo.reading.model import TensorSpec
from zoo.reading.plain_lora import CONFIG
from zoo.reading.shards import ADAPTER
from zoo.writing.place import Place
from zoo.writing.shard import Shard


def write_adapter(
    out: str | Path,
    declared: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    settings: Mapping,
    files: Mapping[str, bytes | Path],
) -> None:
    """Write an adapter's directory; nothing is there until all of it is.

    Args:
        out: the directory to make; must not exist.
        declared: the adapter's tensors.
        read: gives each of them, in order.
        settings: ``adapter_config.json``.
        files: further ones, bytes or paths to copy.

    Raises:
        OutputError: ``out`` exists, cannot be written, another process writes it, or the disk is full.
    """
    place = Place(out, replace=False)
    try:
        place.clear()
        place.whole.mkdir()
        shard = Shard(place.whole / ADAPTER, declared)
        for name in declared:
            shard.write(name, read(name))
        shard.close()
        for name, content in {**files, CONFIG: json.dumps(settings, indent=2).encode() + b"\n"}.items():
            file = place.whole / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
        place.publish()
    except OSError as error:
        what = "no space left; free some or choose another disk" if error.errno == errno.ENOSPC else error.strerror
        raise OutputError(f"{out}: cannot be written: {what}") from error
    finally:
        place.leave()
