"""The rank of every module and expert: one for all, or from the spectra under a budget or for an energy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from upscale.building.budget import energies_of, for_energy, parse_budget, within_budget
from upscale.building.changes import Changes
from upscale.building.skeleton import Linear, skeleton
from upscale.building.spectra import spectra
from upscale.config import BuildConfig
from zoo import Model, TensorSpec, Verdict

Progress = Callable[[int, int, str], None]  # done, in all, what is being done


def choose_ranks(
    verdict: Verdict,
    changes: Mapping[str, Changes],
    linears: Sequence[Linear],
    declared: Mapping[str, TensorSpec],
    fixed: int,
    settings: Mapping[str, BuildConfig],
    progress: Progress | None = None,
) -> dict[str, tuple[int, ...]]:
    """By module, the largest rank that each expert can get.

    Args:
        verdict: the group.
        changes: of its experts, some of which may have their ranks already.
        linears: the modules to upscale.
        declared: the base's tensors as they are written.
        fixed: bytes of everything but the factors: the base, and the deltas of norms and biases.
        settings: ``rank``, ``budget`` or ``energy`` of each expert; a budget is for all that have one together.
        progress: called as spectra are computed.

    Raises:
        ConfigError: a budget that cannot be met; says the smallest that can.
        NonFiniteError: NaN or infinity in a source.
    """
    chosen: dict[str, dict[str, int]] = {n.name: {} for n in linears}
    unknown: dict[str, Model] = {}  # the experts whose ranks follow from their spectra
    for expert, own in settings.items():
        for n in linears:
            known = changes[expert].rank(n)
            if known is None and not own.one_rank:
                unknown[expert] = verdict.experts[expert]
                break
            most = min(own.rank, n.in_features, n.out_features) if own.one_rank else 0
            chosen[n.name][expert] = max(most, known or 0)
    if unknown:
        found = _by_spectra(replace(verdict, experts=unknown), linears, declared, fixed, settings, progress)
        for name, ranks in found.items():
            chosen[name] |= ranks
    return {n.name: tuple(chosen[n.name][e] for e in verdict.experts) for n in linears}


def _by_spectra(
    verdict: Verdict,
    linears: Sequence[Linear],
    declared: Mapping[str, TensorSpec],
    fixed: int,
    settings: Mapping[str, BuildConfig],
    progress: Progress | None,
) -> dict[str, dict[str, int]]:
    """By module and expert, the ranks for each expert's energy, or of all under the budget."""
    experts = list(verdict.experts)
    found = spectra(verdict, linears, device=settings[experts[0]].device, progress=progress)
    energies = energies_of(found.values, heads(verdict.base, linears))
    if (budget := settings[experts[0]].budget) is not None:
        biases = sum(declared[n.bias].nbytes * len(experts) for n in linears if n.bias is not None)
        return within_budget(
            energies,
            costs(linears, declared),
            budget=parse_budget(str(budget)),
            base_bytes=sum(info.nbytes for info in verdict.base.tensors.values()),
            fixed_bytes=fixed + biases,
        )
    chosen: dict[str, dict[str, int]] = {name: {} for name in energies}
    for expert in experts:
        energy = settings[expert].energy
        assert energy is not None  # neither one rank nor a budget
        of_expert = {name: {expert: values[expert]} for name, values in energies.items()}
        for name, ranks in for_energy(of_expert, energy=energy).items():
            chosen[name] |= ranks
    return chosen


def costs(linears: Sequence[Linear], declared: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Bytes that one direction takes, by module."""
    return {n.name: (n.in_features + n.out_features) * declared[n.weight].dtype.itemsize for n in linears}


def heads(base: Model, linears: Sequence[Linear]) -> set[str]:
    """The modules whose factors make logits: the output head, or the embedding that shares its weight with it."""
    weights = {n.weight for n in skeleton(base).linears if n.head}
    return {n.name for n in linears if n.weight in weights}
