"""The router of a finished checkpoint: its file of tensors beside the experts', replaced without touching those."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upscale.errors import LoadError
from upscale.loading import locate, read_config
from upscale.publishing.card import MADE, card
from upscale.runtime import runtime_files
from upscale.runtime.layout_upscaled import Layout
from upscale.runtime.routers_upscaled import make_router
from zoo.writing.amend import amend
from zoo.writing.part import content_key

PART = "router"  # what the file's name and its tensors' begin with


def opened(path: str | Path) -> tuple[Path, Layout]:
    """The directory of an upscaled checkpoint, and its layout. Raises LoadError if it is none, or on the Hub."""
    directory = Path(path)
    if not directory.is_dir():
        raise LoadError(f"{path}: not a directory; a model of the Hub must be downloaded first, to change its router")
    section = read_config(locate(path)).get("upscale")
    if section is None:
        raise LoadError(f"{path}: a plain model, which has no router; give an upscaled one")
    try:
        return directory, Layout.from_config(section)
    except (ValueError, KeyError) as error:
        raise LoadError(f"{path}: {error}") from error


def named(settings: Mapping, values: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """A router's settings that name its tensors, and the tensors by those names, which change with their values.

    So ``config.json``, renamed into place last, decides which file counts.
    """
    if not values:
        return dict(settings), {}
    values = {name: value.detach().cpu().contiguous() for name, value in values.items()}
    names = f"{PART}.{content_key(values)}"
    return {**settings, "tensors": names}, {f"{names}.{name}": value for name, value in values.items()}


def stored(directory: Path) -> tuple[Mapping, dict[str, Tensor]]:
    """The router of a checkpoint: its entry in ``config.json``, and its tensors by its parameters' names.

    Only ``config.json`` and the router's file are read.

    Raises:
        LoadError: no upscaled checkpoint, or the file is missing or not the one that ``config.json`` names.
    """
    directory, layout = opened(directory)
    if (names := layout.router.get("tensors")) is None:
        return layout.router, {}
    key = names.removeprefix(f"{PART}.")
    file = directory / f"{PART}-{key}.safetensors"
    try:
        with safe_open(file, framework="pt") as part:
            values = {n: part.get_tensor(f"{names}.{n}") for n in make_router(layout.modules, layout.router).shapes()}
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{file}: not the router's file ({' '.join(str(error).split())}); fetch it again") from error
    if content_key(values) != key:
        raise LoadError(f"{file}: its tensors are not those that its name stands for; fetch it again")
    return layout.router, values


def replace(
    directory: Path, layout: Layout, settings: Mapping, values: Mapping[str, Tensor], made: Mapping[str, Any]
) -> None:
    """Give a checkpoint another router, all or nothing.

    Args:
        directory: of the checkpoint.
        layout: its own.
        settings: the router's entry in ``config.json``.
        values: the router's tensors by its parameters' names.
        made: how the router was made, for ``upscale.yaml``.

    Raises:
        OutputError: the directory cannot be written, or another process writes it.
    """
    router, tensors = named(settings, values)
    fields = read_config(directory)
    fields["upscale"] = dataclasses.replace(layout, router=router).to_config()
    recipe = directory / "upscale.yaml"
    story = yaml.safe_load(recipe.read_text()) if recipe.is_file() else {}
    story["router"] = dict(made)
    files = {
        **{name: file.read_bytes() for name, file in runtime_files().items()},
        **_card(directory, fields, story),
        "upscale.yaml": yaml.safe_dump(story, sort_keys=False).encode(),
    }
    amend(directory, PART, tensors, fields, files)


def _card(directory: Path, fields: Mapping, story: Mapping) -> dict[str, bytes]:
    """The model card anew, which says how a model routes; nothing if it is the user's own."""
    text, report = directory / "README.md", directory / "report.json"
    if not text.is_file() or not report.is_file() or MADE not in text.read_text(encoding="utf-8"):
        return {}
    return {text.name: card(fields, story, json.loads(report.read_text(encoding="utf-8"))).encode()}
