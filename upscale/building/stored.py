"""An upscaled checkpoint, opened: the base inside it, and what is known of its experts without their sources."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from torch import Tensor

from upscale.building.report import ModuleReport, Report, RestReport
from upscale.building.skeleton import Linear, Norm, Skeleton, skeleton
from upscale.errors import LoadError
from upscale.loading import read_config
from upscale.runtime.layout_upscaled import Layout
from upscale.runtime.modeling_upscaled import base_fields, stored_tensors
from zoo import Checkpoint


@dataclass(frozen=True)
class StoredBase(Checkpoint):
    """The base inside an upscaled checkpoint; ``source_bytes`` is its size where it was read from, if that is known."""

    source_bytes: int | None = None

    @property
    def nbytes(self) -> int:
        """See Model."""
        return self.source_bytes if self.source_bytes is not None else super().nbytes


@dataclass(frozen=True)
class Stored:
    """An upscaled checkpoint.

    Attributes:
        checkpoint: all its tensors.
        layout: what they are.
        base: without the experts and the router, with the base's own configuration.
        recipe: ``upscale.yaml``; empty without one.
        report: ``report.json``; None without one.
    """

    checkpoint: Checkpoint
    layout: Layout
    base: StoredBase
    recipe: Mapping
    report: Report | None

    @classmethod
    def open(cls, directory: Path) -> "Stored":
        """Read configuration, headers, recipe and report; no weights.

        Raises:
            LoadError: a plain model, of an unknown version, or with other tensors than it should have.
            CheckpointError: a file is missing or damaged.
        """
        config = read_config(directory)
        if "upscale" not in config:
            raise LoadError(f"{directory}: a plain model, without experts; give an upscaled one")
        checkpoint = Checkpoint.open(directory)
        try:
            layout = Layout.from_config(config["upscale"])
            stored_tensors(directory, layout)
            fields = base_fields(config)
        except KeyError as error:
            raise LoadError(f"{directory}: config.json lacks {error}") from error
        except ValueError as error:
            raise LoadError(" ".join(str(error).split())) from error
        report = _report(directory)
        own, router = layout.shapes(), f"{layout.router.get('tensors')}."
        tensors = {
            name: info
            for name, info in checkpoint.tensors.items()
            if name not in own and not name.startswith(router) and not info.file.name.startswith("router-")
        }
        base = StoredBase(directory, fields, tensors, report.base_bytes if report else None)
        return cls(checkpoint, layout, base, _recipe(directory), report)

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.checkpoint.path

    @property
    def source(self) -> str:
        """Where the recipe says that the base came from; empty if it says no such thing, as of an imported one."""
        return "" if "imported" in self.recipe else str(self.recipe.get("base") or "")

    @property
    def merged(self) -> bool:
        """Whether everything but the experts is a merge of the group."""
        settings = self.recipe.get("config")
        average = isinstance(settings, dict) and settings.get("rest") == "average"
        return average or self.layout.router["type"] == "ensembling"

    @cached_property
    def skeleton(self) -> Skeleton:
        """The base's structure."""
        return skeleton(self.base)

    @cached_property
    def split_head(self) -> Linear | None:
        """An output head that shares the embedding's weight but not its factors: with an expert it differs from it."""
        modules = self.layout.modules
        for head in (n for n in self.skeleton.linears if n.head):
            shared = [n.name for n in self.skeleton.embeddings if n.weight == head.weight]
            if (
                shared
                and {head.name, *shared} & modules.keys()
                and not (head.name in modules and modules[head.name].tied)
            ):
                return head
        return None

    @cached_property
    def places(self) -> Mapping[str, Linear | Norm]:
        """By tensor of the base, the module with experts that it belongs to."""
        found: dict[str, Linear | Norm] = {}
        for module in (*self.skeleton.norms, *self.skeleton.embeddings, *self.skeleton.linears):
            entry = self.layout.modules.get(module.name)
            if entry is not None and not entry.tied:
                names = (module.bias,) if module is self.split_head else (module.weight, module.bias)
                found |= dict.fromkeys((name for name in names if name is not None), module)
        return found

    @cached_property
    def measured(self) -> Mapping[str, ModuleReport | RestReport]:
        """What the build measured, by linear and by tensor of other modules."""
        return {found.name: found for found in (*self.report.modules, *self.report.rest)} if self.report else {}

    def read(self, module: str, tensor: str) -> Tensor:
        """A tensor ``<module>.experts.<tensor>``, as it is stored."""
        return self.checkpoint.read(f"{module}.experts.{tensor}")


def _recipe(directory: Path) -> dict:
    file = directory / "upscale.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise LoadError(f"{file}: cannot be read as a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{file}: not a recipe; fetch the file again")
    return content


def _report(directory: Path) -> Report | None:
    file = directory / "report.json"
    try:
        return Report.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"{file}: cannot be read as a build's report; fetch the file again") from error
