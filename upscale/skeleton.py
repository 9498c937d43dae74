"""A model's structure without its weights: which of its modules are linear maps, and which tensors they hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from upscale.errors import PlanError
from zoo import Checkpoint
from zoo.preflight import parameters


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
        PlanError: transformers knows no causal LM for this configuration, or the checkpoint lacks tensors of it.
    """
    model = _on_meta(checkpoint.config)
    names = _stored_names(checkpoint, model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found, absent = [], []
    for name, module in model.named_modules():
        in_block = any(part.isdigit() for part in name.split("."))
        if not isinstance(module, nn.Linear | Conv1D) or not (in_block or module is head):
            continue
        weight = names.get(f"{name}.weight")
        if weight is None and module is head and module.weight is embedding.weight:  # tied
            weight = names.get(next(f"{n}.weight" for n, m in model.named_modules() if m is embedding))
        if weight is None:
            absent.append(name)
            continue
        transposed = isinstance(module, Conv1D)
        shape = checkpoint.tensors[weight].shape
        o, i = reversed(shape) if transposed else shape
        found.append(Linear(name, weight, names.get(f"{name}.bias"), i, o, transposed, module is head))
    if absent:
        raise PlanError(
            f"{checkpoint.path}: no tensor for {len(absent)} linears of the architecture, e.g. {absent[0]}; "
            "the checkpoint is incomplete, or stores them in a way that is not read"
        )
    return found


def _stored_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """The checkpoint's tensor names by the model's: transformers renames some, others lack the base model's prefix."""
    renamings = [m for m in get_model_conversion_mapping(model) if isinstance(m, WeightRenaming)]
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    names = {}
    for stored in parameters(checkpoint):
        key = stored
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        candidates = (key, stored, prefix + key, key.removeprefix(prefix))
        names[next((c for c in candidates if c in known), key)] = stored
    return names


def _on_meta(config: Mapping) -> PreTrainedModel:
    kind = config["model_type"]
    try:
        settings = CONFIG_MAPPING[kind].from_dict({**config, "dtype": "float32"})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings)
    except KeyError as error:
        raise PlanError(f"model type {kind!r} is unknown to the installed transformers; update transformers") from error
    except (ValueError, TypeError, StrictDataclassError) as error:
        message = " ".join(str(error).split())
        raise PlanError(
            f"transformers makes no causal language model of this config.json ({kind}): {message}"
        ) from error
