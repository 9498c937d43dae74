"""`upscale spectra`: what the experts' deltas look like, before a rank or a budget is chosen."""

import json
import math
import os
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from upscale.commands.display import console, progress_bar, quiet_libraries, shade, size
from upscale.commands.options import GivenGroup, group_and_rest, group_options
from upscale.errors import ConfigError

RANKS = (8, 16, 32, 64, 128)
ENERGIES = (0.9, 0.95, 0.99)


@click.command()
@click.argument("paths", nargs=-1, metavar="[GROUP]")
@group_options
@click.option(
    "--rank",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="R",
    help="Rank of the picture's heat maps, and one of the table's.",
)
@click.option("--plot", metavar="FILE", help="Draw them too: a .png or .svg file.")
@click.option("--json", "json_file", metavar="FILE", help="Write the figures to this file too.")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to compute: cpu, cuda ...")
def spectra(
    paths: tuple[str, ...],
    given: GivenGroup,
    rank: int,
    plot: str | None,
    json_file: str | None,
    device: str,
) -> None:
    """Show how low-rank the deltas of GROUP's experts are, how alike, and what keeping them takes.

    Computes every singular value of every delta, once; the user's cache keeps them for `upscale smile --budget` and
    --energy. Decides nothing. An energy is the part of the squared delta that every module and expert keeps at least;
    the output head keeps more, since most of its delta moves all logits alike and the rest decides the answer.

    \b
    Examples:
      upscale spectra group.yaml
      upscale spectra group.yaml --plot spectra.png --rank 32
      upscale spectra --base base --expert math=ft-math --expert code=ft-code --json spectra.json --device cuda
    """
    import zoo
    from upscale.building.budget import energies_of, for_energy
    from upscale.building.methods import smile as method
    from upscale.building.plan import make_plan
    from upscale.building.ranks import heads
    from upscale.building.spectra import spectra as compute
    from upscale.building.spectra_plots import check_drawing, draw
    from upscale.config import SmileConfig

    if plot is not None:
        check_drawing(Path(plot))
    for option, file in (("--plot", plot), ("--json", json_file)):
        _check_writable(option, file)
    group, _ = group_and_rest(paths, given, rest=0)
    quiet_libraries()
    verdict = zoo.checked(group)
    # What `upscale smile` makes of the group by default, and with the least of it.
    plans = {rest: make_plan(verdict, method, SmileConfig(rest=rest, device=device)) for rest in ("experts", "base")}
    plan = plans["experts"]
    with progress_bar("spectra") as progress:
        found = compute(verdict, plan.linears, device=device, progress=progress)
    energies = energies_of(found.values, heads(plan.base, plan.linears))
    wanted = {energy: for_energy(energies, energy=energy) for energy in ENERGIES}
    ranks = sorted({*RANKS, rank})
    sizes = {rest: {energy: _size(each, wanted[energy]) for energy in ENERGIES} for rest, each in plans.items()}
    _show_energy(found, ranks)
    _show_ranks(found, wanted)
    _show_overlap(found)
    _show_sizes(sizes, plan.base_bytes)
    if json_file is not None:
        content = _to_json(found, ranks, wanted, sizes, plan.base_bytes)
        Path(json_file).write_text(json.dumps(content, indent=1) + "\n")
    if plot is not None:
        draw(found, Path(plot), rank=rank)
        console.print(f"[green]drew[/] {escape(plot)}", highlight=False, soft_wrap=True)


def _check_writable(option: str, file: str | None) -> None:
    if file is not None and (Path(file).is_dir() or not os.access(Path(file).absolute().parent, os.W_OK)):
        raise ConfigError(f"{option} {file}: no file can be written there")


def _size(plan, ranks) -> int:
    """Bytes of the result with these ranks in the plan's modules."""
    from upscale.building.budget import nbytes
    from upscale.building.ranks import costs

    cost = costs(plan.linears, plan.declared)
    planned = {n.name: dict(zip(plan.experts, plan.layouts[n.name].ranks, strict=True)) for n in plan.linears}
    return plan.result_bytes - nbytes(planned, cost) + nbytes({name: ranks[name] for name in planned}, cost)


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is names, the others numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _energy(found, ranks: list[int]) -> dict[str, dict[int, float]]:
    """Energy kept at each of ``ranks``, mean over modules, by expert and rank."""
    kept = {expert: found.energy_by_rank(expert).tolist() for expert in found.experts}
    return {expert: {rank: part[min(rank, len(part)) - 1] for rank in ranks} for expert, part in kept.items()}


