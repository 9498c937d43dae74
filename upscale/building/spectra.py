"""Spectra of the experts' deltas: their singular values, weight by weight, and how much their subspaces overlap."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from upscale.building import spectra_cache
from upscale.building.linalg import factor, norm_of, singular_values
from upscale.device import check_device
from upscale.errors import NonFiniteError
from zoo import Model, Verdict
from zoo.reading.product import Product

OVERLAP_RANK = 16  # leading directions of each expert that are compared
_ROWS = 4096  # of a delta in float64 at once

Progress = Callable[[int, int, str], None]  # deltas done, deltas in all, what is being done


def block(module: str) -> str:
    """The decoder block that a module lies in, or itself: ``model.layers.3.mlp.up_proj`` -> ``model.layers.3``."""
    found = re.match(r".+?\.\d+(?=\.)", module)
    return found[0] if found else module


class Module(Protocol):
    """What is needed of a module with a weight matrix; ``upscale.building.skeleton.Linear`` is one."""

    @property
    def name(self) -> str:
        """Module name."""
        ...

    @property
    def weight(self) -> str:
        """Its weight's tensor in the checkpoint, [o, i] or, transposed, [i, o]."""
        ...

    @property
    def in_features(self) -> int:
        """i."""
        ...

    @property
    def out_features(self) -> int:
        """o."""
        ...

    @property
    def transposed(self) -> bool:
        """The tensor is stored [i, o]."""
        ...


@dataclass(frozen=True)
class Spectra:
    """What the experts' deltas look like.

    Attributes:
        experts: names, in the group's order: rows and columns of ``overlaps``.
        values: by module and expert, squared singular values of the delta, [min(o, i)] float64, largest first; what
            ``upscale.building.budget`` takes. Their sum is the squared Frobenius norm.
        overlaps: by module, [E, E] float64: the mean squared cosine of the principal angles between the experts'
            leading right singular subspaces of ``OVERLAP_RANK`` directions or, if one has fewer, of so many. 1 is the
            same subspace, 0 an orthogonal one; NaN where an expert has no delta.
        chance: by module, the overlap that random subspaces have on average.
    """

    experts: Sequence[str]
    values: Mapping[str, Mapping[str, Tensor]]
    overlaps: Mapping[str, Tensor]
    chance: Mapping[str, float]

    @property
    def norms(self) -> dict[str, dict[str, float]]:
        """Frobenius norms of the deltas, by module and expert."""
        return {m: {e: float(v.sum()) ** 0.5 for e, v in values.items()} for m, values in self.values.items()}

    def of(self, modules: Iterable[str]) -> "Spectra":
        """The same for some of the modules, in the given order."""
        names = list(modules)
        return Spectra(
            self.experts,
            {name: self.values[name] for name in names},
            {name: self.overlaps[name] for name in names},
            {name: self.chance[name] for name in names},
        )

    def energy_by_rank(self, expert: str) -> Tensor:
        """Part of a delta's energy that is kept at rank 1, 2, ..., mean over modules: [n] float64.

        A mean, because the squared norm of one module, an output head, can be most of all modules' together.
        """
        kept = [by_expert[expert].cumsum(0) for by_expert in self.values.values()]
        longest = max(map(len, kept))
        parts = [k / k[-1] if k[-1] > 0 else torch.ones_like(k) for k in kept]
        return torch.stack([pad(part, (0, longest - len(part)), value=1.0) for part in parts]).mean(dim=0)

    def energy_at(self, rank: int) -> dict[str, dict[str, float]]:
        """Part of each delta's energy that is kept at a rank, by module and expert; 1 for a delta of zero."""
        return {
            module: {e: float(v[:rank].sum() / v.sum()) if v.any() else 1.0 for e, v in values.items()}
            for module, values in self.values.items()
        }

    def overlap(self) -> Tensor:
        """Mean over modules of ``overlaps``, weighted equally, where both experts have a delta: [E, E] float64."""
        return torch.stack(list(self.overlaps.values())).nanmean(dim=0)

    def overlap_by_block(self) -> dict[str, Tensor]:
        """``overlap`` of each decoder block, and of each module outside of one."""
        grouped: dict[str, list[str]] = {}
        for module in self.overlaps:
            grouped.setdefault(block(module), []).append(module)
        return {name: self.of(modules).overlap() for name, modules in grouped.items()}


