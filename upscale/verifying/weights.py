"""Every tensor read once: is it what was written, is it finite, are the factors orthonormal?"""

import math
from collections.abc import Sequence

from torch import Tensor

from upscale.building.linalg import allowed_deviation, deviation
from upscale.runtime.layout_upscaled import LOW_RANK, NORM, Layout
from upscale.verifying.finding import SKIPPED, Finding, judged
from upscale.verifying.structure import is_built
from zoo import Checkpoint
from zoo.writing.checksums import CHECKSUMS
from zoo.writing.integrity import Progress, Sums, differing


class _Look:
    """Looks at tensors, from several threads."""

    def __init__(self, layout: Layout):
        low = {n: m for n, m in layout.modules.items() if m.kind != NORM and m.vectors == LOW_RANK and not m.tied}
        self.experts = layout.experts
        self.factors = {f"{name}.experts.down": module.ranks for name, module in low.items()}
        self.odd: list[str] = []
        self.deviations: dict[tuple[str, str], tuple[float, float]] = {}  # what there is, what may be

    def __call__(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            self.odd.append(name)
        elif name in self.factors and sum(self.factors[name]) == len(tensor):
            for expert, rows in zip(self.experts, tensor.split(list(self.factors[name])), strict=False):
                self.deviations[name, expert] = deviation(rows), allowed_deviation(rows.dtype)


def weights(checkpoint: Checkpoint, layout: Layout, progress: Progress | None = None) -> Sequence[Finding]:
    """Hashes of all tensors and files; NaN and infinities; orthonormality. Each tensor is read once.

    Raises:
        CheckpointError: a damaged ``checksums.json``, or a file that cannot be read.
    """
    look = _Look(layout)
    changed = differing(checkpoint.path, look, progress)
    return [_hashes(checkpoint, changed), _finite(checkpoint, look), _orthonormal(look)]


def _hashes(checkpoint: Checkpoint, changed: Sequence[str]) -> Finding:
    sums = Sums.of(checkpoint.path)
    if sums is None and not is_built(checkpoint.path):
        return Finding("hashes", SKIPPED, f"no build wrote this checkpoint, so it has no {CHECKSUMS}")
    if sums is None:
        return judged("hashes", [f"no {CHECKSUMS}, so that nobody knows whether these are the bytes that were written"])
    problems = [f"{name} is not what {CHECKSUMS} says" for name in changed]
    told = f"{len(sums.tensors)} tensors and {len(sums.files)} files are what was written"
    return judged("hashes", problems, told, tensors=len(sums.tensors), files=len(sums.files))


def _finite(checkpoint: Checkpoint, look: _Look) -> Finding:
    problems = [f"tensor {name} has NaN or infinite values" for name in sorted(look.odd)]
    return judged("finite", problems, f"{len(checkpoint.tensors)} tensors")


def _orthonormal(look: _Look) -> Finding:
    if not look.factors:
        return Finding("orthonormal", SKIPPED, "no expert is stored as factors")
    problems = [
        f"tensor {name}: rows of expert {expert} are {found:.2g} from orthonormal, {allowed:.2g} is allowed"
        for (name, expert), (found, allowed) in sorted(look.deviations.items())
        if not found <= allowed
    ]
    worst = max((found for found, _ in look.deviations.values() if math.isfinite(found)), default=0.0)
    most = max((allowed for _, allowed in look.deviations.values()), default=0.0)
    told = f"rows of {len(look.deviations)} factors, at most {worst:.2g} off ({most:.2g} is allowed)"
    return judged("orthonormal", problems, told, worst=worst, allowed=most)
