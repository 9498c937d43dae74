"""Which class of transformers a checkpoint is for, and how it reads its input.

Structure and configuration decide; no model family is named.
"""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

UPSCALED = "Upscaled"  # what our names of architectures begin with


def auto_classes() -> dict[str, Any]:
    """transformers' Auto classes by name."""
    classes = {name: value for name, value in vars(modeling_auto).items() if isinstance(value, type)}
    return {n: c for n, c in classes.items() if issubclass(c, _BaseAutoModelClass) and c._model_mapping is not None}


def model_class(config: Mapping) -> Any:
    """The class that ``config.json`` names, plain or upscaled; of a causal language model if it names none."""
    for name in config.get("architectures") or []:
        found = getattr(transformers, name.removeprefix(UPSCALED), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModelForCausalLM


def autos_of(config: Mapping) -> list[str]:
    """The Auto classes that make a model of the class that ``config.json`` names; ``AutoModel`` if there are none."""
    wanted = model_class(config).__name__
    if wanted in auto_classes():
        return [wanted]
    found = []
    for name, auto in auto_classes().items():
        values = auto._model_mapping._model_mapping.values()
        if any(wanted == value or (isinstance(value, tuple | list) and wanted in value) for value in values):
            found.append(name)
    return found or ["AutoModel"]


def reads_whole(model: PreTrainedModel) -> list[str]:
    """What the names of the modules begin with that see a whole sequence at once: all ("") of an encoder.

    What a decoder computes for a token depends on the tokens so far alone.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        encoder = model.get_encoder()
        return [f"{name}." for name, module in model.named_modules() if module is encoder]
    return [] if model.can_generate() else [""]
