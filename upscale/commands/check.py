"""`upscale check`: does a group fit together?"""

import click
from rich.markup import escape
from rich.table import Table

from upscale.commands.display import console, size
from upscale.commands.options import GivenGroup, group_and_rest, group_options


@click.command()
@click.argument("paths", nargs=-1, metavar="[GROUP]")
@group_options
def check(paths: tuple[str, ...], given: GivenGroup) -> None:
    """Compare every expert of GROUP with its base, from configurations and headers alone.

    Prints one verdict with every mismatch; exits with 1 if the group cannot be upscaled.

    \b
    Examples:
      upscale check group.yaml
      upscale check --base base --expert math=ft-math --expert code=org/ft-code@v1
    """
    import zoo

    group, _ = group_and_rest(paths, given, rest=0)
    verdict = zoo.check(group)
    table = Table(title="Group", title_justify="left")
    for column in ("model", "source", "architecture", "tensors", "formats", "size"):
        table.add_column(column)
    models = {"base": (group.base, verdict.base)}
    models |= {name: (group.experts[name], model) for name, model in verdict.experts.items()}
    for name, (source, model) in models.items():
        infos = model.tensors.values()
        formats = ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))
        nbytes = size(sum(info.nbytes for info in infos))
        table.add_row(name, escape(str(source)), str(model.config.get("model_type")), str(len(infos)), formats, nbytes)
    console.print(table)
    for warning in verdict.warnings:
        console.print(f"[yellow]warning[/] {warning}", highlight=False, soft_wrap=True)
    verdict.require()
    console.print(f"[green]ok[/] {len(verdict.experts)} expert(s) fit the base", highlight=False)
