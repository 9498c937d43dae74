"""A model's directory: only files that lie in it are read. Those on the Hub need not be there yet."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import CheckpointError
from zoo.reading.model import TensorSpec

_LARGEST_JSON = 256 << 20  # bytes; the largest tokenizers take some 30 MB


@dataclass(frozen=True)
class Folder:
    """A directory with a model's files.

    Attributes:
        path: the directory.
        remote: names of the files that the Hub has beside those that are here.
        header: gives the tensors of one of those, by its name; fetches no weights.
    """

    path: Path
    remote: Collection[str] = ()
    header: Callable[[str], Mapping[str, TensorSpec]] | None = None

    def names(self) -> list[str]:
        """All its files, sorted: those here and those on the Hub; no directories."""
        here = (path.name for path in self.path.iterdir() if path.is_file()) if self.path.is_dir() else ()
        return sorted({*here, *self.remote})

    def file(self, name: str) -> Path:
        """The place of a file, which may not be here yet.

        Raises:
            CheckpointError: the name leads out of the directory, directly or by a link.
        """
        if not name or Path(name).name != name:
            raise CheckpointError(f"{self.path}: {name!r} is no file of this directory; fetch the model again")
        return inside(self.path, self.path / name)

    def read_json(self, name: str) -> dict:
        """A file's JSON object.

        Raises:
            CheckpointError: missing, too large, or no JSON object.
        """
        file = self.file(name)
        try:
            if file.exists() and not file.is_file():
                raise CheckpointError(f"{file}: not a plain file; fetch the model again")
            if (nbytes := file.stat().st_size) > _LARGEST_JSON:
                raise CheckpointError(f"{file}: {nbytes / 1e6:.0f} MB are too much for this file; fetch it again")
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path}: not a model directory (no {name})") from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: cannot be read as JSON ({error}); fetch the file again") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{file}: not a JSON object; fetch the file again")
        return content


def inside(root: Path, path: Path) -> Path:
    """``path``, if it lies in ``root`` once links are followed; files of the Hub's cache are links into its blobs.

    Raises:
        CheckpointError: it does not; another's file would be read, and copied into what is made of the model.
    """
    try:
        real, home = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(f"{path}: cannot be followed ({error}); fetch the file again") from error
    homes = [home]
    if home.parent.name == "snapshots":  # models--org--name/snapshots/<commit>
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(each) for each in homes):
        raise CheckpointError(f"{path}: a link out of the model's directory, to {real}; put the file itself there")
    return path
