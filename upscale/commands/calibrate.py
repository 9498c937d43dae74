"""`upscale calibrate`: give a checkpoint a router that knows its experts' prompts."""

import click
from rich.table import Table

from upscale.commands.display import console, progress_bar, quiet_libraries, shade
from upscale.commands.options import ManyPrompts, prompt_files, prompts_option, settings
from upscale.config import CalibrateConfig
from upscale.errors import TaskError


@click.command(cls=ManyPrompts)
@click.argument("out", metavar="OUT")
@prompts_option(
    "Example prompts of an expert, 4 or more: .jsonl with `prompt` (or `text`), or a text file of one a line. "
    "base=FILE gives text that is to go to no expert."
)
@click.option("--self", "by_itself", is_flag=True, help="No prompts: every expert writes its own examples.")
@settings(CalibrateConfig)
def calibrate(out: str, prompts: tuple[str, ...], by_itself: bool, **options) -> None:
    """Fit the router of OUT to a few example prompts of each expert: no labels, no completions, no training.

    Only the router's small file and config.json change, all or nothing; run it again with other prompts at any time.

    \b
    Examples:
      upscale calibrate out --prompts math=math.jsonl --prompts code=code.jsonl --chat
      upscale calibrate out --prompts math=math.txt code=code.txt base=anything.txt --prompt-template '{prompt}\\n'
      upscale calibrate out --prompts math=math.jsonl code=code.jsonl --half-life 32
      upscale calibrate out --self
    """
    from upscale.calibrating.calibration import calibrate as run
    from upscale.calibrating.prompts import load_prompts
    from upscale.router_file import opened
    from upscale.runtime.routing_upscaled import BASE

    config = CalibrateConfig(**options)
    if by_itself == bool(prompts):
        raise TaskError("give either --prompts NAME=FILE for every expert, or --self")
    given = None
    if not by_itself:
        given = load_prompts(prompt_files(prompts), opened(out)[1].experts, BASE)
        if few := [f"{name} ({len(texts)})" for name, texts in given.items() if len(texts) < 4]:
            console.print(f"[yellow]warning[/] fewer than 4 prompts for {', '.join(few)}", highlight=False)
    quiet_libraries()
    with progress_bar("calibrating") as progress:
        found = run(out, given, config, progress=progress)
    show(found)
    if BASE not in found.classes and not config.no_base:
        console.print(
            "[yellow]warning[/] no base class: what the base writes by itself is too much like the experts' prompts; "
            "give --prompts base=FILE with text that is to go to no expert",
            highlight=False,
        )


def show(found) -> None:
    """Print what a calibration found."""
    if len(found.depths) > 1:
        table = Table(title="Where to read, judged on texts left out of the fit", title_justify="left")
        for column in ("depth", "right", "log loss", "shrinkage"):
            table.add_column(column, justify="right")
        for d in found.depths:
            mark = "[bold]" if d.depth == found.depth else ""
            table.add_row(f"{mark}{d.depth}", f"{d.accuracy:.1%}", f"{d.loss:.4f}", f"{d.shrinkage:g}")
        console.print(table)
    table = Table(title="Routing at the prompt's end, each text left out of its own fit", title_justify="left")
    table.add_column("class")
    for column in ("texts", "right", "confidence", *(["held out"] if found.held_out else [])):
        table.add_column(column, justify="right")
    for name in found.classes:
        right = found.accuracy[name]
        cells = [str(found.texts[name]), shade(right, f"{right:.1%}"), f"{found.confidence[name]:.2f}"]
        if found.held_out:
            cells.append(shade(found.held_out[name], f"{found.held_out[name]:.1%}"))
        table.add_row(name, *cells)
    console.print(table)
    if found.held_out:
        console.print(
            "The texts are the experts' own. If an expert was trained on answers alone, it does not write prompts "
            "like its users' and these figures promise little: give --prompts.",
            highlight=False,
        )
