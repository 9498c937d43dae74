"""Load any model for transformers: an upscaled checkpoint with its routing, or a plain one."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from upscale.errors import LoadError
from upscale.modeling_upscaled import MODEL_TYPE, UpscaledConfig, UpscaledForCausalLM
from zoo import Source

# From here on the Auto classes, AutoTokenizer among them, need no remote code for an upscaled checkpoint.
AutoConfig.register(MODEL_TYPE, UpscaledConfig, exist_ok=True)
AutoModelForCausalLM.register(UpscaledConfig, UpscaledForCausalLM, exist_ok=True)


def load(path: str | Path, *, expert: str | None = None, dtype: str = "auto", **kwargs: Any) -> Any:
    """Load a checkpoint as a transformers causal LM, ready to generate.

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
    try:
        if is_upscaled(directory):
            return UpscaledForCausalLM.from_pretrained(directory, expert=expert, dtype=dtype, **kwargs)
        if expert is not None:
            raise LoadError(f"{path}: has no experts to choose {expert!r} from; it is a plain model")
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **kwargs)
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


def is_upscaled(directory: Path) -> bool:
    """Whether a model directory holds an upscaled checkpoint."""
    return json.loads((directory / "config.json").read_text()).get("model_type") == MODEL_TYPE
