"""`upscale wemoe`: build a WEMoE model."""

import click

from upscale.commands.building import run
from upscale.commands.options import group_and_rest, inline_group, settings
from upscale.config import WemoeConfig


@click.command()
@click.argument("paths", nargs=-1, metavar="[GROUP] OUT")
@inline_group
@settings(WemoeConfig)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
def wemoe(paths: tuple[str, ...], base: str | None, experts: tuple[str, ...], dry_run: bool, **options) -> None:
    """Build OUT, one WEMoE model from all models of GROUP: merged, but for the MLPs, which keep every task vector.

    Until its routers are adapted (upscale adapt) it is the merge. OUT must not exist; it appears when it is complete.

    \b
    Examples:
      upscale wemoe group.yaml out --rank 64
      upscale wemoe group.yaml out --vectors sparse --density 0.1 --shared-router
      upscale wemoe out --base base --expert math=ft-math --expert code=ft-code --merge ties --dry-run
    """
    from upscale.building.methods import wemoe as method

    group, (out,) = group_and_rest(paths, base, experts, rest=1)
    run(method, group, out, WemoeConfig(**options), dry_run=dry_run)
