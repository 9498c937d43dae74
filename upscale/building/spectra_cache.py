"""Computed spectra as one safetensors file under the user's cache, named by the very files they were computed from."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo import Model, Verdict
from zoo.reading.model import files

_FORMAT = 1  # raise it when what is computed changes


def cache_file(verdict: Verdict) -> Path:
    """Where the spectra of these models are kept: ``upscale-zoo/spectra-<key>.safetensors`` under the user's cache.

    The key is a hash of the base's and the experts' stamps and names, in order: of a local checkpoint the resolved
    path, size and modification time of each file of weights; of a Hub snapshot the repository and the commit.
    """
    models = [["", _stamp(verdict.base)], *([name, _stamp(model)] for name, model in verdict.experts.items())]
    key = hashlib.sha256(json.dumps([_FORMAT, models]).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG rules ignore a relative path
    return (home if home.is_absolute() else Path.home() / ".cache") / "upscale-zoo" / f"spectra-{key}.safetensors"


def load(file: Path) -> dict[str, Tensor]:
    """The file's tensors; none if it does not exist or is broken, so that they are computed again."""
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return {}


def save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the file in one step. A cache that cannot be written costs time later, and is no error now."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as scratch:
            save_file(dict(tensors), Path(scratch) / file.name)
            (Path(scratch) / file.name).replace(file)


def _stamp(model: Model) -> list:
    shapes = [list(spec.shape) for spec in model.tensors.values()]  # which a group's vocabulary may change
    if model.path.parent.name == "snapshots":  # models--org--name/snapshots/<commit> of the Hub's cache
        return [model.path.parent.parent.name, model.path.name, shapes]
    found = sorted(file.resolve() for file in files(model))
    return [*([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in found), shapes]
