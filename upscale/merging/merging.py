"""Dense merges, the baselines that an upscaled model must beat: one plain model made of all."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from upscale.errors import ConfigError
from upscale.merging.ties import elect, thresholds
from zoo import Group, Verdict, Writer, check
from zoo.files import companions
from zoo.preflight import parameters

METHODS = ("average", "task-arithmetic", "ties")
_SCALING = {"task-arithmetic": 0.3, "ties": 1.0}  # the papers' own, of task arithmetic for eight tasks


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
    if method not in METHODS:
        raise ConfigError(f"merge method {method!r} is unknown; there are {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise ConfigError(f"density must be above 0 and at most 1, not {density}")
    group = group if isinstance(group, Group) else Group.load(group)
    verdict = check(group)
    verdict.require()
    scale = 1 / len(verdict.experts) if method == "average" else _SCALING[method] if scaling is None else scaling
    with Writer(out, parameters(verdict.base)) as writer:
        combine = _sum
        if method == "ties":
            combine = partial(elect, trims=thresholds(partial(_deltas, verdict), list(writer.declared), density))
        for name in writer.declared:
            source = verdict.base.read(name)
            merged = combine(_deltas(verdict, name))
            writer.write(name, (source.float() + scale * merged).to(source.dtype))
        writer.commit(verdict.base.config, companions(verdict.base.path))


def _deltas(verdict: Verdict, name: str) -> Iterable[Tensor]:
    """The experts' deltas of a tensor, float32, one at a time in memory."""
    base = verdict.base.read(name).float()
    for expert in verdict.experts.values():
        yield expert.read(name).float() - base


def _sum(deltas: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(())
    for delta in deltas:
        total = total + delta
    return total
