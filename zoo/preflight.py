"""Preflight: do these experts fit this base? From configurations and headers alone, every mismatch at once."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.errors import CheckpointError, MismatchError, SourceError
from zoo.group import Group
from zoo.reading.checkpoint import Checkpoint, TensorInfo
from zoo.reading.heads import compare, head

# Buffers that old versions of transformers saved beside the parameters; no weights, so their absence is no mismatch.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
_EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out|tok_embeddings)\.weight$")
_HEAD = "lm_head.weight"
# Fields that decide what a forward pass computes: with another value, an expert's weights mean something else.
_COMPUTED = re.compile(
    r"num_(attention|key_value)_heads|n_head|head_dim|rope_.*|rotary_.*|partial_rotary_factor|(rms|layer)_norm_eps(ilon)?"
    r"|hidden_act|hidden_activation|activation_function|attention_bias|mlp_bias|sliding_window|layer_types|.*_multiplier"
    r"|.*_logit_softcapping|logit_scale|query_pre_attn_scalar|scale_.*"
)
# Fields that say how a model was made or saved.
_HISTORY = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"}
_LABELS = {"id2label", "label2id", "num_labels", "problem_type"}  # of a head, which is the expert's own
_SHOWN = 5  # tensors named per expert and kind of mismatch


@dataclass(frozen=True)
class Verdict:
    """The opened models and everything that keeps them from being one group.

    Attributes:
        base: the base's headers.
        experts: each expert's headers, by name.
        mismatches: one line each; empty if the group can be built.
        warnings: differences that do not keep it from being built.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    mismatches: tuple[str, ...]
    warnings: tuple[str, ...]

    def require(self) -> None:
        """Raise MismatchError with every mismatch, if there is one."""
        if self.mismatches:
            raise MismatchError(list(self.mismatches))


def parameters(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """A checkpoint's weights: without saved buffers, and without a head that is only a copy of tied embeddings."""
    copied = _HEAD in checkpoint.tensors and _tied(checkpoint)
    return {
        name: info
        for name, info in checkpoint.tensors.items()
        if not _BUFFERS.search(name) and not (copied and name == _HEAD)
    }


def _tied(checkpoint: Checkpoint) -> bool:
    """Whether a stored head is tied. Configurations may leave that to a default, so the weights decide then."""
    if (said := checkpoint.config.get("tie_word_embeddings")) is not None:
        return bool(said)
    shape = checkpoint.tensors[_HEAD].shape
    like = [n for n, info in checkpoint.tensors.items() if n != _HEAD and info.shape == shape and _EMBEDDING.search(n)]
    return any(torch.equal(checkpoint.read(_HEAD), checkpoint.read(name)) for name in like)


def check(group: Group) -> Verdict:
    """Open every model of the group and compare each expert with the base.

    Raises:
        SourceError: a model cannot be found or fetched.
        CheckpointError: a directory is no readable checkpoint; the message names the expert.
    """
    base = Checkpoint.open(group.base.resolve())
    experts, mismatches, warnings = {}, [], []
    unreadable = _unreadable("base", base)
    for name, source in group.experts.items():
        try:
            experts[name] = Checkpoint.open(source.resolve())
        except (SourceError, CheckpointError) as error:
            raise type(error)(f"expert {name}: {error}") from error
        found = _unreadable(f"expert {name}", experts[name])
        mismatches += found if found or unreadable else _compare(name, base, experts[name])
        warnings += _differences(name, base, experts[name])
    return Verdict(base, experts, (*unreadable, *mismatches), tuple(warnings))


def _unreadable(who: str, model: Checkpoint) -> list[str]:
    if quantised := model.config.get("quantization_config"):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        return [f"{who}: weights are quantised ({kind}); use the unquantised model, and quantise the result"]
    if not isinstance(model.config.get("model_type"), str):
        return [f"{who}: config.json has no model_type"]
    if "upscale" in model.config:
        return [f"{who}: is an upscaled model already; give the models that it was built from"]
    if "auto_map" in model.config:
        return [f"{who}: needs remote code (auto_map), which cannot be upscaled"]
    infos = parameters(model).items()
    odd = [name for name, info in infos if not info.dtype.is_floating_point or info.dtype.itemsize < 2]
    return [f"{who}: tensor {odd[0]} is {model.tensors[odd[0]].dtype}, not a float of 16 bits or more"] if odd else []


def _compare(name: str, base: Checkpoint, expert: Checkpoint) -> list[str]:
    if (theirs := expert.config["model_type"]) != (ours := base.config["model_type"]):
        return [f"expert {name}: architecture {theirs} is not the base's {ours}; it was not fine-tuned from this base"]
    own = head(base).keys() | head(expert).keys()
    have, want = ({n: info for n, info in parameters(m).items() if n not in own} for m in (expert, base))
    lines = [
        f"expert {name}: config.json has {key} {expert.config[key]}, the base's is {base.config[key]}; "
        "it computes something else with the same weights"
        for key in _differing(base, expert)
        if _COMPUTED.fullmatch(key)
    ]
    absent, extra = want.keys() - have.keys(), have.keys() - want.keys()
    if _HEAD in absent | extra:
        whose = ("base", f"expert {name}") if _HEAD in absent else (f"expert {name}", "base")
        lines.append(
            f"expert {name}: tied and untied heads do not mix: {whose[0]} has {_HEAD}, {whose[1]} has not; "
            "save the expert with the base's tie_word_embeddings"
        )
    lines += _listed(f"expert {name}: lacks", sorted(absent - {_HEAD}))
    lines += _listed(f"expert {name}: has, the base has not:", sorted(extra - {_HEAD}))
    for tensor in sorted(want.keys() & have.keys()):
        if (theirs := have[tensor].shape) == (ours := want[tensor].shape):
            continue
        if _EMBEDDING.search(tensor) and theirs[1:] == ours[1:]:
            lines.append(
                f"expert {name}: vocabulary differs: {theirs[0]} rows in {tensor}, the base has {ours[0]}; "
                "resize the expert's embeddings to the base's"
            )
        else:
            lines.append(f"expert {name}: {tensor} has shape {list(theirs)}, the base's is {list(ours)}")
    lines += compare(name, base, expert)
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"expert {name}: and {len(lines) - _SHOWN} more"]


def _listed(what: str, tensors: list[str]) -> list[str]:
    more = f" and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else ""
    return [f"{what} {', '.join(tensors[:_SHOWN])}{more}"] if tensors else []


def _differing(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Fields of ``config.json`` that both have, with different values."""
    shared = base.config.keys() & expert.config.keys() - _HISTORY
    return sorted(key for key in shared if base.config[key] != expert.config[key])


def _differences(name: str, base: Checkpoint, expert: Checkpoint) -> list[str]:
    lines = [
        f"expert {name}: config.json has {key} {expert.config[key]}; the result keeps the base's {base.config[key]}"
        for key in _differing(base, expert)
        if not _COMPUTED.fullmatch(key) and not (key in _LABELS and head(base))
    ]
    for file, what in (("tokenizer.json", "tokenizer"), ("chat_template.jinja", "chat template")):
        ours, theirs = (_digest(model.path / file) for model in (base, expert))
        if theirs is not None and ours != theirs:
            lines.append(f"expert {name}: {what} differs from the base's, which the result keeps")
    return lines


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
