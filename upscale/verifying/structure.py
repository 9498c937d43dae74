"""Is everything there, and does ``config.json`` describe it? From headers and small files alone."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard
from torch import Tensor
from yaml import YAMLError

from upscale import router_file
from upscale.building.recipe import RECIPE, read_recipe
from upscale.building.skeleton import Norm, lacking
from upscale.building.stored import Stored
from upscale.runtime.layout_upscaled import EMBEDDING, NORM, Layout
from upscale.verifying.finding import OK, SKIPPED, WARNING, Finding, judged
from zoo import Checkpoint
from zoo.reading.folder import inside
from zoo.reading.shards import INDEX, SINGLE
from zoo.writing.checksums import CHECKSUMS
from zoo.writing.integrity import Sums

_CARD = "README.md"
_TENSORS = "down|up|bias|delta|values|gaps|scale|shift"
_EXPERTS = re.compile(rf".+\.experts\.({_TENSORS})|heads\.\d+\..+")  # what experts' tensors are called


def is_built(directory: Path) -> bool:
    """Whether a build wrote it; what transformers' ``save_pretrained`` writes has neither recipe nor checksums."""
    return (directory / RECIPE).is_file() or (directory / CHECKSUMS).is_file()


def files(directory: Path, config: Mapping) -> Finding:
    """All files that ``config.json``, the index and ``checksums.json`` name.

    Raises:
        CheckpointError: a damaged ``checksums.json``, or a link out of the directory.
    """
    sums = Sums.of(directory)
    named = {f"{reference.partition('.')[0]}.py": "config.json" for reference in config.get("auto_map", {}).values()}
    if (index := directory / INDEX).is_file() and not (directory / SINGLE).is_file():
        named |= dict.fromkeys(_indexed(index), INDEX)
    named |= dict.fromkeys(sums.files if sums else (), CHECKSUMS)
    problems = [
        f"{name} is missing, which {by} names"
        for name, by in sorted(named.items())
        if not inside(directory, directory / name).is_file()
    ]
    if is_built(directory):
        problems += [
            f"{name} is missing, which every build writes"
            for name in (RECIPE, CHECKSUMS)
            if not (directory / name).is_file()
        ]
    return judged("files", problems, f"all {len(named)} that are named are there", files=len(named))


