"""A model's structure without its weights: which of its modules are linear maps, and which tensors they hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from upscale.errors import PlanError
from zoo import Checkpoint


@dataclass(frozen=True)
class Linear:
    """A linear module of a model.

    Attributes:
        name: module name in the causal LM, e.g. ``model.layers.0.self_attn.q_proj``.
        weight: its weight's tensor in the checkpoint (the embedding's, for a tied head).
        bias: its bias's tensor in the checkpoint, or None.
        in_features: i.
        out_features: o.
        transposed: the tensor is stored [i, o] (Conv1D) instead of [o, i].
        head: it is the output head, not part of a decoder block.
    """

    name: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    transposed: bool
    head: bool


def linears(checkpoint: Checkpoint) -> list[Linear]:
    """The linears of the decoder blocks and the output head, in the model's order, found by building it on ``meta``.

    Structure decides, not names: a linear counts if it is an ``nn.Linear`` or ``Conv1D`` that lies in a module list,
    or is what ``get_output_embeddings`` returns.

    Raises:
        PlanError: transformers knows no causal LM for this configuration.
    """
    model = _on_meta(checkpoint.config)
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        in_block = any(part.isdigit() for part in name.split("."))
        if not isinstance(module, nn.Linear | Conv1D) or not (in_block or module is head):
            continue
        weight = _tensor(checkpoint, model.base_model_prefix, f"{name}.weight")
        if weight is None and module is head:  # tied to the embeddings
            weight = _embedding(checkpoint, model)
        if weight is None:  # e.g. stored fused under another name: stays as it is
            continue
        bias = _tensor(checkpoint, model.base_model_prefix, f"{name}.bias")
        transposed = isinstance(module, Conv1D)
        shape = checkpoint.tensors[weight].shape
        o, i = reversed(shape) if transposed else shape
        found.append(Linear(name, weight, bias, i, o, transposed, module is head))
    return found


def _on_meta(config: Mapping) -> PreTrainedModel:
    kind = config["model_type"]
    try:
        settings = CONFIG_MAPPING[kind].from_dict({**config, "dtype": "float32"})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings)
    except KeyError as error:
        raise PlanError(f"model type {kind!r} is unknown to the installed transformers; update transformers") from error
    except ValueError as error:
        raise PlanError(f"model type {kind!r} has no causal language model in transformers: {error}") from error


def _tensor(checkpoint: Checkpoint, prefix: str, name: str) -> str | None:
    """The checkpoint's name of a parameter: some checkpoints leave out the base model's prefix."""
    return next((n for n in (name, name.removeprefix(f"{prefix}.")) if n in checkpoint.tensors), None)


def _embedding(checkpoint: Checkpoint, model: PreTrainedModel) -> str | None:
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return _tensor(checkpoint, model.base_model_prefix, f"{name}.weight")
