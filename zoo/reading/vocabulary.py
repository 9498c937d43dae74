"""Vocabularies of a group that differ: which row of an expert's embeddings becomes which row of the group's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import CheckpointError
from zoo.reading.companions import companions
from zoo.reading.folder import Folder
from zoo.reading.model import Model

TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_GENERATION = "generation_config.json"
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece")  # what their files' names begin with


@dataclass(frozen=True)
class Token:
    """A token that a fine-tune added: its text, and how its tokenizer describes it."""

    text: str
    entry: Mapping


@dataclass(frozen=True)
class Vocabulary:
    """The group's tokens.

    Attributes:
        size: number of rows of the embeddings; the base's own if nothing is added.
        rows: by expert, ``{row of the group: row of the expert}`` for all rows that are the expert's.
        added: tokens beyond those of the base's tokenizer, by their row in the group.
    """

    size: int
    rows: Mapping[str, Mapping[int, int]]
    added: Mapping[int, Token] = field(default_factory=dict)


def tokens_of(path: Path) -> dict[int, Token]:
    """All tokens of a model's ``tokenizer.json``, by number; empty if it has none that can be read.

    An expert's tokenizer is not carried on, so that one which is broken takes nothing from what is built.
    """
    try:
        content: Any = Folder(path).read_json(TOKENIZER)
        known = content["model"].get("vocab") or {}
        pairs = known.items() if isinstance(known, dict) else ((pair[0], n) for n, pair in enumerate(known))
        found = {int(number): Token(str(text), {}) for text, number in pairs}
        return found | {int(e["id"]): Token(str(e["content"]), e) for e in content.get("added_tokens") or []}
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError, IndexError):
        return {}


def base_vocabulary(rows: int, experts: Mapping[str, int]) -> Vocabulary:
    """The base's rows alone; of an expert, those that both have.

    Args:
        rows: of the base's embeddings.
        experts: rows of each expert's.
    """
    return Vocabulary(rows, {name: {n: n for n in range(min(rows, count))} for name, count in experts.items()})


def union_vocabulary(rows: int, base: Model, experts: Mapping[str, tuple[int, Model]]) -> Vocabulary:
    """The base's rows and whatever any expert has beyond them, each token once.

    Tokens that experts added follow those of the base's tokenizer in the order of the experts, since tokenizers number
    them so: the base's own padding rows come first. Tokens of one text are one token. Rows beyond the base's that no
    tokenizer names follow, those of one number as one.

    Args:
        rows: of the base's embeddings.
        base: the base, whose tokenizer says what is new.
        experts: rows of each expert's embeddings, and the expert.
    """
    ours = tokens_of(base.path)
    texts = {token.text for token in ours.values()}
    named: dict[str, dict[int, Token]] = {}
    for name, (count, model) in experts.items():
        found = sorted(tokens_of(model.path).items())
        named[name] = {n: t for n, t in found if n < count and t.entry and t.text not in texts}
    first = max(ours) + 1 if ours else rows
    tokens = {token.text: token for found in named.values() for token in found.values()}
    places = {text: first + n for n, text in enumerate(tokens)}
    bare = {n for name, (count, _) in experts.items() for n in range(rows, count) if n not in named[name]}
    start = max(rows, first + len(places))
    moved = {n: start + k for k, n in enumerate(sorted(bare))}
    maps = {}
    for name, (count, _) in experts.items():
        own = {n: n for n in range(min(rows, count)) if n not in named[name]}
        own |= {moved[n]: n for n in range(rows, count) if n not in named[name]}
        maps[name] = own | {places[token.text]: n for n, token in named[name].items()}
    return Vocabulary(start + len(moved), maps, {places[text]: token for text, token in tokens.items()})


def extended_tokenizer(base: Model, added: Mapping[int, Token]) -> dict[str, bytes]:
    """The base's tokenizer files that change, with the tokens ``added`` by their numbers.

    Raises:
        CheckpointError: the base has a tokenizer, but no ``tokenizer.json`` to extend.
    """
    files = companions(base.path)
    if not added or not any(name.startswith(_TOKENIZERS) for name in files):
        return {}
    folder = Folder(base.path)
    if TOKENIZER not in files:
        raise CheckpointError(
            f"{base.path}: no {TOKENIZER} that the experts' tokens could be added to; pass --vocabulary base, or save "
            "the base's tokenizer with a fast one"
        )
    content: Any = folder.read_json(TOKENIZER)
    plain: dict[str, Any] = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    entries: list[Any] = [{**plain, **t.entry, "id": n, "content": t.text} for n, t in sorted(added.items())]
    listed: list[Any] = [*(content.get("added_tokens") or []), *entries]
    content["added_tokens"] = sorted(listed, key=lambda entry: entry["id"])
    changed = {TOKENIZER: _dump(content)}
    if (base.path / _SETTINGS).is_file():
        settings: Any = folder.read_json(_SETTINGS)
        if isinstance(known := settings.get("added_tokens_decoder"), dict):
            decoder = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
            settings["added_tokens_decoder"] = {**known, **decoder}
            changed[_SETTINGS] = _dump(settings)
    return changed


def with_ends(base: Model, experts: Mapping[str, Model], found: Vocabulary) -> dict[str, bytes]:
    """The base's ``generation_config.json`` with the tokens at which experts end their answers, if any are new ones.

    Without them an expert that learnt to end with a token of its own would never stop.
    """
    ends = _ends(base)
    for name, model in experts.items():
        places = {of: to for to, of in found.rows[name].items()}
        ends += [places[end] for end in _ends(model) if places.get(end) in found.added and places[end] not in ends]
    if len(ends) == len(_ends(base)):
        return {}
    present = _GENERATION in companions(base.path)
    settings = Folder(base.path).read_json(_GENERATION) if present else {}
    return {_GENERATION: _dump({**settings, "eos_token_id": ends})}


def _ends(model: Model) -> list[int]:
    """The numbers of the tokens at which a model ends its answers."""
    settings: Mapping = model.config
    if _GENERATION in companions(model.path):
        settings = {**settings, **Folder(model.path).read_json(_GENERATION)}
    ends = settings.get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def _dump(content: Mapping) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
