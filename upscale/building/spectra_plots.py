"""Draw spectra: energy by rank, energy kept by block, overlap of the experts' subspaces. Needs matplotlib."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upscale.building.skeleton import kind
from upscale.building.spectra import OVERLAP_RANK, Spectra, block
from upscale.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

SUFFIXES = (".png", ".svg")
_COLUMNS = 6
_WIDTH = 14.0  # inches
_HEAT = "viridis"  # perceptually uniform, and readable in grey
_PERCENT = "{x:.0%}"


def check_drawing(file: Path) -> None:
    """Say before the work whether ``draw`` could write ``file``.

    Raises:
        ConfigError: another suffix than .png or .svg, or matplotlib is not installed.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {file}: a picture's name ends in {' or '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'upscale-zoo[plot]'")


def draw(spectra: Spectra, file: Path, *, rank: int) -> None:
    """Write one picture, PNG or SVG by its suffix; the same spectra give the same bytes.

    From top to bottom: energy kept by rank, a panel a kind of module and a line an expert; energy kept at ``rank`` by
    block and kind, a heat map an expert; overlap of the experts' subspaces, if there are several, on the whole and by
    block.

    Raises:
        ConfigError: see ``check_drawing``.
        OSError: the file cannot be written.
    """
    check_drawing(file)
    import matplotlib.style
    from matplotlib.figure import Figure

    experts, blocks = len(spectra.experts), len(set(map(block, _in_blocks(spectra).values)))
    curves = 2.4 * _rows(len(_kinds(spectra))) + 0.25 * _rows(experts) + 0.7
    maps = (0.5 + min(4.0, 1.2 + 0.15 * blocks)) * _rows(experts) + 1.4
    pairs = max(3.6, 0.4 * experts + 2.0)
    sections = [(curves, _energy_by_rank), (maps, partial(_energy_by_block, rank=rank)), (pairs, _overlap)]
    sections = sections if experts > 1 else sections[:-1]
    heights = [height for height, _ in sections]
    # The user's own style would change the picture; without the salt, ids in an SVG differ each time, as dates do.
    with matplotlib.style.context(["default", {"svg.hashsalt": "upscale", "axes.titlesize": "medium"}]):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(sections), 1, height_ratios=heights, hspace=0.04)
        for row, (_, section) in enumerate(sections):
            section(figure.add_subfigure(grid[row]), spectra)
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)


