"""Checkpoints with calibrated routers that were made by hand."""

import json
import shutil

import torch

from zoo.writing.amend import amend
from zoo.writing.part import content_key


def give_router(directory, tensors, **settings):
    """Write a calibrated router of these tensors and settings into a checkpoint."""
    config = json.loads((directory / "config.json").read_text())
    names = f"router.{content_key(tensors)}"
    experts = len(config["upscale"]["experts"])
    classes, depth = len(tensors["bias"]), settings.get("depth", 0)
    own = {"size": tensors["weight"].shape[1] if depth else len(tensors["table"]), "base": classes > experts}
    config["upscale"]["router"] = {"type": "calibrated", "experts": experts, "tensors": names, **own, **settings}
    amend(directory, "router", {f"{names}.{name}": tensor for name, tensor in tensors.items()}, config, {})
    return directory


def random_router(size, depth=0, classes=4, seed=0):
    """Tensors of a router that sends tokens here and there: [V, C] scores of tokens, or [C, d] of hidden states."""
    generator = torch.Generator().manual_seed(seed)
    shape = (classes, size) if depth else (size, classes)
    scores = (0.25 if depth else 3.0) * torch.randn(shape, generator=generator)
    return {"weight" if depth else "table": scores, "bias": 0.1 * torch.randn(classes, generator=generator)}


def copied(source, directory):
    """A copy of a checkpoint, to be changed."""
    return shutil.copytree(source, directory)