def _show_energy(found, ranks: list[int]) -> None:
    table = _table(
        "Energy kept at one rank, mean over modules", "expert", "delta's norm", *(f"rank {r}" for r in ranks)
    )
    for expert, kept in _energy(found, ranks).items():
        norm = math.hypot(*(norms[expert] for norms in found.norms.values()))
        table.add_row(expert, f"{norm:.4g}", *(shade(value, f"{value:.1%}") for value in kept.values()))
    console.print(table)


def _show_ranks(found, wanted: dict[float, dict[str, dict[str, int]]]) -> None:
    from upscale.building.skeleton import kind

    table = _table(
        "Rank for an energy, as --energy takes it: mean over blocks and experts (largest)",
        "kind",
        "modules",
        "full rank",
        *(f"{energy:.0%}" for energy in wanted),
    )
    for name in dict.fromkeys(map(kind, found.values)):
        modules = [module for module in found.values if kind(module) == name]
        full = max(len(values) for module in modules for values in found.values[module].values())
        cells = []
        for by_module in wanted.values():
            ranks = [rank for module in modules for rank in by_module[module].values()]
            cells.append(f"{sum(ranks) / len(ranks):.0f} ({max(ranks)})")
        table.add_row(name, str(len(modules)), str(full), *cells)
    console.print(table)


def _show_overlap(found) -> None:
    from upscale.building.spectra import OVERLAP_RANK

    if len(found.experts) == 1:
        return
    rows = found.overlap().tolist()
    others = [v for n, row in enumerate(rows) for m, v in enumerate(row) if n != m and not math.isnan(v)]
    table = _table(f"Overlap of {OVERLAP_RANK} directions, {_chance(found):.2f} by chance", "expert", *found.experts)
    for n, (expert, row) in enumerate(zip(found.experts, rows, strict=True)):
        cells = ("" if n == m or math.isnan(v) else _blue(v / max(others), f"{v:.2f}") for m, v in enumerate(row))
        table.add_row(expert, *cells)
    console.print(table)


def _chance(found) -> float:
    return sum(found.chance.values()) / len(found.chance)


def _blue(value: float, text: str) -> str:
    """``text`` on a background the bluer, the nearer ``value`` is to 1."""
    return f"[black on rgb({230 - int(150 * value)},{240 - int(90 * value)},255)] {text} [/]"


def _show_sizes(sizes: dict[str, dict[float, int]], base_bytes: int) -> None:
    table = _table(
        f"Size for an energy of every module and expert; base: {size(base_bytes)}",
        "energy",
        "of all modules",
        "of blocks alone (--rest base)",
    )
    for energy in ENERGIES:
        cells = (f"{size(by_energy[energy])}  {by_energy[energy] / base_bytes:.2f}x" for by_energy in sizes.values())
        table.add_row(f"{energy:.0%}", *cells)
    console.print(table)


def _to_json(
    found,
    ranks: list[int],
    wanted: dict[float, dict[str, dict[str, int]]],
    sizes: dict[str, dict[float, int]],
    base_bytes: int,
) -> dict:
    """Plain values: no singular values, which are many, but what follows from them. An overlap that is none is null."""
    kept = {rank: found.energy_at(rank) for rank in ranks}
    modules = {}
    for name, norms in found.norms.items():
        modules[name] = {
            "norms": norms,
            "energy": {e: {str(rank): kept[rank][name][e] for rank in ranks} for e in found.experts},
            "rank_for": {str(energy): by_module[name] for energy, by_module in wanted.items()},
            "overlap": _rows(found.overlaps[name]),
        }
    return {
        "experts": list(found.experts),
        "base_bytes": base_bytes,
        "result_bytes": {rest: {str(e): n for e, n in by_energy.items()} for rest, by_energy in sizes.items()},
        "energy": {e: {str(rank): part for rank, part in kept.items()} for e, kept in _energy(found, ranks).items()},
        "overlap": _rows(found.overlap()),
        "overlap_by_block": {name: _rows(matrix) for name, matrix in found.overlap_by_block().items()},
        "overlap_by_chance": _chance(found),
        "modules": modules,
    }


def _rows(matrix) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]
