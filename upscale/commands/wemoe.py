"""`upscale wemoe`: build a WEMoE model."""

import click

from upscale.commands.building import run
from upscale.commands.options import GivenGroup, group_and_rest, group_options, settings
from upscale.config import WemoeConfig


@click.command()
@click.argument("paths", nargs=-1, metavar="[GROUP] OUT")
@group_options
@settings(WemoeConfig)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
def wemoe(paths: tuple[str, ...], given: GivenGroup, dry_run: bool, **options) -> None:
    """Build OUT, one WEMoE model from all models of GROUP: merged, but for the MLPs, which keep every task vector.

    Until its routers are adapted (upscale adapt) it is the merge. OUT must not exist; it appears when it is complete.

    \b
    Examples:
      upscale wemoe group.yaml out --rank 64
      upscale wemoe group.yaml out --vectors sparse --density 0.1 --shared-router
      upscale wemoe out --base base --expert math=ft-math --expert code=ft-code --merge ties --dry-run
    """
    from upscale.building.methods import wemoe as method

    group, (out,) = group_and_rest(paths, given, rest=1)
    run(method, group, out, WemoeConfig(**options), dry_run=dry_run)
