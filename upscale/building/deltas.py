"""What a build writes for a tensor, a norm or a linear, from the base's weights and the experts' changes."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from upscale.building.changes import Compared
from upscale.building.plan import Plan
from upscale.building.report import RestReport
from upscale.building.skeleton import Linear, Norm
from upscale.building.vectors import UpscaledLinear


def rest_tensor(plan: Plan, name: str) -> tuple[Tensor | None, RestReport]:
    """The tensor to write for a parameter that is not upscaled, and what each expert loses by it.

    None: it stays as the base has it.
    """
    if not plan.base.tensors[name].dtype.is_floating_point:
        return None, RestReport(name, {}, {})
    origin = cache(lambda: plan.base.read(name).to(plan.config.device))  # not read where all changes are known
    if plan.merging is None:
        norms = {expert: changes.of_rest(name, origin) for expert, changes in plan.changes.items()}
        return None, RestReport(name, norms, norms)
    base, norms = origin(), {}
    compared = {e: Compared(e, model, plan.base, plan.config.device) for e, model in plan.experts.items()}

    def measured(expert: str) -> Tensor:
        delta = compared[expert].delta(name, base)
        norms[expert] = float(torch.linalg.vector_norm(delta))
        return delta

    merged = plan.merging(base, map(measured, compared))  # a map, unlike a generator, keeps none in memory
    if not any(norms.values()):
        return None, RestReport(name, norms, norms)
    left = {e: float(torch.linalg.vector_norm(each.delta(name, merged))) for e, each in compared.items()}
    return merged, RestReport(name, norms, left)


def norm_tensors(plan: Plan, norm: Norm) -> tuple[dict[str, Tensor] | None, list[RestReport]]:
    """The experts' tensors of a norm, None if none changed it, and what is lost."""
    found = {expert: changes.of_norm(norm) for expert, changes in plan.changes.items()}
    kept = {"scale": torch.stack([change.scale.to(plan.config.device) for change in found.values()])}
    reports = [_report(norm.weight, {expert: change.weight for expert, change in found.items()})]
    if norm.bias is not None:
        kept["shift"] = torch.stack([change.shift.to(plan.config.device) for change in found.values()])
        reports.append(_report(norm.bias, {expert: change.bias for expert, change in found.items()}))
    changed = [report for report in reports if any(report.norms.values())]
    return (kept if changed else None), changed


def _report(tensor: str, norms: Mapping[str, tuple[float, float]]) -> RestReport:
    return RestReport(tensor, {e: norm for e, (norm, _) in norms.items()}, {e: lost for e, (_, lost) in norms.items()})


def upscaled_linear(plan: Plan, linear: Linear) -> UpscaledLinear | None:
    """Hand the deltas of one linear to the method; None if it stays plain."""
    origin = cache(lambda: _origin(plan, linear))  # not read where every expert is known by its factors
    merged, device = plan.is_merged(linear.weight), plan.config.device
    deltas = (  # one in memory at a time
        (expert, changes.of_linear(linear, origin, merged=merged).to(device))
        for expert, changes in plan.changes.items()
    )
    biases = None
    if linear.bias is not None:
        biases = {expert: changes.of_bias(linear).to(device) for expert, changes in plan.changes.items()}
    ranks, seeds = plan.layouts[linear.name].ranks, [own.seed for own in plan.settings.values()]
    return plan.method.upscale_linear(linear, deltas, biases, ranks, seeds, plan.config)


def _origin(plan: Plan, linear: Linear) -> Tensor:
    """The weight that is written for the base: a tied head shares its tensor with embeddings that may be averaged."""
    if linear.weight not in plan.rest:
        return plan.base.read(linear.weight).to(plan.config.device)
    merged, _ = rest_tensor(plan, linear.weight)
    written = plan.base.read(linear.weight) if merged is None else merged
    return written.to(plan.declared[linear.weight].dtype).to(plan.config.device)
