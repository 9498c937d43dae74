"""`upscale smile`: build a SMILE model."""

import click

from upscale.commands.building import run
from upscale.commands.options import GivenGroup, group_and_rest, group_options, settings
from upscale.config import SmileConfig


@click.command()
@click.argument("paths", nargs=-1, metavar="[GROUP] OUT")
@group_options
@settings(SmileConfig)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
def smile(paths: tuple[str, ...], given: GivenGroup, dry_run: bool, **options) -> None:
    """Build OUT, one SMILE model from all models of GROUP, without data or training.

    OUT must not exist; it appears only when it is complete.

    \b
    Examples:
      upscale smile group.yaml out --rank 64
      upscale smile out --base base --expert math=ft-math --expert code=ft-code
      upscale smile group.yaml out --lm-head --rest average --exclude '*.k_proj' --dry-run
    """
    from upscale.building.methods import smile as method

    group, (out,) = group_and_rest(paths, given, rest=1)
    run(method, group, out, SmileConfig(**options), dry_run=dry_run)
