"""Example prompts of each expert, for calibration: JSON Lines or plain text, one prompt a line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from upscale.errors import TaskError

LEAST = 2  # prompts of an expert: with one, none is left when it is left out


def load_prompts(files: Mapping[str, Sequence[str | Path]], experts: Sequence[str], fallback: str | None) -> dict:
    """Prompts by expert, in the order of ``experts``.

    Args:
        files: by expert, ``.jsonl`` files with ``prompt`` (or ``text``) in each line, or text files of one a line.
        experts: names of all experts; each needs prompts.
        fallback: a further name that may have prompts; None for none.

    Raises:
        TaskError: an unknown or missing expert, a file that cannot be read or used, too few prompts; says which.
    """
    names = [*experts, *([] if fallback is None else [fallback])]
    has = ", ".join(experts) + ("" if fallback is None else f" and {fallback}")
    if unknown := sorted(files.keys() - {*names}):
        raise TaskError(f"--prompts {unknown[0]}: no such expert; the model has {has}")
    if missing := [name for name in experts if name not in files]:
        raise TaskError(f"no prompts for {', '.join(missing)}: every expert needs --prompts NAME=FILE")
    prompts = {}
    for name in names:
        if name not in files:
            continue
        prompts[name] = [prompt for file in files[name] for prompt in _read(Path(file))]
        if len(prompts[name]) < LEAST:
            raise TaskError(
                f"--prompts {name}: {len(prompts[name])} prompt(s) in {', '.join(map(str, files[name]))}; "
                f"at least {LEAST} are needed, 4 to 16 are advised"
            )
    return prompts


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{file}: cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise TaskError(f"{file}: no prompts; the file is empty")
    return [_row(file, number, line) if file.suffix == ".jsonl" else line for number, line in numbered]


def _row(file: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
        prompt = row if isinstance(row, str) else row.get("prompt", row.get("text"))
    except (ValueError, AttributeError) as error:
        raise TaskError(f'{file}:{number}: not a row like {{"prompt": "..."}}') from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise TaskError(f'{file}:{number}: not a row like {{"prompt": "..."}}')
    return prompt


def load_tensors(files: Mapping[str, Sequence[str | Path]]) -> dict[str, dict[str, Tensor]]:
    """Inputs by expert and name, from ``.safetensors`` files; those of several files one after the other.

    Raises:
        TaskError: a file that cannot be read, or files that do not hold the same names.
    """
    found = {}
    for name, given in files.items():
        try:
            parts = [load_file(file) for file in given]
            found[name] = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise TaskError(f"--prompts {name}: {', '.join(map(str, given))}: cannot be read: {error}") from error
    return found
