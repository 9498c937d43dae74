"""`upscale import`: another tool's upscaled checkpoint in our format."""

import click
from rich.markup import escape

from upscale.commands.display import console, progress_bar, quiet_libraries, size


@click.command("import")
@click.argument("path", metavar="MODEL")
@click.argument("out", metavar="OUT")
@click.option("--names", metavar="A,B,...", help="Names of the experts, in their order; else expert_0, expert_1 ...")
@click.option(
    "--whole-biases",
    is_flag=True,
    help="The experts' biases are whole ones, not differences from the base's: subtract the base's.",
)
def import_(path: str, out: str, names: str | None, whole_biases: bool) -> None:
    """Convert MODEL, a SMILE checkpoint made by FusionBench (Llama, Mistral or Qwen2), so that vLLM can serve it.

    OUT computes what MODEL computes, each expert's router and all. OUT must not exist; it appears only when it is
    complete.

    FusionBench 0.2.33 stores the whole bias of a low-rank expert where it means the difference from the base's, and
    so adds the base's twice (Qwen2's q, k and v have biases). --whole-biases mends that.

    \b
    Examples:
      upscale import smile-mistral out --names math,chat,code
      upscale import org/smile-qwen2@v1 out --whole-biases
    """
    from upscale.importing.fusionbench import import_fusionbench

    quiet_libraries()
    chosen = None if names is None else names.split(",")
    with progress_bar("converting") as progress:
        made = import_fusionbench(path, out, chosen, whole_biases=whole_biases, progress=progress)
    if made.whole_biases:
        console.print(
            "[yellow]warning[/] the experts' biases look like whole ones, which this model adds to the base's; "
            "import it with --whole-biases to mend that",
            highlight=False,
            soft_wrap=True,
        )
    ranks = [rank for of_module in made.modules.values() for rank in of_module]
    least, most = min(ranks, default=0), max(ranks, default=0)
    console.print(f"experts    {len(made.experts)}: {', '.join(made.experts)}", highlight=False)
    console.print(
        f"linears    {len(made.modules)} with experts of rank {least if least == most else f'{least} to {most}'}, "
        f"{len(made.plain)} that no expert changed",
        highlight=False,
    )
    console.print(
        f"size       {size(made.result_bytes)}: {made.result_bytes / made.base_bytes:.2f}x the base, "
        f"{made.result_bytes / made.source_bytes:.0%} of the source",
        highlight=False,
    )
    console.print(f"[green]wrote[/] {escape(out)}", highlight=False, soft_wrap=True)
