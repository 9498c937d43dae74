"""Experts of a linear whose deltas are kept whole, or their largest entries alone (E-WEMoE).

Symbols: ``T`` tokens, ``E`` experts, ``i``/``o`` in/out features, ``n`` = o * i entries of a delta, ``m`` of them kept.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .mixture_upscaled import Experts

_SKIP = 15  # a step of so many entries at which nothing is kept


def weighted(x: Tensor, w: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """``sum_e w_e (delta_e x + bias_e)``: x [..., i], w [..., E], delta [E, o, i], bias [E, o] -> [..., o]."""
    w = w.to(x.dtype)
    y = sum(w[..., e : e + 1] * F.linear(x, of_expert) for e, of_expert in enumerate(delta))
    return y if bias is None else y + w @ bias  # type: ignore[return-value]


class DenseExperts(Experts):
    """Task vectors ``delta`` [E, o, i] and, if any bias changed, ``bias`` [E, o]."""

    delta: Tensor
    bias: Tensor | None

    def forward(self, args: tuple, y: Tensor) -> Tensor:
        """Add the experts' part to the base's output ``y`` [..., o] for its input ``args[0]`` [..., i]."""
        w = self.routing.weights(self.name, y, args[0], None, self.ranks)
        return y + weighted(args[0], w, self.delta, self.bias)


class SparseExperts(Experts):
    """Task vectors of which m entries are stored: ``values`` [E, m] and their positions, ``gaps`` [E, bytes] uint8.

    They are small on disk; to run they are unpacked, once.
    """

    values: Tensor
    gaps: Tensor
    delta: Tensor
    bias: Tensor | None

    def forward(self, args: tuple, y: Tensor) -> Tensor:
        """Add the experts' part to the base's output ``y`` [..., o] for its input ``args[0]`` [..., i]."""
        x = args[0]
        if not hasattr(self, "delta"):
            self.register_buffer("delta", unpack(self.values, self.gaps, (y.shape[-1], x.shape[-1])), persistent=False)
        w = self.routing.weights(self.name, y, x, None, self.ranks)
        return y + weighted(x, w, self.delta, self.bias)


def pack(delta: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The ``kept`` entries of largest magnitude of ``delta`` [o, i], of equal ones the first, and where they are.

    Positions are stored as steps from one kept entry to the next, row by row, half a byte each: 0 to 14 stands for
    1 to 15 entries on, and 15 for a step of 15 at which nothing is kept. Of a tenth of the entries that takes less
    than a bit for each entry of the delta.

    Returns:
        Values [kept] and steps [bytes] uint8.
    """
    flat = delta.flatten()
    order = flat.abs().sort(descending=True, stable=True).indices[:kept]
    position = order.sort().values
    step = torch.diff(position, prepend=position.new_tensor([-1])) - 1
    skips = step // _SKIP
    place = torch.arange(kept, device=delta.device) + skips.cumsum(0)
    length = kept + int(skips.sum())
    halves = torch.full((length + length % 2,), _SKIP, dtype=torch.uint8, device=delta.device)
    halves[place] = (step % _SKIP).to(torch.uint8)
    high, low = halves.view(-1, 2).unbind(1)
    return flat[position], high * 16 + low


@torch.inference_mode(False)  # or training could not use what a first pass under it made
@torch.no_grad()
def unpack(values: Tensor, gaps: Tensor, shape: tuple[int, int]) -> Tensor:
    """The deltas [E, o, i] of ``values`` [E, m] and ``gaps`` [E, bytes]; see ``pack``."""
    delta = values.new_zeros(len(values), shape[0] * shape[1])
    for of_expert, kept, packed in zip(delta, values, gaps, strict=True):
        halves = torch.stack([packed // 16, packed % 16], dim=1).flatten()
        here = halves < _SKIP
        step = torch.where(here, halves.long() + 1, _SKIP)
        of_expert[step.cumsum(0)[here] - 1] = kept
    return delta.unflatten(1, shape)


def longest(entries: int, kept: int) -> int:
    """The most bytes that the steps of ``kept`` of so many entries take."""
    return (kept + entries // _SKIP + 1) // 2 + 1
