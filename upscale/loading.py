"""Load any model for transformers: an upscaled checkpoint with its routing, or a plain one."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from upscale.errors import LoadError
from upscale.runtime.architecture_upscaled import auto_classes, model_class
from upscale.runtime.modeling_upscaled import MODEL_TYPE, UpscaledConfig, UpscaledPreTrained
from upscale.runtime.routing_upscaled import BASE
from zoo import Source

# From here on the Auto classes, AutoTokenizer among them, need no remote code for an upscaled checkpoint.
AutoConfig.register(MODEL_TYPE, UpscaledConfig, exist_ok=True)
for auto in auto_classes().values():
    auto.register(UpscaledConfig, UpscaledPreTrained, exist_ok=True)


def load(path: str | Path, *, expert: str | None = None, dtype: str = "auto", **kwargs: Any) -> Any:
    """Load a checkpoint as a model of transformers, of the class that its ``config.json`` names.

    Args:
        path: directory, or Hub id with an optional ``@revision``.
        expert: route every token to this expert instead of by the router; "base" for none.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        kwargs: to the base class's ``from_pretrained`` (``device_map``, ``attn_implementation``, ...).

    Returns:
        The base's own class with the experts injected (see ``modeling_upscaled.UpscaledModel``: ``force``,
        ``generate(expert=...)``); for a plain checkpoint, the plain model.

    Raises:
        SourceError: no such directory or Hub id.
        LoadError: no model, of an unknown format, incomplete, or without the expert.
    """
    directory = locate(path)
    if expert is not None:
        require_expert(directory, expert)
    try:
        config = read_config(directory)
        if config.get("model_type") == MODEL_TYPE:
            return UpscaledPreTrained.from_pretrained(directory, expert=expert, dtype=dtype, **kwargs)
        return model_class(config).from_pretrained(directory, dtype=dtype, **kwargs)
    except KeyError as error:
        raise LoadError(f"{path}: config.json lacks {error}") from error
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"{path}: {' '.join(str(error).split())}") from error


def locate(path: str | Path) -> Path:
    """The directory of a model given as a directory or Hub id, downloaded first if need be.

    Raises:
        SourceError: no such directory or Hub id.
        LoadError: the directory holds no finished model.
    """
    directory = Source.parse(str(path)).resolve()
    if not (directory / "config.json").is_file():
        raise LoadError(f"{path}: not a model directory (no config.json); an interrupted build has none")
    return directory


def load_tokenizer(path: str | Path, **kwargs: Any) -> Any:
    """A model's tokenizer; ``kwargs`` go to ``AutoTokenizer.from_pretrained``. Raises LoadError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(locate(path), **kwargs)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise LoadError(f"{path}: no usable tokenizer: {' '.join(str(error).split())}") from error


def read_config(directory: Path) -> dict:
    """``config.json`` of a model directory. Raises LoadError if it is no JSON."""
    try:
        return json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise LoadError(f"{directory}: config.json cannot be read: {error}") from error


def require_expert(directory: Path, expert: str) -> None:
    """Raise LoadError unless the model in ``directory`` has this expert; every upscaled model has "base"."""
    section = read_config(directory).get("upscale")
    if section is None:
        raise LoadError(f"{directory}: no experts to choose {expert!r} from; it is a plain model")
    if expert not in (*section.get("experts", []), BASE):
        names = ", ".join(section.get("experts", []))
        raise LoadError(f"{directory}: no expert {expert} in this model; it has {names} and {BASE}")
