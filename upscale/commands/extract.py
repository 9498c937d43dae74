"""`upscale extract`: one expert as a LoRA adapter or as a model of its own."""

import click
from rich.markup import escape

from upscale.commands.display import console, progress_bar, quiet_libraries, size

_NAMED = 3  # tensors named in the warning


@click.command()
@click.argument("path", metavar="OUT")
@click.argument("expert", metavar="NAME")
@click.argument("directory", metavar="DIR")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["lora", "model"]),
    required=True,
    help="lora: the linears' factors as an adapter of PEFT, which vLLM serves over the plain base; model: the base's "
    "weights with all that is stored of the expert, as a model of its own.",
)
def extract(path: str, expert: str, directory: str, kind: str) -> None:
    """Write the expert NAME of the upscaled model OUT, or its base, to DIR, which must not exist.

    A LoRA holds no norms, embeddings, heads and biases: what is left out is named, here and in the adapter's card.

    \b
    Examples:
      upscale extract out math math-lora --as lora
      upscale extract org/zoo math math-model --as model
      upscale extract org/zoo base base --as model
    """
    from upscale.growing.extract import extract_lora, extract_model

    quiet_libraries()
    with progress_bar("extracting") as progress:
        taken = (extract_lora if kind == "lora" else extract_model)(path, expert, directory, progress=progress)
    if taken.left_out:
        largest = sorted(taken.left_out.items(), key=lambda item: -item[1])
        named = ", ".join(f"{name} (norm {norm:.3g})" for name, norm in largest[:_NAMED])
        more = f" and {len(largest) - _NAMED} more, see its card" if len(largest) > _NAMED else ""
        console.print(
            f"[yellow]warning[/] not in the adapter, since a LoRA cannot hold it: {named}{more}; it has "
            f"{taken.kept:.0%} of the stored change's squared norm",
            highlight=False,
            soft_wrap=True,
        )
    rank = f" of rank {taken.rank}" if taken.rank else ""
    console.print(f"[green]wrote[/] {escape(directory)}: {size(taken.nbytes)}{rank}", highlight=False, soft_wrap=True)
