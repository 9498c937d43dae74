"""The build loop: read one tensor from the base and every expert, hand the deltas to the method, write."""

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upscale.building.methods import Method
from upscale.building.methods import smile as smile_method
from upscale.building.methods import wemoe as wemoe_method
from upscale.building.plan import Plan, make_plan
from upscale.building.recipe import RECIPE, fingerprint, recipe_bytes, recipe_of, with_hashes
from upscale.building.report import Report
from upscale.building.steps import outcomes, steps
from upscale.config import BuildConfig, SmileConfig, WemoeConfig
from upscale.publishing.card import card
from upscale.router_file import PART, named
from upscale.runtime import runtime_files
from upscale.runtime.layout_upscaled import LINEAR, Layout
from upscale.runtime.modeling_upscaled import upscaled_config
from zoo import Group, Verdict, Writer, checked
from zoo.reading.contents import Hashes
from zoo.reading.heads import labels

Progress = Callable[[int, int, str], None]  # bytes of the base done, bytes in all, what is being done


def smile(
    group: Group | str | Path,
    out: str | Path,
    config: SmileConfig | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Build a SMILE model from a group and write it to ``out``.

    Args:
        group: a Group, or the YAML file of one.
        out: directory to make; must not exist.
        config: settings; or give them as ``options``, e.g. ``rank=32``.
        progress: called after each step with (bytes done, bytes in all, name).

    Returns:
        Report: energy kept, norms left behind, sizes. It is also written to ``out/report.json``.

    Raises:
        ZooError: anything that a user can cause; see ``zoo.errors`` and ``upscale.errors``.
    """
    return _made(smile_method, group, out, config or SmileConfig(**options), progress)


def wemoe(
    group: Group | str | Path,
    out: str | Path,
    config: WemoeConfig | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Build a WEMoE model from a group and write it to ``out``; otherwise as ``smile``.

    Before ``upscale.adapt`` it is the merge of the group, up to what its MLPs' task vectors leave out.
    """
    return _made(wemoe_method, group, out, config or WemoeConfig(**options), progress)


def _made(
    method: Method, group: Group | str | Path, out: str | Path, config: BuildConfig, progress: Progress | None
) -> Report:
    group = group if isinstance(group, Group) else Group.load(group)
    verdict = checked(group)
    with hashing(group, verdict) as hashes:
        return build(make_plan(verdict, method, config, progress), group, out, hashes, progress=progress)


def hashing(group: Group, verdict: Verdict) -> Hashes:
    """Begin to hash the group's local models; those from the Hub are pinned by their commits."""
    models, sources = {"base": verdict.base, **verdict.experts}, {"base": group.base, **group.experts}
    return Hashes({name: model for name, model in models.items() if sources[name].is_local}, models)


def build(plan: Plan, group: Group, out: str | Path, hashes: Hashes, *, progress: Progress | None = None) -> Report:
    """Carry out a plan for the models of a group. Nothing is left in ``out`` unless all of it succeeds.

    A build that was killed goes on where it was when the same is built again.

    Args:
        plan: what to do.
        group: its models.
        out: directory to make; must not exist.
        hashes: see ``hashing``; they may be on their way since before the plan.
        progress: called after each step with (bytes done, bytes in all, name).

    Raises:
        OutputError: see ``zoo.Writer``.
        SourceError: a model was changed while it was read.
        NonFiniteError: NaN or infinity in a source, with tensor and expert.
    """
    return write(plan, recipe_of(plan, group), out, hashes, progress=progress)


def write(
    plan: Plan,
    made: Mapping,
    out: str | Path,
    hashes: Hashes,
    *,
    router: tuple[Mapping, Mapping[str, Tensor]] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write what is planned: the one loop for every method, and for what experts are added to or removed from.

    Args:
        plan: what to do.
        made: the recipe, for ``upscale.yaml``.
        out: directory to make.
        hashes: of the models, "base" or an expert's, whose content hashes go into the recipe; all are watched.
        router: its settings and tensors; None: those that the method begins with.
        files: further files to put into ``out``.
        replace: ``out`` is there, and is exchanged for the new one.
        progress: called after each step with (bytes done, bytes in all, name).

    Raises:
        OutputError: see ``zoo.Writer``.
        SourceError: a model was changed while it was read.
        NonFiniteError: NaN or infinity in a source, with tensor and expert.
    """
    total, done, found = sum(step.nbytes for step in steps(plan)), 0, {}
    with (
        torch.no_grad(),
        _settled(),
        Writer(
            out,
            plan.declared,
            most=plan.result_bytes,
            fingerprint=fingerprint(plan, made, hashes.stamps),
            replace=replace,
        ) as writer,
    ):
        for step, outcome in outcomes(plan, writer, hashes):
            found[step.name] = outcome
            done += step.nbytes
            if progress:
                progress(done, total, step.name)
        modules = {name: outcome.layout for name, outcome in found.items() if outcome.layout}
        for head, embedding in plan.tied.items():
            if embedding in modules:
                modules[head] = dataclasses.replace(modules[embedding], kind=LINEAR, tied=embedding)
        settings, tensors = named(*(router or plan.method.router(plan.skeleton, modules, plan.config)))
        classes = {expert: labels(plan.experts[expert]) for expert in plan.heads}
        layout = Layout(plan.method.NAME, tuple(plan.experts), settings, modules, plan.heads, classes)
        report = Report(
            plan.method.NAME,
            [outcome.module for outcome in found.values() if outcome.module],
            [report for outcome in found.values() for report in outcome.rest],
            plan.base_bytes,
            plan.expert_bytes,
            writer.nbytes + plan.router_bytes,
        )
        config, whole = _config(plan, layout), with_hashes(made, hashes.result())
        all_files = {**_files(plan, config, whole, report), **(files or {})}
        writer.commit(config, all_files, {PART: tensors} if tensors else {})
    return report


@contextmanager
def _settled() -> Iterator[None]:
    """Within the context, what the libraries hold is not searched for garbage: all threads wait for that."""
    if gc.get_freeze_count():  # by the program that we are a part of, which would not like to have it undone
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _config(plan: Plan, layout: Layout) -> dict:
    """``config.json``: the base's fields, in the format that the tensors are written in."""
    config = upscaled_config(plan.base.config, layout)
    if plan.config.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = plan.config.dtype
    return config


def _files(plan: Plan, config: Mapping, made: Mapping, report: Report) -> Mapping[str, bytes | Path]:
    return {
        **plan.base.companions,
        **runtime_files(),
        RECIPE: recipe_bytes(made),
        "report.json": json.dumps(report.to_json(), indent=1).encode() + b"\n",
        "README.md": card(config, made, report.to_json()).encode(),
    }
