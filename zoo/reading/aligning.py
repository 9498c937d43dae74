"""Make the models of a group have the same tensors: heads that some tie, embeddings of more or fewer tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from zoo.errors import CheckpointError
from zoo.reading.heads import head
from zoo.reading.model import Extent, Model, TensorInfo, TensorSpec
from zoo.reading.product import Product
from zoo.reading.tied import HEAD, embedding_of, has_tied_head, is_tied
from zoo.reading.vocabulary import (
    Vocabulary,
    base_vocabulary,
    extended_tokenizer,
    tokens_of,
    union_vocabulary,
    with_ends,
)

_NAMED = 3  # tokens named in a message


@dataclass(frozen=True)
class View:
    """A model whose tensors are arranged like those of its group.

    Attributes:
        model: whose they are.
        config: its configuration, changed where the arrangement asks for it.
        tensors: as the group has them.
        alias: by tensor, the model's own that stands for it: a tied head's embedding.
        rows: by tensor of the vocabulary, ``{row of the group: own row}``.
        filling: of the rows that are not its own: the base's view, for an expert; for the base, the experts whose
            mean an added row is, as (their rows by tensor, model).
        changed: companion files that differ from the model's own.
    """

    model: Model
    config: Mapping
    tensors: Mapping[str, TensorSpec]
    alias: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    filling: "View | Sequence[View]" = ()
    changed: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """See Model."""
        return self.model.path

    @property
    def own_tensors(self) -> Mapping[str, TensorInfo]:
        """See Model."""
        return self.model.own_tensors

    @property
    def nbytes(self) -> int:
        """See Model."""
        return self.model.nbytes

    @property
    def companions(self) -> Mapping[str, Path | bytes]:
        """See Model."""
        return {**self.model.companions, **self.changed}

    def read(self, name: str) -> Tensor:
        """See Model. Rows that are not the model's own are the base's, or of the base the mean of those that exist."""
        own = self.own(name)
        if name not in self.rows:
            return own
        filled = self._filled(name, own)
        to, of = _pairs(self.rows[name])
        filled[to] = own[of].to(filled.dtype)
        return filled

    def own(self, name: str) -> Tensor:
        """A tensor as the model has it, before its rows are arranged."""
        return self.model.read(self.alias.get(name, name))

    def extent(self, name: str) -> Extent | None:
        """See Model."""
        return None if name in self.rows else self.model.extent(self.alias.get(name, name))

    def known_rank(self, name: str) -> int | None:
        """See Model."""
        return self.model.known_rank(self.alias.get(name, name))

    def product(self, name: str) -> Product | None:
        """See Model."""
        product = self.model.product(self.alias.get(name, name))
        if product is None or name not in self.rows:
            return product
        return product.rows(self.tensors[name].shape[0], *_pairs(self.rows[name]))

    def _filled(self, name: str, own: Tensor) -> Tensor:
        if isinstance(self.filling, View):
            base = self.filling.read(name)
            return base.to(torch.promote_types(base.dtype, own.dtype))
        filled = own.new_zeros(self.tensors[name].shape, dtype=torch.float32)
        count = filled.new_zeros(len(filled))
        for expert in self.filling:
            if added := {to: of for to, of in expert.rows.get(name, {}).items() if to >= len(own)}:
                to, of = _pairs(added)
                filled[to] += expert.own(name)[of].float()
                count[to] += 1
        return (filled / count.clamp_min(1).view(-1, *[1] * (filled.ndim - 1))).to(own.dtype)


@dataclass(frozen=True)
class Refused:
    """An expert's vocabulary that is not arranged: what to say of it, and its tensors."""

    line: str
    tensors: Sequence[str]


@dataclass(frozen=True)
class Alignment:
    """A group's models with the same tensors, and what was found on the way.

    Attributes:
        base: the base.
        experts: by name.
        refused: by expert, a vocabulary that differs and of which nobody said what counts.
        warnings: what is arranged.
        added: tokens that the result has beyond the base's tokenizer, by number.
    """

    base: Model
    experts: Mapping[str, Model]
    refused: Mapping[str, Refused]
    warnings: tuple[str, ...]
    added: Mapping[int, str]


