"""One file a method: which modules it upscales, what it stores for each, and its router."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from upscale.building.skeleton import Linear, Norm, Skeleton
from upscale.building.vectors import Deltas, UpscaledLinear
from upscale.merging.merging import Merging
from upscale.runtime.layout_upscaled import ModuleLayout
from zoo import Verdict


class Method(Protocol):
    """What the plan and the build loop ask of a method's module."""

    NAME: str
    SUMMARY: str  # what it does, for the model card

    def choose(self, found: Skeleton, experts: int, config: Any) -> tuple[list[Linear], list[Norm]]:
        """The modules of a model to upscale, for so many experts."""
        ...

    def rest(self, verdict: Verdict, config: Any) -> Merging | None:
        """How the tensors of all other modules are merged; None: they stay the base's."""
        ...

    def largest(self, linear: Linear, ranks: Sequence[int], config: Any) -> ModuleLayout:
        """The largest layout that a linear can get with these ranks of the experts: what to reserve."""
        ...

    def router_bytes(self, found: Skeleton, linears: Sequence[Linear], experts: int, config: Any) -> int:
        """Size of the router's tensors, known before anything is read."""
        ...

    def upscale_linear(
        self,
        linear: Linear,
        deltas: Deltas,
        biases: Mapping[str, Tensor] | None,
        ranks: Sequence[int],
        seeds: Sequence[int],
        config: Any,
    ) -> UpscaledLinear | None:
        """The tensors and layout to store for one linear, or None to leave it plain; ranks and seeds by expert."""
        ...

    def router(
        self, found: Skeleton, modules: Mapping[str, ModuleLayout], config: Any
    ) -> tuple[dict, Mapping[str, Tensor]]:
        """The router's entry in ``config.json`` and its tensors, for the modules that were upscaled."""
        ...
