"""WEMoE: weight-ensembling mixture of experts (arXiv 2402.00433), E-WEMoE (2410.21804) and rank-one WEMoE.

Everything outside the MLPs is merged; the MLPs keep the base's weights and every expert's task vector, which a router
on the MLP's input adds up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from upscale.building.skeleton import Linear, Norm, Skeleton, kind
from upscale.building.vectors import Deltas, UpscaledLinear, dense, entries_kept, low_rank, sparse
from upscale.config import WemoeConfig
from upscale.errors import PlanError
from upscale.merging.merging import Merging, merging
from upscale.runtime.dense_upscaled import longest
from upscale.runtime.ensembling_upscaled import EnsemblingRouter
from upscale.runtime.layout_upscaled import DENSE, LOW_RANK, SPARSE, ModuleLayout
from upscale.runtime.router_upscaled import in_block
from zoo import Verdict

NAME: str = "wemoe"
SUMMARY: str = (
    "everything is merged but the MLPs,\nwhich keep each fine-tune's task vector; routers weigh them for each input."
)
SCALING = 0.3  # the paper's, for eight tasks
SPREAD = 0.01  # standard deviation of the routers' first weights
# Where the MLPs of transformers' models are; attention has output projections of the same names.
MLPS = (
    *("*.mlp.*", "*.ffn.*", "*.feed_forward.*", "*.feedforward.*", "*.DenseReluDense.*", "*.fc1", "*.fc2"),
    *("*.intermediate.dense", "*.output.dense", "*.dense_h_to_4h", "*.dense_4h_to_h", "*.fc_in", "*.fc_out"),
)
_ATTENTION = ("attention", "attn", "Attention")


def choose(found: Skeleton, experts: int, config: WemoeConfig) -> tuple[list[Linear], list[Norm]]:
    """The linears of the blocks' MLPs.

    Raises:
        PlanError: there are none; says what was looked for.
    """
    patterns = config.mlp_pattern or MLPS
    inside = [n for n in found.linears if in_block(n.name)]
    chosen = [n for n in inside if any(fnmatchcase(n.name, glob) for glob in patterns)]
    if not config.mlp_pattern:
        chosen = [n for n in chosen if not any(word in part for part in n.name.split(".") for word in _ATTENTION)]
    if not chosen:
        kinds = ", ".join(sorted({f"*.{kind(n.name)}" for n in inside}))
        raise PlanError(
            f"no MLP found, looked for linears named {', '.join(patterns)}; "
            f"name them by --mlp-pattern: the model's linears are {kinds}"
        )
    if config.vectors == "rank-one":  # as published: a bias has no rank, so it is merged like the rest
        chosen = [replace(n, bias=None) for n in chosen]
    return chosen, []


def rest(verdict: Verdict, config: WemoeConfig) -> Merging:
    """The merge of everything outside the MLPs."""
    return merging(verdict, config.merge, config.scaling if config.scaling is not None else _default(config))


def _default(config: WemoeConfig) -> float | None:
    return SCALING if config.merge == "task-arithmetic" else None


def scaling(experts: int, config: WemoeConfig) -> float:
    """The weight of each task vector in the MLPs before adaptation."""
    return config.scaling if config.scaling is not None else 1 / experts if config.merge == "average" else SCALING


def router(
    found: Skeleton, modules: Mapping[str, ModuleLayout], config: WemoeConfig
) -> tuple[dict, Mapping[str, Tensor]]:
    """The routers as they are before adaptation, when every task vector has the weight ``scaling``.

    As published, but that the last layer starts at zero instead of N(0, 0.01^2): so the model is the merge exactly.
    """
    settings = _settings(found, modules, config)
    made = EnsemblingRouter(modules, **settings)
    experts = len(next(iter(modules.values())).ranks)
    generator = torch.Generator().manual_seed(config.seed)
    values = {}
    for name, parameter in made.named_parameters():
        if config.router_depth == 2 and name.split(".")[-2] == "0":
            drawn = SPREAD * torch.randn(parameter.shape, generator=generator)
            values[name] = drawn if parameter.ndim == 2 else torch.zeros_like(parameter)
        elif parameter.ndim == 2:
            values[name] = torch.zeros_like(parameter)
        else:
            values[name] = torch.full_like(parameter, scaling(experts, config))
    return {"type": "ensembling", **settings}, values


def _settings(found: Skeleton, modules: Mapping[str, ModuleLayout], config: WemoeConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"depth": config.router_depth, "shared": config.shared_router}
    if found.whole:
        settings["whole"] = list(found.whole)
    if config.vectors == "rank-one":
        settings["terms"] = max(rank for module in modules.values() for rank in module.ranks)
    return settings


def router_bytes(found: Skeleton, linears: Sequence[Linear], experts: int, config: WemoeConfig) -> int:
    """Of the networks, in float32."""
    modules = {
        n.name: largest(n, (min(config.rank, n.in_features, n.out_features),) * experts, config) for n in linears
    }
    with torch.device("meta"):
        made = EnsemblingRouter(modules, **_settings(found, modules, config))
    return sum(4 * parameter.numel() for parameter in made.parameters())


def largest(linear: Linear, ranks: Sequence[int], config: WemoeConfig) -> ModuleLayout:
    """The layout of a linear if every expert changed its bias, and positions take as many bytes as they can."""
    i, o, bias = linear.in_features, linear.out_features, linear.bias is not None
    if config.vectors in (LOW_RANK, "rank-one"):
        return ModuleLayout(i, o, tuple(ranks), bias, linear.kind)
    if config.vectors == DENSE:
        return ModuleLayout(i, o, (0,) * len(ranks), bias, linear.kind, vectors=DENSE)
    kept = entries_kept(linear, config.density)
    stored = (kept, longest(i * o, kept))
    return ModuleLayout(i, o, (0,) * len(ranks), bias, linear.kind, vectors=SPARSE, stored=stored)


def upscale_linear(
    linear: Linear,
    deltas: Deltas,
    biases: Mapping[str, Tensor] | None,
    ranks: Sequence[int],
    seeds: Sequence[int],
    config: WemoeConfig,
) -> UpscaledLinear:
    """The task vectors in the form asked for; of all linears, since the first of an MLP is where its router looks."""
    if config.vectors == DENSE:
        return dense(linear, deltas, biases)
    if config.vectors == SPARSE:
        return sparse(linear, deltas, biases, config.density)
    return low_rank(linear, deltas, biases, ranks, seeds, exact=config.exact)
