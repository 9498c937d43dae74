"""What a checkpoint keeps of its sources, measured: each expert's deltas against what is stored of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from upscale.building.linalg import norm_of
from upscale.building.skeleton import Linear, Norm
from upscale.building.stored import Stored
from upscale.building.stored_expert import StoredExpert
from zoo import Model, Verdict

Progress = Callable[[int, int, str], None]  # bytes of the base done, bytes in all, tensor
_FLOAT32 = 1e-4  # of a delta: what sums of squares in float32 may miss of it


@dataclass(frozen=True)
class Measured:
    """One expert against its source.

    Attributes:
        energy: part of the squared norm of its deltas that the upscaled linears keep.
        reported: the same as the build has it; None without a report.
        worst: the tensor of which most is missing, and the part of its delta's norm that is.
    """

    energy: float
    reported: float | None
    worst: tuple[str, float] = ("", 0.0)


@dataclass(frozen=True)
class Reconstruction:
    """A checkpoint against its sources.

    Attributes:
        experts: by name.
        base: tensors that are not the source's base, though nothing was merged.
        lies: where more or less is missing than the report says, a line each.
    """

    experts: Mapping[str, Measured]
    base: Sequence[str]
    lies: Sequence[str]


@dataclass(frozen=True)
class _Piece:
    """One expert's delta of one tensor: its norm, and the norm of what is missing of it.

    ``linear`` counts in the energy. ``left`` is what the report says is missing, ``slack`` by how much the rounding of
    what is stored may change that.
    """

    expert: str
    tensor: str
    norm: float
    error: float
    left: float
    slack: float
    linear: bool


@dataclass
class _Sum:
    """Of the pieces of one expert."""

    norm: float = 0.0
    error: float = 0.0
    worst: tuple[str, float] = ("", 0.0)
    lies: list[str] = field(default_factory=list)

    def add(self, piece: _Piece) -> None:
        if piece.linear:
            self.norm += piece.norm**2
            self.error += piece.error**2
            missing = piece.error / piece.norm if piece.norm else 0.0
            self.worst = max(self.worst, (piece.tensor, missing), key=lambda found: found[1])
        if not abs(piece.error - piece.left) <= piece.slack:
            told = f"{piece.error:.4g} of {piece.norm:.4g} is missing, report.json says {piece.left:.4g}"
            self.lies.append(f"expert {piece.expert}: {piece.tensor}: {told}")


@torch.no_grad()
def measure(stored: Stored, verdict: Verdict, progress: Progress | None = None) -> Reconstruction:
    """Compare what a checkpoint stores with the models that it was built from, tensor by tensor.

    Args:
        stored: the checkpoint.
        verdict: on the group, which passed and has the checkpoint's experts and its base's tensors; its weights are all
            here.
        progress: called after each tensor of the base.

    Raises:
        CheckpointError: a source cannot be read.
    """
    experts = {name: StoredExpert.of(stored, name) for name in stored.layout.experts}
    sums = {name: _Sum() for name in experts}
    base: list[str] = []
    done, total = 0, sum(info.nbytes for info in stored.base.tensors.values())
    for name, info in stored.base.tensors.items():
        source, written = verdict.base.read(name), stored.base.read(name)
        same = torch.equal(_bits(source.to(written.dtype)), _bits(written))
        for piece in _pieces(stored, experts, verdict, name, source if same else written, merged=not same):
            sums[piece.expert].add(piece)
        if not same and not (stored.merged and _place(stored, name) is None):
            base.append(name)
        done += info.nbytes
        if progress:
            progress(done, total, name)
    reported = stored.report.energy if stored.report else {}
    found = {
        name: Measured(1 - own.error / own.norm if own.norm else 1.0, reported.get(name), own.worst)
        for name, own in sums.items()
    }
    return Reconstruction(found, base, [line for own in sums.values() for line in own.lies])


def _pieces(
    stored: Stored, experts: Mapping[str, StoredExpert], verdict: Verdict, name: str, origin: Tensor, *, merged: bool
) -> Iterator[_Piece]:
    """All experts' deltas of a tensor of the base, from what the checkpoint computes with in its place."""
    written, base = stored.base.tensors[name], origin.float()
    eps = torch.finfo(written.dtype).eps
    place, head = _place(stored, name), stored.split_head
    places = [place, head] if head is not None and head.weight == name else [place]
    for expert, own in experts.items():
        source = verdict.experts[expert]
        if name in own.heads:
            stands = own.read(name)
            missing = float(torch.linalg.vector_norm(source.read(name).to(stands.dtype).float() - stands.float()))
            yield _Piece(expert, name, missing, missing, 0.0, 0.0, linear=False)
            continue
        truth = _truth(source, name, base, merged=merged)
        norm = norm_of(truth)
        for where in places:
            kept, rounded = _kept(own, where, name, base)
            error = norm if kept is None else float(torch.linalg.vector_norm(truth - kept))
            linear = isinstance(where, Linear) and name == where.weight
            left = error if stored.report is None else _left(stored, where, name, expert)
            whole = float(torch.linalg.vector_norm(base)) if merged else 0.0
            slack = eps * (rounded + whole) + _FLOAT32 * norm
            yield _Piece(expert, name, norm, error, left, slack, linear)


def _place(stored: Stored, name: str) -> Linear | Norm | None:
    """The module that has experts for this tensor."""
    place = stored.places.get(name)
    of_bias = isinstance(place, Linear) and name == place.bias
    return None if place is None or (of_bias and not stored.layout.modules[place.name].bias) else place


def _truth(source: Model, name: str, base: Tensor, *, merged: bool) -> Tensor:
    """The expert's own delta, float32, oriented like the tensor."""
    product = None if merged else source.product(name)
    return source.read(name).float() - base if product is None else product.dense()


def _left(stored: Stored, where: Linear | Norm | None, name: str, expert: str) -> float:
    """The norm of what the report says is missing; biases of linears are kept whole."""
    if isinstance(where, Linear) and name == where.bias:
        return 0.0
    report = stored.measured.get(where.name if isinstance(where, Linear) else name)
    return report.left.get(expert, 0.0) if report else 0.0


def _kept(own: StoredExpert, where: Linear | Norm | None, name: str, base: Tensor) -> tuple[Tensor | None, float]:
    """What is stored of a delta, None if nothing, and the norm of the numbers that were rounded for it."""
    if where is None:
        return None, 0.0
    if isinstance(where, Norm):
        change = own.of_norm(where)
        if name == where.weight:
            kept = (where.offset + base) * change.scale
            return kept, float(torch.linalg.vector_norm(kept))
        parts = change.shift, base * change.scale
        return parts[0] + parts[1], sum(float(torch.linalg.vector_norm(part)) for part in parts)
    if name == where.weight:
        delta = own.delta(where)
        kept = delta.mT if where.transposed else delta
    else:
        kept = own.of_bias(where)
    return kept, float(torch.linalg.vector_norm(kept))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
