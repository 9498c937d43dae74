"""What a build kept and what it left behind, measured while it ran."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModuleReport:
    """One upscaled linear: by expert, the rank stored, the delta's norm, and the norm of what the factors leave out."""

    name: str
    ranks: Mapping[str, int]
    norms: Mapping[str, float]
    left: Mapping[str, float]

    @property
    def energy(self) -> Mapping[str, float]:
        """By expert, the part of the delta's squared norm that is kept; 1 for an expert that changed nothing."""
        return {e: 1 - (self.left[e] / n) ** 2 if n else 1.0 for e, n in self.norms.items()}


@dataclass(frozen=True)
class RestReport:
    """One tensor that is not upscaled: by expert, the norm of its delta and of what the written tensor misses of it."""

    name: str
    norms: Mapping[str, float]
    left: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """A build's account.

    Attributes:
        method: name of the method.
        modules: upscaled linears, in the model's order.
        rest: tensors that are not upscaled but that some expert changed.
        base_bytes, result_bytes: sizes of the base and of the result.
        expert_bytes: sizes of the experts' sources.
    """

    method: str
    modules: Sequence[ModuleReport]
    rest: Sequence[RestReport]
    base_bytes: int
    expert_bytes: Mapping[str, int]
    result_bytes: int

    @classmethod
    def from_json(cls, values: Mapping) -> "Report":
        """Read what ``to_json`` gave. Raises KeyError or TypeError for anything else."""
        modules = [ModuleReport(m["name"], m["ranks"], m["norms"], m["left"]) for m in values["modules"]]
        rest = [RestReport(r["name"], r["norms"], r["left"]) for r in values["rest"]]
        sizes = values["base_bytes"], values["expert_bytes"], values["result_bytes"]
        return cls(values["method"], modules, rest, *sizes)

    @property
    def group_bytes(self) -> int:
        """Size of base and experts."""
        return self.base_bytes + sum(self.expert_bytes.values())

    @property
    def energy(self) -> Mapping[str, float]:
        """By expert, the part of the squared norm of all its deltas that the upscaled linears keep."""
        experts = {e for module in self.modules for e in module.norms}
        kept = {}
        for e in sorted(experts):
            total = sum(m.norms[e] ** 2 for m in self.modules)
            kept[e] = 1 - sum(m.left[e] ** 2 for m in self.modules) / total if total else 1.0
        return kept

    def left_behind(self, expert: str) -> tuple[float, float]:
        """Norms of what an expert loses: (in the upscaled linears, in everything else)."""
        inside = sum(m.left[expert] ** 2 for m in self.modules) ** 0.5
        return inside, sum(r.left[expert] ** 2 for r in self.rest) ** 0.5

    def to_json(self) -> dict:
        """Plain values, with the energies that follow from the norms."""
        modules = [{**asdict(m), "energy": dict(m.energy)} for m in self.modules]
        return {**asdict(self), "group_bytes": self.group_bytes, "modules": modules, "energy": dict(self.energy)}
