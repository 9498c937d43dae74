"""SMILE: zero-shot sparse mixture of low-rank experts (arXiv 2408.10174, section 4)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upscale.building.linalg import LowRank, factor
from upscale.building.skeleton import Linear
from upscale.config import SmileConfig
from upscale.errors import NonFiniteError
from upscale.runtime.mixture_upscaled import ModuleLayout

NAME: str = "smile"


@dataclass(frozen=True)
class UpscaledLinear:
    """What SMILE stores for one linear.

    Attributes:
        layout: its entry in ``config.json``; rank 0 for an expert that did not change the weight.
        tensors: ``down`` [R, i], ``up`` [o, R], and ``bias`` [E, o] if any expert changed the bias; float32.
        factors: of each expert, for the report.
    """

    layout: ModuleLayout
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, LowRank]


def router(config: SmileConfig) -> dict:
    """The router's entry in ``config.json``."""
    settings = {"type": "projection", "rank": config.router_rank, "top_k": config.top_k}
    beyond = {"scope": config.scope, "granularity": config.granularity, "standardise": config.standardise}
    return settings | {name: value for name, value in beyond.items() if value not in ("linear", "token", False)}


def largest(linear: Linear, ranks: Sequence[int]) -> ModuleLayout:
    """The layout of a linear if every expert changed it: what to reserve before anything is read."""
    return ModuleLayout(linear.in_features, linear.out_features, tuple(ranks), linear.bias is not None, linear.kind)


def upscale_linear(
    linear: Linear,
    deltas: Iterable[tuple[str, Tensor]],
    bias_deltas: Mapping[str, Tensor] | None,
    ranks: Sequence[int],
    config: SmileConfig,
) -> UpscaledLinear | None:
    """Factor the experts' deltas of one linear, expert-major.

    Args:
        linear: which one.
        deltas: (expert, its delta [o, i] float32), taken one at a time.
        bias_deltas: by expert, [o] float32; None if the linear has no bias.
        ranks: of each expert, at most.
        config: exact or sketched, seed.

    Returns:
        The tensors to store; None if no expert changed the linear, which then stays a plain one.

    Raises:
        NonFiniteError: NaN or infinity in a delta.
    """
    # A sketch of its own for each expert: with one for all, flat spectra look as if they shared directions.
    factors = {
        expert: factor(delta, rank, exact=config.exact, seed=config.seed + number)
        for number, ((expert, delta), rank) in enumerate(zip(deltas, ranks, strict=True))
    }
    bias = None if bias_deltas is None else torch.stack(list(bias_deltas.values()))
    if bias is not None and not torch.isfinite(bias).all():
        raise NonFiniteError("a bias delta has NaN or infinite values")
    if bias is not None and not bias.any():
        bias = None
    kept = tuple(f.down.shape[0] for f in factors.values())
    if not any(kept) and bias is None:
        return None
    down = torch.cat([f.down for f in factors.values()])
    up = torch.cat([f.up for f in factors.values()], dim=1)
    layout = ModuleLayout(down.shape[1], up.shape[0], kept, bias is not None, linear.kind)
    tensors = {"down": down, "up": up} | ({} if bias is None else {"bias": bias})
    return UpscaledLinear(layout, tensors, factors)
