"""The build loop: read one tensor from the base and every expert, hand the deltas to the method, write."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from upscale.building.card import card
from upscale.building.deltas import norm_tensors, rest_tensor, upscaled_linear
from upscale.building.methods import Method
from upscale.building.methods import smile as smile_method
from upscale.building.methods import wemoe as wemoe_method
from upscale.building.plan import Plan, make_plan
from upscale.building.report import ModuleReport, Report
from upscale.building.skeleton import Linear
from upscale.config import BuildConfig, SmileConfig, WemoeConfig, recipe
from upscale.errors import NonFiniteError
from upscale.router_file import PART, named
from upscale.runtime import runtime_files
from upscale.runtime.architecture_upscaled import autos_of
from upscale.runtime.layout_upscaled import LINEAR, Layout, ModuleLayout
from upscale.runtime.modeling_upscaled import upscaled_config
from zoo import Checkpoint, Group, Source, Writer, check
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
    return build(make_plan(check(group), method, config, progress), group, out, progress=progress)


def build(plan: Plan, group: Group, out: str | Path, *, progress: Progress | None = None) -> Report:
    """Carry out a plan for the models of a group. Nothing is left in ``out`` unless all of it succeeds.

    Raises:
        OutputError: see ``zoo.Writer``.
        NonFiniteError: NaN or infinity in a source, with tensor and expert.
    """
    return write(plan, _recipe(plan, group), out, progress=progress)


def write(
    plan: Plan,
    made: Mapping,
    out: str | Path,
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
        router: its settings and tensors; None: those that the method begins with.
        files: further files to put into ``out``.
        replace: ``out`` is there, and is exchanged for the new one.
        progress: called after each step with (bytes done, bytes in all, name).

    Raises:
        OutputError: see ``zoo.Writer``.
        NonFiniteError: NaN or infinity in a source, with tensor and expert.
    """
    total = sum(plan.base.tensors[name].nbytes for name in plan.rest) + sum(_nbytes(plan, n) for n in plan.linears)
    done = 0

    def step(nbytes: int, name: str) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total, name)

    modules: dict[str, ModuleLayout] = {}
    module_reports, rest_reports = [], []
    with torch.no_grad(), Writer(out, plan.declared) as writer:

        def put(name: str, tensor: Tensor) -> None:
            writer.write(name, _cast(name, tensor, plan.declared[name].dtype))

        for name in plan.rest:
            tensor, report = rest_tensor(plan, name)
            put(name, tensor)
            if any(report.norms.values()):
                rest_reports.append(report)
            step(plan.base.tensors[name].nbytes, name)
        for norm in plan.norms:
            for name in (norm.weight, norm.bias):
                if name is not None:
                    put(name, plan.base.read(name))
            changes, reports = norm_tensors(plan, norm)
            rest_reports += reports
            if changes is not None:
                modules[norm.name] = plan.layouts[norm.name]
                for tensor, value in changes.items():
                    put(f"{norm.name}.experts.{tensor}", value)
        for linear in plan.linears:
            own = [name for name in (linear.weight, linear.bias) if name is not None and name not in plan.rest]
            for name in own:
                put(name, plan.base.read(name))
            upscaled = upscaled_linear(plan, linear)
            if upscaled is not None:
                modules[linear.name] = upscaled.layout
                for tensor, value in upscaled.tensors.items():
                    put(f"{linear.name}.experts.{tensor}", value)
                kept = upscaled.kept
                module_reports.append(
                    ModuleReport(
                        linear.name,
                        {e: k.rank for e, k in kept.items()},
                        {e: k.norm for e, k in kept.items()},
                        {e: k.left for e, k in kept.items()},
                    )
                )
            step(_nbytes(plan, linear), linear.name)
        for number, (expert, shapes) in enumerate(plan.heads.items()):
            for name in shapes:
                put(f"heads.{number}.{name}", plan.experts[expert].read(name))
                if number == 0:
                    put(name, plan.base.read(name))
        for head, embedding in plan.tied.items():
            if embedding in modules:
                modules[head] = dataclasses.replace(modules[embedding], kind=LINEAR, tied=embedding)
        settings, tensors = named(*(router or plan.method.router(plan.skeleton, modules, plan.config)))
        classes = {expert: labels(plan.experts[expert]) for expert in plan.heads}
        layout = Layout(plan.method.NAME, tuple(plan.experts), settings, modules, plan.heads, classes)
        report = Report(
            plan.method.NAME,
            module_reports,
            rest_reports,
            plan.base_bytes,
            plan.expert_bytes,
            writer.nbytes + sum(tensor.nbytes for tensor in tensors.values()),
        )
        all_files = {**_files(plan, made, report), **(files or {})}
        writer.commit(_config(plan, layout), all_files, {PART: tensors} if tensors else {})
    return report


def _nbytes(plan: Plan, linear: Linear) -> int:
    return plan.base.tensors[linear.weight].nbytes


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the format it is written in, which must hold it: float16 ends at 65504."""
    cast = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not cast.isfinite().all():
        raise NonFiniteError(f"tensor {name} has values that float16 cannot hold; use --dtype bfloat16 or float32")
    return cast


def _config(plan: Plan, layout: Layout) -> dict:
    """``config.json``: the base's fields, in the format that the tensors are written in."""
    config = upscaled_config(plan.base.config, layout)
    if plan.config.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = plan.config.dtype
    return config


def _pinned(source: Source, model: Checkpoint) -> str:
    """A source as it can be found again: a Hub id with the commit that was read, which names its cache directory."""
    return source.location if source.is_local else f"{source.location}@{model.path.name}"


def _recipe(plan: Plan, group: Group) -> dict:
    return {
        "upscale_zoo": version("upscale-zoo"),
        "method": plan.method.NAME,
        "base": _pinned(group.base, plan.base),
        "experts": {name: _pinned(source, plan.experts[name]) for name, source in group.experts.items()},
        "config": recipe(plan.config),
    }


def _files(plan: Plan, made: Mapping, report: Report) -> Mapping[str, bytes | Path]:
    sources = Group(Source(made["base"]), {name: Source(text) for name, text in made["experts"].items()})
    return {
        **plan.base.companions,
        **runtime_files(),
        "upscale.yaml": yaml.safe_dump(dict(made), sort_keys=False).encode(),
        "report.json": json.dumps(report.to_json(), indent=1).encode() + b"\n",
        "README.md": card(sources, report, plan.method.SUMMARY, autos_of(plan.base.config)[0]).encode(),
    }
