"""Plan a build from headers alone: which linears are upscaled, what is written, how large it gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from upscale.building import memory
from upscale.building.changes import Changes, Compared
from upscale.building.methods import Method
from upscale.building.overrides import Overrides, settings_of
from upscale.building.ranks import Progress, choose_ranks
from upscale.building.skeleton import Linear, Norm, Skeleton, skeleton
from upscale.config import BuildConfig
from upscale.device import check_device
from upscale.merging.merging import Merging
from upscale.runtime.layout_upscaled import EMBEDDING, NORM, ModuleLayout, stored_dtype
from zoo import Model, TensorSpec, Verdict
from zoo.preflight import parameters
from zoo.reading.heads import head


@dataclass(frozen=True)
class Plan:
    """Everything that a build will do.

    Attributes:
        base: headers of the base.
        experts: headers of the experts, by name.
        changes: what each expert changes of the base, by name.
        method: the upscaling method's module.
        config: its settings.
        settings: of each expert, with the seed of its sketches.
        linears: the linears to upscale, the embedding first, in the model's order.
        norms: the norms whose deltas are kept.
        tied: the embedding that lends the output head its factors, by the head's name.
        layouts: the largest layout that each can get, by module name.
        rest: tensors of the base that are not upscaled.
        merging: how they are merged; None: they stay the base's.
        skeleton: the base's structure.
        router_bytes: size of the router's tensors.
        heads: of a classifier, shapes of the tensors of each expert's head.
        declared: every tensor that may be written, as large as the settings allow.
        result_bytes: largest size of the result's tensors, by what is known of the experts.
    """

    base: Model
    experts: Mapping[str, Model]
    changes: Mapping[str, Changes]
    method: Method
    config: BuildConfig
    settings: Mapping[str, BuildConfig]
    linears: Sequence[Linear]
    norms: Sequence[Norm]
    tied: Mapping[str, str]
    layouts: Mapping[str, ModuleLayout]
    rest: Sequence[str]
    merging: Merging | None
    skeleton: Skeleton
    router_bytes: int
    heads: Mapping[str, Mapping[str, tuple[int, ...]]]
    declared: Mapping[str, TensorSpec]
    result_bytes: int

    @property
    def base_bytes(self) -> int:
        """Size of the base's tensors."""
        return self.base.nbytes

    @property
    def expert_bytes(self) -> Mapping[str, int]:
        """Sizes of the experts' own tensors."""
        return {name: model.nbytes for name, model in self.experts.items()}

    @property
    def group_bytes(self) -> int:
        """Size of the base and all experts: what serving them one by one takes."""
        return self.base_bytes + sum(self.expert_bytes.values())

    @property
    def working_bytes(self) -> dict[str, int]:
        """Memory that each upscaled linear and each tensor of the rest takes while it is worked on."""
        merge = self.merging.method if self.merging else None
        sizes = {}
        for name in self.rest:
            count = torch.Size(self.base.tensors[name].shape).numel()
            sizes[name] = memory.of_rest(count, merge=merge, factored=self.factored(name), **self._itemsizes(name))
        for linear in self.linears:
            sizes[linear.name] = memory.of_linear(
                linear,
                self.layouts[linear.name],
                exact=self.config.exact,
                factored=self.factored(linear.weight),
                **self._itemsizes(linear.weight),
            )
        return sizes

    def factored(self, tensor: str) -> bool:
        """Whether the deltas of all experts are stored as factors or zero, so that none is ever as large as it."""
        return not self.is_merged(tensor) and all(
            model.known_rank(tensor) is not None for model in self.experts.values()
        )

    def is_merged(self, tensor: str) -> bool:
        """Whether what is written for a tensor of the base is not the base's own."""
        return self.merging is not None and tensor in self.rest

    def _itemsizes(self, tensor: str) -> dict[str, int]:
        """Bytes of a number of a tensor: in the base, in the experts at most, and as the base's has to be cast."""
        own, written = self.base.tensors[tensor].dtype, self.declared[tensor].dtype
        experts = (model.tensors[tensor].dtype.itemsize for model in self.experts.values() if tensor in model.tensors)
        return {"base": own.itemsize, "expert": max(experts), "cast": written.itemsize if written != own else 0}

    @property
    def peak_bytes(self) -> int:
        """Expected peak memory of this process if it builds now, its libraries among it."""
        return memory.peak(self.working_bytes)


