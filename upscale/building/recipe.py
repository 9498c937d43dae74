"""``upscale.yaml``: how a checkpoint was made, enough to make it again."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from upscale.building.plan import Plan
from upscale.config import recipe
from upscale.errors import RecipeError
from zoo import Group, Source
from zoo.hub.licences import licence_of
from zoo.reading.model import Model

RECIPE = "upscale.yaml"
_MOST_THREADS = 4096


def recipe_of(plan: Plan, group: Group) -> dict:
    """The recipe of a group's build, but for the content hashes that ``with_hashes`` adds."""
    return {
        "upscale_zoo": version("upscale-zoo"),
        "method": plan.method.NAME,
        "base": pinned(group.base, plan.base),
        "experts": {name: pinned(source, plan.experts[name]) for name, source in group.experts.items()},
        "licences": {name: licence_of(model.path) for name, model in {"base": plan.base, **plan.experts}.items()},
        **({"vocabulary": group.vocabulary} if group.vocabulary else {}),
        "config": recipe(plan.config),
        "threads": torch.get_num_threads(),
    }


def pinned(source: Source, model: Model) -> str:
    """A source as it can be found again: a Hub id with the commit that was read, which names its cache directory."""
    return source.location if source.is_local else f"{source.location}@{model.path.name}"


def with_hashes(made: Mapping, hashes: Mapping[str, str]) -> dict:
    """A recipe with content hashes of some of its models, beside those that it has."""
    known = {**made.get("sha256", {}), **hashes}
    found = {}
    for key, value in made.items():
        if key != "sha256":
            found[key] = value
        if key == "experts" and known:
            found["sha256"] = {name: known[name] for name in ("base", *value) if name in known}
    return found


def fingerprint(plan: Plan, made: Mapping, stamps: Mapping) -> str:
    """A hash of all that decides a build's tensors: the recipe, the sources as they are now, what computes.

    Args:
        plan: of the build.
        made: its recipe.
        stamps: of the sources' files, by model.
    """
    settings = {name: recipe(config) for name, config in plan.settings.items()}
    facts = [made, settings, stamps, plan.config.device, torch.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def recipe_bytes(made: Mapping) -> bytes:
    """The content of ``upscale.yaml``."""
    return yaml.safe_dump(dict(made), sort_keys=False).encode()


def read_recipe(file: Path) -> dict:
    """The recipe in a file. Raises RecipeError: no file, no YAML, or no recipe of an upscaled checkpoint."""
    try:
        made = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{file}: cannot be read as a recipe: {' '.join(str(error).split())}") from error
    kinds = {"method": str, "base": str, "experts": dict, "config": dict}
    if not isinstance(made, dict) or not all(isinstance(made.get(key), kind) for key, kind in kinds.items()):
        raise RecipeError(f"{file}: no recipe; give the upscale.yaml of a checkpoint that upscale built")
    if not isinstance(made.get("sha256", {}), dict) or not all(isinstance(s, str) for s in made["experts"].values()):
        raise RecipeError(f"{file}: a damaged recipe; fetch the file again")
    if type(count := made.get("threads", 1)) is not int or not 1 <= count <= _MOST_THREADS:
        raise RecipeError(f"{file}: a damaged recipe: threads {count!r}; fetch the file again")
    return made