def spectra(
    verdict: Verdict,
    modules: Sequence[Module],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Spectra:
    """Compute the spectra of every expert's delta of the given modules, or find them in the user's cache.

    One delta is in memory at a time. The spectrum is exact: the eigenvalues of the Gram matrix of the delta's shorter
    side, in float64. What was computed is kept even if a later module fails or the run is stopped.

    Args:
        verdict: a group that passed preflight.
        modules: whose weights to look at; see ``upscale.building.skeleton``.
        device: where to compute.
        progress: called after each delta that is not in the cache with (done, all of them, module).

    Raises:
        MismatchError: the group did not pass.
        ConfigError: the device does not exist.
        NonFiniteError: NaN or infinity in a weight, with tensor and expert.
    """
    verdict.require()
    check_device(device)
    file = spectra_cache.cache_file(verdict)
    known = spectra_cache.load(file)
    missing = [m for m in modules if not {_energies(m), _overlap(m)} <= known.keys()]
    done = 0

    def step(name: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(missing) * len(verdict.experts), name)

    try:
        for module in missing:
            known[_energies(module)], known[_overlap(module)] = _module(verdict, module, device, step)
    finally:
        if missing:
            spectra_cache.save(file, known)
    experts = tuple(verdict.experts)
    return Spectra(
        experts,
        {m.name: dict(zip(experts, known[_energies(m)], strict=True)) for m in modules},
        {m.name: known[_overlap(m)] for m in modules},
        {m.name: min(OVERLAP_RANK, m.in_features, m.out_features) / m.in_features for m in modules},
    )


def _energies(module: Module) -> str:
    return f"{module.name}.energies"


def _overlap(module: Module) -> str:
    return f"{module.name}.overlap"


@torch.no_grad()
def _module(verdict: Verdict, module: Module, device: str, step: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """Squared singular values [E, n] and overlap [E, E] of a module, float64 on the CPU."""
    base = cache(lambda: _read(verdict.base, module.weight, device))
    energies, subspaces = [], []
    for number, (expert, model) in enumerate(verdict.experts.items()):
        product = model.product(module.weight)
        delta = _read(model, module.weight, device).sub_(base()) if product is None else product.to(device)
        if not norm_of(delta) < float("inf"):
            who = f"expert {expert}" if base().isfinite().all() else "base"
            raise NonFiniteError(f"{who}: tensor {module.weight} has NaN or infinite values; is the download complete?")
        delta = delta.mT if module.transposed else delta
        energies.append(squared_singular_values(delta).cpu())
        # From the same sketch, the subspaces of flat spectra would be alike for no other reason.
        subspaces.append(factor(delta, OVERLAP_RANK, seed=number).down.double())
        del delta  # before the next one is made
        step(module.name)
    return torch.stack(energies), overlap(subspaces).cpu()


def _read(model: Model, name: str, device: str) -> Tensor:
    return model.read(name).to(device).float()


def squared_singular_values(delta: Tensor | Product) -> Tensor:
    """Squared singular values of ``delta`` [o, i], any float dtype: [min(o, i)] float64, largest first.

    They are the eigenvalues of the Gram matrix of the shorter side. Those below its rounding are 0.
    """
    if isinstance(delta, Product):
        squares = singular_values(delta).double().square()
        return pad(squares, (0, min(delta.shape) - len(squares)))
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.mT
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=delta.device)
    for rows in tall.split(_ROWS):  # an embedding in float64 would be large
        rows = rows.double()
        gram.addmm_(rows.mT, rows)
    values = torch.linalg.eigvalsh(gram).flip(0)
    return torch.where(values > values[0] * max(delta.shape) * torch.finfo(torch.float64).eps, values, 0)


def overlap(subspaces: Sequence[Tensor]) -> Tensor:
    """Mean squared cosines of the principal angles between subspaces, pair by pair: ``|A B^T|^2 / min(r_A, r_B)``.

    Args:
        subspaces: orthonormal rows, [r, i] each, of any r.

    Returns:
        [E, E]; NaN where a subspace is empty.
    """
    rows = [[(a @ b.mT).square().sum() / min(len(a), len(b)) for b in subspaces] for a in subspaces]
    return torch.stack([torch.stack(row) for row in rows])
