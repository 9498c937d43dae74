"""The content of a model as one hash, so that what is built from it can be built again from the same.

The hash is the SHA-256 of a list that has a line for each tensor and each small file that a build reads, however the
tensors are spread over files: ``<sha256>  <tensor> <dtype> <shape>`` and ``<sha256>  <file>``, sorted by what follows
the hash. A pickle counts as a file.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from zoo.errors import SourceError
from zoo.reading.companions import companions
from zoo.reading.model import Extent, Model, files
from zoo.reading.shards import INDEX, PICKLE_INDEX

_SETTINGS = ("config.json", "adapter_config.json")
_THREADS = 4  # tensors hashed at once


def stamps(model: Model) -> dict[str, list[int]]:
    """Size and times of the files that a build reads, by name; they change whenever a file does. Reads no file."""
    indices = [model.path / name for name in (INDEX, PICKLE_INDEX) if (model.path / name).is_file()]
    found = {**_small(model), **{file.name: file for file in (*indices, *files(model))}}
    states = {name: found[name].stat() for name in sorted(found) if found[name].exists()}
    return {name: [state.st_size, state.st_mtime_ns, state.st_ctime_ns] for name, state in states.items()}


def _small(model: Model) -> dict[str, Path]:
    """Configuration, and the files that travel with the weights, by their names in the model's directory."""
    settings = {name: model.path / name for name in _SETTINGS if (model.path / name).is_file()}
    return {**settings, **companions(model.path)}


def _parts(model: Model) -> dict[str, Extent]:
    """What the hash is made of, by what its line says of it."""
    parts = {name: _whole(path) for name, path in _small(model).items()}
    for name, info in model.own_tensors.items():
        if info.extent is None:
            parts[info.file.name] = _whole(info.file)
        else:
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
        self._lock = Lock()
        self._asked: OrderedDict[Extent, Future[str]] = OrderedDict()
        self._waiting: OrderedDict[Extent, Future[str]] = OrderedDict()
        self._known: dict[Extent, Future[str]] = {}
        self._parts = {name: _parts(model) for name, model in models.items()}

    def of(self, extent: Extent) -> Future[str]:
        """SHA-256 of some bytes of a model, computed once, and before those that nobody has asked for."""
        with self._lock:
            if extent in self._waiting:
                self._asked[extent] = self._waiting.pop(extent)
        if extent not in self._known:
            self._add(extent, self._asked)
        return self._known[extent]

    def _add(self, extent: Extent, queue: OrderedDict[Extent, Future[str]]) -> None:
        if extent not in self._known:
            self._known[extent] = Future()
            with self._lock:
                queue[extent] = self._known[extent]
            self._pool.submit(self._next)

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

    def _next(self) -> None:
        """Hash what is the next now; there is a call for each that was added."""
        with self._lock:
            extent, future = (self._asked or self._waiting).popitem(last=False)
        digest = hashlib.sha256()
        try:
            for block in extent.blocks():
                if self._left.is_set():
                    return
                digest.update(block)
            future.set_result(digest.hexdigest())
        except BaseException as error:  # whatever it is, who waits must hear of it
            future.set_exception(error)

    def __enter__(self) -> "Hashes":
        for parts in self._parts.values():
            for extent in sorted(parts.values(), key=lambda part: (part.file, part.start)):  # as they lie on the disk
                self._add(extent, self._waiting)
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._pool.shutdown(cancel_futures=True)
