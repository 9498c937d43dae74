"""Give a finished checkpoint further experts, or take some away; of the models it was built from none is needed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upscale import router_file
from upscale.building.build import write
from upscale.building.methods import Method
from upscale.building.overrides import settings_of, unused_seed
from upscale.building.plan import make_plan
from upscale.building.rebuild import method_of
from upscale.building.recipe import RECIPE, read_recipe
from upscale.building.report import Report
from upscale.building.stored import Stored
from upscale.building.stored_expert import StoredExpert
from upscale.config import BuildConfig
from upscale.device import threads
from upscale.errors import ConfigError, ExpertError
from upscale.growing.recipe import changed, sharing
from upscale.growing.router import rearranged
from upscale.publishing.card import MADE
from upscale.publishing.contents import is_built
from zoo import Group, Model, Source, Verdict
from zoo.preflight import check_against
from zoo.reading.contents import Hashes
from zoo.reading.tied import embedding_of

Progress = Callable[[int, int, str], None]  # bytes of the base done, bytes in all, what is being done
_CARD = "README.md"
_STALE = ("eval.json", "routing.png")  # of the model as it was


@dataclass(frozen=True)
class Grown:
    """What became of a checkpoint.

    Attributes:
        report: as of a build with these experts.
        warnings: one line each: of the preflight, and what is no longer as it was.
    """

    report: Report
    warnings: tuple[str, ...]


def add(
    path: str | Path,
    experts: Mapping[str, str | Path],
    *,
    rank: int | None = None,
    energy: float | None = None,
    vocabulary: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Grown:
    """Add experts to an upscaled checkpoint: the same as if it had been built with them.

    Their deltas are taken against the base inside the checkpoint, and everything is done as its recipe says. Only the
    new experts are factored; the stored ones' tensors stay as they are, to the bit. The directory is exchanged for the
    new one in one step.

    Args:
        path: directory of the checkpoint.
        experts: models to add, by name: directories or Hub ids, fine-tunes of the base or LoRA adapters on it.
        rank: of theirs, if not the recipe's.
        energy: part of each of their squared deltas to keep, if not the recipe's way.
        vocabulary: see ``Group``; by default the recipe's.
        allow_pickle: see ``Group``.
        progress: called after each step with (bytes done, bytes in all, name).
        options: settings that decide no byte: ``device``, ``max_memory``.

    Raises:
        LoadError, RecipeError: not a directory of an upscaled model that ``upscale`` built.
        ExpertError: names that are there already, or a checkpoint that cannot be added to.
        ConfigError: settings out of range, or that do not go together with the recipe's.
        MismatchError, SourceError, CheckpointError: see ``zoo.check``.
        OutputError: see ``zoo.Writer``.
    """
    if rank is not None and energy is not None:
        raise ConfigError("--rank and --energy exclude each other: each decides all ranks")
    growing = _Growing.open(path, options)
    old, common = growing.stored.layout.experts, growing.config
    if twice := [name for name in experts if name in old]:
        raise ExpertError(
            f"{path}: has an expert {twice[0]} already; choose another name, or `upscale remove` that one first"
        )
    if rank is not None:
        common = replace(common, rank=rank, budget=None, energy=None)
    elif energy is not None:
        common = replace(common, budget=None, energy=energy)
    elif common.budget is not None:
        raise ExpertError(
            f"{path}: its ranks share a budget of {common.budget} among {', '.join(sharing(growing.made))}; "
            "give the new ones a --rank or an --energy of their own"
        )
    settings = growing.settings
    for name in experts:
        settings[name] = replace(common, seed=unused_seed(settings, growing.config))
    group = growing.group(experts, vocabulary, allow_pickle=allow_pickle)
    verdict = check_against(growing.stored.base, group)
    verdict.require()
    if remote := [source for source in group.experts.values() if not source.is_local]:
        for source in remote:
            source.resolve(allow_pickle=allow_pickle)
        verdict = check_against(growing.stored.base, group)
    return growing.write(verdict, group, settings, progress)


def remove(path: str | Path, experts: Sequence[str], *, progress: Progress | None = None) -> Grown:
    """Take experts out of an upscaled checkpoint; all others stay as they are, to the bit.

    The directory is exchanged for the new one in one step.

    Args:
        path: directory of the checkpoint.
        experts: their names.
        progress: called after each step with (bytes done, bytes in all, name).

    Raises:
        LoadError, RecipeError: not a directory of an upscaled model that ``upscale`` built.
        ExpertError: unknown names, the last expert, or fewer experts than a token is given to.
        OutputError: see ``zoo.Writer``.
    """
    growing = _Growing.open(path, {})
    old = growing.stored.layout.experts
    if unknown := [name for name in experts if name not in old]:
        raise ExpertError(f"{path}: no expert {unknown[0]} in this model; it has {', '.join(old)}")
    left = [name for name in old if name not in experts]
    if not left:
        raise ExpertError(f"{path}: nothing would be left but the base; remove the directory, or leave one expert")
    if (top_k := getattr(growing.config, "top_k", 1)) > len(left):
        raise ExpertError(
            f"{path}: a token is given to {top_k} experts, and {len(left)} would be left; "
            "build the model anew with a smaller --top-k"
        )
    kept = {name: own for name, own in growing.settings.items() if name in left}
    return growing.write(Verdict(growing.stored.base, {}, (), ()), None, kept, progress)


@dataclass(frozen=True)
class _Growing:
    """A checkpoint that is to have other experts.

    Attributes:
        stored: the checkpoint.
        made: its recipe.
        method: that it was built by.
        config: of the build.
    """

    stored: Stored
    made: Mapping[str, Any]
    method: Method
    config: BuildConfig

    @classmethod
    def open(cls, path: str | Path, machine: Mapping[str, Any]) -> "_Growing":
        directory, _ = router_file.opened(path)
        if directory.resolve().parent.name == "snapshots":
            raise ExpertError(f"{path}: lies in the Hub's cache, which is not to be changed; `upscale pull` the model")
        made = read_recipe(directory / RECIPE)
        if "imported" in made:
            raise ExpertError(
                f"{path}: was imported, so that it has no settings to go on with; "
                "take base and experts out by `upscale extract --as model` and build anew"
            )
        method, config = method_of(directory / RECIPE, made, machine)
        stored = Stored.open(directory)
        if stored.merged:
            raise ExpertError(
                f"{path}: everything but the experts is a merge of all of them, which has other weights with others; "
                "build the model anew"
            )
        if stored.report is None:
            raise ExpertError(f"{path}: no report.json, which says what its experts keep; build the model anew")
        return cls(stored, made, method, config)

    @property
    def settings(self) -> dict[str, BuildConfig]:
        """Of each expert that is there."""
        return settings_of(self.stored.layout.experts, self.config, self.made.get("overrides", {}))

    def group(self, experts: Mapping[str, str | Path], vocabulary: str | None, *, allow_pickle: bool) -> Group:
        """The models to add, on the base that the recipe names, which need not be there any more."""
        location, _, revision = self.made["base"].partition("@")
        base = Source(self.made["base"]) if Path(self.made["base"]).is_dir() else Source(location, revision or None)
        vocabulary = vocabulary or self.made.get("vocabulary")
        given = Group.of(self.stored.path, experts, vocabulary=vocabulary, allow_pickle=allow_pickle)
        return replace(given, base=base)

    def write(
        self, verdict: Verdict, group: Group | None, settings: Mapping[str, BuildConfig], progress: Progress | None
    ) -> Grown:
        """Exchange the checkpoint for one with the experts of ``settings``: stored ones and those of ``group``."""
        added = dict(group.experts) if group else {}
        stored = {name: StoredExpert.of(self.stored, name) for name in settings if name not in added}
        experts: dict[str, Model] = {name: stored.get(name) or verdict.experts[name] for name in settings}
        made = changed(self.made, self.config, settings, group, verdict.experts)
        router = rearranged(
            router_file.stored(self.stored.path), self.stored.layout.experts, list(experts), self._gained(verdict)
        )
        others, warnings = self._others()
        if added and router[0]["type"] == "calibrated":
            warnings.append(
                f"the router does not know {', '.join(added)} yet: it serves who asks for it by name; "
                f"run `upscale calibrate {self.stored.path}` with prompts of every expert"
            )
        local = {name: experts[name] for name, source in added.items() if source.is_local}
        verdict, out = replace(verdict, experts=experts), self.stored.path
        with threads(made.get("threads")), Hashes(local, {"base": verdict.base, **experts}) as hashes:
            plan = make_plan(verdict, self.method, self.config, progress, made.get("overrides", {}), stored)
            report = write(plan, made, out, hashes, router=router, files=others, replace=True, progress=progress)
        return Grown(report, (*verdict.warnings, *warnings))

    def _gained(self, verdict: Verdict) -> int:
        """Tokens that the vocabulary gains."""
        if verdict.base is self.stored.base:
            return 0
        name = embedding_of(verdict.base)
        return verdict.base.tensors[name].shape[0] - self.stored.base.tensors[name].shape[0]

    def _others(self) -> tuple[dict[str, Path], list[str]]:
        """The files that no build makes and that stay, and what is to be said of those that do not."""
        path = self.stored.path
        found = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
        card = found.pop(_CARD, None)
        stale = [name for name in _STALE if found.pop(name, None)]
        others = {name: file for name, file in found.items() if not is_built(name)}
        if card is not None and MADE not in card.read_text(encoding="utf-8"):
            others[_CARD] = card
        return others, [f"{name} is of the model as it was, and is left out" for name in stale]
