"""Preflight: do these experts fit this base? From configurations and headers alone, every mismatch at once."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from zoo.errors import CheckpointError, MismatchError, SourceError
from zoo.group import Group
from zoo.reading.adapter import Adapter
from zoo.reading.aligning import Refused, align
from zoo.reading.checkpoint import Checkpoint, is_adapter
from zoo.reading.heads import compare, head
from zoo.reading.model import Model, TensorSpec
from zoo.reading.origin import check_origin
from zoo.reading.quantised import quantised
from zoo.reading.tied import HEAD, is_tied
from zoo.source import Source

# Buffers that old versions of transformers saved beside the parameters; no weights, so their absence is no mismatch.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
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
        base: the base, arranged as the result has it.
        experts: each expert, by name, with the base's tensors.
        mismatches: one line each; empty if the group can be built.
        warnings: differences that do not keep it from being built.
        added: tokens that the result's vocabulary has beyond the base's, by number.
    """

    base: Model
    experts: Mapping[str, Model]
    mismatches: tuple[str, ...]
    warnings: tuple[str, ...]
    added: Mapping[int, str] = field(default_factory=dict)

    def require(self) -> None:
        """Raise MismatchError with every mismatch, if there is one."""
        if self.mismatches:
            raise MismatchError(list(self.mismatches))


def parameters(model: Model) -> dict[str, TensorSpec]:
    """A model's weights: without saved buffers, and without a head that is only a copy of tied embeddings."""
    copied = HEAD in model.tensors and is_tied(model)
    return {
        name: spec
        for name, spec in model.tensors.items()
        if not _BUFFERS.search(name) and not (copied and name == HEAD)
    }


def check(group: Group) -> Verdict:
    """Open every model of the group and compare each expert with the base; weights on the Hub stay there.

    Raises:
        SourceError: a model cannot be found or fetched.
        CheckpointError: a directory is no readable checkpoint or adapter; the message names the expert.
    """
    base = Checkpoint.open(group.base.folder(allow_pickle=group.allow_pickle), allow_pickle=group.allow_pickle)
    return check_against(base, group)


def check_against(base: Checkpoint, group: Group) -> Verdict:
    """``check`` with a base that is open already: as another checkpoint holds it, if the group's own is gone.

    Raises:
        SourceError, CheckpointError: see ``check``.
    """
    experts, doubts = {}, []
    for name, source in group.experts.items():
        try:
            experts[name], doubt = _open(source, base, group)
        except (SourceError, CheckpointError) as error:
            raise type(error)(f"expert {name}: {error}") from error
        doubts += [f"expert {name}: {doubt}"] if doubt else []
    verdict = compared(base, experts, group.vocabulary)
    return replace(verdict, warnings=(*doubts, *verdict.warnings))


def checked(group: Group) -> Verdict:
    """The verdict on a group whose weights are all here: those on the Hub are fetched once it has passed.

    Raises:
        MismatchError: it did not pass.
        SourceError, CheckpointError: see ``zoo.check``.
    """
    verdict = check(group)
    verdict.require()
    return check(group) if group.fetch() else verdict


def compared(base: Model, experts: Mapping[str, Model], vocabulary: str | None = None) -> Verdict:
    """The verdict on models that are open already; see ``Group.vocabulary``.

    Raises:
        CheckpointError: the base's tokenizer cannot take the experts' tokens.
    """
    unreadable = _unreadable("base", base)
    odd = {name: _unreadable(f"expert {name}", model) for name, model in experts.items()}
    if unreadable:
        return Verdict(base, experts, (*unreadable, *(line for lines in odd.values() for line in lines)), ())
    odd = {name: lines or _foreign(name, base, experts[name]) for name, lines in odd.items()}
    aligned = align(base, {name: model for name, model in experts.items() if not odd[name]}, vocabulary)
    mismatches, warnings = [], list(aligned.warnings)
    for name in experts:
        if odd[name]:
            mismatches += odd[name]
            continue
        model = aligned.experts[name]
        mismatches += _compare(name, aligned.base, model, aligned.refused.get(name))
        warnings += _differences(name, aligned.base, model)
    return Verdict(aligned.base, {**experts, **aligned.experts}, tuple(mismatches), tuple(warnings), aligned.added)


