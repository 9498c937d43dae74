"""Ranks from spectra: how many directions each expert keeps in each module. Pure functions.

The energy of a direction is its share of the squared norm of its own delta, one expert's change of one module; so no
expert or module starves beside one with larger deltas. In an output head it is ``HEAD`` times the share of what the
first direction leaves: that one moves all logits nearly alike, which changes no probability, and is most of the norm.

A budget keeps the directions of the largest energy, whatever their module: the most energy per byte, where a delta
weighs as many bytes as one of its directions takes. An energy for all is what no delta keeps less of.

This was measured on small Llamas cut to 1.15 to 3 times the base: groups of 3 to 8 full fine-tunes or LoRA experts,
output heads tied or not. With the right expert it answers better than one rank for all, in each group on average. The
following are worse: squared singular values as they are, divided by the base's squared norm or the delta's norm, and
shares for each byte or of singular values not squared; so is treating the head like any other module.

Common arguments, by module and expert, in the model's order:
    energies: of directions, [n] float64, largest first; of ``energies_of``.
    cost_per_rank: bytes that one direction of a module takes, (in + out) features times the bytes of a number.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from upscale.errors import ConfigError

HEAD = 2.0  # 1 to 4 are about as good

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


def energies_of(spectra: Energies, heads: Collection[str]) -> Energies:
    """Energies of directions: a delta's add up to 1, a zero delta's to 0, and those beyond a head's first to ``HEAD``.

    Args:
        spectra: by module and expert, squared singular values of the delta, [n] float64, largest first
            (``upscale.building.spectra.Spectra.values``).
        heads: modules that are output heads.
    """

    def energies(values: Tensor, head: bool) -> Tensor:
        beyond = float(values[1:].sum()) if head else 0.0
        return values / (beyond / HEAD or float(values.sum()) or 1.0)

    return {m: {e: energies(values, m in heads) for e, values in experts.items()} for m, experts in spectra.items()}


def allocate(energies: Energies, cost_per_rank: Costs, *, available_bytes: int) -> Ranks:
    """Ranks of at most ``available_bytes`` in all: directions by their energy, until the next one does not fit.

    Ties go by module, expert and index. So a delta's leading directions come first, and the ranks of a smaller budget
    are never above those of a larger one.

    Returns:
        Rank by module and expert, 0 where nothing fits.
    """
    order = _by_energy(energies, cost_per_rank)
    fit = int(torch.searchsorted(order.cost.cumsum(0), available_bytes, right=True))
    return order.ranks(fit)


def for_energy(energies: Energies, *, energy: float) -> Ranks:
    """The smallest ranks with which no delta loses more energy than ``1 - energy``.

    So every module and expert keeps at least the fraction ``energy`` of its delta's squared norm. An output head keeps
    more: it loses at most ``(1 - energy) / HEAD`` of what its first direction leaves.

    Raises:
        ConfigError: ``energy`` is not above 0 and at most 1.
    """
    if not 0 < energy <= 1:
        raise ConfigError(f"--energy {energy:g} must be more than 0 and at most 1, e.g. 0.95")

    def rank(values: Tensor) -> int:
        lost = values.flip(0).cumsum(0).flip(0)  # with the directions from each one on
        return int((lost > 1 - energy).sum())

    return {module: {e: rank(values) for e, values in experts.items()} for module, experts in energies.items()}


def within_budget(
    energies: Energies, cost_per_rank: Costs, *, budget: float, base_bytes: int, fixed_bytes: int
) -> Ranks:
    """The ranks of a model of at most ``budget`` times ``base_bytes``, with ``fixed_bytes`` beside the directions.

    Raises:
        ConfigError: some expert would get no direction at all; says the smallest budget that gives one to each.
    """
    needed = fixed_bytes + smallest_bytes(energies, cost_per_rank)
    total = int(Fraction(str(budget)) * base_bytes)  # the decimal that was written, not the nearest float below it
    if total < needed:
        thousandths = -(-1000 * needed // base_bytes)
        raise ConfigError(
            f"--budget {budget:g}x cannot be met: the smallest is {thousandths / 1000:.3f}x, "
            "with one direction for every expert"
        )
    return allocate(energies, cost_per_rank, available_bytes=total - fixed_bytes)


def smallest_bytes(energies: Energies, cost_per_rank: Costs) -> int:
    """The least ``available_bytes`` with which ``allocate`` gives every expert that changed anything a direction."""
    order = _by_energy(energies, cost_per_rank)
    experts = len(next(iter(energies.values()), {}))
    expert = order.slot % max(1, experts)
    first = [int(torch.nonzero(expert == number)[0]) for number in expert.unique()]
    return int(order.cost[: max(first) + 1].sum()) if first else 0


def nbytes(ranks: Mapping[str, Mapping[str, int]], cost_per_rank: Costs) -> int:
    """Bytes that the directions of ``ranks`` take."""
    return sum(cost_per_rank[module] * sum(by_expert.values()) for module, by_expert in ranks.items())


@dataclass(frozen=True)
class _Order:
    """Every direction with energy, the largest first.

    Attributes:
        slots: (module, expert), in the order of the energies.
        slot: [n] int64, whose direction it is.
        cost: [n] int64, bytes.
    """

    slots: Sequence[tuple[str, str]]
    slot: Tensor
    cost: Tensor

    def ranks(self, count: int) -> Ranks:
        """What the first ``count`` directions make."""
        taken = torch.bincount(self.slot[:count], minlength=len(self.slots)).tolist()
        ranks: Ranks = {}
        for (module, expert), rank in zip(self.slots, taken, strict=True):
            ranks.setdefault(module, {})[expert] = rank
        return ranks


def _by_energy(energies: Energies, cost_per_rank: Costs) -> _Order:
    slots = [(module, expert) for module, experts in energies.items() for expert in experts]
    values = [energies[module][expert] for module, expert in slots]
    slot = torch.repeat_interleave(torch.tensor([len(v) for v in values], dtype=torch.int64))
    energy = torch.cat([torch.zeros(0, dtype=torch.float64), *values])  # no spectra at all are fine
    order = torch.sort(energy, descending=True, stable=True).indices[: int((energy > 0).sum())]
    cost = torch.tensor([cost_per_rank[module] for module, _ in slots], dtype=torch.int64)
    return _Order(slots, slot[order], cost[slot[order]])
