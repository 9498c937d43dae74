"""Where a model comes from: a local directory, or a Hub id with an optional revision."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import SourceError
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
            SourceError: the Hub does not have it, does not grant access, or cannot be reached.
        """
        if self.is_local:
            return Folder(Path(self.location))
        # Imported here: huggingface_hub reads its environment (offline, endpoint) when it is imported.
        from huggingface_hub import HfApi, constants, snapshot_download

        with self._hub_errors():
            path = Path(snapshot_download(self.location, revision=self.revision, allow_patterns=_SMALL))
            if constants.HF_HUB_OFFLINE or is_complete(Folder(path)):
                return Folder(path)
            api = HfApi()
            names = weight_files(api.list_repo_files(self.location, revision=path.name), allow_pickle=allow_pickle)
            if any(name.endswith(".bin") for name in names):
                snapshot_download(self.location, revision=path.name, allow_patterns=[*_SMALL, *names])

        def header(name: str) -> Mapping[str, TensorSpec]:
            with self._hub_errors():
                found = api.parse_safetensors_file_metadata(self.location, name, revision=path.name)
            return {
                tensor: TensorSpec(tuple(info.shape), dtype_of(info.dtype, tensor, f"{self}: {name}"))
                for tensor, info in found.tensors.items()
            }

        return Folder(path, tuple(names), header)

    def resolve(self, *, allow_pickle: bool = False) -> Path:
        """The model's directory; a Hub id is downloaded (or found in the cache) first, without what is not needed.

        Raises:
            SourceError: the Hub does not have it, does not grant access, or cannot be reached.
        """
        folder = self.folder(allow_pickle=allow_pickle)
        if folder.remote:
            from huggingface_hub import snapshot_download

            with self._hub_errors():
                wanted = [*_SMALL, *folder.remote]
                snapshot_download(self.location, revision=folder.path.name, allow_patterns=wanted)
        return folder.path

    @contextmanager
    def _hub_errors(self) -> Iterator[None]:
        from huggingface_hub import errors as hub

        try:
            yield
        except hub.GatedRepoError as error:  # a subclass of RepositoryNotFoundError: must come first
            raise SourceError(f"{self}: gated; accept its terms on the Hub and log in with `hf auth login`") from error
        except hub.RepositoryNotFoundError as error:
            raise SourceError(f"{self}: no such directory and no such model on the Hub (or it is private)") from error
        except hub.RevisionNotFoundError as error:
            raise SourceError(f"{self}: the model has no revision {self.revision!r}") from error
        except (hub.HFValidationError, hub.SafetensorsParsingError) as error:
            raise SourceError(f"{self}: no such directory, and not usable from the Hub: {error}") from error
        except (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, OSError) as error:
            raise SourceError(
                f"{self}: no such directory, and the Hub cannot be reached ({type(error).__name__}); "
                "check the spelling of the path, or the network"
            ) from error
