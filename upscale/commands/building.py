"""What the commands that build share: plan, build, show what was kept."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from upscale.commands.display import console, progress_bar, quiet_libraries, shade, size
from zoo import Group


def run(method: Any, group: Group, out: str, config: Any, *, dry_run: bool) -> None:
    """Build ``out`` by a method, or print the plan alone."""
    import zoo
    from upscale.building.build import build, hashing
    from upscale.building.plan import make_plan

    quiet_libraries()
    verdict = zoo.check(group) if dry_run and config.one_rank else zoo.checked(group)
    for warning in verdict.warnings:
        console.print(f"[yellow]warning[/] {warning}", highlight=False, soft_wrap=True)
    if dry_run:
        with progress_bar("reading spectra") as progress:
            plan = make_plan(verdict, method, config, progress)
        _show_plan(plan)
        return
    with hashing(group, verdict) as hashes:
        with progress_bar("reading spectra") as progress:
            plan = make_plan(verdict, method, config, progress)
        with progress_bar("upscaling") as progress:
            report = build(plan, group, out, hashes, progress=progress)
    show_report(report)
    console.print(f"[green]wrote[/] {escape(out)}", highlight=False, soft_wrap=True)


def _show_plan(plan) -> None:
    from upscale.building.skeleton import kind

    table = Table(title="Plan: modules to upscale, by kind", title_justify="left")
    for column in ("module", "modules", "shape", "rank an expert", "parameters"):
        table.add_column(column, justify="left" if column == "module" else "right")
    kinds: dict[tuple, list] = {}
    for linear in plan.linears:
        kinds.setdefault((kind(linear.name), f"{linear.out_features} x {linear.in_features}"), []).append(linear.name)
    for norm in plan.norms:
        kinds.setdefault((kind(norm.name), str(norm.width)), []).append(norm.name)
    for (name, shape), modules in kinds.items():
        layouts = [plan.layouts[module] for module in modules]
        ranks = [rank for layout in layouts for rank in layout.ranks]
        least, most = min(ranks), max(ranks)
        count = sum(_count(shape) for layout in layouts for shape in layout.shapes().values())
        rank = "exact" if not most else str(most) if least == most else f"{least} to {most}"
        table.add_row(name, str(len(modules)), shape, rank, f"{count:,}")
    console.print(table)
    for head, embedding in plan.tied.items():
        console.print(f"tied       {head} uses the experts of {embedding}", highlight=False)
    experts = ", ".join(plan.experts)
    console.print(f"experts    {len(plan.experts)}: {experts}", highlight=False)
    source = plan.merging.method if plan.merging else "base"
    console.print(f"rest       {len(plan.rest)} tensors, from: {source}", highlight=False)
    ratio, group = plan.result_bytes / plan.base_bytes, plan.group_bytes / plan.base_bytes
    console.print(
        f"size       at most {size(plan.result_bytes)}: {ratio:.2f}x the base ({size(plan.base_bytes)}); "
        f"base and experts are {group:.2f}x",
        highlight=False,
    )
    console.print(f"memory     about {size(plan.peak_bytes)} at the peak, libraries included", highlight=False)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def show_report(report) -> None:
    """Print what a build kept, linear by linear and expert by expert."""
    from upscale.building.skeleton import kind

    kinds = list(dict.fromkeys(kind(module.name) for module in report.modules))
    table = Table(title="Energy kept, mean over experts", title_justify="left")
    table.add_column("block")
    for name in kinds:
        table.add_column(name.rsplit(".", 1)[-1], justify="right")
    blocks: dict[str, dict[str, float]] = {}
    for module in report.modules:
        block = module.name.removesuffix(kind(module.name)).rstrip(".").rsplit(".", 1)[-1] or "-"
        blocks.setdefault(block, {})[kind(module.name)] = sum(module.energy.values()) / len(module.energy)
    for block, cells in blocks.items():
        table.add_row(block, *(shade(cells[k], f"{cells[k]:.1%}") if k in cells else "" for k in kinds))
    console.print(table)
    table = Table(title="Experts", title_justify="left")
    for column in ("expert", "energy kept", "left behind in linears", "left behind in the rest"):
        table.add_column(column, justify="left" if column == "expert" else "right")
    for expert, energy in report.energy.items():
        inside, outside = report.left_behind(expert)
        table.add_row(expert, shade(energy, f"{energy:.2%}"), f"{inside:.4g}", f"{outside:.4g}")
    console.print(table)
    ratio, group = report.result_bytes / report.base_bytes, report.group_bytes / report.base_bytes
    console.print(
        f"size {size(report.result_bytes)}: {ratio:.2f}x the base, {ratio / group:.0%} of base and experts",
        highlight=False,
    )