def _indexed(index: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # said by whoever opens the weights


def tensors(checkpoint: Checkpoint, layout: Layout) -> Finding:
    """No tensor missing, of a shape that ``config.json`` does not say, or beyond what it and ``checksums.json`` name.

    The router's are looked at by ``router``.

    Raises:
        CheckpointError: a damaged ``checksums.json``.
    """
    sums = Sums.of(checkpoint.path)
    said = layout.shapes()
    wrong = [
        f"tensor {name} has shape {list(checkpoint.tensors[name].shape)}, config.json says {list(shape)}"
        for name, shape in said.items()
        if name in checkpoint.tensors and checkpoint.tensors[name].shape != shape
    ]
    written = set(sums.tensors) if sums else set()
    absent = [f"tensor {name} is missing" for name in sorted((said.keys() | written) - checkpoint.tensors.keys())]
    beyond = [
        f"tensor {name} is beyond what config.json and {CHECKSUMS} name"
        for name, info in checkpoint.tensors.items()
        if name not in said
        and not info.file.name.startswith(f"{router_file.PART}-")
        and (_EXPERTS.fullmatch(name) or (sums is not None and name not in written))
    ]
    count = len(checkpoint.tensors)
    return judged("tensors", [*absent, *wrong, *beyond], f"{count}, {len(said)} of them the experts'", tensors=count)


def layout(stored: Stored) -> Finding:
    """The base builds and has its tensors, and its modules, the experts, their heads and ranks fit together.

    Raises:
        PlanError: transformers makes no model of the base's configuration, or it lacks tensors.
    """
    found = stored.skeleton
    places = {place.name: place for place in (*found.norms, *found.embeddings, *found.linears)}
    said, experts = stored.layout, stored.layout.experts
    problems = [f"the base lacks {name}" for name in lacking(stored.base)]
    for name, entry in said.modules.items():
        place, shape = places.get(name), (entry.in_features, entry.out_features)
        if len(entry.ranks) != len(experts):
            problems.append(f"{name} has {len(entry.ranks)} ranks for {len(experts)} experts")
        if place is None:
            problems.append(f"{name} has experts but is no module of the base")
        elif (kind := NORM if isinstance(place, Norm) else place.kind) != entry.kind:
            problems.append(f"{name} is called {entry.kind} in config.json and is {kind}")
        elif shape != ((place.width,) * 2 if isinstance(place, Norm) else (place.in_features, place.out_features)):
            problems.append(f"{name} has {shape[0]} in and {shape[1]} out features in config.json, not in the base")
        other = said.modules.get(entry.tied) if entry.tied else entry
        if other is None:
            problems.append(f"{name} shares the factors of {entry.tied}, which has none")
        elif entry.tied and (other.kind != EMBEDDING or other.ranks != entry.ranks):
            problems.append(f"{name} shares the factors of {entry.tied}, but has other ranks")
    for module in stored.report.modules if stored.report else ():
        entry = said.modules.get(module.name)
        if entry is not None and any(entry.ranks) and list(entry.ranks) != list(module.ranks.values()):
            told = f"ranks {list(entry.ranks)} in config.json and {list(module.ranks.values())} in report.json"
            problems.append(f"{module.name} has {told}")
    for what, own in (("heads", said.heads), ("labels", said.labels)):
        if own and list(own) != list(experts):
            problems.append(f"config.json has {what} of {', '.join(own)}; the experts are {', '.join(experts)}")
    return judged("layout", problems, f"{len(said.modules)} modules with experts fit the base", experts=list(experts))


def router(directory: Path, layout: Layout) -> Finding:
    """The router's tensors are those that its file's name stands for, and finite.

    Raises:
        LoadError: they are not those.
    """
    kind, names = layout.router["type"], layout.router.get("tensors")
    if names is None or names == router_file.PART:  # as save_pretrained calls them, in the shards
        return Finding("router", OK, f"{kind}, which has no file")
    _, values = router_file.stored(directory)
    odd = [f"the router's {name} has NaN or infinite values" for name, value in values.items() if not _finite(value)]
    return judged("router", odd, f"{kind}, with the tensors that config.json names")


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def recipe(directory: Path, layout: Layout) -> Finding:
    """The recipe can be read and is this checkpoint's.

    Raises:
        RecipeError: it cannot be read.
    """
    if not is_built(directory):
        return Finding("recipe", SKIPPED, f"no build wrote this checkpoint, so it has no {RECIPE}")
    made, problems = read_recipe(directory / RECIPE), []
    for what, ours, theirs in (
        ("experts", list(layout.experts), list(made["experts"])),
        ("method", layout.method, made["method"]),
    ):
        if ours != theirs:
            problems.append(f"{RECIPE} has {what} {_text(theirs)}; config.json has {_text(ours)}")
    return judged("recipe", problems, f"{RECIPE} has the same experts and method as config.json")


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(map(str, value))


def card(directory: Path) -> Finding:
    """The card is there and its metadata can be read; a warning, since nothing computes with it."""
    file = directory / _CARD
    try:
        said = ModelCard(file.read_text(encoding="utf-8")).data.to_dict()
    except FileNotFoundError:
        return Finding("card", WARNING, problems=(f"no {_CARD}, the model card",))
    except (OSError, ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        return Finding("card", WARNING, problems=(f"{_CARD}: its metadata cannot be read: {reason}",))
    if not said:
        return Finding("card", WARNING, problems=(f"{_CARD} has no metadata",))
    return Finding("card", OK, f"its metadata name {', '.join(said)}")
