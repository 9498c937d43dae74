"""Was this adapter trained on this base? By the base's name, revision and weights, as far as the adapter tells."""

from collections.abc import Mapping
from pathlib import Path

import torch

from zoo.errors import CheckpointError
from zoo.reading.checkpoint import Checkpoint
from zoo.reading.folder import Folder
from zoo.reading.model import files
from zoo.reading.tied import HEAD

_SAMPLE = 256  # numbers compared at the beginning of each tensor


def check_origin(settings: Mapping, location: str, revision: str | None, base: Checkpoint) -> str | None:
    """Compare what an adapter says of its base with the group's base.

    Args:
        settings: ``adapter_config.json``.
        location: of the group's base, a directory or a Hub id.
        revision: that was asked for, of a Hub id.
        base: the group's base.

    Returns:
        What cannot be told for sure, as a warning; None if the two are the same.

    Raises:
        CheckpointError: the adapter was trained on another model, or on another revision.
    """
    said = settings.get("base_model_name_or_path")
    if not isinstance(said, str) or not said:
        return "does not say which base it was trained on"
    if Path(said).is_dir():
        if not _same_weights(Path(said), base):
            raise CheckpointError(f"trained on {said}, whose weights are not those of {location}; use that base")
        return None
    commit = base.path.name if base.path.parent.name == "snapshots" else None
    hub = base.path.parent.parent.name.removeprefix("models--").replace("--", "/", 1) if commit else None
    if hub is None and revision is not None:  # the base is a part of another checkpoint, and was on the Hub
        hub, commit = location, revision
    if hub is None:  # the base lies in a directory, which can have any name
        known = {base.path.resolve().name, str(base.config.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]}
        if said.rstrip("/").rsplit("/", 1)[-1].lower() in {name.lower() for name in known}:
            return None
        return f"says that it was trained on {said}; make sure that {location} is that model"
    if "/" in said.strip("/") and said.lower() != hub.lower() and not said.startswith(("/", ".", "~")):
        raise CheckpointError(f"trained on {said}, the group's base is {hub}; use that base")
    asked = settings.get("revision")
    if isinstance(asked, str) and asked not in (revision, commit, "main"):
        raise CheckpointError(
            f"trained on revision {asked} of {said}, the group's base is {revision or commit}; use it"
        )
    return None


def _same_weights(directory: Path, base: Checkpoint) -> bool:
    """Whether two local models have the same weights, by the beginning of each tensor.

    The base may be a part of another checkpoint, in files of its own, of another format or a larger vocabulary.
    """
    if directory.resolve() == base.path.resolve():
        return True
    try:
        other = Checkpoint.open(Folder(directory))
    except CheckpointError:  # no longer a model: nothing can be said
        return True
    shared = base.tensors
    if HEAD not in other.tensors:  # tied there, and parted from the embedding since
        shared = {name: spec for name, spec in shared.items() if name != HEAD}
    if any(name not in other.tensors or other.tensors[name].shape[1:] != s.shape[1:] for name, s in shared.items()):
        return False
    if not all(file.is_file() for file in files(base)):  # still on the Hub; looked at again once they are here
        return True
    return all(
        torch.equal(_beginning(other, name).to(spec.dtype), _beginning(base, name)) for name, spec in shared.items()
    )


def _beginning(model: Checkpoint, name: str) -> torch.Tensor:
    return model.read(name).flatten()[:_SAMPLE]  # a view of the file's map: no more than this is read