def make_plan(
    verdict: Verdict,
    method: Method,
    config: BuildConfig,
    progress: Progress | None = None,
    overrides: Overrides | None = None,
    stored: Mapping[str, Changes] | None = None,
) -> Plan:
    """Plan the build of a group that passed preflight; reads no weights, unless ranks follow the spectra.

    Args:
        verdict: of ``zoo.check``.
        method: the upscaling method's module.
        config: its settings.
        progress: called as spectra are computed, with (done, in all, module).
        overrides: by expert, what differs from ``config``.
        stored: by expert, the changes that are known without comparing its weights.

    Raises:
        MismatchError: the group did not pass.
        PlanError: unknown architecture, or the patterns leave nothing to upscale.
        ConfigError: the device does not exist, ``top_k`` exceeds the number of experts, the budget cannot be met, or
            the build needs more memory than ``max_memory``.
    """
    verdict.require()
    check_device(config.device)
    base = verdict.base
    found = skeleton(base)
    chosen, norms = method.choose(found, len(verdict.experts), config)
    embeddings = {n.weight: n.name for n in chosen if n.kind == EMBEDDING}
    tied = {n.name: embeddings[n.weight] for n in chosen if n.head and n.bias is None and n.weight in embeddings}
    chosen = [n for n in chosen if n.name not in tied]
    shared = {n.weight for n in found.embeddings}  # a tied head that has factors of its own leaves them to the rest
    upscaled = {n.weight for n in chosen if not n.head or n.weight not in shared} | {n.bias for n in chosen}
    kept = dict(sorted(parameters(base).items()))  # the same bytes however the base is sharded
    of_norms = {tensor for norm in norms for tensor in (norm.weight, norm.bias)}
    own = head(base)
    rest = [name for name in kept if name not in upscaled | of_norms | own.keys()]
    declared = {name: TensorSpec(info.shape, output_dtype(info.dtype, config)) for name, info in kept.items()}
    experts = len(verdict.experts)
    heads = {name: {t: info.shape for t, info in head(model).items()} for name, model in verdict.experts.items() if own}
    for number, shapes in enumerate(heads.values()):
        declared |= {f"heads.{number}.{t}": TensorSpec(shape, declared[t].dtype) for t, shape in shapes.items()}
    layouts = {n.name: ModuleLayout(n.width, n.width, (0,) * experts, n.bias is not None, NORM) for n in norms}
    weights = {n.name: n.weight for n in [*norms, *chosen]}
    declared |= _of_experts(declared, layouts, weights)
    router = method.router_bytes(found, chosen, experts, config)
    fixed = sum(spec.nbytes for spec in declared.values()) + router
    settings = settings_of(verdict.experts, config, overrides or {})
    if not config.one_rank:
        memory.require(config.max_memory, _spectra_bytes(verdict, chosen))
    merging = method.rest(verdict, config)
    # Of a linear whose written weight is a merge, the deltas are of full rank whatever they are from the base.
    merged = {n.name for n in chosen if merging is not None and n.weight in rest}
    compared = {name: Compared(name, model, base, config.device) for name, model in verdict.experts.items()}
    changes: dict[str, Changes] = {**compared, **(stored or {})}
    ranks = choose_ranks(verdict, changes, chosen, declared, fixed, settings, progress)
    # Arranged by the settings alone, which are the same when experts are added later.
    arranged = {n.name: method.largest(n, ranks[n.name], config) for n in chosen}
    ranks |= {n.name: _known(ranks[n.name], n, verdict) for n in chosen if n.name not in merged}
    of_linears = {n.name: method.largest(n, ranks[n.name], config) for n in chosen}
    plan = Plan(
        base=base,
        experts=verdict.experts,
        changes=changes,
        method=method,
        config=config,
        settings=settings,
        linears=chosen,
        norms=norms,
        tied=tied,
        layouts=layouts | of_linears,
        rest=rest,
        merging=merging,
        skeleton=found,
        router_bytes=router,
        heads=heads,
        declared=declared | _of_experts(declared, arranged, weights),
        result_bytes=fixed + sum(spec.nbytes for spec in _of_experts(declared, of_linears, weights).values()),
    )
    memory.require(config.max_memory, plan.working_bytes)
    return plan


def _known(ranks: Sequence[int], linear: Linear, verdict: Verdict) -> tuple[int, ...]:
    """The experts' ranks in a linear, no larger than the headers say that their deltas can have."""
    known = (model.known_rank(linear.weight) for model in verdict.experts.values())
    return tuple(rank if most is None else min(rank, most) for rank, most in zip(ranks, known, strict=True))


def _spectra_bytes(verdict: Verdict, linears: Sequence[Linear]) -> dict[str, int]:
    """Memory that the spectrum of each linear takes."""
    return {
        n.name: memory.of_spectrum(
            n.in_features * n.out_features,
            min(n.in_features, n.out_features),
            expert=max(model.tensors[n.weight].dtype.itemsize for model in verdict.experts.values()),
        )
        for n in linears
    }


def _of_experts(
    declared: Mapping[str, TensorSpec], layouts: Mapping[str, ModuleLayout], weights: Mapping[str, str]
) -> dict[str, TensorSpec]:
    """The experts' tensors of ``layouts``, in the format of the weight that each belongs to."""
    return {
        f"{name}.experts.{tensor}": TensorSpec(shape, stored_dtype(tensor, declared[weights[name]].dtype))
        for name, layout in layouts.items()
        for tensor, shape in layout.shapes().items()
    }


def output_dtype(dtype: torch.dtype, config: BuildConfig) -> torch.dtype:
    """The format in which a tensor of the base is written."""
    return dtype if config.dtype == "auto" or not dtype.is_floating_point else getattr(torch, config.dtype)
