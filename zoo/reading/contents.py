"""The content of a model as one hash, so that what is built from it can be built again from the same.

The hash is the SHA-256 of a list that has a line for each tensor and each small file that a build reads, however the
tensors are spread over files: ``<sha256>  <tensor> <dtype> <shape>`` and ``<sha256>  <file>``, sorted by what follows
the hash. A pickle counts as a file.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

from zoo.errors import SourceError
from zoo.reading.companions import companions
from zoo.reading.model import Extent, Model
from zoo.reading.shards import INDEX, PICKLE_INDEX, header_of

_SETTINGS = ("config.json", "adapter_config.json")
_THREADS = 4  # tensors hashed at once


def stamps(model: Model) -> dict[str, list[int]]:
    """Size and times of the files that a build reads, by name; they change whenever a file does. Reads no file."""
    indices = [model.path / name for name in (INDEX, PICKLE_INDEX) if (model.path / name).is_file()]
    found = {**_small(model), **{file.name: file for file in (*indices, *model.files)}}
    states = {name: found[name].stat() for name in sorted(found) if found[name].exists()}
    return {name: [state.st_size, state.st_mtime_ns, state.st_ctime_ns] for name, state in states.items()}


def _small(model: Model) -> dict[str, Path]:
    """Configuration, and the files that travel with the weights, by their names in the model's directory."""
    settings = {name: model.path / name for name in _SETTINGS if (model.path / name).is_file()}
    return {**settings, **companions(model.path)}


def _parts(model: Model) -> dict[str, Extent]:
    """What the hash is made of, by what its line says of it."""
    parts = {name: _whole(path) for name, path in _small(model).items()}
    for file in model.files:
        if file.suffix == ".bin":
            parts[file.name] = _whole(file)
            continue
        for name, info in header_of(file).items():
            assert info.extent is not None  # the file is here
            parts[f"{name} {str(info.dtype).removeprefix('torch.')} {list(info.shape)}"] = info.extent
    return dict(sorted(parts.items()))


def _whole(file: Path) -> Extent:
    return Extent(file, 0, file.stat().st_size)


class Hashes:
    """Hashes of models' contents, computed in threads of their own while the models are read; a context manager.

    Args:
        models: by name; those to hash.
        watched: by name; these must not change either.
    """

    def __init__(self, models: Mapping[str, Model], watched: Mapping[str, Model] | None = None):
        self._watched = {**models, **(watched or {})}
        self.stamps = {name: stamps(model) for name, model in self._watched.items()}
        self._left = Event()
        self._pool = ThreadPoolExecutor(max_workers=_THREADS)
        self._known: dict[Extent, Future[str]] = {}
        self._parts = {name: _parts(model) for name, model in models.items()}
        for parts in self._parts.values():
            for extent in sorted(parts.values(), key=lambda part: (part.file, part.start)):  # as they lie on the disk
                self.of(extent)

    def of(self, extent: Extent) -> Future[str]:
        """SHA-256 of some bytes of a model, computed once."""
        if extent not in self._known:
            self._known[extent] = self._pool.submit(self._hash, extent)
        return self._known[extent]

    def result(self) -> dict[str, str]:
        """Wait for the content hash of each model.

        Raises:
            SourceError: a file was changed since this object was made.
        """
        found = {}
        for name, parts in self._parts.items():
            lines = (f"{self.of(extent).result()}  {said}\n" for said, extent in parts.items())
            found[name] = hashlib.sha256("".join(lines).encode()).hexdigest()
        for name, model in self._watched.items():
            before, now = self.stamps[name], stamps(model)
            changed = [file for file in sorted({*before, *now}) if before.get(file) != now.get(file)]
            if changed:
                raise SourceError(f"{name}: {model.path / changed[0]} was changed while it was read; start again")
        return found

    def _hash(self, extent: Extent) -> str:
        digest = hashlib.sha256()
        for block in extent.blocks():
            if self._left.is_set():
                break
            digest.update(block)
        return digest.hexdigest()

    def __enter__(self) -> "Hashes":
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._pool.shutdown(cancel_futures=True)
