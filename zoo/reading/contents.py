"""The content of a model as one hash, so that what is built from it can be built again from the same.

The hash is the SHA-256 of the list that ``sha256sum`` prints for the files that a build reads, in the order of their
names: configuration, weights and their index, and the files that travel with them.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from zoo.errors import SourceError
from zoo.reading.companions import companions
from zoo.reading.model import Model
from zoo.reading.shards import INDEX, PICKLE_INDEX

_SETTINGS = ("config.json", "adapter_config.json", INDEX, PICKLE_INDEX)
_BLOCK = 1 << 20  # bytes read at once
_THREADS = 4  # files hashed at once


def contents(model: Model) -> dict[str, Path]:
    """The files that a build reads of a model, by their names in its directory, sorted."""
    settings = {name: model.path / name for name in _SETTINGS if (model.path / name).is_file()}
    found = {**settings, **companions(model.path), **{file.name: file for file in model.files}}
    return dict(sorted(found.items()))


def stamps(model: Model) -> dict[str, list[int]]:
    """Size and times of a model's files, by name; they change whenever a file does. Reads no file."""
    found = {name: file.stat() for name, file in contents(model).items()}
    return {name: [state.st_size, state.st_mtime_ns, state.st_ctime_ns] for name, state in found.items()}


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
        self._files = {
            name: {file: self._pool.submit(self._hash, path) for file, path in contents(model).items()}
            for name, model in models.items()
        }

    def result(self) -> dict[str, str]:
        """Wait for the content hash of each model.

        Raises:
            SourceError: a file was changed since this object was made.
        """
        found = {
            name: hashlib.sha256("".join(f"{f.result()}  {file}\n" for file, f in files.items()).encode()).hexdigest()
            for name, files in self._files.items()
        }
        for name, model in self._watched.items():
            before, now = self.stamps[name], stamps(model)
            changed = [file for file in sorted({*before, *now}) if before.get(file) != now.get(file)]
            if changed:
                raise SourceError(f"{name}: {model.path / changed[0]} was changed while it was read; start again")
        return found

    def _hash(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not self._left.is_set() and (block := file.read(_BLOCK)):
                digest.update(block)
        return digest.hexdigest()

    def __enter__(self) -> "Hashes":
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._pool.shutdown(cancel_futures=True)
