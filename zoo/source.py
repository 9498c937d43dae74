"""Where a model comes from: a local directory, or a Hub id with an optional revision."""

import re
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import SourceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.bin.index.json"]


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
        except (OSError, RuntimeError):  # too long, not permitted, or the home of nobody
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

    def resolve(self) -> Path:
        """The model's directory; a Hub id is downloaded (or found in the cache) first.

        Raises:
            SourceError: the Hub does not have it, does not grant access, or cannot be reached.
        """
        if self.is_local:
            return Path(self.location)
        # Imported here: huggingface_hub reads its environment (offline, endpoint) when it is imported.
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.location, revision=self.revision, allow_patterns=_FILES))
        except hub.GatedRepoError as error:  # a subclass of RepositoryNotFoundError: must come first
            raise SourceError(f"{self}: gated; accept its terms on the Hub and log in with `hf auth login`") from error
        except hub.RepositoryNotFoundError as error:
            raise SourceError(f"{self}: no such directory and no such model on the Hub (or it is private)") from error
        except hub.RevisionNotFoundError as error:
            raise SourceError(f"{self}: the model has no revision {self.revision!r}") from error
        except hub.HFValidationError as error:
            raise SourceError(f"{self}: no such directory, and not a Hub id: {error}") from error
        except (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, OSError) as error:
            raise SourceError(
                f"{self}: no such directory, and the Hub cannot be reached ({type(error).__name__}); "
                "check the spelling of the path, or the network"
            ) from error
