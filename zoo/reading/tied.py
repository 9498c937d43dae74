"""Output heads that share the embeddings' weights."""

import re

import torch

from zoo.errors import CheckpointError
from zoo.reading.model import Model, files

HEAD = "lm_head.weight"
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")


def embedding_of(model: Model) -> str:
    """The tensor of a model's input embedding, [V, d]. Raises CheckpointError if none has a name that is known."""
    found = [name for name, spec in model.tensors.items() if _EMBEDDING.search(name) and len(spec.shape) == 2]
    if not found:
        raise CheckpointError(f"{model.path}: no input embedding found among its tensors")
    return min(found, key=len)


def is_tied(model: Model) -> bool:
    """Whether a model's output head is its embedding: it stores none, or one that is only a copy.

    Configurations may leave that to a default, so the weights decide then.
    """
    if HEAD not in model.tensors:
        return True
    if (said := model.config.get("tie_word_embeddings")) is not None:
        return bool(said)
    if not all(file.is_file() for file in files(model)):  # still on the Hub: a copy is seen once it is here
        return False
    shape = model.tensors[HEAD].shape
    like = [name for name, spec in model.tensors.items() if _EMBEDDING.search(name) and spec.shape == shape]
    return any(torch.equal(model.read(HEAD), model.read(name)) for name in like)


def has_tied_head(model: Model) -> bool:
    """Whether a model is a causal language model that stores no head of its own."""
    named = model.config.get("architectures") or []
    causal = not named or any(_CAUSAL.search(name) for name in named)
    return HEAD not in model.tensors and causal and model.config.get("tie_word_embeddings") is not False
