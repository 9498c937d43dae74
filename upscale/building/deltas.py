"""What a build writes for a tensor, a norm or a linear: from the base's weights and the experts' deltas, in float32."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from upscale.building.plan import Plan
from upscale.building.report import RestReport
from upscale.building.skeleton import Linear, Norm
from upscale.building.vectors import UpscaledLinear
from upscale.errors import NonFiniteError
from zoo import Checkpoint


def _delta(plan: Plan, expert: str, name: str, origin: Tensor) -> Tensor:
    """float32 delta of an expert's tensor, on the build's device; checks that it is finite."""
    delta = _read(plan.experts[expert], name, plan.config.device).sub_(origin)
    if not float(torch.linalg.vector_norm(delta)) < float("inf"):
        who = f"expert {expert}" if origin.isfinite().all() else "base"
        raise NonFiniteError(f"{who}: tensor {name} has NaN or infinite values; is the download complete?")
    return delta


def rest_tensor(plan: Plan, name: str) -> tuple[Tensor, RestReport]:
    """The tensor to write for a parameter that is not upscaled, and what each expert loses by it."""
    source = plan.base.read(name)
    if not source.is_floating_point():
        return source, RestReport(name, {}, {})
    base = source.to(plan.config.device).float()
    norms: dict[str, float] = {}

    def deltas() -> Iterator[Tensor]:
        for expert in plan.experts:
            delta = _delta(plan, expert, name, base)
            norms[expert] = float(torch.linalg.vector_norm(delta))
            yield delta

    if plan.merging is None:
        for _ in deltas():
            pass
        return source, RestReport(name, norms, norms)
    merged = plan.merging(base, deltas())
    if not any(norms.values()):
        return source, RestReport(name, norms, norms)
    left = {e: float(torch.linalg.vector_norm(_delta(plan, e, name, merged))) for e in plan.experts}
    return merged, RestReport(name, norms, left)


def norm_tensors(plan: Plan, norm: Norm) -> tuple[dict[str, Tensor] | None, list[RestReport]]:
    """The experts' tensors of a norm, None if none changed it, and what is lost: deltas of gains of about 0."""
    experts = list(plan.experts)
    weight = _read(plan.base, norm.weight, plan.config.device)
    deltas = torch.stack([_delta(plan, expert, norm.weight, weight) for expert in experts])
    scale = deltas / (norm.offset + weight)
    held = scale.isfinite()
    scale, lost = torch.where(held, scale, 0.0), torch.where(held, 0.0, deltas)
    reports = [RestReport(norm.weight, _norms(experts, deltas), _norms(experts, lost))]
    kept = {"scale": scale}
    if norm.bias is not None:
        bias = _read(plan.base, norm.bias, plan.config.device)
        shifts = torch.stack([_delta(plan, expert, norm.bias, bias) for expert in experts])
        reports.append(RestReport(norm.bias, _norms(experts, shifts), dict.fromkeys(experts, 0.0)))
        kept["shift"] = shifts - bias * scale
    changed = [report for report in reports if any(report.norms.values())]
    return (kept if changed else None), changed


def _norms(experts: Sequence[str], rows: Tensor) -> dict[str, float]:
    return dict(zip(experts, torch.linalg.vector_norm(rows, dim=1).tolist(), strict=True))


def upscaled_linear(plan: Plan, linear: Linear) -> UpscaledLinear | None:
    """Hand the deltas of one linear to the method; None if it stays plain."""
    origin = _origin(plan, linear)

    def deltas() -> Iterator[tuple[str, Tensor]]:  # one at a time: each is as large as the linear in float32
        for expert in plan.experts:
            delta = _delta(plan, expert, linear.weight, origin)
            yield expert, delta.mT if linear.transposed else delta

    bias_deltas = None
    if linear.bias is not None:
        base = _read(plan.base, linear.bias, plan.config.device)
        bias_deltas = {expert: _delta(plan, expert, linear.bias, base) for expert in plan.experts}
    return plan.method.upscale_linear(linear, deltas(), bias_deltas, plan.layouts[linear.name].ranks, plan.config)


def _origin(plan: Plan, linear: Linear) -> Tensor:
    """The weight that is written for the base: a tied head shares its tensor with embeddings that may be averaged."""
    if linear.weight not in plan.rest:
        return _read(plan.base, linear.weight, plan.config.device)
    written = rest_tensor(plan, linear.weight)[0].to(plan.declared[linear.weight].dtype)
    return written.to(plan.config.device).float()


def _read(model: Checkpoint, name: str, device: str) -> Tensor:
    return model.read(name).to(device).float()
