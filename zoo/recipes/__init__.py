"""Ready group files for published experiments and popular families; each says how to use it and what to expect."""

from dataclasses import dataclass
from pathlib import Path

from zoo.errors import GroupError, OutputError
from zoo.group import Group

_FILES = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A group file that comes with the package.

    Attributes:
        name: of the recipe; its file is ``name.yaml``.
        group: what is in it.
        expect: the scores to expect, from its comment of that name.
    """

    name: str
    group: Group
    expect: str

    @property
    def file(self) -> Path:
        """The file."""
        return _FILES / f"{self.name}.yaml"

    def copy(self, out: str | Path) -> Path:
        """Copy the file to ``out``, which must not exist. Raises OutputError: it does, or cannot be written."""
        try:
            with Path(out).open("xb") as file:
                file.write(self.file.read_bytes())
        except FileExistsError as error:
            raise OutputError(f"{out}: exists already; choose another name or remove it") from error
        except OSError as error:
            raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
        return Path(out)


def recipes() -> list[Recipe]:
    """All recipes, by name."""
    return [recipe(name) for name in _names()]


def recipe(name: str) -> Recipe:
    """One recipe. Raises GroupError: there is none of this name."""
    if name not in _names():
        raise GroupError(f"no recipe {name!r}; there are {', '.join(_names())}")
    file = _FILES / f"{name}.yaml"
    _, _, after = file.read_text(encoding="utf-8").partition("# Expect: ")
    expect, _, _ = after.partition("# Source: ")
    return Recipe(name, Group.load(file), " ".join(expect.replace("\n#", "\n").split()))


def _names() -> list[str]:
    return sorted(file.stem for file in _FILES.glob("*.yaml"))
