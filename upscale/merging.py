"""Dense merges, the baselines that an upscaled model must beat: one plain model made of all."""

from pathlib import Path

import torch

from upscale.errors import ConfigError
from zoo import Group, Writer, check
from zoo.files import companions
from zoo.preflight import parameters

METHODS = ("average", "task-arithmetic")


def merge(group: Group | str | Path, out: str | Path, method: str = "average", *, scaling: float = 0.3) -> None:
    """Merge a group into one plain checkpoint of the base's architecture, tensor by tensor in float32.

    Args:
        group: a Group, or the YAML file of one.
        out: directory to make; must not exist.
        method: ``"average"`` of the experts (the base only lends its files), or ``"task-arithmetic"``:
            base + scaling * sum of the experts' deltas (arXiv 2212.04089).
        scaling: of task arithmetic; 0.3 is the paper's choice for eight tasks.

    Raises:
        ConfigError: unknown method.
        MismatchError, OutputError, CheckpointError: see ``zoo``.
    """
    if method not in METHODS:
        raise ConfigError(f"merge method {method!r} is unknown; there are {', '.join(METHODS)}")
    group = group if isinstance(group, Group) else Group.load(group)
    verdict = check(group)
    verdict.require()
    scale = 1 / len(verdict.experts) if method == "average" else scaling
    with Writer(out, parameters(verdict.base)) as writer:
        for name in writer.declared:
            source = verdict.base.read(name)
            base = source.float()
            total = torch.zeros_like(base)
            for expert in verdict.experts.values():
                total += expert.read(name).float() - base
            writer.write(name, (base + scale * total).to(source.dtype))
        writer.commit(verdict.base.config, companions(verdict.base.path))
