"""`upscale list`: the experts of a finished checkpoint."""

import json

import click
from rich.markup import escape
from rich.table import Table

from upscale.commands.display import console, quiet_libraries, shade, size


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
