"""`upscale pull`: fetch a model from the Hub into a directory."""

import click
from rich.markup import escape

from upscale.commands.display import console


@click.command()
@click.argument("model", metavar="ORG/NAME[@REVISION]")
@click.argument("directory", required=False, metavar="[DIR]")
@click.option("--token", metavar="TOKEN", help="Of the Hub; by default the one of `hf auth login` or HF_TOKEN.")
@click.pass_context
def pull(ctx: click.Context, model: str, directory: str | None, token: str | None) -> None:
    """Pull a model from the Hub into DIR, by default a directory named like the model.

    A revision is a branch, a tag or a commit. Every file is checked against the Hub's checksums and the model's own;
    DIR must not exist, and appears when all is there. A pull that was stopped goes on when it is run again.

    \b
    Examples:
      upscale pull org/name
      upscale pull org/name@v1 models/name
    """
    from zoo.hub.pull import pull as run

    ctx.meta["left"] = "run it again to go on"
    pulled = run(model, directory, token=token)
    console.print(f"commit {pulled.commit}", highlight=False)
    console.print(f"[green]wrote[/] {escape(str(directory or pulled.directory.name))}", highlight=False, soft_wrap=True)
