"""How commands show things: one console, byte counts, progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()
# The same shade scale for every table: bad, middling, good.
_SHADES = ((0.98, "green"), (0.9, "yellow"), (0.0, "red"))


def size(nbytes: float) -> str:
    """Bytes for people: 1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def shade(value: float, text: str) -> str:
    """``text`` coloured by ``value`` from 0 to 1, in rich's markup."""
    colour = next(colour for least, colour in _SHADES if value >= least or least == 0.0)
    return f"[{colour}]{text}[/]"


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr; yields a function of (done, total, what is being done)."""
    columns = (
        TextColumn(title),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)
        yield lambda done, total, what: progress.update(bar, completed=done, total=total, description=what)


def quiet_libraries() -> None:
    """Keep transformers' own bars and warnings out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def show_grown(path: str, grown: Any) -> None:
    """Say what a checkpoint that gained or lost experts has become; ``grown`` is of ``upscale.growing``."""
    for warning in grown.warnings:
        console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False, soft_wrap=True)
    report = grown.report
    experts = ", ".join(report.expert_bytes)
    ratio = report.result_bytes / report.base_bytes
    console.print(
        f"[green]wrote[/] {escape(path)}: {size(report.result_bytes)}, {ratio:.2f}x the base, with {experts}",
        highlight=False,
        soft_wrap=True,
    )
