"""The files that travel with a model beside its weights: tokenizer, chat template, generation config."""

from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from zoo.reading.folder import inside

_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "*.tiktoken",
    "*.model",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def companions(model: Path) -> dict[str, Path]:
    """Files of ``model`` to copy byte for byte, by their name relative to it, sorted; directories are walked.

    Raises:
        CheckpointError: one is a link out of the directory.
    """
    found: set[Path] = set()
    for pattern in _PATTERNS:
        for path in model.glob(pattern):
            found |= {p for p in path.rglob("*") if p.is_file()} if path.is_dir() else {path}
    return {str(path.relative_to(model)): inside(model, path) for path in sorted(found)}


def is_companion(name: str) -> bool:
    """Whether ``companions`` would find a file of this name, which may be in a directory."""
    return any(fnmatchcase(PurePath(name).parts[0], pattern) for pattern in _PATTERNS)
