"""Ranks from spectra: how many directions each expert keeps in each module. Pure functions on squared singular values.

Common arguments, by module and expert, in the model's order:
    spectra: squared singular values of the delta, [n] float64, largest first (``upscale.spectra.Spectra.values``).
    cost_per_rank: bytes that one direction of a module takes, (in + out) features times the bytes of a number.

An expert's energy is its share of that expert's own total, the sum of its squared singular values over the modules
given, so that an expert with small deltas is not starved by one with large ones. A delta of zero needs no rank.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from upscale.errors import ConfigError

Energies = Mapping[str, Mapping[str, Tensor]]
Costs = Mapping[str, int]
Ranks = dict[str, dict[str, int]]


def parse_budget(text: str) -> float:
    """A size as a multiple of the base's: ``1.5x`` or ``1.5`` -> 1.5.

    Raises:
        ConfigError: anything else, or nothing above zero.
    """
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)x?", text.strip(), re.ASCII | re.IGNORECASE)
    if number is None or not 0 < float(number[1]) < math.inf:
        raise ConfigError(f"--budget {text}: write the size as a multiple of the base's, e.g. 1.5x")
    return float(number[1])


def allocate(spectra: Energies, cost_per_rank: Costs, *, available_bytes: int) -> Ranks:
    """Ranks of at most ``available_bytes`` in all: directions by energy per byte, until the next one does not fit.

    Ties go by module, expert and index. Within one module and expert all directions cost the same, so that the order
    takes the leading ones first; and the ranks of a smaller budget are never above those of a larger one.

    Returns:
        Rank by module and expert, 0 where nothing fits.
    """
    order = _by_density(spectra, cost_per_rank)
    fit = int(torch.searchsorted(order.cost.cumsum(0), available_bytes, right=True))
    return order.ranks(fit)


def for_energy(spectra: Energies, cost_per_rank: Costs, *, energy: float) -> Ranks:
    """The smallest ranks with which every expert keeps at least the fraction ``energy`` of its own energy.

    Smallest in bytes, to within one direction an expert: each takes its directions by energy per byte.

    Raises:
        ConfigError: ``energy`` is not above 0 and at most 1.
    """
    if not 0 < energy <= 1:
        raise ConfigError(f"--energy {energy:g} must be more than 0 and at most 1, e.g. 0.95")
    ranks: Ranks = {module: dict.fromkeys(experts, 0) for module, experts in spectra.items()}
    for expert in _experts(spectra):
        own = {module: {expert: experts[expert]} for module, experts in spectra.items()}
        order = _by_density(own, cost_per_rank)
        kept = order.share.cumsum(0)
        enough = int(torch.searchsorted(kept, energy * kept[-1])) + 1 if len(kept) else 0
        for module, found in order.ranks(enough).items():
            ranks[module] |= found
    return ranks


def within_budget(
    spectra: Energies, cost_per_rank: Costs, *, budget: float, base_bytes: int, fixed_bytes: int
) -> Ranks:
    """The ranks of a model of at most ``budget`` times ``base_bytes``, with ``fixed_bytes`` beside the directions.

    Raises:
        ConfigError: some expert would get no direction at all; says the smallest budget that gives one to each.
    """
    needed = fixed_bytes + smallest_bytes(spectra, cost_per_rank)
    total = int(Fraction(str(budget)) * base_bytes)  # the decimal that was written, not the nearest float below it
    if total < needed:
        thousandths = -(-1000 * needed // base_bytes)
        raise ConfigError(
            f"--budget {budget:g}x cannot be met: the smallest is {thousandths / 1000:.3f}x, "
            "with one direction for every expert"
        )
    return allocate(spectra, cost_per_rank, available_bytes=total - fixed_bytes)


def smallest_bytes(spectra: Energies, cost_per_rank: Costs) -> int:
    """The least ``available_bytes`` with which ``allocate`` gives every expert that changed anything a direction."""
    order = _by_density(spectra, cost_per_rank)
    expert = order.slot % max(1, len(_experts(spectra)))
    first = [int(torch.nonzero(expert == number)[0]) for number in expert.unique()]
    return int(order.cost[: max(first) + 1].sum()) if first else 0


def sizes_for(
    spectra: Energies, cost_per_rank: Costs, energies: Sequence[float] = (0.9, 0.95, 0.99)
) -> dict[float, int]:
    """Bytes of the directions with which every expert keeps each of ``energies``."""
    return {e: nbytes(for_energy(spectra, cost_per_rank, energy=e), cost_per_rank) for e in energies}


def nbytes(ranks: Mapping[str, Mapping[str, int]], cost_per_rank: Costs) -> int:
    """Bytes that the directions of ``ranks`` take."""
    return sum(cost_per_rank[module] * sum(by_expert.values()) for module, by_expert in ranks.items())


@dataclass(frozen=True)
class _Order:
    """Every direction with energy, by energy per byte.

    Attributes:
        slots: (module, expert), in the order of the spectra.
        slot: [n] int64, whose direction it is.
        share: [n] float64, its part of its expert's energy.
        cost: [n] int64, bytes.
    """

    slots: Sequence[tuple[str, str]]
    slot: Tensor
    share: Tensor
    cost: Tensor

    def ranks(self, count: int) -> Ranks:
        """What the first ``count`` directions make."""
        taken = torch.bincount(self.slot[:count], minlength=len(self.slots)).tolist()
        ranks: Ranks = {}
        for (module, expert), rank in zip(self.slots, taken, strict=True):
            ranks.setdefault(module, {})[expert] = rank
        return ranks


def _experts(spectra: Energies) -> list[str]:
    return list(next(iter(spectra.values()), {}))


def _by_density(spectra: Energies, cost_per_rank: Costs) -> _Order:
    totals = {e: sum(float(experts[e].sum()) for experts in spectra.values()) for e in _experts(spectra)}
    slots = [(module, expert) for module, experts in spectra.items() for expert in experts]
    empty = torch.zeros(0, dtype=torch.float64)  # so that no spectra at all are fine
    values = [spectra[module][expert] for module, expert in slots]
    slot = torch.repeat_interleave(torch.tensor([len(v) for v in values], dtype=torch.int64))
    share = torch.cat([empty, *(v / (totals[expert] or 1.0) for v, (_, expert) in zip(values, slots, strict=True))])
    cost = torch.tensor([cost_per_rank[module] for module, _ in slots], dtype=torch.int64)[slot]
    some = share > 0
    slot, share, cost = slot[some], share[some], cost[some]
    order = torch.sort(share / cost, descending=True, stable=True).indices
    return _Order(slots, slot[order], share[order], cost[order])
