"""`upscale rebuild`: a checkpoint again, from its recipe."""

import click
from rich.markup import escape

from upscale.commands.display import console, progress_bar, quiet_libraries
from upscale.commands.options import settings
from upscale.config import BuildConfig
from upscale.errors import RecipeError


@click.command()
@click.argument("recipe", metavar="UPSCALE.YAML")
@click.argument("out")
@click.option(
    "--source", "sources", multiple=True, metavar="NAME=MODEL", help="Where the base or an expert is now; repeat it."
)
@click.option("--allow-pickle", is_flag=True, help="Read pickles, as the build did.")
@settings(BuildConfig, "device", "max_memory")
def rebuild(recipe: str, out: str, sources: tuple[str, ...], allow_pickle: bool, **options) -> None:
    """Build OUT again from the upscale.yaml of a checkpoint: the same files, byte for byte.

    Every source is compared with its pin first: the commit, or the hash of its content. Paths are as they were written;
    from another directory, or if a model was moved, say where it is by --source.

    \b
    Examples:
      upscale rebuild model/upscale.yaml again
      upscale rebuild model/upscale.yaml again --source base=models/base --source math=models/math
    """
    from upscale.building.rebuild import other_version
    from upscale.building.rebuild import rebuild as run

    quiet_libraries()
    moved: dict[str, str] = {}
    for text in sources:
        name, found, model = text.partition("=")
        if not found or not name or not model or name in moved:
            raise RecipeError(f"--source {text}: write NAME=MODEL, each name once")
        moved[name] = model
    if warning := other_version(recipe):
        console.print(f"[yellow]warning[/] {warning}", highlight=False, soft_wrap=True)
    with progress_bar("rebuilding") as progress:
        run(recipe, out, moved, allow_pickle=allow_pickle, progress=progress, **options)
    console.print(f"[green]wrote[/] {escape(out)}", highlight=False, soft_wrap=True)
