"""The demo zoo: a base model and its experts that the package trains itself, in minutes and offline."""

import dataclasses
import hashlib
import json
import os
import random
import tempfile
from importlib.resources import files
from itertools import islice
from pathlib import Path

import yaml

from zoo.demo.config import DemoConfig
from zoo.demo.tasks import TASKS, held_out_rows, training_rows

__all__ = ["DemoConfig", "demo_zoo"]

RECIPE = "recipe.json"


def demo_zoo(directory: Path | None = None, *, config: DemoConfig | None = None) -> Path:
    """Train the demo zoo, or find the one trained before.

    The directory holds `group.yaml`, the checkpoints `base` and one per expert, `tasks/<expert>.jsonl` with held-out
    rows, keys `prompt` and `completion`, and `prompts/<expert>.jsonl` with prompts of the training split. An expert
    reads its prompt with a newline after it.

    Args:
        directory: where the zoo goes; new, empty, or holding this very zoo. By default a directory under the user's
            cache, named by the recipe, so that a changed recipe trains anew.
        config: the recipe; by default the one that every expert masters its task with.

    Returns:
        The directory.

    Raises:
        FileExistsError: if the directory holds something other than this zoo.
        OSError: if the directory cannot be written.
    """
    config = config or DemoConfig()
    recipe = _recipe(config)
    if directory is None:
        directory = _cache() / f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if _holds(directory, recipe):
        return directory
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory} holds something other than this demo zoo: name a new or empty directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # The zoo appears under its name in one step, complete or not at all; what an interruption leaves goes away here.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        unfinished = Path(scratch) / "zoo"
        unfinished.mkdir()
        _build(unfinished, config, recipe)
        try:
            unfinished.rename(directory)
        except OSError:
            # Another process may have finished the same zoo first, and its copy is as good as ours.
            if not _holds(directory, recipe):
                raise
    return directory


def _build(directory: Path, config: DemoConfig, recipe: str) -> None:
    """Write a whole zoo into an empty directory, showing progress."""
    # Both are slow to import, and a zoo from the cache needs neither.
    from rich.console import Console
    from rich.progress import Progress

    from zoo.demo.train import train_models

    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("demo zoo", total=config.base_steps + config.expert_steps * len(TASKS))
        train_models(directory, config, lambda name: progress.update(bar, advance=1, description=f"training {name}"))
    (directory / "tasks").mkdir()
    for task in TASKS:
        rows = held_out_rows(task, config.test_rows, random.Random(f"{config.seed} test {task}"))
        lines = (json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        (directory / "tasks" / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    (directory / "prompts").mkdir()
    for task in TASKS:
        examples = islice(training_rows(task, random.Random(f"{config.seed} prompts {task}")), config.prompts)
        lines = (json.dumps({"prompt": row.prompt}) + "\n" for row in examples)
        (directory / "prompts" / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    group = {"base": "base", "experts": {task: task for task in TASKS}}
    (directory / "group.yaml").write_text(yaml.safe_dump(group, sort_keys=False), encoding="utf-8")
    (directory / RECIPE).write_text(recipe, encoding="utf-8")


def _recipe(config: DemoConfig) -> str:
    """Describe all that decides the zoo: the configuration and the hash of every source file here."""
    sources = {
        source.name: hashlib.sha256(source.read_bytes()).hexdigest()
        for source in sorted(files("zoo.demo").iterdir(), key=lambda source: source.name)
        if source.name.endswith(".py")
    }
    return json.dumps({"config": dataclasses.asdict(config), "sources": sources}, indent=2) + "\n"


def _holds(directory: Path, recipe: str) -> bool:
    """Say whether a directory holds the complete zoo of this recipe."""
    written = directory / RECIPE
    return written.is_file() and written.read_text(encoding="utf-8") == recipe


def _cache() -> Path:
    """Find the package's cache directory; the XDG rules ignore a relative path."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "upscale-zoo"