def _rows(panels: int) -> int:
    return -(-panels // _COLUMNS)


def _panels(figure: "SubFigure", count: int, xlabel: str = "") -> "list[Axes]":
    """Panels of one scale in rows of about the same length; the rest of the last row is empty."""
    columns = -(-count // _rows(count))
    axes = list(figure.subplots(_rows(count), columns, squeeze=False, sharex=True, sharey=True).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    for lowest in axes[max(0, count - columns) : count]:  # of its column, whether or not in the last row
        lowest.xaxis.set_tick_params(labelbottom=True)
        lowest.set_xlabel(xlabel)
    return axes[:count]


def _title(figure: "SubFigure", text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold")


def _last_parts(names: Sequence[str]) -> list[str]:
    """``self_attn.q_proj`` -> ``q_proj``, unless two names end alike."""
    last = [name.rsplit(".", 1)[-1] for name in names]
    return last if len(set(last)) == len(last) else list(names)


def _colours(count: int) -> list:
    """One for each expert, of a qualitative palette."""
    from matplotlib import colormaps

    return [colormaps["tab10" if count <= 10 else "tab20"](n % 20) for n in range(count)]


def _kinds(spectra: Spectra) -> list[str]:
    return list(dict.fromkeys(map(kind, spectra.values)))


def _in_blocks(spectra: Spectra) -> Spectra:
    """Without embeddings and head, unless there is nothing else."""
    return spectra.of([m for m in spectra.values if block(m) != m] or spectra.values)


def _energy_by_rank(figure: "SubFigure", spectra: Spectra) -> None:
    _title(figure, "Energy kept by rank, all blocks together")
    kinds = _kinds(spectra)
    panels = _panels(figure, len(kinds), xlabel="rank")
    for axes, name, title in zip(panels, kinds, _last_parts(kinds), strict=True):
        part = spectra.of(module for module in spectra.values if kind(module) == name)
        for expert, colour in zip(spectra.experts, _colours(len(spectra.experts)), strict=True):
            kept = part.energy_by_rank(expert)
            axes.plot(range(1, len(kept) + 1), kept.tolist(), color=colour, label=expert, linewidth=1.4)
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=8, frameon=False)


def _energy_by_block(figure: "SubFigure", spectra: Spectra, rank: int) -> None:
    _title(figure, f"Energy kept at rank {rank}, by block and kind")
    spectra = _in_blocks(spectra)
    kinds = _kinds(spectra)
    blocks = list(dict.fromkeys(map(block, spectra.values)))
    shown = range(0, len(blocks), -(-len(blocks) // 16))
    panels = _panels(figure, len(spectra.experts))
    for axes, expert in zip(panels, spectra.experts, strict=True):
        cells = torch.full((len(blocks), len(kinds)), torch.nan, dtype=torch.float64)
        for module, values in spectra.values.items():
            kept = values[expert][:rank].sum() / values[expert].sum()  # no delta: 0 / 0, an empty cell
            cells[blocks.index(block(module)), kinds.index(kind(module))] = kept
        _heat_map(axes, cells, 1.0)
        axes.set_title(expert)
        axes.set_xticks(range(len(kinds)), _last_parts(kinds), rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(shown, [blocks[n].rsplit(".", 1)[-1] for n in shown])
    figure.supylabel("block", fontsize="medium")
    _colour_bar(figure, panels, 1.0, "energy kept", format=_PERCENT, aspect=20 * _rows(len(panels)))


def _overlap(figure: "SubFigure", spectra: Spectra) -> None:
    chance = sum(spectra.chance.values()) / len(spectra.chance)
    _title(figure, f"Overlap of the experts' {OVERLAP_RANK} leading input directions: 1 the same, {chance:.2f} chance")
    experts = spectra.experts
    others = ~torch.eye(len(experts), dtype=torch.bool)  # an expert's overlap with itself is 1, and would blind the map
    pairs = spectra.overlap().where(others, torch.nan)
    by_block = {name: m.where(others, torch.nan).nanmean(dim=1) for name, m in spectra.overlap_by_block().items()}
    columns = torch.stack(list(by_block.values()), dim=1)
    largest = float(torch.cat([pairs, columns], dim=1).nan_to_num(0).max())
    top = max(0.1, math.ceil(10 * largest) / 10)
    whole, blocks = figure.subplots(1, 2, width_ratios=[1, 2])
    for axes, cells, title in ((whole, pairs, "all modules"), (blocks, columns, "with the other experts, by block")):
        _heat_map(axes, cells, top)
        axes.set_title(title)
        axes.set_yticks(range(len(experts)), experts)
        for (row, column), value in _cells(cells):
            ink = "white" if value < 0.6 * top else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    whole.set_xticks(range(len(experts)), experts, rotation=45, ha="right", rotation_mode="anchor")
    blocks.set_xticks(
        range(len(by_block)), _last_parts(list(by_block)), rotation=45, ha="right", rotation_mode="anchor"
    )
    _colour_bar(figure, [whole, blocks], top, "mean squared cosine")


def _heat_map(axes: "Axes", cells: Tensor, top: float) -> None:
    """Cells from 0 to ``top``; NaN is grey."""
    axes.imshow(cells.numpy(), cmap=_HEAT, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    axes.set_facecolor("0.9")


def _colour_bar(figure: "SubFigure", axes: "list[Axes]", top: float, label: str, **kwargs: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.colorbar(ScalarMappable(Normalize(0, top), _HEAT), ax=axes, label=label, pad=0.01, **kwargs)


def _cells(cells: Tensor) -> Iterator[tuple[tuple[int, int], float]]:
    """Where to write numbers: nowhere if they would not be readable."""
    if cells.shape[1] > 20:
        return
    for row, values in enumerate(cells.tolist()):
        for column, value in enumerate(values):
            if not math.isnan(value):
                yield (row, column), value
