"""`upscale remove`: experts out of a finished checkpoint."""

import click

from upscale.commands.display import progress_bar, quiet_libraries, show_grown


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
    show_grown(path, grown)
