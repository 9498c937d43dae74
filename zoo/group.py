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
_LARGEST = 1 << 20  # bytes of a group file
_LONGEST = 64  # characters of an expert's name
VOCABULARIES = ("base", "union")


class _Loader(yaml.SafeLoader):
    """YAML without what a group needs not: keys that stand twice, of which the first would be lost, and aliases."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for gigabytes
            raise yaml.YAMLError("aliases (*name) are not read; write the model out")
        return super().compose_node(parent, index)

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
        if len(str(name)) > _LONGEST:
            raise GroupError(f"expert name {str(name)[:20]}... is longer than {_LONGEST} characters")
        if name in known:
            raise GroupError(f"expert name {name!r} stands there twice; names must differ")
        known.add(name)


@dataclass(frozen=True)
class Group:
    """A base and the models that were fine-tuned from it, in the order that the upscaled model keeps.

    Attributes:
        base: the model that every expert was trained from.
        experts: by name; at least one.
        vocabulary: what counts where embeddings have more or fewer rows than the base's: "base" or "union"; None to
            take no difference.
        allow_pickle: read pickles where there is no safetensors file; a group file cannot say so.
    """

    base: Source
    experts: Mapping[str, Source]
    vocabulary: str | None = None
    allow_pickle: bool = False

    def __post_init__(self):
        if not self.experts:
            raise GroupError("a group needs at least one expert: name=path or name=org/model")
        check_names(self.experts)
        if self.vocabulary not in (None, *VOCABULARIES):
            raise GroupError(f"vocabulary {self.vocabulary!r}: must be one of {', '.join(VOCABULARIES)}")

    @classmethod
    def of(
        cls,
        base: str | Path,
        experts: Mapping[str, str | Path],
        relative_to: Path | None = None,
        *,
        vocabulary: str | None = None,
        allow_pickle: bool = False,
    ) -> "Group":
        """A group from paths or Hub ids. Raises GroupError or SourceError, naming the expert."""
        sources = {}
        for name, text in experts.items():
            try:
                sources[name] = Source.parse(str(text), relative_to)
            except SourceError as error:
                raise SourceError(f"expert {name}: {error}") from error
        return cls(Source.parse(str(base), relative_to), sources, vocabulary, allow_pickle)

    @classmethod
    def load(cls, file: str | Path) -> "Group":
        """A group from a YAML file with ``base: MODEL`` and ``experts: {name: MODEL}``; paths relative to the file.

        ``vocabulary: base`` or ``union`` may stand beside them.

        Raises:
            GroupError: no such file, no YAML, or other keys than these.
            SourceError: a model is neither a directory nor a Hub id.
        """
        file = Path(file)
        try:
            if file.stat().st_size > _LARGEST:
                raise GroupError(f"{file}: too large for a group file")
            content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError) as error:
            raise GroupError(f"{file}: cannot be read as a group file ({error})") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise GroupError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
        wanted = "a group file holds `base: MODEL` and `experts:` with one `name: MODEL` a line"
        if not isinstance(content, dict) or set(content) - {"vocabulary"} != {"base", "experts"}:
            raise GroupError(f"{file}: {wanted}")
        base, experts = content["base"], content["experts"]
        if not isinstance(base, str) or not isinstance(experts, dict):
            raise GroupError(f"{file}: {wanted}")
        if odd := [name for name, text in experts.items() if not (isinstance(name, str) and isinstance(text, str))]:
            raise GroupError(f"{file}: expert {odd[0]!r}: {wanted}")
        return cls.of(base, experts, relative_to=file.parent, vocabulary=content.get("vocabulary"))

    def fetch(self) -> bool:
        """Download the weights of what is on the Hub and not in its cache; whether the group has models there at all.

        Raises:
            SourceError: naming the model.
        """
        remote = [source for source in (self.base, *self.experts.values()) if not source.is_local]
        for source in remote:
            source.resolve(allow_pickle=self.allow_pickle)
        return bool(remote)
