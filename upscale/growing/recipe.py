"""The recipe of a checkpoint that gains or loses experts: that of a build with those it has now."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from upscale.building.overrides import overrides_of
from upscale.building.recipe import pinned
from upscale.config import BuildConfig
from zoo import Group, Model
from zoo.hub.licences import licence_of


def sharing(made: Mapping[str, Any]) -> Sequence[str]:
    """The experts among which a recipe's budget is divided."""
    return made.get("budget_of", list(made["experts"]))


def changed(
    made: Mapping[str, Any],
    config: BuildConfig,
    settings: Mapping[str, BuildConfig],
    group: Group | None,
    models: Mapping[str, Model],
) -> dict[str, Any]:
    """The recipe for other experts, which gives each the seed and the rank that it has.

    Args:
        made: the recipe as it was.
        config: its settings.
        settings: of each expert that there will be, in order.
        group: those that are new; None if none is.
        models: the new ones, opened.
    """
    sources = group.experts if group else {}
    experts = {**made["experts"], **{name: pinned(source, models[name]) for name, source in sources.items()}}
    licences = {**made.get("licences", {}), **{name: licence_of(models[name].path) for name in sources}}
    router = dict(made.get("router", {}))
    if isinstance(prompts := router.get("prompts"), dict):
        router["prompts"] = {name: text for name, text in prompts.items() if name in ("base", *settings)}
    shared = sharing(made) if config.budget is not None else []
    fields = {
        "upscale_zoo": version("upscale-zoo"),
        "method": made["method"],
        "base": made["base"],
        "experts": {name: experts[name] for name in settings},
        "sha256": made.get("sha256"),
        "licences": {name: licence for name, licence in licences.items() if name in ("base", *settings)},
        "vocabulary": group.vocabulary if group else made.get("vocabulary"),
        "config": made["config"],
        "threads": made.get("threads"),
        "overrides": overrides_of(settings, config),
        "budget_of": [] if list(shared) == list(settings) else list(shared),
        "router": router,
    }
    others = {name: value for name, value in made.items() if name not in fields}
    return {**{name: value for name, value in fields.items() if value}, **others}
