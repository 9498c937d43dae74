"""What a checkpoint was made of, as its recipe says it, and as others may read it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

_PINNED = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)@(?P<commit>[0-9a-f]{40})", re.ASCII)  # of the Hub


@dataclass(frozen=True)
class Origin:
    """One source of a checkpoint.

    Attributes:
        role: ``base`` or the expert's name.
        name: the Hub id, or the last part of a local path, since the rest is nobody else's business.
        hub_id: None for a local source.
        version: the beginning of the commit, or of a local source's content hash; empty if neither is known.
        licence: what its card says; None if it does not.
    """

    role: str
    name: str
    hub_id: str | None
    version: str
    licence: str | None


def origins(recipe: Mapping[str, Any]) -> list[Origin]:
    """The base and the experts of an ``upscale.yaml``, in order."""
    found = []
    for role, text in {"base": recipe["base"], **recipe["experts"]}.items():
        pinned = _PINNED.fullmatch(text)
        version = pinned["commit"] if pinned else (recipe.get("sha256") or {}).get(role, "")
        name = pinned["id"] if pinned else PurePath(text).name
        licence = (recipe.get("licences") or {}).get(role)
        found.append(Origin(role, name, pinned and pinned["id"], version[:12], licence))
    return found


def public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the directories of local sources; their content hashes still tell which models they are."""

    def named(text: str) -> str:
        return text if _PINNED.fullmatch(text) else PurePath(text).name

    experts = {expert: named(text) for expert, text in recipe["experts"].items()}
    return {**recipe, "base": named(recipe["base"]), "experts": experts}
