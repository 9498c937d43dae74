"""Evaluation tasks: JSON Lines files of one kind of row each."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upscale.errors import TaskError

# What a row of each kind looks like. The first field of the list that a file's first row has decides the file's kind.
KINDS = {
    "completion": ("generation", '{"prompt": "...", "completion": "..."}'),
    "choices": ("choice", '{"prompt": "...", "choices": ["...", "..."], "answer": 0}, the answer an index or a choice'),
    "label": ("label", '{"prompt": "...", "label": "..."}'),
    "text": ("text", '{"text": "..."}'),
}


@dataclass(frozen=True)
class Row:
    """One row of any kind.

    Attributes:
        prompt: what the model is given; empty in a row of kind "text".
        completion: what is right to follow it: the completion, the right choice or label, or the text.
        choices: what it is chosen from: a row's choices, or all labels of the task in order.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named list of rows of one kind: "generation", "choice", "label" or "text".

    Raises:
        TaskError: another kind, no rows, or a row whose right choice is none of its choices.
    """

    name: str
    rows: Sequence[Row]
    kind: str = "generation"

    def __post_init__(self):
        if self.kind not in (kinds := [kind for kind, _ in KINDS.values()]):
            raise TaskError(f"task {self.name}: kind {self.kind!r} is unknown; there are {', '.join(kinds)}")
        if not self.rows:
            raise TaskError(f"task {self.name}: no rows")
        if self.kind in ("choice", "label") and not all(row.completion in row.choices for row in self.rows):
            raise TaskError(f"task {self.name}: a row's completion is none of its choices")

    @property
    def digest(self) -> str:
        """SHA-256 of all that the task is made of."""
        content = json.dumps([self.name, self.kind, [asdict(row) for row in self.rows]])
        return hashlib.sha256(content.encode()).hexdigest()


def load_tasks(paths: Iterable[str | Path], limit: int | None = None) -> list[Task]:
    """Tasks from files, or from all ``*.jsonl`` files of directories, named after the files.

    Args:
        paths: ``.jsonl`` files with a row of ``KINDS`` in each line, or directories of them.
        limit: take only the first rows of each. A task's labels are those of the whole file.

    Raises:
        TaskError: nothing found, two tasks of one name, or a line that is no such row; names file and line.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise TaskError(f"{path}: no .jsonl file in this directory")
        files += found
    tasks = [_task(file, limit) for file in files]
    require_distinct(tasks)
    return tasks


def require_distinct(tasks: Sequence[Task]) -> None:
    """Raise TaskError if there is no task, or two are of one name."""
    if not tasks:
        raise TaskError("no tasks: give --tasks with a .jsonl file or a directory of them")
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TaskError(f"two tasks are named {twice[0]}; rename one file")


def _task(file: Path, limit: int | None) -> Task:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may hold its other breaks
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{file}: cannot be read: {error}") from error
    field, rows = None, []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if not isinstance(content, Mapping):
                raise ValueError(line)
            field = field or next(name for name in KINDS if name in content)
            rows.append(_row(content, field))
        except (ValueError, KeyError, StopIteration) as error:
            wanted = " or ".join(shape for _, shape in KINDS.values()) if field is None else KINDS[field][1]
            raise TaskError(f"{file}:{number}: not a row like {wanted}") from error
        except TaskError as error:
            raise TaskError(f"{file}:{number}: {error}") from error
    if field is None:
        raise TaskError(f"{file}: no rows")
    if field == "label":
        labels = tuple(sorted({row.completion for row in rows}))
        if len(labels) == 1:
            raise TaskError(f"{file}: all rows have the label {labels[0]!r}; a label task has at least two")
        rows = [Row(row.prompt, row.completion, labels) for row in rows]
    return Task(file.stem, rows[:limit], KINDS[field][0])


def _row(content: Mapping[str, Any], field: str) -> Row:
    """Raises KeyError for a missing field, TaskError for a wrong value."""
    prompt = "" if field == "text" else content["prompt"]
    right = content["answer"] if field == "choices" else content[field]
    choices = _choices(content["choices"]) if field == "choices" else ()
    if choices and type(right) is int and 0 <= right < len(choices):
        right = choices[right]
    if choices and right not in choices:
        raise TaskError(f"answer {right!r} is neither one of the choices nor an index from 0 to {len(choices) - 1}")
    if not (isinstance(prompt, str) and isinstance(right, str)):
        raise TaskError(" and ".join(["prompt"] * (field != "text") + [field]) + " must be strings")
    if not right and field in ("label", "text"):
        raise TaskError(f"{field} is empty")
    return Row(prompt, right, choices)


def _choices(listed: Any) -> tuple[str, ...]:
    if not isinstance(listed, list) or not all(isinstance(choice, str) and choice for choice in listed):
        raise TaskError("choices must be a list of strings, none of them empty")
    if len(set(listed)) < max(2, len(listed)):
        raise TaskError("choices must be at least two, and differ")
    return tuple(listed)
