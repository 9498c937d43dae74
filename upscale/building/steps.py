"""The steps of a build: what is read, computed and written together, and what is known of it afterwards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from upscale.building.deltas import norm_tensors, rest_tensor, upscaled_linear
from upscale.building.plan import Plan
from upscale.building.report import ModuleReport, RestReport
from upscale.building.skeleton import Linear, Norm
from upscale.device import threads
from upscale.errors import NonFiniteError
from upscale.runtime.layout_upscaled import ModuleLayout
from zoo import Model, Writer
from zoo.reading.contents import Hashes


@dataclass(frozen=True)
class Outcome:
    """What a step leaves beside its tensors.

    Attributes:
        layout: of its module, if that has experts now.
        module: what was kept of the experts' deltas in it.
        rest: of tensors that are not upscaled, what was lost.
    """

    layout: ModuleLayout | None = None
    module: ModuleReport | None = None
    rest: Sequence[RestReport] = ()

    def to_json(self) -> dict:
        """Plain values; floats keep every bit in JSON."""
        return {
            "layout": self.layout.to_config() if self.layout else None,
            "module": asdict(self.module) if self.module else None,
            "rest": [asdict(report) for report in self.rest],
        }

    @classmethod
    def from_json(cls, values: Mapping) -> "Outcome":
        """Read what ``to_json`` gave."""
        layout, module = values["layout"], values["module"]
        return cls(
            ModuleLayout.from_config(layout) if layout else None,
            ModuleReport(**module) if module else None,
            [RestReport(**report) for report in values["rest"]],
        )


@dataclass(frozen=True)
class Output:
    """Where the tensors of steps go."""

    plan: Plan
    writer: Writer
    hashes: Hashes

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor in the format that is planned for it."""
        self.writer.write(name, _cast(name, tensor, self.plan.declared[name].dtype))

    def copy(self, name: str, model: Model, own: str | None = None) -> None:
        """Write a tensor of a model, ``own`` or of the same name: byte by byte where it lies in a file as it is."""
        own = own or name
        extent = model.extent(own)
        if extent is None or model.tensors[own].dtype != self.plan.declared[name].dtype:
            self.put(name, model.read(own))
        else:
            self.writer.copy(name, extent, self.hashes.of(extent))


@dataclass(frozen=True)
class Step:
    """A part of a build that is done as a whole.

    Attributes:
        name: of the tensor or module.
        nbytes: of the base that it takes care of.
        run: does it; writes its tensors one after the other.
    """

    name: str
    nbytes: int
    run: Callable[[Output], Outcome]


def steps(plan: Plan) -> list[Step]:
    """All steps, in the order in which the tensors are written."""

    def nbytes(name: str) -> int:
        return plan.base.tensors[name].nbytes

    found = [Step(name, nbytes(name), partial(_rest, plan, name)) for name in plan.rest]
    found += [Step(norm.name, nbytes(norm.weight), partial(_norm, plan, norm)) for norm in plan.norms]
    found += [Step(linear.name, nbytes(linear.weight), partial(_linear, plan, linear)) for linear in plan.linears]
    return [*found, Step("heads", 0, partial(_heads, plan))] if plan.heads else found


def outcomes(plan: Plan, writer: Writer, hashes: Hashes) -> Iterator[tuple[Step, Outcome]]:
    """Do every step that a killed build of the same did not finish already.

    Raises:
        OutputError: see ``Writer``.
        NonFiniteError: NaN or infinity in a source, with tensor and expert.
    """
    output = Output(plan, writer, hashes)
    for step in steps(plan):
        if (record := writer.done(step.name)) is None:
            record = step.run(output).to_json()
            writer.finish(step.name, record)
        yield step, Outcome.from_json(record)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the format it is written in, which must hold it: float16 ends at 65504."""
    cast = tensor.to(dtype)
    lossy = dtype == torch.float16 and tensor.dtype != dtype and cast.numel()
    if lossy and not torch.stack(cast.aminmax()).isfinite().all():  # of two numbers: of all takes as much again
        raise NonFiniteError(f"tensor {name} has values that float16 cannot hold; use --dtype bfloat16 or float32")
    return cast


def _rest(plan: Plan, name: str, output: Output) -> Outcome:
    merged, report = rest_tensor(plan, name)
    if merged is None:
        output.copy(name, plan.base)
    else:
        output.put(name, merged)
    return Outcome(rest=[report] if any(report.norms.values()) else [])


def _norm(plan: Plan, norm: Norm, output: Output) -> Outcome:
    for name in (norm.weight, norm.bias):
        if name is not None:
            output.copy(name, plan.base)
    changes, reports = norm_tensors(plan, norm)
    for tensor, value in (changes or {}).items():
        output.put(f"{norm.name}.experts.{tensor}", value)
    return Outcome(layout=plan.layouts[norm.name] if changes else None, rest=reports)


def _linear(plan: Plan, linear: Linear, output: Output) -> Outcome:
    for name in (linear.weight, linear.bias):
        if name is not None and name not in plan.rest:
            output.copy(name, plan.base)
    with threads(1 if plan.factored(linear.weight) else None):  # factors are small; copying and hashing need the others
        upscaled = upscaled_linear(plan, linear)
        if upscaled is None:
            return Outcome()
        for tensor, value in upscaled.tensors.items():
            output.put(f"{linear.name}.experts.{tensor}", value)
    kept = upscaled.kept
    report = ModuleReport(
        linear.name,
        {e: k.rank for e, k in kept.items()},
        {e: k.norm for e, k in kept.items()},
        {e: k.left for e, k in kept.items()},
    )
    return Outcome(upscaled.layout, report)


def _heads(plan: Plan, output: Output) -> Outcome:
    for number, (expert, shapes) in enumerate(plan.heads.items()):
        for name in shapes:
            output.copy(f"heads.{number}.{name}", plan.experts[expert], name)
            if number == 0:
                output.copy(name, plan.base)
    return Outcome()
