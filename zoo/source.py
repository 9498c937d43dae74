"""Where a model comes from: a local directory, or a Hub id with an optional revision."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import SourceError
from zoo.hub.asking import asking, retried
from zoo.reading.folder import Folder
from zoo.reading.model import TensorSpec
from zoo.reading.shards import dtype_of, is_complete, weight_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md", "upscale.yaml"]


@dataclass(frozen=True)
class Source:
    """A model's place as the user wrote it: ``path``, ``org/name`` or ``org/name@revision``.

    Attributes:
        location: a directory or a Hub id.
        revision: branch, tag or commit of a Hub id; None for the default branch and for directories.
    """

    location: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, relative_to: Path | None = None) -> "Source":
        """Read ``text``; an existing directory (from ``relative_to``, if given) wins over a Hub id.

        Raises:
            SourceError: neither an existing directory nor the form of a Hub id.
        """
        try:
            path = (relative_to or Path()) / Path(text).expanduser()
            if text and path.is_dir():
                return cls(str(path))
        except (OSError, RuntimeError, ValueError):  # too long, not permitted, the home of nobody, a zero byte
            pass
        return cls.of_hub(text)

    @classmethod
    def of_hub(cls, text: str) -> "Source":
        """Read ``text`` as a Hub id, whatever directories there are. Raises SourceError for another form."""
        location, at, revision = text.partition("@")
        if _HUB_ID.fullmatch(location) and bool(at) == bool(revision):
            return cls(location, revision or None)
        raise SourceError(f"{text or repr(text)}: no such directory, and not a Hub id (org/name or org/name@revision)")

    def __str__(self) -> str:
        return self.location if self.revision is None else f"{self.location}@{self.revision}"

    @property
    def is_local(self) -> bool:
        """Whether the location is a directory on this machine."""
        return Path(self.location).is_dir()

    def folder(self, *, allow_pickle: bool = False) -> Folder:
        """The model's directory, for a look at it: of a Hub id without its weights, whose headers are read in place.

        Args:
            allow_pickle: fetch pickles, where there is nothing else: they have no header that could be read in place.

        Raises:
            HubError: the Hub does not have it, does not grant access, or cannot be reached.
        """
        if self.is_local:
            return Folder(Path(self.location))
        # Imported here: huggingface_hub reads its environment (offline, endpoint) when it is imported.
        from huggingface_hub import HfApi, constants, snapshot_download

        with asking(self, perhaps_local=True):
            path = Path(
                retried(lambda: snapshot_download(self.location, revision=self.revision, allow_patterns=_SMALL))
            )
            if constants.HF_HUB_OFFLINE or is_complete(Folder(path)):
                return Folder(path)
            api = HfApi()
            names = api.list_repo_files(self.location, revision=path.name)
            wanted = weight_files(names, allow_pickle=allow_pickle)
            if any(name.endswith(".bin") for name in wanted):
                snapshot_download(self.location, revision=path.name, allow_patterns=[*_SMALL, *wanted])

        def header(name: str) -> Mapping[str, TensorSpec]:
            with asking(self, perhaps_local=True):
                found = api.parse_safetensors_file_metadata(self.location, name, revision=path.name)
            return {
                tensor: TensorSpec(tuple(info.shape), dtype_of(info.dtype, tensor, f"{self}: {name}"))
                for tensor, info in found.tensors.items()
            }

        return Folder(path, [name for name in names if "/" not in name], header)

    def resolve(self, *, allow_pickle: bool = False, whole: bool = False) -> Path:
        """The model's directory; a Hub id is downloaded (or found in the cache) first, without what is not needed.

        Args:
            allow_pickle: see ``folder``.
            whole: with all that is in it.

        Raises:
            HubError: the Hub does not have it, does not grant access, or cannot be reached.
        """
        folder = self.folder(allow_pickle=allow_pickle)
        if folder.remote or (whole and not self.is_local):
            from huggingface_hub import snapshot_download

            with asking(self, perhaps_local=True):
                wanted = None if whole else [*_SMALL, *weight_files(folder.remote, allow_pickle=allow_pickle)]
                retried(lambda: snapshot_download(self.location, revision=folder.path.name, allow_patterns=wanted))
        return folder.path
