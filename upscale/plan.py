"""Plan a build from headers alone: which linears are upscaled, what is written, how large it gets."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from upscale.config import SmileConfig
from upscale.device import check_device
from upscale.errors import ConfigError, PlanError
from upscale.methods import Method
from upscale.modeling_upscaled import ModuleLayout
from upscale.skeleton import Linear, linears
from zoo import Checkpoint, TensorSpec, Verdict
from zoo.preflight import parameters


@dataclass(frozen=True)
class Plan:
    """Everything that a build will do.

    Attributes:
        base: headers of the base.
        experts: headers of the experts, by name.
        method: the upscaling method's module.
        config: its settings.
        linears: the modules to upscale, in the model's order.
        layouts: the largest layout that each can get, by module name.
        rest: tensors of the base that are not upscaled.
        declared: every tensor that may be written.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    method: Method
    config: SmileConfig
    linears: Sequence[Linear]
    layouts: Mapping[str, ModuleLayout]
    rest: Sequence[str]
    declared: Mapping[str, TensorSpec]

    @property
    def base_bytes(self) -> int:
        """Size of the base's tensors."""
        return sum(info.nbytes for info in self.base.tensors.values())

    @property
    def group_bytes(self) -> int:
        """Size of the base and all experts: what serving them one by one takes."""
        sizes = (info.nbytes for model in self.experts.values() for info in model.tensors.values())
        return self.base_bytes + sum(sizes)

    @property
    def result_bytes(self) -> int:
        """Largest size of the result's tensors."""
        return sum(spec.nbytes for spec in self.declared.values())

    @property
    def peak_bytes(self) -> int:
        """Estimated peak memory of the build's own tensors: a few copies of the largest one, and all its factors.

        A delta, its source and the base in float32 live at once; a full SVD adds two copies.
        """
        copies = 5 if self.config.exact else 3
        sizes = [copies * 4 * torch.Size(self.base.tensors[name].shape).numel() for name in self.rest]
        for linear in self.linears:
            factors = sum(torch.Size(shape).numel() for shape in self.layouts[linear.name].shapes().values())
            sizes.append(4 * (copies * linear.in_features * linear.out_features + 3 * factors))
        return max(sizes)


def make_plan(verdict: Verdict, method: Method, config: SmileConfig) -> Plan:
    """Plan the build of a group that passed preflight; reads no weights.

    Raises:
        MismatchError: the group did not pass.
        PlanError: unknown architecture, or the patterns leave nothing to upscale.
        ConfigError: the device does not exist, or ``top_k`` exceeds the number of experts.
    """
    verdict.require()
    check_device(config.device)
    if config.top_k > len(verdict.experts):
        raise ConfigError(f"--top-k {config.top_k} is more than the group's {len(verdict.experts)} experts")
    base = verdict.base
    chosen = _choose(linears(base), config)
    layouts = {
        n.name: method.largest(n.in_features, n.out_features, len(verdict.experts), n.bias is not None, config)
        for n in chosen
    }
    upscaled = {n.weight for n in chosen if not n.head or n.weight == f"{n.name}.weight"} | {n.bias for n in chosen}
    kept = parameters(base)
    rest = [name for name in kept if name not in upscaled]
    declared = {name: TensorSpec(info.shape, output_dtype(info.dtype, config)) for name, info in kept.items()}
    for n in chosen:
        dtype = declared[n.weight].dtype
        for tensor, shape in layouts[n.name].shapes().items():
            declared[f"{n.name}.experts.{tensor}"] = TensorSpec(shape, dtype)
    return Plan(base, verdict.experts, method, config, chosen, layouts, rest, declared)


def output_dtype(dtype: torch.dtype, config: SmileConfig) -> torch.dtype:
    """The format in which a tensor of the base is written."""
    return dtype if config.dtype == "auto" or not dtype.is_floating_point else getattr(torch, config.dtype)


def kind(module: str) -> str:
    """A module's name with its block left out: ``model.layers.3.mlp.up_proj`` -> ``mlp.up_proj``."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[-1]


def _choose(found: Sequence[Linear], config: SmileConfig) -> list[Linear]:
    wanted = [n for n in found if config.lm_head or not n.head]
    chosen = [
        n
        for n in wanted
        if (not config.include or any(fnmatchcase(n.name, glob) for glob in config.include))
        and not any(fnmatchcase(n.name, glob) for glob in config.exclude)
    ]
    if not wanted:
        raise PlanError("no linear layer found in the decoder blocks of this architecture")
    if not chosen:
        kinds = ", ".join(sorted({f"*.{kind(n.name)}" for n in wanted}))
        raise PlanError(f"--include and --exclude leave nothing to upscale; the model's linears are {kinds}")
    return chosen
