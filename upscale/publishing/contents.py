"""Which files of a directory are a checkpoint's, and go to the Hub with it."""

from fnmatch import fnmatchcase
from pathlib import Path

from zoo.reading.companions import is_companion
from zoo.reading.folder import inside

_BUILT = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "router-*.safetensors",
    "*_upscaled.py",
    "upscale.yaml",
    "report.json",
    "checksums.json",
)
_ADDED = ("README.md", "eval.json", "*.png", "*.svg", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def contents(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """The checkpoint's files by name, and the names of other files, which are left out.

    Raises:
        CheckpointError: one of its files is a link out of the directory.
    """
    found = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    own = {name: inside(directory, path) for name, path in found.items() if is_built(name) or _matches(name, _ADDED)}
    return own, [name for name in found if name not in own]


def is_built(name: str) -> bool:
    """Whether a file of this name comes from the build: on the Hub it goes when a new version has it no more."""
    return is_companion(name) or _matches(name, _BUILT)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)
