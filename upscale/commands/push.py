"""`upscale push`: put a checkpoint on the Hub."""

import os
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from upscale.commands.display import console, progress_bar, quiet_libraries, size


@click.command()
@click.argument("directory", metavar="OUT")
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch; it is made if it is not there.")
@click.option("--pr", is_flag=True, help="Open a pull request instead.")
@click.option("--licence", "--license", metavar="ID", help="Of the model, where it does not follow from its sources'.")
@click.option("--token", metavar="TOKEN", help="Of the Hub; by default the one of `hf auth login` or HF_TOKEN.")
@click.option("--no-xet", is_flag=True, help="Upload by plain LFS, as servers other than huggingface.co need it.")
@click.option("--no-verify", is_flag=True, help="Do not run `upscale verify` first.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
@click.pass_context
def push(
    ctx: click.Context,
    directory: str,
    repo: str,
    private: bool,
    revision: str | None,
    pr: bool,
    licence: str | None,
    token: str | None,
    no_xet: bool,
    no_verify: bool,
    dry_run: bool,
) -> None:
    """Push the checkpoint OUT to ORG/NAME on the Hub: weights, card and all in one commit.

    Files that are there already are not sent again, so a push that was stopped goes on when it is run again; shards
    and routers of an earlier version go. The card is written from the checkpoint: sources, sizes, results of
    `upscale eval --json OUT/eval.json`, pictures such as OUT/routing.png.

    \b
    Examples:
      upscale push out org/name --private
      upscale push out org/name --licence apache-2.0 --dry-run
      upscale push out org/name --revision v2
    """
    if no_xet:
        os.environ["HF_HUB_DISABLE_XET"] = "1"  # before huggingface_hub is imported, which reads it then
    from upscale.publishing.publish import check, pack, publish
    from zoo.hub.push import Target

    ctx.meta["left"] = "nobody sees what was sent; run it again to go on"
    target = Target(repo, revision, private, pr, token)
    parcel = pack(directory, repo, licence)
    for note in parcel.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False, soft_wrap=True)
    if parcel.left_out:
        names = escape(", ".join(parcel.left_out))
        console.print(f"[yellow]note[/] left out, no part of a checkpoint: {names}", highlight=False, soft_wrap=True)
    if not no_verify:
        quiet_libraries()
        with progress_bar("verifying") as progress:
            check(Path(directory), progress)
    if dry_run:
        _show(parcel)
        return
    pushed = publish(parcel, target)
    if not pushed.sent and not pushed.deleted:
        console.print(f"[green]unchanged[/] {pushed.url}", highlight=False, soft_wrap=True)
        return
    gone = f", {len(pushed.deleted)} deleted: {', '.join(pushed.deleted)}" if pushed.deleted else ""
    console.print(f"{len(pushed.sent)} file(s) sent{escape(gone)}", highlight=False, soft_wrap=True)
    console.print(f"[green]pushed[/] {pushed.url}", highlight=False, soft_wrap=True)


def _show(parcel) -> None:
    table = Table(title="Files", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    nbytes = {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in parcel.files.items()}
    for name, count in nbytes.items():
        table.add_row(escape(name), size(count))
    console.print(table)
    console.print(f"{len(nbytes)} files, {size(sum(nbytes.values()))}", highlight=False)
    console.print(f"licence {escape(parcel.licence)}", highlight=False, soft_wrap=True)
    console.print("\nREADME.md", style="bold")
    console.print(parcel.card, markup=False, highlight=False, soft_wrap=True)