def align(base: Model, experts: Mapping[str, Model], vocabulary: str | None) -> Alignment:
    """Arrange the models of a group.

    - Where some heads are tied and others not, all get one of their own: a tied one's is its embedding.
    - Where embeddings have more or fewer rows than the base's, ``vocabulary`` says what counts: the "base"'s rows, of
      which an expert that lacks some has the base's; or the "union", where the base's added rows are the mean of those
      experts that have them, and an expert that lacks some has the base's.

    Args:
        base: the group's base.
        experts: by name.
        vocabulary: "base", "union", or None to take no difference.

    Raises:
        CheckpointError: the base's tokenizer cannot take the experts' tokens.
    """
    warnings = _added_tokens(base, experts)
    views = {"": View(base, base.config, base.tensors)}
    views |= {name: View(model, model.config, model.tensors) for name, model in experts.items()}
    tied = {name: has_tied_head(view) or (HEAD in view.tensors and is_tied(view)) for name, view in views.items()}
    if any(tied.values()) and (untied := [name or "the base" for name, is_so in tied.items() if not is_so]):
        warnings.append(
            f"heads are tied in some models and not in others ({', '.join(untied)}); the result has one of its own"
        )
        views = {name: _with_head(view) if tied[name] else view for name, view in views.items()}
    base_view, of_experts = views.pop(""), views
    if not (differing := {name: d for name, view in of_experts.items() if (d := _differing(base_view, view))}):
        return Alignment(_bare(base_view), _all_bare(of_experts), {}, tuple(warnings), {})
    if vocabulary is None:
        refused = {name: _refusal(name, base_view, of_experts[name], *d) for name, d in differing.items()}
        return Alignment(_bare(base_view), _all_bare(of_experts), refused, tuple(warnings), {})
    rows = next(iter(differing.values()))[1]
    names = sorted({tensor for tensors, _, _ in differing.values() for tensor in tensors})
    counts = {name: differing[name][2] if name in differing else rows for name in of_experts}
    if vocabulary == "base":
        found = base_vocabulary(rows, counts)
    else:
        found = union_vocabulary(rows, base, {name: (counts[name], view) for name, view in of_experts.items()})
    arranged = _arranged(base_view, of_experts, found, names)
    added = {number: token.text for number, token in found.added.items()}
    return Alignment(*arranged, {}, tuple(warnings), added)


def _arranged(
    base: View, experts: Mapping[str, View], found: Vocabulary, names: Sequence[str]
) -> tuple[View, dict[str, Model]]:
    def sized(view: View) -> dict[str, TensorSpec]:
        return {
            name: TensorSpec((found.size, *spec.shape[1:]), spec.dtype) if name in names else spec
            for name, spec in view.tensors.items()
        }

    views = {n: replace(v, rows=dict.fromkeys(names, found.rows[n]), tensors=sized(v)) for n, v in experts.items()}
    rows = base.tensors[names[0]].shape[0]
    grown = found.size > rows
    base = replace(
        base,
        tensors=sized(base),
        config=_with_vocabulary(base.config, found.size) if grown else base.config,
        rows={name: {n: n for n in range(rows)} for name in names} if grown else {},
        filling=tuple(views.values()),
        changed={**extended_tokenizer(base, found.added), **with_ends(base, experts, found)},
    )
    return base, {n: replace(v, filling=base, config=_with_vocabulary(v.config, found.size)) for n, v in views.items()}


def _with_vocabulary(config: Mapping, size: int) -> dict:
    changed = dict(config)
    if isinstance(text := changed.get("text_config"), dict):
        changed["text_config"] = {**text, "vocab_size": size}
    if "vocab_size" in changed or not text:
        changed["vocab_size"] = size
    return changed


def _with_head(view: View) -> View:
    embedding = embedding_of(view)
    config = {**view.config, "tie_word_embeddings": False}
    tensors = {**view.tensors, HEAD: view.tensors[embedding]}
    return replace(view, config=config, tensors=tensors, alias={HEAD: embedding})


def _differing(base: View, expert: View) -> tuple[list[str], int, int] | None:
    """The tensors of the vocabulary, the base's number of rows and the expert's; None if these are the same."""
    of_head = head(base).keys()
    pairs = {
        name: (spec.shape[0], expert.tensors[name].shape[0])
        for name, spec in base.tensors.items()
        if name in expert.tensors
        and name not in of_head
        and spec.shape
        and expert.tensors[name].shape != spec.shape
        and expert.tensors[name].shape[1:] == spec.shape[1:]
    }
    try:
        embedding = embedding_of(base)
    except CheckpointError:
        return None
    if embedding not in pairs:
        return None
    rows = pairs[embedding]
    return [name for name, pair in pairs.items() if pair == rows], *rows


def _refusal(name: str, base: View, expert: View, tensors: Sequence[str], rows: int, count: int) -> Refused:
    tensor = next((t for t in tensors if t == embedding_of(base)), tensors[0])
    known = {token.text for token in tokens_of(base.path).values()}
    new = [token.text for _, token in sorted(tokens_of(expert.path).items()) if token.text not in known]
    named = f" (it adds {', '.join(new[:_NAMED])}{' ...' if len(new) > _NAMED else ''})" if new else ""
    line = (
        f"expert {name}: vocabulary differs: {count} rows in {tensor}, the base has {rows}{named}; "
        "pass --vocabulary base to keep the base's rows, or --vocabulary union to keep all"
    )
    return Refused(line, tensors)


def _added_tokens(base: Model, experts: Mapping[str, Model]) -> list[str]:
    """One line for each expert whose tokenizer has tokens of its own."""
    ours = {token.text for token in tokens_of(base.path).values()}
    lines = []
    for name, model in experts.items():
        new = {n: t.text for n, t in tokens_of(model.path).items() if t.entry and t.text not in ours}
        if new and ours:
            shown = ", ".join(f"{text} ({number})" for number, text in sorted(new.items())[:_NAMED])
            lines.append(f"expert {name}: tokens of its own: {shown}{' ...' if len(new) > _NAMED else ''}")
    return lines


def _pairs(rows: Mapping[int, int]) -> tuple[list[int], list[int]]:
    return list(rows), list(rows.values())


def _bare(view: View) -> Model:
    """The model itself where nothing of it is arranged."""
    return view.model if not view.alias and view.config is view.model.config else view


def _all_bare(views: Mapping[str, View]) -> dict[str, Model]:
    return {name: _bare(view) for name, view in views.items()}
