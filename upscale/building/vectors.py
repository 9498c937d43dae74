"""What is stored of the experts' deltas of one linear: low-rank factors, all entries, or the largest ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upscale.building.linalg import LowRank, factor
from upscale.building.skeleton import Linear
from upscale.errors import NonFiniteError
from upscale.runtime.dense_upscaled import pack
from upscale.runtime.layout_upscaled import DENSE, SPARSE, ModuleLayout
from zoo.reading.product import Product

# (expert, its delta [o, i] float32, or the factors that are stored of it), taken one at a time
Deltas = Iterable[tuple[str, Tensor | Product | LowRank]]


@dataclass(frozen=True)
class Kept:
    """What is kept of one expert's delta of a linear.

    Attributes:
        rank: of its factors; the smaller side of the linear where it is not factored.
        norm: Frobenius norm of the delta.
        left: Frobenius norm of what is not kept.
    """

    rank: int
    norm: float
    left: float


@dataclass(frozen=True)
class UpscaledLinear:
    """What is stored for one linear.

    Attributes:
        layout: its entry in ``config.json``.
        tensors: by the names of ``ModuleLayout.shapes``; float32, but for positions.
        kept: of each expert, for the report.
    """

    layout: ModuleLayout
    tensors: Mapping[str, Tensor]
    kept: Mapping[str, Kept]


def low_rank(
    linear: Linear,
    deltas: Deltas,
    biases: Mapping[str, Tensor] | None,
    ranks: Sequence[int],
    seeds: Sequence[int],
    *,
    exact: bool = False,
) -> UpscaledLinear:
    """Factors of the deltas, expert-major: ``down`` [R, i], ``up`` [o, R], and ``bias`` [E, o] if any bias changed.

    Args:
        linear: which one.
        deltas: of all experts.
        biases: by expert, [o] float32; None if the linear has no bias.
        ranks: of each expert, at most; a delta of lower rank gets its own, 0 if it is zero.
        seeds: of each expert's sketch.
        exact: full SVD.

    Raises:
        NonFiniteError: NaN or infinity in a delta.
    """
    factors, left = {}, iter(deltas)
    for rank, seed in zip(ranks, seeds, strict=True):
        expert, delta = next(left)
        factors[expert] = delta if isinstance(delta, LowRank) else factor(delta, rank, exact=exact, seed=seed)
        del delta  # before the next one is made
    down = torch.cat([f.down for f in factors.values()])
    up = torch.cat([f.up for f in factors.values()], dim=1)
    bias = _bias(biases)
    kept = {expert: Kept(f.down.shape[0], f.norm, f.left) for expert, f in factors.items()}
    layout = ModuleLayout(down.shape[1], up.shape[0], tuple(k.rank for k in kept.values()), bool(bias), linear.kind)
    return UpscaledLinear(layout, {"down": down, "up": up, **bias}, kept)


def dense(linear: Linear, deltas: Deltas, biases: Mapping[str, Tensor] | None) -> UpscaledLinear:
    """The deltas as they are: ``delta`` [E, o, i]; otherwise as ``low_rank``."""
    found = {expert: _whole(delta).contiguous() for expert, delta in deltas}
    kept = {
        expert: Kept(min(delta.shape), float(torch.linalg.vector_norm(delta)), 0.0) for expert, delta in found.items()
    }
    bias = _bias(biases)
    layout = ModuleLayout(
        linear.in_features, linear.out_features, (0,) * len(found), bool(bias), linear.kind, vectors=DENSE
    )
    return UpscaledLinear(layout, {"delta": torch.stack(list(found.values())), **bias}, kept)


def sparse(linear: Linear, deltas: Deltas, biases: Mapping[str, Tensor] | None, density: float) -> UpscaledLinear:
    """The entries of largest magnitude of each delta, a part ``density`` of all: see ``dense_upscaled.pack``."""
    values, gaps, kept = [], [], {}
    for expert, given in deltas:
        delta = _whole(given)
        entries, steps = pack(delta, entries_kept(linear, density))
        values.append(entries)
        gaps.append(steps)
        norm = float(torch.linalg.vector_norm(delta))
        left = max(0.0, norm**2 - float(entries.double().square().sum())) ** 0.5
        kept[expert] = Kept(min(delta.shape), norm, left)
    size = max(len(steps) for steps in gaps)
    rows = [torch.cat([steps, steps.new_full((size - len(steps),), 255)]) for steps in gaps]  # steps that keep nothing
    bias = _bias(biases)
    stored = (len(values[0]), size)
    layout = ModuleLayout(
        linear.in_features,
        linear.out_features,
        (0,) * len(kept),
        bool(bias),
        linear.kind,
        vectors=SPARSE,
        stored=stored,
    )
    return UpscaledLinear(layout, {"values": torch.stack(values), "gaps": torch.stack(rows), **bias}, kept)


def entries_kept(linear: Linear, density: float) -> int:
    """How many entries of a delta ``density`` keeps, at least one."""
    return max(1, round(density * linear.in_features * linear.out_features))


def _whole(delta: Tensor | Product | LowRank) -> Tensor:
    if isinstance(delta, LowRank):
        return delta.up @ delta.down
    return delta.dense() if isinstance(delta, Product) else delta


def _bias(biases: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The deltas of the bias [E, o], if there is one and any expert changed it."""
    if biases is None:
        return {}
    stacked = torch.stack(list(biases.values()))
    if not torch.isfinite(stacked).all():
        raise NonFiniteError("a bias delta has NaN or infinite values")
    return {"bias": stacked} if stacked.any() else {}
