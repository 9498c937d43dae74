"""TIES-merging (arXiv 2306.01708) of deltas that are read one tensor at a time: trim, elect sign, disjoint mean."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_HALF = 16  # bits of a magnitude counted at once
_SOME = 1 << 22  # entries counted at once
Read = Callable[[str], Iterable[Tensor]]  # a tensor's name -> the experts' deltas, float32, in the same order each time


def thresholds(read: Read, names: Sequence[str], density: float) -> list[float]:
    """For each expert, the magnitude that the ``density`` of largest entries reach, over all tensors together.

    Exact, in two passes over the deltas and a few hundred kilobytes an expert: the bits of a float32 magnitude order
    as the number does, so the first pass counts their upper halves and the second, among the magnitudes whose upper
    half is the sought one, their lower halves.
    """
    counts = _count(read, names, lambda expert, bits: bits >> _HALF)
    keep = max(1, round(density * int(counts[0].sum())))
    upper = [_place(of_expert, keep) for of_expert in counts]

    def lower(expert: int, bits: Tensor) -> Tensor:
        return bits[bits >> _HALF == upper[expert][0]] & ((1 << _HALF) - 1)

    rest = [_place(c, rank) for c, (_, rank) in zip(_count(read, names, lower), upper, strict=True)]
    bits = torch.tensor([(high << _HALF) + low for (high, _), (low, _) in zip(upper, rest, strict=True)])
    return bits.int().view(torch.float32).tolist()


def _count(read: Read, names: Sequence[str], part: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """How often each value of ``part(expert, bits)`` occurs, for each expert, over all tensors."""
    counts: dict[int, Tensor] = {}
    for name in names:
        for expert, delta in enumerate(read(name)):
            for some in delta.flatten().split(_SOME):
                bits = some.abs().view(torch.int32)
                found = torch.bincount(part(expert, bits), minlength=1 << _HALF)
                counts[expert] = counts[expert] + found if expert in counts else found
    return list(counts.values())


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """The value of the ``rank``-th largest of what was counted, and its rank among those of the same value."""
    above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(above, rank))
    value = len(counts) - 1 - index
    return value, rank - int(above[index] - counts[value])


def elect(deltas: Iterable[Tensor], trims: Sequence[float]) -> Tensor:
    """Merge one tensor's deltas: each entry is the mean of those that have the sign of all their sum.

    Args:
        deltas: of the experts, [...] float32; entries of a magnitude below the expert's trim count as 0.
        trims: of ``thresholds``.

    Returns:
        [...]; 0 where nothing is left or the sum is exactly 0, so that no sign is elected.
    """
    sums, numbers = _signs(deltas, trims)
    total = sums[0] + sums[1]
    means = [of_sign.div_(number.clamp_min(1)) for of_sign, number in zip(sums, numbers, strict=True)]
    return torch.where(total > 0, means[0], torch.where(total < 0, means[1], 0.0))


def _signs(deltas: Iterable[Tensor], trims: Sequence[float]) -> tuple[list[Tensor], list[Tensor]]:
    """Of the positive entries that are kept, and of the negative ones, the sums and how many there are."""
    sums: list[Tensor] = []
    numbers: list[Tensor] = []
    for delta, trim in zip(deltas, trims, strict=True):
        if not sums:
            sums = [torch.zeros_like(delta) for _ in range(2)]
            numbers = [torch.zeros_like(delta, dtype=torch.int16) for _ in range(2)]
        kept = torch.where(delta.abs() >= trim, delta, 0.0)
        for total, number, part in zip(sums, numbers, (kept.clamp_min, kept.clamp_max), strict=True):
            some = part(0.0)
            total += some
            number += some != 0
    return sums, numbers