def _open(source: Source, base: Checkpoint, group: Group) -> tuple[Model, str | None]:
    """An expert, and what cannot be told of it."""
    folder = source.folder(allow_pickle=group.allow_pickle)
    if not is_adapter(folder):
        return Checkpoint.open(folder, allow_pickle=group.allow_pickle), None
    adapter = Adapter.open(folder, base, allow_pickle=group.allow_pickle)
    try:
        return adapter, check_origin(adapter.settings, group.base.location, group.base.revision, base)
    except CheckpointError as error:
        raise CheckpointError(f"{folder.path}: {error}") from error


def _unreadable(who: str, model: Model) -> list[str]:
    if problem := quantised(model):
        return [f"{who}: {problem}"]
    if not isinstance(model.config.get("model_type"), str):
        return [f"{who}: config.json has no model_type"]
    if "upscale" in model.config:
        return [f"{who}: is an upscaled model already; give the models that it was built from"]
    if "auto_map" in model.config:
        return [f"{who}: needs remote code (auto_map), which cannot be upscaled"]
    odd = [name for name, spec in parameters(model).items() if not spec.dtype.is_floating_point]
    return [f"{who}: tensor {odd[0]} is {model.tensors[odd[0]].dtype}, not a float of 16 bits or more"] if odd else []


def _foreign(name: str, base: Model, expert: Model) -> list[str]:
    if (theirs := expert.config["model_type"]) != (ours := base.config["model_type"]):
        return [f"expert {name}: architecture {theirs} is not the base's {ours}; it was not fine-tuned from this base"]
    return []


def _compare(name: str, base: Model, expert: Model, refused: Refused | None) -> list[str]:
    own = head(base).keys() | head(expert).keys()
    have, want = ({n: info for n, info in parameters(m).items() if n not in own} for m in (expert, base))
    lines = [
        f"expert {name}: config.json has {key} {expert.config[key]}, the base's is {base.config[key]}; "
        "it computes something else with the same weights"
        for key in _differing(base, expert)
        if _COMPUTED.fullmatch(key)
    ]
    absent, extra = want.keys() - have.keys(), have.keys() - want.keys()
    lines += _listed(f"expert {name}: lacks", sorted(absent))
    lines += _listed(f"expert {name}: has, the base has not:", sorted(extra))
    lines += [refused.line] if refused else []
    lines += [
        f"expert {name}: {tensor} has shape {list(have[tensor].shape)}, the base's is {list(want[tensor].shape)}"
        for tensor in sorted(want.keys() & have.keys())
        if have[tensor].shape != want[tensor].shape and not (refused and tensor in refused.tensors)
    ]
    lines += compare(name, base, expert)
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"expert {name}: and {len(lines) - _SHOWN} more"]


def _listed(what: str, tensors: list[str]) -> list[str]:
    more = f" and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else ""
    return [f"{what} {', '.join(tensors[:_SHOWN])}{more}"] if tensors else []


def _differing(base: Model, expert: Model) -> list[str]:
    """Fields of ``config.json`` that both have, with different values."""
    shared = base.config.keys() & expert.config.keys() - _HISTORY
    if not (base.config.get("use_sliding_window", True) or expert.config.get("use_sliding_window", True)):
        shared -= {"sliding_window", "max_window_layers"}  # which then mean nothing
    return sorted(key for key in shared if base.config[key] != expert.config[key])


def _differences(name: str, base: Model, expert: Model) -> list[str]:
    lines = [
        f"expert {name}: config.json has {key} {expert.config[key]}; the result keeps the base's {base.config[key]}"
        for key in _differing(base, expert)
        if not _COMPUTED.fullmatch(key) and not (key in _LABELS and head(base))
    ]
    for file, what in (("tokenizer.json", "tokenizer"), ("chat_template.jinja", "chat template")):
        ours, theirs = (_digest(model.companions.get(file)) for model in (base, expert))
        if theirs is not None and ours != theirs:
            lines.append(f"expert {name}: {what} differs from the base's, which the result keeps")
    return lines


def _digest(content: Path | bytes | None) -> str | None:
    if content is None:
        return None
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()
