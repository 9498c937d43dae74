"""A model's structure without its weights: which of its modules can take experts, and which tensors they hold."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from upscale.errors import PlanError
from upscale.runtime.architecture_upscaled import model_class, reads_whole
from upscale.runtime.layout_upscaled import EMBEDDING, LINEAR
from upscale.runtime.router_upscaled import in_block
from zoo import Model
from zoo.preflight import parameters


@dataclass(frozen=True)
class Linear:
    """A linear map of a model: a linear module, or its input embedding, which maps the other way.

    Attributes:
        name: module name in the causal LM, e.g. ``model.layers.0.self_attn.q_proj``.
        weight: its weight's tensor in the checkpoint (the embedding's, for a tied head).
        bias: its bias's tensor in the checkpoint, or None.
        in_features: i; of an embedding [V, d], d.
        out_features: o; of an embedding, V.
        transposed: the tensor is stored [i, o] (Conv1D) instead of [o, i].
        head: it is the output head, not part of a decoder block.
        kind: "linear" or "embedding".
    """

    name: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    transposed: bool
    head: bool
    kind: str = LINEAR


@dataclass(frozen=True)
class Norm:
    """A norm: ``(offset + weight) * n(x) + bias`` for some n without parameters.

    Attributes:
        name: module name in the causal LM.
        weight: its weight's tensor in the checkpoint.
        bias: its bias's tensor in the checkpoint, or None.
        width: number of features.
        offset: 0, or 1 where the weight is stored as a difference from 1 (Gemma's).
    """

    name: str
    weight: str
    bias: str | None
    width: int
    offset: float


@dataclass(frozen=True)
class Skeleton:
    """What can take experts, in the model's order: embeddings, the input's first; linears, the head too; norms.

    ``whole`` says which modules see a whole sequence at once: what their names begin with.
    """

    embeddings: Sequence[Linear]
    linears: Sequence[Linear]
    norms: Sequence[Norm]
    whole: Sequence[str] = ()


def linears(checkpoint: Model) -> list[Linear]:
    """The linears of ``skeleton(checkpoint)``."""
    return list(skeleton(checkpoint).linears)


def skeleton(checkpoint: Model) -> Skeleton:
    """The modules of a checkpoint's causal LM that can take experts, found by building it on ``meta``.

    Structure decides, not names. A linear counts if it is an ``nn.Linear`` or ``Conv1D`` that lies in a module list, or
    is what ``get_output_embeddings`` returns. A norm is what behaves like one when it is run.

    Raises:
        PlanError: transformers knows no causal LM for this configuration, or the checkpoint lacks tensors of it or has
            them in other shapes.
    """
    model = on_meta(checkpoint.config, most=len(checkpoint.tensors))
    names = _stored_names(checkpoint, model)
    for name, parameter in model.named_parameters():
        if (stored := names.get(name)) and checkpoint.tensors[stored].shape != tuple(parameter.shape):
            raise PlanError(
                f"{checkpoint.path}: {stored} has shape {list(checkpoint.tensors[stored].shape)}, by config.json "
                f"it has {list(parameter.shape)}; one of the two is of another model"
            )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found, norms, absent, embeddings = [], [], [], []
    for name, module in model.named_modules():
        weight, bias = names.get(f"{name}.weight"), names.get(f"{name}.bias")
        looked_up = module is embedding or type(module) is nn.Embedding  # tokens, positions; not patches of images
        if weight is not None and looked_up and len(checkpoint.tensors[weight].shape) == 2:
            rows, width = checkpoint.tensors[weight].shape
            embeddings.append(Linear(name, weight, None, width, rows, transposed=False, head=False, kind=EMBEDDING))
        if weight is not None and (offset := _norm_offset(module)) is not None:
            norms.append(Norm(name, weight, bias, checkpoint.tensors[weight].shape[0], offset))
        if not isinstance(module, nn.Linear | Conv1D) or not (in_block(name) or module is head):
            continue
        if weight is None and module is head and module.weight is embedding.weight:  # tied
            weight = names.get(next(f"{n}.weight" for n, m in model.named_modules() if m is embedding))
        if weight is None:
            absent.append(name)
            continue
        transposed = isinstance(module, Conv1D)
        shape = checkpoint.tensors[weight].shape
        o, i = reversed(shape) if transposed else shape
        found.append(Linear(name, weight, bias, i, o, transposed, module is head))
    if absent:
        raise PlanError(
            f"{checkpoint.path}: no tensor for {len(absent)} linears of the architecture, e.g. {absent[0]}; "
            "the checkpoint is incomplete, or stores them in a way that is not read"
        )
    return Skeleton(embeddings, found, norms, reads_whole(model))


def _norm_offset(module: nn.Module) -> float | None:
    """The offset of a norm's weight, found by running the module; None for what is no norm."""
    held = dict(module.named_parameters())
    if not held.keys() <= {"weight", "bias"} or any(p.ndim != 1 for p in held.values()) or "weight" not in held:
        return None
    if next(module.buffers(), None) is not None:
        return None
    probe, width = copy.deepcopy(module).to_empty(device="cpu").float().eval(), len(held["weight"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, width, generator=generator)
    weight, bias = torch.randn(2, width, generator=generator)

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        given = {"weight": weight.expand(width), "bias": bias.expand(width)}
        return torch.func.functional_call(probe, {name: given[name] for name in held}, (x,))

    try:
        zero, one = (run(torch.tensor(value), torch.zeros(())) for value in (0.0, 1.0))
        normed = one - zero
        offset = 1.0 if torch.allclose(zero, normed, atol=1e-5) else 0.0
        expected = (offset + weight) * normed + (bias if "bias" in held else 0.0)
        is_norm = normed.any() and torch.allclose(run(weight, bias), expected, atol=1e-4)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # it needs more than one input
        return None
    return offset if is_norm else None


def _stored_names(checkpoint: Model, model: PreTrainedModel) -> dict[str, str]:
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


def lacking(checkpoint: Model) -> list[str]:
    """The parameters of a checkpoint's architecture that it has no tensor for.

    Raises:
        PlanError: transformers makes no model of its ``config.json``.
    """
    model = on_meta(checkpoint.config)
    found = set(_stored_names(checkpoint, model))
    for conversion in get_model_conversion_mapping(model):  # several tensors may become one parameter
        found |= {conversion.rename_source_key(name)[0] for name in checkpoint.tensors}
    return [name for name, _ in model.named_parameters() if name not in found]


def on_meta(config: Mapping, most: int | None = None) -> PreTrainedModel:
    """The model of a ``config.json`` without its weights.

    Args:
        config: its fields.
        most: blocks that it can have at most.

    Raises:
        PlanError: transformers makes no model of it, or it has more blocks.
    """
    kind = config["model_type"]
    try:
        settings = CONFIG_MAPPING[kind].from_dict({**config, "dtype": "float32"})
        blocks = getattr(settings.get_text_config(), "num_hidden_layers", None) or 0
        if most is not None and blocks > most:  # a model of them all might never be finished
            raise PlanError(f"config.json has num_hidden_layers {blocks}, but there are only {most} tensors")
        with torch.device("meta"):
            made = model_class(config)
            return made.from_config(settings) if made is AutoModelForCausalLM else made._from_config(settings)
    except KeyError as error:
        raise PlanError(f"model type {kind!r} is unknown to the installed transformers; update transformers") from error
    except (ValueError, TypeError, RuntimeError, ArithmeticError, AttributeError, StrictDataclassError) as error:
        message = " ".join(str(error).split())
        raise PlanError(f"transformers makes no model of this config.json ({kind}): {message}") from error


def kind(module: str) -> str:
    """A module's name with its block left out: ``model.layers.3.mlp.up_proj`` -> ``mlp.up_proj``."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[-1]
