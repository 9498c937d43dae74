"""`upscale route`: a heat map of routing in the terminal."""

from pathlib import Path

import click
from rich.markup import escape
from rich.text import Text

from upscale.commands.display import console, quiet_libraries

_PALETTE = (
    (86, 156, 214),
    (214, 120, 86),
    (106, 190, 110),
    (190, 110, 190),
    (214, 190, 86),
    (86, 200, 200),
    (214, 96, 140),
    (150, 150, 96),
    (120, 120, 220),
    (160, 120, 90),
)


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Send the prompt as a chat message, through the chat template.")
@click.option(
    "--max-new-tokens", default=0, show_default=True, metavar="N", help="Generate and show so many tokens too."
)
@click.option("--plot", metavar="FILE", help="Also draw it: FILE.png or FILE.svg.")
def route(model: str, prompt: str, chat: bool, max_new_tokens: int, plot: str | None) -> None:
    """Show which expert of MODEL each token of PROMPT went to, by layer and overall.

    A cell has the colour of the expert with the largest mean weight over the layer's modules, the darker the smaller;
    where colours are not shown, its number. For a calibrated router the last row is its confidence: the class that is
    most likely from the text up to each token.

    \b
    Examples:
      upscale route out 'What is 7 in roman numerals?'
      upscale route out 'sort: pear apple' --chat --max-new-tokens 16
      upscale route out "$(cat conversation.txt)" --plot routing.png
    """
    from upscale.evaluating.trace import trace

    quiet_libraries()
    if plot is not None:
        from upscale.building.spectra_plots import check_drawing

        check_drawing(Path(plot))
    traced = trace(model, prompt.replace("\\n", "\n"), chat=chat, max_new_tokens=max_new_tokens)
    plain = console.color_system is None
    legend = Text()
    for number, expert in enumerate(traced.experts):
        share = float(traced.overall[:, number].mean())
        named = f"{number} {expert}" if plain else expert
        legend.append(f" {named} {share:.0%} ", style=_style(number, 1.0)).append("  ")
    console.print(legend)
    cells = [token.replace("\n", "↵").replace(" ", "␣") or "·" for token in traced.tokens]
    if plain:
        cells = [f"{cell:3} " for cell in cells]  # room for a number
    rows = {**traced.blocks, "overall": traced.overall}
    if traced.confidence is not None:
        rows["confidence"] = traced.confidence
    label = max(map(len, rows)) + 2
    for start, stop in _lines(cells, console.width - label):
        console.print()
        if plain:
            console.print(Text(" " * label + "".join(cells[start:stop])))
        for name, weights in rows.items():
            line = Text(name.ljust(label), style="bold" if name == "overall" else "")
            for n in range(start, stop):
                weight, expert = weights[n].max(dim=0)
                served = weight > 0 and int(expert) < len(traced.experts)  # the class beyond the experts is the base
                cell = f"{int(expert) if served else '-'}".ljust(len(cells[n])) if plain else cells[n]
                line.append(cell, style=_style(int(expert), float(weight)) if served else "")
            console.print(line)
    if plot is not None:
        from upscale.evaluating.trace_plots import draw_trace

        draw_trace(traced, Path(plot))
        console.print(f"[green]wrote[/] {escape(plot)}", highlight=False, soft_wrap=True)


def _style(expert: int, weight: float) -> str:
    """Background in the expert's colour, the darker the smaller the weight."""
    shade = 0.35 + 0.65 * weight
    red, green, blue = (int(shade * part) for part in _PALETTE[expert % len(_PALETTE)])
    return f"black on rgb({red},{green},{blue})"


def _lines(cells: list[str], width: int):
    """Ranges of tokens whose cells fit a line of the terminal."""
    start, used = 0, 0
    for n, cell in enumerate(cells):
        if used + len(cell) > width and n > start:
            yield start, n
            start, used = n, 0
        used += len(cell)
    yield start, len(cells)
