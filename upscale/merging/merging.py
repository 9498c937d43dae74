"""Dense merges, the baselines that an upscaled model must beat: one plain model made of all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from upscale.errors import ConfigError
from upscale.merging.ties import elect, thresholds
from zoo import Group, Verdict, Writer, checked
from zoo.preflight import parameters
from zoo.reading.heads import head

METHODS = ("average", "task-arithmetic", "ties")
SCALING = {"task-arithmetic": 0.3, "ties": 1.0}  # the papers' own, of task arithmetic for eight tasks


@dataclass(frozen=True)
class Merging:
    """How one tensor's deltas are merged: ``base + scale * combined``.

    Attributes:
        method: its name.
        scale: of what is added to the base.
        trims: of TIES, see ``ties.thresholds``; None for the plain sum of the deltas.
    """

    method: str
    scale: float
    trims: Sequence[float] | None = None

    def __call__(self, base: Tensor, deltas: Iterable[Tensor]) -> Tensor:
        """The merged tensor [...] float32, of the base's and the experts' deltas, taken one at a time."""
        combined = _sum(deltas) if self.trims is None else elect(deltas, self.trims)
        return combined.mul_(self.scale).add_(base)


def merge(
    group: Group | str | Path,
    out: str | Path,
    method: str = "average",
    *,
    scaling: float | None = None,
    density: float = 0.2,
) -> None:
    """Merge a group into one plain checkpoint of the base's architecture, tensor by tensor in float32.

    - ``"average"``: the mean of the experts; the base only lends its files.
    - ``"task-arithmetic"`` (arXiv 2212.04089): base + scaling * sum of the experts' deltas.
    - ``"ties"`` (arXiv 2306.01708): base + scaling * the deltas, trimmed, elected and averaged. Of each expert's delta,
      all its tensors taken together, the ``density`` of largest magnitude are kept, and what is as large as the
      smallest of these. Each parameter takes the sign of the sum of what is kept there, and the mean of what has that
      sign; a sum of exactly 0 gives 0.

    Args:
        group: a Group, or the YAML file of one.
        out: directory to make; must not exist.
        method: one of the above.
        scaling: of task arithmetic and TIES; by default their papers' choice, 0.3 and 1.
        density: of TIES; 0.2 is the paper's choice.

    Raises:
        ConfigError: unknown method, or a density that is not above 0 and at most 1.
        MismatchError, OutputError, CheckpointError: see ``zoo``.
    """
    group = group if isinstance(group, Group) else Group.load(group)
    verdict = checked(group)
    merged = merging(verdict, method, scaling, density)
    with Writer(out, parameters(verdict.base)) as writer:
        for name in writer.declared:
            source = verdict.base.read(name)
            own = name in head(verdict.base)  # classes of one expert mean nothing to another: the base's stays
            tensor = source if own else merged(source.float(), _deltas(verdict, name)).to(source.dtype)
            writer.write(name, tensor)
        writer.commit(verdict.base.config, verdict.base.companions)


def merging(verdict: Verdict, method: str, scaling: float | None = None, density: float = 0.2) -> Merging:
    """The merge of a group's tensors; see ``merge`` for the arguments. TIES reads all of them, twice.

    Raises:
        ConfigError: unknown method, or a density that is not above 0 and at most 1.
    """
    if method not in METHODS:
        raise ConfigError(f"merge method {method!r} is unknown; there are {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise ConfigError(f"density must be above 0 and at most 1, not {density}")
    scale = 1 / len(verdict.experts) if method == "average" else SCALING[method] if scaling is None else scaling
    if method != "ties":
        return Merging(method, scale)
    names = [name for name in parameters(verdict.base) if name not in head(verdict.base)]
    return Merging(method, scale, thresholds(partial(_deltas, verdict), names, density))


def _deltas(verdict: Verdict, name: str) -> Iterable[Tensor]:
    """The experts' deltas of a tensor, float32, one at a time in memory."""
    base = verdict.base.read(name).float()
    for expert in verdict.experts.values():
        yield expert.read(name).float() - base


def _sum(deltas: Iterable[Tensor]) -> Tensor:
    left = iter(deltas)
    total = 0.0 + next(left)
    while (delta := next(left, None)) is not None:
        total.add_(delta)
        del delta  # before the next one is made
    return total
