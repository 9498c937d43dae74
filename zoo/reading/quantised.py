"""Weights that are stored in fewer bits than a difference can be taken of."""

from zoo.reading.folder import Folder
from zoo.reading.model import Model

# What tells of it: fields of config.json, and files that older tools write beside it.
_FIELDS = ("quantization_config", "compression_config", "quantization")
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_REMEDY = "use the unquantised model, and quantise the result"


def quantised(model: Model) -> str | None:
    """What is wrong with a model whose weights are quantised (GPTQ, AWQ, fp8, bitsandbytes, ...); None if they are not.

    An adapter's base was perhaps quantised while it was trained, which changes nothing of the adapter.
    """
    for field in _FIELDS:
        if found := model.config.get(field):
            kind = found.get("quant_method") or found.get("format") if isinstance(found, dict) else found
            return f"weights are quantised ({kind or field}); {_REMEDY}"
    if present := [name for name in Folder(model.path).names() if name in _FILES]:
        return f"weights are quantised ({present[0]} says so); {_REMEDY}"
    for name, spec in model.tensors.items():
        if name.endswith((".qweight", ".weight_packed", ".absmax", ".weight_scale", ".weight_scale_inv", ".SCB")):
            return f"weights are quantised (tensor {name}); {_REMEDY}"
        if spec.dtype.is_floating_point and spec.dtype.itemsize < 2:
            return f"tensor {name} is {spec.dtype}, not a float of 16 bits or more; {_REMEDY}"
    return None
