"""Options that commands share: settings from dataclasses, and a group given as a file or inline."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

import click

from upscale.errors import TaskError
from zoo import Group, GroupError
from zoo.group import VOCABULARIES


def settings(config: type, *only: str) -> Callable[[Callable], Callable]:
    """Decorate a command with one option for each field of a configuration dataclass, help text and all.

    ``only`` names the fields to take, where not all are wanted.
    """

    def decorate(command: Callable) -> Callable:
        for field in reversed([field for field in fields(config) if field.name in only or not only]):
            extra: dict[str, Any] = dict(field.metadata["click"])
            if field.name in config.CHOICES:  # type: ignore[attr-defined]
                extra["type"] = click.Choice(config.CHOICES[field.name])  # type: ignore[attr-defined]
            elif not extra.get("is_flag") and not extra.get("multiple"):
                extra["type"] = next((t for t in (int, float) if t.__name__ in str(field.type)), str)
            shown = not extra.get("is_flag") and field.default not in (None, ())
            flag = f"--{field.name.replace('_', '-')}"
            text = field.metadata["help"]
            command = click.option(flag, default=field.default, show_default=shown, help=text, **extra)(command)
        return command

    return decorate


class ManyPrompts(click.Command):
    """Lets ``--prompts`` take several NAME=FILE at once."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click.Command."""
        spread: list[str] = []
        for arg in args:
            after = len(spread) > 1 and spread[-2] == "--prompts" and "=" in arg and not arg.startswith("-")
            spread += ["--prompts", arg] if after else [arg]
        return super().parse_args(ctx, spread)


def prompts_option(text: str) -> Callable[[Callable], Callable]:
    """Decorate a command (of class ManyPrompts) with --prompts NAME=FILE."""
    return click.option("--prompts", multiple=True, metavar="NAME=FILE...", help=text)


def prompt_files(prompts: tuple[str, ...]) -> dict[str, list[str]]:
    """Files by name, of --prompts NAME=FILE. Raises TaskError for what is no NAME=FILE."""
    files: dict[str, list[str]] = {}
    for text in prompts:
        name, found, file = text.partition("=")
        if not found or not name or not file:
            raise TaskError(f"--prompts {text}: write NAME=FILE")
        files.setdefault(name, []).append(file)
    return files


@dataclass(frozen=True)
class GivenGroup:
    """What the command line says of a group, beside the file of one."""

    base: str | None
    experts: tuple[str, ...]
    vocabulary: str | None
    allow_pickle: bool


pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read pytorch_model.bin where there is no safetensors file: tensors alone, no code is run.",
)
vocabulary_option = click.option(
    "--vocabulary",
    type=click.Choice(VOCABULARIES),
    help="Where embeddings have more or fewer rows than the base's: keep the base's, or the union of all.",
)


def group_options(command: Callable) -> Callable:
    """Decorate a command with the options of a group, which it gets as one argument ``given``."""

    @wraps(command)
    def run(
        *args, base: str | None, experts: tuple[str, ...], vocabulary: str | None, allow_pickle: bool, **kwargs
    ) -> Any:
        return command(*args, given=GivenGroup(base, experts, vocabulary, allow_pickle), **kwargs)

    for option in (
        pickle_option,
        vocabulary_option,
        click.option(
            "--expert", "experts", multiple=True, metavar="NAME=MODEL", help="An expert of an inline group; repeat it."
        ),
        click.option("--base", metavar="MODEL", help="The base of an inline group, instead of GROUP."),
    ):
        run = option(run)
    return run


def group_and_rest(paths: tuple[str, ...], given: GivenGroup, rest: int) -> tuple[Group, list]:
    """The group, from the first of ``paths`` or from the flags, and the ``rest`` of the paths.

    Raises:
        click.UsageError: too few or too many paths.
        GroupError: a flag that is no NAME=MODEL, or a name twice.
    """
    base, experts = given.base, given.experts
    inline = base is not None or bool(experts)
    wanted = rest + (0 if inline else 1)
    if len(paths) != wanted:
        names = ([] if inline else ["GROUP"]) + ["OUT"] * rest
        raise click.UsageError(
            f"expected {' '.join(names) or 'no argument'}, got {len(paths)} argument(s); "
            "a group is either GROUP or --base and --expert"
        )
    if not inline:
        group = Group.load(paths[0])
        vocabulary = given.vocabulary or group.vocabulary
        return replace(group, vocabulary=vocabulary, allow_pickle=given.allow_pickle), list(paths[1:])
    if base is None:
        raise GroupError("an inline group needs --base MODEL beside --expert")
    named = named_models(experts, "--expert ")
    return Group.of(base, named, vocabulary=given.vocabulary, allow_pickle=given.allow_pickle), list(paths)


def named_models(texts: Iterable[str], option: str = "") -> dict[str, str]:
    """Models by name, of NAME=MODEL. Raises GroupError for anything else, and for a name that stands there twice."""
    named: dict[str, str] = {}
    for text in texts:
        name, found, model = text.partition("=")
        if not found or not name or not model:
            raise GroupError(f"{option}{text}: write NAME=MODEL")
        if name in named:
            raise GroupError(f"{option}{name}: given twice; names must differ")
        named[name] = model
    return named
