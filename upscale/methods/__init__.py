"""One file a method: what to store for one linear, given the experts' deltas of it."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from upscale.modeling_upscaled import ModuleLayout


class Method(Protocol):
    """What the plan and the build loop ask of a method's module."""

    NAME: str

    def router(self, config: Any) -> dict:
        """The router's entry in ``config.json``."""
        ...

    def largest(self, in_features: int, out_features: int, experts: int, bias: bool, config: Any) -> ModuleLayout:
        """The largest layout that a linear of this shape can get."""
        ...

    def upscale_linear(
        self, deltas: Iterable[tuple[str, Tensor]], bias_deltas: Mapping[str, Tensor] | None, config: Any
    ) -> Any:
        """The tensors and layout to store for one linear, or None to leave it plain."""
        ...
