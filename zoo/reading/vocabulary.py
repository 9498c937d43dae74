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

    A token keeps the number that its expert gave it unless another's token has that number: then it gets the next free
    one. Tokens of one text are one token. Rows beyond the base's that no tokenizer names are kept as they are.

    Args:
        rows: of the base's embeddings.
        base: the base, whose tokenizer says what is new.
        experts: rows of each expert's embeddings, and the expert.
    """
    ours = tokens_of(base.path)
    texts = {token.text for token in ours.values()}
    size = max([rows, *(count for count, _ in experts.values())])
    owners: dict[int, str] = {}  # row of the group -> the text of the token there, or "" for a row without a name
    places: dict[str, int] = {}
    added: dict[int, Token] = {}
    maps = {}
    for name, (count, model) in experts.items():
        theirs = tokens_of(model.path)
        own = {n: n for n in range(min(rows, count))}
        new = {n: t for n, t in theirs.items() if n < count and t.entry and t.text not in texts}
        for number in sorted({*new, *range(rows, count)}):
            own.pop(number, None)
            token = new.get(number)
            text = token.text if token else ""
            place = places.get(text, number) if text else number
            if owners.get(place, text) != text or place in ours:
                place, size = size, size + 1
            owners[place] = text
            if token:
                places[text] = place
                added.setdefault(place, token)
            own[place] = number
        maps[name] = own
    return Vocabulary(size, maps, added)


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
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    entries: list[dict] = [{**plain, **t.entry, "id": n, "content": t.text} for n, t in sorted(added.items())]
    content["added_tokens"] = sorted([*(content.get("added_tokens") or []), *entries], key=lambda entry: entry["id"])
    changed = {TOKENIZER: _dump(content)}
    if (base.path / _SETTINGS).is_file():
        settings: Any = folder.read_json(_SETTINGS)
        if isinstance(known := settings.get("added_tokens_decoder"), dict):
            decoder = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
            settings["added_tokens_decoder"] = {**known, **decoder}
            changed[_SETTINGS] = _dump(settings)
    return changed


def _dump(content: Mapping) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
