"""Who takes part in an evaluation: the models given, and a group's base, experts and merges as baselines."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from upscale.config import EvalConfig
from upscale.errors import EngineError, TaskError
from upscale.evaluating.engines import is_server
from upscale.evaluating.tasks import Task
from upscale.loading import locate, read_config, require_expert
from upscale.merging.merging import merge
from zoo import Checkpoint, CheckpointError, Group, checked
from zoo.reading.checkpoint import is_adapter
from zoo.reading.companions import companions
from zoo.reading.folder import Folder

MERGES = {"average": "average", "task arithmetic": "task-arithmetic", "TIES": "ties"}  # shown, called
ORACLE = ", right expert forced"  # what the second name of an upscaled model ends in


@dataclass(frozen=True)
class Entrant:
    """A model that takes part.

    Attributes:
        name: shown.
        location: directory, Hub id or served name; of a merge, the method.
        directory: where the model lies; None for a served one and for a merge, which is made when its turn comes.
        group: what a merge is made of.
        experts: of an upscaled model.
        given: whether --expert is meant for it; baselines are run as they are.
    """

    name: str
    location: str
    directory: Path | None = None
    group: Group | None = None
    experts: tuple[str, ...] = ()
    given: bool = True

    @contextmanager
    def opened(self) -> Iterator[str]:
        """What ``open_engine`` takes. A merge lies in a temporary directory (of ``TMPDIR``) while the context lasts."""
        if self.group is None:
            yield self.location
            return
        with tempfile.TemporaryDirectory(prefix="upscale-eval-") as scratch:
            out = Path(scratch) / self.location
            merge(self.group, out, self.location)
            yield str(out)

    def stamp(self) -> list:
        """What tells that the model has changed, as plain JSON values: its files' names, sizes and times.

        Of a served model that is its name alone.
        """
        if self.group is not None:
            sources = {"base": self.group.base, **self.group.experts}
            return [self.location, [[name, _files(source.resolve())] for name, source in sources.items()]]
        return [self.location] if self.directory is None else _files(self.directory)

    def expert(self, task: Task, config: EvalConfig) -> str | None:
        """The expert that --expert forces on this model for a task."""
        if not self.given:
            return None
        return task.name if config.expert == "auto" else config.expert


def _files(directory: Path) -> list:
    directory = directory.resolve()
    files = [directory / "config.json", *directory.glob("*.safetensors"), *companions(directory).values()]
    stats = [(file.name, file.stat()) for file in sorted(set(files)) if file.is_file()]
    return [str(directory), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def tensor_bytes(directory: str | Path) -> int | None:
    """Bytes of a checkpoint's tensors, from its headers; None where they are not stored as safetensors."""
    try:
        return sum(info.nbytes for info in Checkpoint.open(directory).tensors.values())
    except CheckpointError:
        return None


def entrants(
    models: Mapping[str, str | Path], group: Group | None, tasks: Sequence[Task], config: EvalConfig
) -> list[Entrant]:
    """The group's baselines, then the models; all found, none loaded.

    Raises:
        TaskError: no model, two of one name, or nothing to force under --oracle.
        EngineError: a server is asked for what only a model on this machine can do.
        LoadError, SourceError, MismatchError, CheckpointError: a model cannot be used; see ``zoo.check``.
    """
    if is_server(config):
        if group is not None or config.oracle:
            raise EngineError("--group and --oracle need an engine that loads models; a server has its own")
        taking_part = [Entrant(name, str(model)) for name, model in models.items()]
    else:
        taking_part = [] if group is None else _baselines(group)
        for name, model in models.items():
            directory = locate(model)
            twin = next((other for other in taking_part if other.name == name), None)
            if twin and twin.directory and twin.directory.resolve() == directory.resolve() and config.expert is None:
                continue  # base=BASE beside a group of BASE: once is enough
            if twin:
                raise TaskError(f"two models are named {name}, one of them in the group; write NAME=MODEL")
            section = read_config(directory).get("upscale") or {}
            taking_part.append(Entrant(name, str(model), directory, experts=tuple(section.get("experts", ()))))
    if not taking_part:
        raise TaskError("no model to evaluate: give at least one MODEL or NAME=MODEL")
    for entrant in taking_part:
        for task in tasks:
            if entrant.directory is not None and (expert := entrant.expert(task, config)) is not None:
                require_expert(entrant.directory, expert)
    if config.oracle and not any(task.name in entrant.experts for task in tasks for entrant in taking_part):
        raise TaskError("--oracle: no task is named like an expert of any model, so that none can be forced")
    return taking_part


def _baselines(group: Group) -> list[Entrant]:
    verdict = checked(group)
    found = {"base": (group.base, verdict.base), **{n: (s, verdict.experts[n]) for n, s in group.experts.items()}}
    if twin := sorted(found.keys() & MERGES.keys()):
        raise TaskError(f"an expert of the group is named {twin[0]} like a baseline; rename it")
    plain = [
        Entrant(name, "average", group=replace(group, experts={name: source}), given=False)  # a LoRA, merged
        if is_adapter(Folder(opened.path))
        else Entrant(name, str(source), opened.path, given=False)
        for name, (source, opened) in found.items()
    ]
    return [*plain, *(Entrant(name, method, group=group, given=False) for name, method in MERGES.items())]
