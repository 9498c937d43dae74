"""Build a checkpoint again from its recipe: from the same sources, the same bytes."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from upscale import router_file
from upscale.building.build import Progress, write
from upscale.building.methods import Method, smile, wemoe
from upscale.building.plan import make_plan
from upscale.building.recipe import read_recipe
from upscale.building.report import Report
from upscale.config import BuildConfig, SmileConfig, WemoeConfig
from upscale.device import threads
from upscale.errors import ConfigError, LoadError, RecipeError
from zoo import Group, Model, Source, SourceError, Verdict, checked
from zoo.reading.contents import Hashes

_METHODS: dict[str, tuple[Method, type[BuildConfig]]] = {
    smile.NAME: (smile, SmileConfig),
    wemoe.NAME: (wemoe, WemoeConfig),
}


def rebuild(
    file: str | Path,
    out: str | Path,
    sources: Mapping[str, str] | None = None,
    *,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Build what ``upscale.yaml`` describes, byte for byte, and write it to ``out``.

    A router that was calibrated or adapted is taken from its file, which lies beside the recipe in a checkpoint. It
    computes on as many threads as the build did; the arithmetic is the same with the same version of torch on the same
    kind of processor.

    Args:
        file: the recipe.
        out: directory to make; must not exist.
        sources: where models are now, by name ("base" or an expert's); by default where the recipe says.
        allow_pickle: as the build was told, see ``Group.allow_pickle``.
        progress: called after each step with (bytes done, bytes in all, name).
        options: settings that decide no byte: ``device``, ``max_memory``.

    Returns:
        Report: as of the build.

    Raises:
        RecipeError: no recipe, one of another version of the format, or a source that is not what it was.
        ZooError: anything else that a user can cause, as for ``upscale.smile``.
    """
    file = Path(file)
    made = read_recipe(file)
    method, config = method_of(file, made, options)
    if "budget_of" in made:
        raise RecipeError(
            f"{file}: its ranks share a budget among {', '.join(made['budget_of'])}, and experts were added or removed "
            "since; build the group anew"
        )
    router = _router(file, made)
    group = _group(file, made, sources or {}, allow_pickle=allow_pickle)
    verdict = checked(group)
    with _pinned(made, verdict) as hashes, threads(made.get("threads")):  # the ranks of a budget are computed too
        _require_same(made, verdict, hashes)
        plan = make_plan(verdict, method, config, progress, made.get("overrides"))
        return write(plan, made, out, hashes, router=router, progress=progress)


def other_version(file: str | Path) -> str | None:
    """A warning if another version of this package built the recipe's checkpoint, which may have made other bytes."""
    made, here = read_recipe(Path(file)).get("upscale_zoo"), version("upscale-zoo")
    return f"built by upscale-zoo {made}, this is {here}: the bytes may differ" if made != here else None


def method_of(file: Path, made: Mapping, options: Mapping[str, Any]) -> tuple[Method, BuildConfig]:
    """The method and the settings that a recipe names.

    Args:
        file: the recipe.
        made: its content.
        options: settings that decide no byte.

    Raises:
        RecipeError: they are none of this version.
    """
    if "imported" in made:
        raise RecipeError(f"{file}: describes no build but a conversion; run `upscale import {made['base']}` again")
    if made["method"] not in _METHODS:
        raise RecipeError(f"{file}: method {made['method']!r} is unknown; this version has {', '.join(_METHODS)}")
    method, settings = _METHODS[made["method"]]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in made["config"].items()}
    try:
        return method, settings(**values, **options)
    except (TypeError, ConfigError) as error:
        raise RecipeError(f"{file}: its config does not suit this version of upscale-zoo: {error}") from error


def _group(file: Path, made: Mapping, sources: Mapping[str, str], *, allow_pickle: bool) -> Group:
    written = {"base": made["base"], **made["experts"]}
    if unknown := sorted(sources.keys() - written.keys()):
        raise RecipeError(f"{file}: has no model {unknown[0]}; it has {', '.join(written)}")
    found = {}
    for name, text in {**written, **sources}.items():
        if name in made.get("sha256", {}) and name not in sources and not Path(text).is_dir():
            raise RecipeError(f"{name}: no directory {text}; say where it is now by --source {name}=PATH")
        try:
            found[name] = Source.parse(text)
        except SourceError as error:
            raise RecipeError(f"{name}: {error}") from error
    base = found.pop("base")
    return replace(Group(base, found), vocabulary=made.get("vocabulary"), allow_pickle=allow_pickle)


def _pinned(made: Mapping, verdict: Verdict) -> Hashes:
    """Hashes of the models that a recipe pins by their content."""
    models = {"base": verdict.base, **verdict.experts}
    return Hashes({name: model for name, model in models.items() if name in made.get("sha256", {})}, models)


def _require_same(made: Mapping, verdict: Verdict, hashes: Hashes) -> None:
    if changed := _others(made, verdict, hashes):
        name, model = next(iter(changed.items()))
        raise RecipeError(
            f"{name}: {model.path} is not what the recipe was made from, or has changed since; "
            f"give the original by --source {name}=PATH"
        )


def other_sources(made: Mapping, verdict: Verdict) -> dict[str, Model]:
    """The models of a group, by name, that are not what a recipe was made from.

    Each is compared with its pin: a content hash, or of one from the Hub the commit.

    Args:
        made: the recipe.
        verdict: on the group; its weights are all here.
    """
    with _pinned(made, verdict) as hashes:
        return _others(made, verdict, hashes)


def _others(made: Mapping, verdict: Verdict, hashes: Hashes) -> dict[str, Model]:
    models = {"base": verdict.base, **verdict.experts}
    written = {"base": made["base"], **made["experts"]}
    pins, found = made.get("sha256", {}), hashes.result()
    return {
        name: model
        for name, model in models.items()
        if found.get(name) != pins.get(name)
        or (name not in pins and model.path.name != str(written.get(name)).partition("@")[2])
    }


def _router(file: Path, made: Mapping) -> tuple[Mapping, Mapping[str, Tensor]] | None:
    """The router that was given to the checkpoint after its build, None if none was."""
    if "router" not in made:
        return None
    try:
        return router_file.stored(file.parent)
    except LoadError as error:
        raise RecipeError(
            f"{error}; its router was made after the build, so upscale.yaml must lie in the checkpoint"
        ) from error
