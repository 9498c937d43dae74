"""One file a method: what to store for one linear, given the experts' deltas of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from upscale.building.skeleton import Linear
from upscale.runtime.mixture_upscaled import ModuleLayout


class Method(Protocol):
    """What the plan and the build loop ask of a method's module."""

    NAME: str

    def router(self, config: Any) -> dict:
        """The router's entry in ``config.json``."""
        ...

    def largest(self, linear: Linear, ranks: Sequence[int]) -> ModuleLayout:
        """The largest layout that a linear can get with these ranks of the experts."""
        ...

    def upscale_linear(
        self,
        linear: Linear,
        deltas: Iterable[tuple[str, Tensor]],
        bias_deltas: Mapping[str, Tensor] | None,
        ranks: Sequence[int],
        config: Any,
    ) -> Any:
        """The tensors and layout to store for one linear, or None to leave it plain."""
        ...
