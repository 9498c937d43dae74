"""SMILE: zero-shot sparse mixture of low-rank experts (arXiv 2408.10174, section 4)."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from upscale.building.skeleton import Linear, Norm, Skeleton, kind
from upscale.building.vectors import Deltas, UpscaledLinear, low_rank
from upscale.config import SmileConfig
from upscale.errors import ConfigError, PlanError
from upscale.merging.merging import Merging, merging
from upscale.runtime.layout_upscaled import ModuleLayout
from upscale.runtime.router_upscaled import in_block
from zoo import Verdict

NAME: str = "smile"
SUMMARY: str = (
    "every linear that a fine-tune\nchanged keeps the change as a low-rank expert, and a router chooses among them."
)


def choose(found: Skeleton, experts: int, config: SmileConfig) -> tuple[list[Linear], list[Norm]]:
    """The linears, and with ``rest`` "experts" embeddings, head and norms too, that the patterns leave.

    Raises:
        PlanError: the patterns leave nothing.
        ConfigError: ``top_k`` exceeds the number of experts.
    """
    if config.top_k > experts:
        raise ConfigError(f"--top-k {config.top_k} is more than the group's {experts} experts")
    everything = config.rest == "experts"
    linears = [n for n in found.linears if everything or config.lm_head or not n.head]
    if not linears:
        raise PlanError("no linear layer found in the blocks of this architecture")
    wanted = [*found.embeddings, *linears] if everything else linears
    chosen = [n for n in wanted if _matches(n.name, config)]
    if not chosen:
        kinds = ", ".join(sorted({f"*.{kind(n.name)}" if in_block(n.name) else n.name for n in wanted}))
        raise PlanError(f"--include and --exclude leave nothing to upscale; the model's modules are {kinds}")
    return chosen, [n for n in found.norms if everything and _matches(n.name, config)]


def _matches(name: str, config: SmileConfig) -> bool:
    included = not config.include or any(fnmatchcase(name, glob) for glob in config.include)
    return included and not any(fnmatchcase(name, glob) for glob in config.exclude)


def rest(verdict: Verdict, config: SmileConfig) -> Merging | None:
    """The average, or the base's own."""
    return merging(verdict, "average") if config.rest == "average" else None


def router(
    found: Skeleton, modules: Mapping[str, ModuleLayout], config: SmileConfig
) -> tuple[dict, Mapping[str, Tensor]]:
    """The projection router, which needs no tensors."""
    settings = {"type": "projection", "rank": config.router_rank, "top_k": config.top_k}
    beyond = {"scope": config.scope, "granularity": config.granularity, "standardise": config.standardise}
    return settings | {name: value for name, value in beyond.items() if value not in ("linear", "token", False)}, {}


def router_bytes(found: Skeleton, linears: Sequence[Linear], experts: int, config: SmileConfig) -> int:
    """None."""
    return 0


def largest(linear: Linear, ranks: Sequence[int], config: SmileConfig) -> ModuleLayout:
    """The layout of a linear if every expert changed it."""
    return ModuleLayout(linear.in_features, linear.out_features, tuple(ranks), linear.bias is not None, linear.kind)


def upscale_linear(
    linear: Linear,
    deltas: Deltas,
    biases: Mapping[str, Tensor] | None,
    ranks: Sequence[int],
    seeds: Sequence[int],
    config: SmileConfig,
) -> UpscaledLinear | None:
    """Low-rank experts; None if no expert changed the linear, which then stays a plain one."""
    upscaled = low_rank(linear, deltas, biases, ranks, seeds, exact=config.exact)
    return upscaled if any(upscaled.layout.ranks) or upscaled.layout.bias else None
