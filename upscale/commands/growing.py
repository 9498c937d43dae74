"""`upscale add`, `upscale remove`, `upscale list`: the experts of a finished checkpoint."""

import json

import click
from rich.markup import escape
from rich.table import Table

from upscale.commands.display import console, progress_bar, quiet_libraries, shade, size
from upscale.commands.options import named_models, pickle_option, settings, vocabulary_option
from upscale.config import BuildConfig


@click.command()
@click.argument("path", metavar="OUT")
@click.argument("experts", nargs=-1, required=True, metavar="NAME=MODEL...")
@click.option("--rank", type=int, metavar="R", help="Rank of the new experts, instead of what the recipe says.")
@click.option(
    "--energy",
    type=float,
    metavar="PART",
    help="Part of each of the new experts' squared deltas to keep, instead of what the recipe says.",
)
@vocabulary_option
@pickle_option
@settings(BuildConfig, "device", "max_memory")
def add(path: str, experts: tuple[str, ...], **options) -> None:
    """Add experts to OUT, as if it had been built with them: the other experts' models and the base are not needed.

    Everything is done as OUT's recipe says. OUT is exchanged for the new checkpoint in one step.

    \b
    Examples:
      upscale add out law=ft-law
      upscale add out law=org/ft-law@v1 med=lora-med --rank 16
    """
    from upscale.growing.grow import add as run

    named = named_models(experts)
    quiet_libraries()
    with progress_bar("adding") as progress:
        grown = run(path, named, progress=progress, **options)
    _show(path, grown)


@click.command()
@click.argument("path", metavar="OUT")
@click.argument("experts", nargs=-1, required=True, metavar="NAME...")
def remove(path: str, experts: tuple[str, ...]) -> None:
    """Take experts out of OUT; the others stay as they are, to the bit.

    OUT is exchanged for the new checkpoint in one step.

    \b
    Examples:
      upscale remove out law
    """
    from upscale.growing.grow import remove as run

    quiet_libraries()
    with progress_bar("removing") as progress:
        grown = run(path, experts, progress=progress)
    _show(path, grown)


def _show(path: str, grown) -> None:
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


@click.command("list")
@click.argument("path", metavar="OUT")
@click.option("--json", "as_json", is_flag=True, help="Print plain JSON instead of a table.")
def list_(path: str, as_json: bool) -> None:
    """Show the experts of OUT: where they come from, their ranks, what they keep, what they take.

    \b
    Examples:
      upscale list out
      upscale list org/zoo --json
    """
    from upscale.growing.inventory import inventory

    quiet_libraries()
    found = inventory(path)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    table = Table(title="Experts", title_justify="left")
    for column in ("expert", "source", "version", "ranks", "energy kept", "size", "share"):
        justify = "left" if column in ("expert", "source", "version") else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for name, own in found.experts.items():
        ranks = "-" if own.ranks is None else "to".join(dict.fromkeys(f" {rank} " for rank in own.ranks)).strip()
        kept = "" if own.energy is None else shade(own.energy, f"{own.energy:.2%}")
        cells = (ranks, kept, size(own.nbytes), f"{own.nbytes / found.nbytes:.1%}")
        table.add_row(name, escape(own.source), own.version, *cells)
    console.print(table)
    console.print(f"router     {found.router}", highlight=False)
    console.print(f"size       {size(found.nbytes)}, of which the base has {size(found.base_bytes)}", highlight=False)
