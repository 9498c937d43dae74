"""`upscale eval`: score models on tasks."""

import json
import os
from pathlib import Path

import click
from rich.table import Table

from upscale.commands.display import console, progress_bar, quiet_libraries
from upscale.commands.options import settings
from upscale.config import EvalConfig
from upscale.errors import TaskError


class _ManyTasks(click.Command):
    """Lets ``--tasks`` take several files at once, as a shell's ``tasks/*.jsonl`` gives them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        for arg in args:
            after_tasks = len(spread) > 1 and spread[-2] == "--tasks"
            spread += ["--tasks", arg] if after_tasks and _is_tasks(arg) else [arg]
        return super().parse_args(ctx, spread)


def _is_tasks(text: str) -> bool:
    path = Path(text)
    return path.suffix == ".jsonl" or (path.is_dir() and any(path.glob("*.jsonl")))


@click.command(name="eval", cls=_ManyTasks)
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]MODEL...")
@click.option(
    "--tasks", multiple=True, required=True, metavar="FILE_OR_DIR...", help=".jsonl tasks, or directories of them."
)
@settings(EvalConfig)
@click.option("--json", "json_file", metavar="FILE", help="Write the results to this file too.")
def evaluate(models: tuple[str, ...], tasks: tuple[str, ...], json_file: str | None, **options) -> None:
    """Score MODELs on tasks: one .jsonl file a task, rows of prompt and completion, greedy answers.

    A MODEL is a directory, a Hub id, or with --engine URL the name that the server gives it.

    \b
    Examples:
      upscale eval base=base smile=out --tasks tasks/
      upscale eval smile=out --tasks tasks/ --expert auto --json scores.json
      upscale eval out --tasks dates.jsonl --engine vllm --prompt-template '{prompt}\\n'
      upscale eval out --tasks tasks/ --engine http://127.0.0.1:8000 --chat
    """
    from upscale.evaluation import evaluate as run
    from upscale.evaluation import to_json
    from upscale.tasks import load_tasks

    config = EvalConfig(**options)
    loaded = load_tasks(tasks, config.limit)
    named = _named(models)
    if json_file is not None and (
        Path(json_file).is_dir() or not os.access(Path(json_file).absolute().parent, os.W_OK)
    ):
        raise TaskError(f"--json {json_file}: no file can be written there")
    quiet_libraries()
    with progress_bar("evaluating") as progress:
        results = run(named, loaded, config, progress=progress)
    show(results)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(to_json(results), indent=2) + "\n")


def show(results) -> None:
    """Print results as a table: a row a model, a column a task."""
    tasks = list(dict.fromkeys(result.task for result in results))
    table = Table(title=f"{results[0].metric}, greedy, {results[0].engine}", title_justify="left")
    table.add_column("model")
    for task in tasks:
        table.add_column(f"{task}\nn={next(r.n for r in results if r.task == task)}", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("seconds", justify="right")
    for model in dict.fromkeys(result.model for result in results):
        rows = [result for result in results if result.model == model]
        scores = {result.task: result.score for result in rows}
        mean = sum(scores.values()) / len(scores)
        cells = [f"{scores[task]:.3f}" if task in scores else "" for task in tasks]
        table.add_row(model, *cells, f"[bold]{mean:.3f}[/]", f"{sum(r.seconds for r in rows):.1f}")
    console.print(table)


def _named(models: tuple[str, ...]) -> dict[str, str]:
    """NAME=MODEL, or MODEL named after its last part."""
    named: dict[str, str] = {}
    for text in models:
        name, found, model = text.partition("=")
        if not found or Path(text).is_dir():
            name, model = Path(text).name or text, text
        if name in named:
            raise TaskError(f"two models are named {name}; write NAME=MODEL")
        named[name] = model
    return named
