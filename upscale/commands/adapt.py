"""`upscale adapt`: train a checkpoint's routers on prompts without labels."""

import click
from rich.table import Table

from upscale.commands.display import console, progress_bar, quiet_libraries
from upscale.commands.options import ManyPrompts, prompt_files, prompts_option, settings
from upscale.config import AdaptConfig, EvalConfig
from upscale.errors import TaskError


@click.command(cls=ManyPrompts)
@click.argument("out", metavar="OUT")
@prompts_option(
    "Prompts of an expert, 16 or more: .jsonl with `prompt` (or `text`), or a text file of one a line; "
    "or .safetensors of a classifier's inputs, e.g. pixel_values [N, C, H, W]."
)
@click.option("--tasks", multiple=True, metavar="FILE|DIR", help="Tasks to score before and after; see upscale eval.")
@settings(AdaptConfig)
def adapt(out: str, prompts: tuple[str, ...], tasks: tuple[str, ...], **options) -> None:
    """Train the routers of OUT, a WEMoE or a calibrated SMILE, on prompts: no labels, no completions.

    Only the router's file and config.json change, all or nothing. Interrupted, the same command goes on.

    \b
    Examples:
      upscale adapt out --prompts math=math.jsonl code=code.jsonl --chat
      upscale adapt out --prompts math=math.jsonl code=code.jsonl --objective entropy --steps 500
      upscale adapt out --prompts math=math.jsonl code=code.jsonl --tasks tasks
    """
    from upscale.adapting.adaptation import adapt as run
    from upscale.calibrating.prompts import load_prompts, load_tensors
    from upscale.router_file import opened

    config = AdaptConfig(**options)
    if not prompts:
        raise TaskError("give --prompts NAME=FILE for every expert")
    experts = opened(out)[1].experts
    files = prompt_files(prompts)
    given = load_tensors(files) if _tensors(files) else load_prompts(files, experts, None)
    quiet_libraries()
    before = _scores(out, tasks, config, "before")
    with progress_bar("adapting") as progress:
        found = run(out, given, config, progress=progress)
    show(found)
    if tasks:
        from upscale.commands.eval import show as show_scores

        show_scores([*before, *_scores(out, tasks, config, "after")])


def _tensors(files: dict[str, list[str]]) -> bool:
    return all(file.endswith(".safetensors") for of_expert in files.values() for file in of_expert)


def _scores(out: str, tasks: tuple[str, ...], config: AdaptConfig, name: str) -> list:
    """Scores of prompts that are framed as those of the adaptation."""
    if not tasks:
        return []
    from upscale.evaluating.evaluation import evaluate

    asked = EvalConfig(prompt_template=config.prompt_template, chat=config.chat, device=config.device)
    with progress_bar(f"scoring {name}") as progress:
        return evaluate({name: out}, list(tasks), asked, progress=progress)


def show(found) -> None:
    """Print how the routers did on the held-out prompts."""
    best = found.training.best
    table = Table(title="Routers on held-out prompts, and the mean weight of each expert", title_justify="left")
    for column in ("step", "loss", "entropy", *best.use):
        table.add_column(column, justify="right")
    for j in found.training.judgements:
        mark = "[bold]" if j == best else ""
        table.add_row(f"{mark}{j.step}", f"{j.loss:.4f}", f"{j.entropy:.4f}", *(f"{w:.2f}" for w in j.use.values()))
    console.print(table)
    if found.stopped == "diverged":
        console.print(
            f"[yellow]warning[/] the loss diverged after {found.steps} steps; "
            f"the routers of step {best.step} were kept; try a smaller --lr",
            highlight=False,
        )
    if best.step == 0:
        console.print("[yellow]warning[/] no step made the routers better; they were left as they are", highlight=False)
    else:
        first = found.training.judgements[0]
        console.print(
            f"kept the routers of step {best.step}: {found.objective} {first.loss:.4f} -> {best.loss:.4f}",
            highlight=False,
        )
