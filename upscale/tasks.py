"""Evaluation tasks: JSON Lines files with a prompt and the completion that is right."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from upscale.errors import TaskError

# How an answer is scored against the completion: 0 or 1.
METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": lambda answer, right: float(answer.strip() == right.strip()),
    "contains": lambda answer, right: float(right.strip() in answer),
}


@dataclass(frozen=True)
class Row:
    """A prompt and its right completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Task:
    """A named list of rows."""

    name: str
    rows: Sequence[Row]


def load_tasks(paths: Iterable[str | Path], limit: int | None = None) -> list[Task]:
    """Tasks from files, or from all ``*.jsonl`` files of directories, named after the files.

    Args:
        paths: ``.jsonl`` files with ``prompt`` and ``completion`` in each line, or directories of them.
        limit: take only the first rows of each.

    Raises:
        TaskError: nothing found, two tasks of one name, or a line that is no such row; names file and line.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise TaskError(f"{path}: no .jsonl file in this directory")
        files += found
    if not files:
        raise TaskError("no tasks: give --tasks with a .jsonl file or a directory of them")
    tasks = [Task(file.stem, _rows(file)[:limit]) for file in files]
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TaskError(f"two tasks are named {twice[0]}; rename one file")
    return tasks


def _rows(file: Path) -> list[Row]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{file}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(Row(row["prompt"], row["completion"]))
        except (ValueError, TypeError, KeyError) as error:
            raise TaskError(f'{file}:{number}: not a row like {{"prompt": "...", "completion": "..."}}') from error
        if not (isinstance(rows[-1].prompt, str) and isinstance(rows[-1].completion, str)):
            raise TaskError(f"{file}:{number}: prompt and completion must be strings")
    if not rows:
        raise TaskError(f"{file}: no rows")
    return rows
