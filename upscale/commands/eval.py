"""`upscale eval`: score models on tasks."""

import os
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape
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
@click.argument("models", nargs=-1, metavar="[[NAME=]MODEL]...")
@click.option(
    "--tasks", multiple=True, required=True, metavar="FILE_OR_DIR...", help=".jsonl tasks, or directories of them."
)
@click.option(
    "--group", metavar="GROUP", help="Add the base, every expert, their average, task arithmetic and TIES of a group."
)
@settings(EvalConfig)
@click.option("--json", "json_file", metavar="FILE", help="Keep results here; what is there is not computed again.")
@click.option("--markdown", "markdown_file", metavar="FILE", help="Write the table as Markdown.")
@click.option("--html", "html_file", metavar="FILE", help="Write a report with plots, one page that fetches nothing.")
def evaluate(
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    group: str | None,
    json_file: str | None,
    markdown_file: str | None,
    html_file: str | None,
    **options,
) -> None:
    """Score MODELs on tasks, one .jsonl file a task, with intervals, retention, routing, size and speed.

    A MODEL is a directory, a Hub id, or with --engine URL the name that the server gives it. A task's rows decide how
    it is scored: {"prompt", "completion"} by a greedy answer; {"prompt", "choices", "answer"} and {"prompt", "label"}
    by the likeliest choice or label; {"text"} by perplexity.

    \b
    Examples:
      upscale eval base=base smile=out --tasks tasks/
      upscale eval smile=out --group group.yaml --oracle --tasks tasks/ --json scores.json --html scores.html
      upscale eval out --tasks dates.jsonl --engine vllm --prompt-template '{prompt}\\n'
      upscale eval out --tasks tasks/ --engine http://127.0.0.1:8000 --chat
    """
    from upscale.evaluating.evaluation import evaluate as run
    from upscale.evaluating.score_page import to_html
    from upscale.evaluating.score_plots import require_matplotlib
    from upscale.evaluating.scoreboard import to_markdown
    from upscale.evaluating.tasks import load_tasks

    config = EvalConfig(**options)
    loaded = load_tasks(tasks, config.limit)
    named = _named(models)
    for flag, file in (("--markdown", markdown_file), ("--html", html_file)):
        if file is not None and (Path(file).is_dir() or not os.access(Path(file).absolute().parent, os.W_OK)):
            raise TaskError(f"{flag} {file}: no file can be written there")
    if html_file is not None:
        require_matplotlib("--html")
    quiet_libraries()
    with progress_bar("evaluating") as progress:
        results = run(named, loaded, config, group=group, file=json_file, progress=progress)
    show(results)
    if markdown_file is not None:
        Path(markdown_file).write_text(to_markdown(results), encoding="utf-8")
    if html_file is not None:
        Path(html_file).write_text(to_html(results, config), encoding="utf-8")
    for file in (json_file, markdown_file, html_file):
        if file is not None:
            console.print(f"[green]wrote[/] {escape(file)}", highlight=False, soft_wrap=True)


def show(results) -> None:
    """Print results as two tables, a row a model: scores by task, and what each model costs."""
    from upscale.evaluating.scoreboard import overall_board, scores_board

    for board in (scores_board(results), overall_board(results)):
        title = f"{board.title}, {results[0].engine}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column(_lines(board.header[0]), min_width=12)
        for cell in board.header[1:]:
            table.add_column(_lines(cell), justify="right", no_wrap=True)
        for row in board.rows:
            table.add_row(*(_lines(cell) for cell in row))
        console.print(table)
        console.print(board.note, style="dim", highlight=False)


def _lines(cell) -> str:
    return f"{escape(cell.text)}\n[dim]{escape(cell.small)}[/]" if cell.small else escape(cell.text)


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
