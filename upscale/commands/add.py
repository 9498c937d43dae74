"""`upscale add`: experts into a finished checkpoint."""

import click

from upscale.commands.display import progress_bar, quiet_libraries, show_grown
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
    show_grown(path, grown)
