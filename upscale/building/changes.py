"""What an expert changes of the base: told by its weights, or by an upscaled checkpoint that holds it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from upscale.building.linalg import LowRank, norm_of
from upscale.building.skeleton import Linear, Norm
from upscale.errors import NonFiniteError
from zoo import Model
from zoo.reading.product import Product

_ROWS = 1024  # of a matrix, taken at once


@dataclass(frozen=True)
class NormChange:
    """What an expert does to a norm.

    Attributes:
        scale: [d] float32, of its output.
        shift: [d] float32, zero for a norm without a bias.
        weight: norm of the weight's delta, and of what is lost of it.
        bias: the same of the bias's.
    """

    scale: Tensor
    shift: Tensor
    weight: tuple[float, float]
    bias: tuple[float, float]


class Changes(Protocol):
    """What an expert changes of the base, in float32; ``Compared`` and ``StoredExpert`` tell it."""

    def rank(self, linear: Linear) -> int | None:
        """The rank of its factors of a linear; None if they are yet to be found."""
        ...

    def of_linear(self, linear: Linear, origin: Callable[[], Tensor], *, merged: bool) -> Tensor | Product | LowRank:
        """Its delta of a linear [o, i]: the very factors where they are known.

        Args:
            linear: which one.
            origin: gives the weight that is written for the base.
            merged: that one is not the base's own.
        """
        ...

    def of_bias(self, linear: Linear) -> Tensor:
        """Its delta of a linear's bias [o]."""
        ...

    def of_norm(self, norm: Norm) -> NormChange:
        """Its changes of a norm."""
        ...

    def of_rest(self, name: str, origin: Callable[[], Tensor]) -> float:
        """Norm of its delta of a tensor that is no module's; ``origin`` gives the base's."""
        ...


@dataclass(frozen=True)
class Compared:
    """An expert's weights against the base's.

    Attributes:
        expert: its name.
        model: its weights.
        base: the base's.
        device: on which they are compared.
    """

    expert: str
    model: Model
    base: Model
    device: str

    def rank(self, linear: Linear) -> None:
        """See Changes."""
        return

    def of_linear(self, linear: Linear, origin: Callable[[], Tensor], *, merged: bool) -> Tensor | Product:
        """See Changes."""
        product = None if merged else self.model.product(linear.weight)
        change = self.delta(linear.weight, origin()) if product is None else product.to(self.device)
        return change.mT if linear.transposed else change

    def of_bias(self, linear: Linear) -> Tensor:
        """See Changes."""
        assert linear.bias is not None
        return self.delta(linear.bias, self._of_base(linear.bias))

    def of_norm(self, norm: Norm) -> NormChange:
        """See Changes; deltas of gains of about 0 are lost."""
        weight = self._of_base(norm.weight)
        delta = self.delta(norm.weight, weight)
        scale = delta / (norm.offset + weight)
        held = scale.isfinite()
        scale, lost = torch.where(held, scale, 0.0), torch.where(held, 0.0, delta)
        norms = float(torch.linalg.vector_norm(delta)), float(torch.linalg.vector_norm(lost))
        if norm.bias is None:
            return NormChange(scale, torch.zeros_like(scale), norms, (0.0, 0.0))
        bias = self._of_base(norm.bias)
        moved = self.delta(norm.bias, bias)
        return NormChange(scale, moved - bias * scale, norms, (float(torch.linalg.vector_norm(moved)), 0.0))

    def of_rest(self, name: str, origin: Callable[[], Tensor]) -> float:
        """See Changes."""
        product = self.model.product(name)
        return norm_of(self.delta(name, origin()) if product is None else product)

    def delta(self, name: str, origin: Tensor) -> Tensor:
        """float32 delta of a tensor, on the device; ``origin``, of any format, is never there in float32 as a whole.

        Raises:
            NonFiniteError: NaN or infinity in it; says whose.
        """
        delta = self.model.read(name).to(self.device).float()
        pieces = zip(torch.atleast_1d(delta).split(_ROWS), torch.atleast_1d(origin).split(_ROWS), strict=True)
        for rows, taken in pieces:
            rows.sub_(taken.float())
        if not float(torch.linalg.vector_norm(delta)) < float("inf"):
            who = f"expert {self.expert}" if origin.isfinite().all() else "base"
            raise NonFiniteError(f"{who}: tensor {name} has NaN or infinite values; is the download complete?")
        return delta

    def _of_base(self, name: str) -> Tensor:
        return self.base.read(name).to(self.device).float()
