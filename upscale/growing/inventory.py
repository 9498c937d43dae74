"""What an upscaled checkpoint holds, expert by expert."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from upscale.building.stored import Stored
from upscale.building.stored_expert import StoredExpert
from upscale.loading import locate
from upscale.publishing.sources import origins
from upscale.runtime.layout_upscaled import LOW_RANK, NORM


@dataclass(frozen=True)
class Held:
    """One expert.

    Attributes:
        source: the Hub id or path that it was built from, as the recipe says; empty without a recipe.
        version: the beginning of the commit or content hash; empty if neither is known.
        ranks: the smallest and the largest of its factors; None if nothing is stored as factors.
        energy: part of the squared norm of its deltas of linears that is kept; None without a report.
        nbytes: what its tensors take.
    """

    source: str
    version: str
    ranks: tuple[int, int] | None
    energy: float | None
    nbytes: int


@dataclass(frozen=True)
class Inventory:
    """A checkpoint.

    Attributes:
        experts: by name, in order.
        router: its type.
        base_bytes: what the base's tensors take.
        nbytes: of all tensors.
    """

    experts: Mapping[str, Held]
    router: str
    base_bytes: int
    nbytes: int

    def to_json(self) -> dict:
        """Plain values."""
        return asdict(self)


def inventory(path: str | Path) -> Inventory:
    """Read what a checkpoint holds from its configuration, headers, recipe and report.

    Raises:
        SourceError: no such directory or Hub id.
        LoadError: no upscaled model, or one with other tensors than it should have.
    """
    stored = Stored.open(locate(path))
    recipe, report = stored.recipe, stored.report
    known = {o.role: o for o in origins(recipe)} if "base" in recipe and isinstance(recipe.get("experts"), dict) else {}
    modules = {n: m for n, m in stored.layout.modules.items() if m.kind != NORM and m.vectors == LOW_RANK}
    experts = {}
    for name in stored.layout.experts:
        own, origin = StoredExpert.of(stored, name), known.get(name)
        ranks = [module.ranks[own.number] for module in modules.values()]
        experts[name] = Held(
            source=str(recipe["experts"][name]) if origin else "",
            version=origin.version if origin else "",
            ranks=(min(ranks), max(ranks)) if ranks else None,
            energy=report.energy.get(name) if report else None,
            nbytes=own.stored_bytes,
        )
    router = stored.layout.router["type"]
    base_bytes = sum(info.nbytes for info in stored.base.tensors.values())
    return Inventory(experts, router, base_bytes, sum(info.nbytes for info in stored.checkpoint.tensors.values()))
