"""A low-rank difference of two matrices, kept as its factors."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Product:
    """``left @ right``: a LoRA's B and A with its scaling, oriented like the tensor that it is added to.

    Attributes:
        left: [m, r] float32.
        right: [r, n] float32; r is 0 for a difference of zero.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n]."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def mT(self) -> "Product":
        """The transposed."""
        return Product(self.right.mT, self.left.mT)

    def to(self, device: str) -> "Product":
        """The same on another device."""
        return Product(self.left.to(device), self.right.to(device))

    def dense(self) -> Tensor:
        """The difference itself, [m, n]."""
        return self.left @ self.right

    def rows(self, count: int, to: Sequence[int], of: Sequence[int]) -> "Product":
        """A difference of ``count`` rows, zero but for the rows ``to``, which are this one's rows ``of``."""
        left = self.left.new_zeros(count, self.left.shape[1])
        left[list(to)] = self.left[list(of)]
        return Product(left, self.right)
