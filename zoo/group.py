"""A group: one base model and its named experts."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from zoo.errors import GroupError, SourceError
from zoo.source import Source

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RESERVED = {"base", "auto"}


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first of two experts would be lost."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} stands there twice; names must differ")
        return super().construct_mapping(node, deep)


def check_names(names: Iterable[str]) -> None:
    """Raise GroupError unless these can name experts."""
    known = set()
    for name in names:
        if not _NAME.fullmatch(str(name)):
            raise GroupError(f"expert name {name!r}: use letters, digits, '.', '_' and '-' only")
        if name in _RESERVED:
            raise GroupError(f"expert name {name!r} is reserved; choose another")
        if name in known:
            raise GroupError(f"expert name {name!r} stands there twice; names must differ")
        known.add(name)


@dataclass(frozen=True)
class Group:
    """A base and the models that were fine-tuned from it, in the order that the upscaled model keeps.

    Attributes:
        base: the model that every expert was trained from.
        experts: by name; at least one.
    """

    base: Source
    experts: Mapping[str, Source]

    def __post_init__(self):
        if not self.experts:
            raise GroupError("a group needs at least one expert: name=path or name=org/model")
        check_names(self.experts)

    @classmethod
    def of(cls, base: str | Path, experts: Mapping[str, str | Path], relative_to: Path | None = None) -> "Group":
        """A group from paths or Hub ids. Raises GroupError or SourceError, naming the expert."""
        sources = {}
        for name, text in experts.items():
            try:
                sources[name] = Source.parse(str(text), relative_to)
            except SourceError as error:
                raise SourceError(f"expert {name}: {error}") from error
        return cls(Source.parse(str(base), relative_to), sources)

    @classmethod
    def load(cls, file: str | Path) -> "Group":
        """A group from a YAML file with ``base: MODEL`` and ``experts: {name: MODEL}``; paths relative to the file.

        Raises:
            GroupError: no such file, no YAML, or other keys than these.
            SourceError: a model is neither a directory nor a Hub id.
        """
        file = Path(file)
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError) as error:
            raise GroupError(f"{file}: cannot be read as a group file ({error})") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise GroupError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
        wanted = "a group file holds `base: MODEL` and `experts:` with one `name: MODEL` a line"
        if not isinstance(content, dict) or set(content) != {"base", "experts"}:
            raise GroupError(f"{file}: {wanted}")
        base, experts = content["base"], content["experts"]
        if not isinstance(base, str) or not isinstance(experts, dict):
            raise GroupError(f"{file}: {wanted}")
        if odd := [name for name, text in experts.items() if not (isinstance(name, str) and isinstance(text, str))]:
            raise GroupError(f"{file}: expert {odd[0]!r}: {wanted}")
        return cls.of(base, experts, relative_to=file.parent)
