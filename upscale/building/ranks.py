"""The rank of every module and expert: one for all, or from the spectra under a budget or for an energy."""

from collections.abc import Callable, Mapping, Sequence

from upscale.building.budget import energies_of, for_energy, parse_budget, within_budget
from upscale.building.skeleton import Linear, skeleton
from upscale.building.spectra import spectra
from upscale.config import BuildConfig
from zoo import Checkpoint, TensorSpec, Verdict

Progress = Callable[[int, int, str], None]  # done, in all, what is being done


def choose_ranks(
    verdict: Verdict,
    linears: Sequence[Linear],
    declared: Mapping[str, TensorSpec],
    fixed: int,
    config: BuildConfig,
    progress: Progress | None = None,
) -> dict[str, tuple[int, ...]]:
    """By module, the rank of each expert.

    Args:
        verdict: the group.
        linears: the modules to upscale.
        declared: the base's tensors as they are written.
        fixed: bytes of everything but the factors: the base, and the deltas of norms and biases.
        config: ``rank``, ``budget`` or ``energy``.
        progress: called as spectra are computed.

    Raises:
        ConfigError: a budget that cannot be met; says the smallest that can.
        NonFiniteError: NaN or infinity in a source.
    """
    experts = list(verdict.experts)
    if config.one_rank:
        most = {n.name: min(config.rank, n.in_features, n.out_features) for n in linears}
        return {name: (rank,) * len(experts) for name, rank in most.items()}
    found = spectra(verdict, linears, device=config.device, progress=progress)
    energies = energies_of(found.values, heads(verdict.base, linears))
    if config.energy is not None:
        chosen = for_energy(energies, energy=config.energy)
    else:
        biases = sum(declared[n.bias].nbytes * len(experts) for n in linears if n.bias is not None)
        base = sum(info.nbytes for info in verdict.base.tensors.values())
        chosen = within_budget(
            energies,
            costs(linears, declared),
            budget=parse_budget(str(config.budget)),
            base_bytes=base,
            fixed_bytes=fixed + biases,
        )
    return {n.name: tuple(chosen[n.name][e] for e in experts) for n in linears}


def costs(linears: Sequence[Linear], declared: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Bytes that one direction takes, by module."""
    return {n.name: (n.in_features + n.out_features) * declared[n.weight].dtype.itemsize for n in linears}


def heads(base: Checkpoint, linears: Sequence[Linear]) -> set[str]:
    """The modules whose factors make logits: the output head, or the embedding that shares its weight with it."""
    weights = {n.weight for n in skeleton(base).linears if n.head}
    return {n.name for n in linears if n.weight in weights}
