"""`upscale recipes`: ready group files."""

import click
from rich.markup import escape
from rich.table import Table

from upscale.commands.display import console


@click.command()
@click.argument("name", required=False)
@click.argument("file", required=False)
def recipes(name: str | None, file: str | None) -> None:
    """List ready group files, or copy the one called NAME to FILE (NAME.yaml by default), which must not exist.

    Each opens with its commands and the published scores to expect.

    \b
    Examples:
      upscale recipes
      upscale recipes mistral-7b
      upscale recipes flan-t5-glue-lora groups/glue.yaml
    """
    from zoo.recipes import recipe
    from zoo.recipes import recipes as known

    if name is not None:
        out = recipe(name).copy(file or f"{name}.yaml")
        console.print(f"[green]wrote[/] {escape(str(out))}; its first lines say what to run", highlight=False)
        return
    table = Table(title="Recipes", title_justify="left", show_lines=True)
    for column in ("name", "base", "experts", "what to expect"):
        table.add_column(column, no_wrap=column == "name")
    for each in known():
        experts = ", ".join(each.group.experts)
        table.add_row(each.name, escape(str(each.group.base)), experts, escape(each.expect))
    console.print(table)
