"""What a build writes for a tensor, a norm or a linear: from the base's weights and the experts' deltas, in float32."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from upscale.building.linalg import LowRank, norm_of
from upscale.building.plan import Plan
from upscale.building.report import RestReport
from upscale.building.skeleton import Linear, Norm
from upscale.building.stored_expert import StoredExpert
from upscale.building.vectors import UpscaledLinear
from upscale.errors import NonFiniteError
from zoo import Model
from zoo.reading.product import Product

_ROWS = 1024  # of a matrix, taken at once


def _delta(plan: Plan, expert: str, name: str, origin: Tensor) -> Tensor:
    """float32 delta of an expert's tensor, on the build's device; checks that it is finite.

    ``origin``, of any format, is never there in float32 as a whole.
    """
    delta = _read(plan.experts[expert], name, plan.config.device)
    for rows, taken in zip(torch.atleast_1d(delta).split(_ROWS), torch.atleast_1d(origin).split(_ROWS), strict=True):
        rows.sub_(taken.float())
    if not float(torch.linalg.vector_norm(delta)) < float("inf"):
        who = f"expert {expert}" if origin.isfinite().all() else "base"
        raise NonFiniteError(f"{who}: tensor {name} has NaN or infinite values; is the download complete?")
    return delta


def rest_tensor(plan: Plan, name: str) -> tuple[Tensor | None, RestReport]:
    """The tensor to write for a parameter that is not upscaled, and what each expert loses by it.

    None: it stays as the base has it.
    """
    source = plan.base.read(name)
    if not source.is_floating_point():
        return None, RestReport(name, {}, {})
    base = source.to(plan.config.device)
    norms: dict[str, float] = {}

    def measured(expert: str) -> Tensor:
        delta = _delta(plan, expert, name, base)
        norms[expert] = float(torch.linalg.vector_norm(delta))
        return delta

    if plan.merging is None:
        for expert, model in plan.experts.items():
            if isinstance(model, StoredExpert):
                norms[expert] = model.measured(name)[0]
            else:
                product = model.product(name)
                norms[expert] = norm_of(_delta(plan, expert, name, base) if product is None else product)
        return None, RestReport(name, norms, norms)
    merged = plan.merging(base, map(measured, plan.experts))  # a map, unlike a generator, keeps none in memory
    if not any(norms.values()):
        return None, RestReport(name, norms, norms)
    left = {e: float(torch.linalg.vector_norm(_delta(plan, e, name, merged))) for e in plan.experts}
    return merged, RestReport(name, norms, left)


def norm_tensors(plan: Plan, norm: Norm) -> tuple[dict[str, Tensor] | None, list[RestReport]]:
    """The experts' tensors of a norm, None if none changed it, and what is lost: deltas of gains of about 0."""
    found = {expert: _change(plan, expert, norm) for expert in plan.experts}
    kept = {"scale": torch.stack([change.scale for change in found.values()])}
    reports = [_report(norm.weight, {expert: change.weight for expert, change in found.items()})]
    if norm.bias is not None:
        kept["shift"] = torch.stack([change.shift for change in found.values()])
        reports.append(_report(norm.bias, {expert: change.bias for expert, change in found.items()}))
    changed = [report for report in reports if any(report.norms.values())]
    return (kept if changed else None), changed


@dataclass(frozen=True)
class _Change:
    """What an expert does to a norm: scale and shift of its output [d]; of weight and bias, the norms of their deltas
    and of what is lost of them.
    """

    scale: Tensor
    shift: Tensor
    weight: tuple[float, float]
    bias: tuple[float, float]


def _change(plan: Plan, expert: str, norm: Norm) -> _Change:
    model = plan.experts[expert]
    if isinstance(model, StoredExpert):
        scale, shift = (change.to(plan.config.device) for change in model.change(norm))
        return _Change(scale, shift, model.measured(norm.weight), model.measured(norm.bias or ""))
    weight = _read(plan.base, norm.weight, plan.config.device)
    delta = _delta(plan, expert, norm.weight, weight)
    scale = delta / (norm.offset + weight)
    held = scale.isfinite()
    scale, lost = torch.where(held, scale, 0.0), torch.where(held, 0.0, delta)
    norms = float(torch.linalg.vector_norm(delta)), float(torch.linalg.vector_norm(lost))
    if norm.bias is None:
        return _Change(scale, torch.zeros_like(scale), norms, (0.0, 0.0))
    bias = _read(plan.base, norm.bias, plan.config.device)
    moved = _delta(plan, expert, norm.bias, bias)
    return _Change(scale, moved - bias * scale, norms, (float(torch.linalg.vector_norm(moved)), 0.0))


def _report(tensor: str, norms: Mapping[str, tuple[float, float]]) -> RestReport:
    return RestReport(tensor, {e: norm for e, (norm, _) in norms.items()}, {e: lost for e, (_, lost) in norms.items()})


def upscaled_linear(plan: Plan, linear: Linear) -> UpscaledLinear | None:
    """Hand the deltas of one linear to the method; None if it stays plain."""
    origin = cache(lambda: _origin(plan, linear))  # not read where every expert is stored as factors
    deltas = ((expert, _change_of(plan, expert, linear, origin)) for expert in plan.experts)  # one in memory at a time
    bias_deltas = None
    if (name := linear.bias) is not None:
        base = _read(plan.base, name, plan.config.device)
        bias_deltas = {
            expert: model.bias(linear).to(base) if isinstance(model, StoredExpert) else _delta(plan, expert, name, base)
            for expert, model in plan.experts.items()
        }
    ranks, seeds = plan.layouts[linear.name].ranks, [own.seed for own in plan.settings.values()]
    return plan.method.upscale_linear(linear, deltas, bias_deltas, ranks, seeds, plan.config)


def _change_of(plan: Plan, expert: str, linear: Linear, origin: Callable[[], Tensor]) -> Tensor | Product | LowRank:
    """An expert's delta of a linear, [o, i]: as factors where it is stored so, else in float32."""
    model = plan.experts[expert]
    if isinstance(model, StoredExpert):
        return model.factors(linear).to(plan.config.device)
    merged = plan.merging is not None and linear.weight in plan.rest  # what is written is not the base's own
    product = None if merged else model.product(linear.weight)
    change = _delta(plan, expert, linear.weight, origin()) if product is None else product.to(plan.config.device)
    return change.mT if linear.transposed else change


def _origin(plan: Plan, linear: Linear) -> Tensor:
    """The weight that is written for the base: a tied head shares its tensor with embeddings that may be averaged."""
    if linear.weight not in plan.rest:
        return plan.base.read(linear.weight).to(plan.config.device)
    merged, _ = rest_tensor(plan, linear.weight)
    written = plan.base.read(linear.weight) if merged is None else merged
    return written.to(plan.declared[linear.weight].dtype).to(plan.config.device)


def _read(model: Model, name: str, device: str) -> Tensor:
    return model.read(name).to(device).float()
