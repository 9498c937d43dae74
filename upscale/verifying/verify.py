"""The run of a verification: one check after the other, each only where what it needs was found to be sound."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from upscale.building.rebuild import other_sources
from upscale.building.recipe import RECIPE, read_recipe
from upscale.building.stored import Stored
from upscale.config import VerifyConfig
from upscale.errors import LoadError
from upscale.loading import locate, read_config, require_expert
from upscale.runtime.layout_upscaled import Layout
from upscale.verifying import structure
from upscale.verifying.engines import engines
from upscale.verifying.finding import FAILED, OK, SKIPPED, Finding, Verification, judged
from upscale.verifying.reconstruction import Measured, measure
from upscale.verifying.weights import weights
from zoo import Checkpoint, Group, Model, Source, Verdict, ZooError, checked
from zoo.preflight import parameters
from zoo.reading.model import files

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


def verify(
    out: str | Path,
    against: Group | str | Path | None = None,
    config: VerifyConfig | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Verification:
    """Check that a checkpoint is what it should be; writes nothing.

    Files and tensors are all there with the bytes that were written, and finite; factors are orthonormal;
    ``config.json`` fits the tensors, the base and the recipe; it loads in transformers and, where it is installed, in
    vLLM, which say the same of some texts. Against its sources: each expert keeps what the report says, and the base is
    the group's.

    Args:
        out: directory or Hub id of an upscaled checkpoint.
        against: the group that it was built from, or the YAML file of one; None: the sources are not looked at.
        config: settings; or give them as ``options``, e.g. ``engine="none"``.
        progress: called with (bytes done, bytes in all, what is being done) of the part that is under way.

    Returns:
        Verification: a finding for each check. What is wrong with the checkpoint raises nothing.

    Raises:
        SourceError: no such directory or Hub id.
        LoadError: not an upscaled checkpoint, one of another version, or none with the experts asked for.
        ConfigError: a setting out of range.
        GroupError: ``against`` is no group.
    """
    config = config or VerifyConfig(**options)
    group = against if against is None or isinstance(against, Group) else Group.load(against)
    tell = progress or (lambda done, total, what: None)
    directory = locate(Source.parse(str(out)).resolve(whole=True))
    fields = read_config(directory)
    layout = _layout(out, fields)
    for expert in config.expert:
        require_expert(directory, expert)
    found = _Findings()
    found.run("files", lambda: structure.files(directory, fields))
    found.run("weights", lambda: _opened(directory))
    found.run_all(
        ("hashes", "finite", "orthonormal"), lambda: weights(Checkpoint.open(directory), layout, tell), "weights"
    )
    found.run("tensors", lambda: structure.tensors(Checkpoint.open(directory), layout), "weights")
    found.run("layout", lambda: structure.layout(Stored.open(directory)), "tensors")
    found.run("router", lambda: structure.router(directory, layout))
    found.run("recipe", lambda: structure.recipe(directory, layout))
    found.run("card", lambda: structure.card(directory))
    sound = ("layout", "router", "finite")
    found.run_all(
        ("transformers", "vllm"), lambda: engines(directory, fields, config, lambda what: tell(0, 0, what)), *sound
    )
    experts: dict[str, Measured] = {}
    against_group = ("sources", "base", "experts")
    if group is None:
        found.skip(against_group, "no group to compare with was given")
    else:
        found.run_all(against_group, lambda: _against(Stored.open(directory), group, experts, tell), "layout", "finite")
    return Verification(str(out), found.all, experts)


class _Findings:
    """What was found so far."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def run(self, name: str, check: Callable[[], Finding], *needs: str) -> None:
        """Run a check, unless one of those that it needs found nothing sound."""
        self.run_all((name,), lambda: [check()], *needs)

    def run_all(self, names: Sequence[str], check: Callable[[], Sequence[Finding]], *needs: str) -> None:
        """The same for a check with several findings; an error stands for the first of them."""
        bad = [f.check for f in self.all if f.check in needs and f.status in (FAILED, SKIPPED)]
        if bad:
            self.skip(names, f"needs {bad[0]}")
            return
        try:
            self.all += check()
        except ZooError as error:
            self.all.append(judged(names[0], [str(error)]))
            self.skip(names[1:], f"needs {names[0]}")

    def skip(self, names: Sequence[str], reason: str) -> None:
        """Skip checks."""
        self.all += [Finding(name, SKIPPED, reason) for name in names]


def _layout(out: str | Path, fields: dict) -> Layout:
    if "upscale" not in fields:
        raise LoadError(f"{out}: a plain model, without experts; give an upscaled one")
    try:
        return Layout.from_config(fields["upscale"])
    except KeyError as error:
        raise LoadError(f"{out}: config.json lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise LoadError(f"{out}: config.json: {error}") from error


def _opened(directory: Path) -> Finding:
    checkpoint = Checkpoint.open(directory)
    count = len(files(checkpoint))
    told = f"{count} file(s), {checkpoint.nbytes / 1e6:,.1f} MB"
    return Finding("weights", OK, told, figures={"bytes": checkpoint.nbytes, "files": count})


def _against(stored: Stored, group: Group, measured: dict[str, Measured], progress: Progress) -> list[Finding]:
    """The sources, the base and the experts; the experts' figures go into ``measured``.

    Raises:
        MismatchError, SourceError, CheckpointError: the group cannot be read.
    """
    made = read_recipe(stored.path / RECIPE) if structure.is_built(stored.path) else {}
    verdict = checked(replace(group, vocabulary=group.vocabulary or made.get("vocabulary")))
    ours, theirs = list(stored.layout.experts), list(verdict.experts)
    if set(ours) != set(theirs):
        line = f"the group has experts {', '.join(theirs)}; the checkpoint has {', '.join(ours)}"
        return [judged("sources", [line]), *(Finding(n, SKIPPED, "needs sources") for n in ("base", "experts"))]
    sources = _sources(made, verdict)
    if other := _other_shapes(stored.base, verdict.base):
        return [sources, judged("base", other), Finding("experts", SKIPPED, "needs base")]
    found = measure(stored, verdict, progress)
    measured |= found.experts
    merged = ", but for what was merged" if stored.merged else ""
    return [
        sources,
        judged("base", [f"tensor {name} is not the base's" for name in found.base], f"is the group's base{merged}"),
        _experts(found.lies, found.experts, reported=stored.report is not None),
    ]


def _sources(made: Mapping, verdict: Verdict) -> Finding:
    if not made:
        return Finding("sources", SKIPPED, f"no build wrote this checkpoint, so it has no {RECIPE}")
    changed = other_sources(made, verdict)
    problems = [f"{name}: {model.path} is not what {RECIPE} was made from" for name, model in changed.items()]
    return judged("sources", problems, f"{1 + len(verdict.experts)} models are those that {RECIPE} was made from")


def _other_shapes(ours: Model, theirs: Model) -> list[str]:
    """The tensors that only one of two bases has, or of another shape."""
    sides = [{name: tuple(spec.shape) for name, spec in parameters(model).items()} for model in (ours, theirs)]
    names = sorted(sides[0].keys() | sides[1].keys())
    return [f"tensor {name} is not the base's" for name in names if sides[0].get(name) != sides[1].get(name)]


def _experts(lies: Sequence[str], experts: Mapping[str, Measured], *, reported: bool) -> Finding:
    worst = min(experts, key=lambda name: experts[name].energy)
    said = "what report.json says" if reported else "there is no report.json to compare with"
    told = f"{experts[worst].energy:.2%} of the squared delta or more is kept ({worst}); {said}"
    return judged("experts", lies, told)
