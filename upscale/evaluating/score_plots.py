"""Draw results: scores by task and model, quality against size, routing by layer and expert. Needs matplotlib."""

import io
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from upscale.errors import ConfigError
from upscale.evaluating.metrics import SHARES
from upscale.evaluating.results import Result, Routes, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 5  # panels side by side
_WIDTH = 11.0  # inches
_COLOUR = "#2f6db3"


def require_matplotlib(what: str) -> None:
    """Raise ConfigError, with the remedy, if matplotlib is not installed; ``what`` needs it."""
    if find_spec("matplotlib") is None:
        raise ConfigError(f"{what} needs matplotlib: pip install 'upscale-zoo[plot]'")


def scores_plot(results: Sequence[Result]) -> str:
    """SVG: a panel a task, a line a model, its score as a point with its interval."""
    tasks, models = _names(results, "task"), _names(results, "model")

    def draw(figure: "Figure") -> None:
        for place, task in enumerate(tasks):
            axes = figure.add_subplot(-(-len(tasks) // _COLUMNS), min(len(tasks), _COLUMNS), place + 1)
            of_task = {r.model: r for r in results if r.task == task}
            for height, model in enumerate(models):
                if (r := of_task.get(model)) is not None:
                    axes.plot([r.low, r.high], [height, height], color=_COLOUR, linewidth=1.6)
                    axes.plot([r.score], [height], "o", color=_COLOUR, markersize=5)
            metric = next(iter(of_task.values())).metric
            axes.set_title(f"{task}\n{metric}", fontsize=10)
            axes.set_ylim(len(models) - 0.5, -0.5)
            axes.set_yticks(range(len(models)), models if place % _COLUMNS == 0 else [""] * len(models))
            axes.grid(axis="x", alpha=0.3)
            if metric in SHARES:
                axes.set_xlim(-0.03, 1.03)

    return _svg(draw, height=-(-len(tasks) // _COLUMNS) * (0.9 + 0.28 * len(models)))


def size_plot(results: Sequence[Result]) -> str | None:
    """SVG: mean score of each model against its size; None unless two models or more have both."""
    points = [(s.model, s.size / 1e6, s.mean) for s in summarise(results) if s.size and s.mean is not None]
    if len(points) < 2:
        return None

    largest = max(size for _, size, _ in points)

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.plot([size for _, size, _ in points], [mean for _, _, mean in points], "o", color=_COLOUR, markersize=6)
        for size, mean, models in _together(points):
            right = size > largest / 2  # then there is room on the left
            axes.annotate(
                ", ".join(models),
                (size, mean),
                xytext=(-7 if right else 7, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize=9,
            )
        axes.set(xlabel="size of the tensors, MB", ylabel="mean score", ylim=(-0.05, 1.05), xlim=(0, 1.05 * largest))
        axes.grid(alpha=0.3)

    return _svg(draw, height=4.5)


def _together(points: Sequence[tuple[str, float, float]]) -> list[tuple[float, float, list[str]]]:
    """(model, size, mean) -> (size, mean, models): models whose labels would lie on each other have one in common."""
    groups: list[tuple[float, float, list[str]]] = []
    for model, size, mean in sorted(points, key=lambda point: point[1:]):
        if groups and groups[-1][0] == size and mean - groups[-1][1] < 0.04:
            groups[-1][2].append(model)
        else:
            groups.append((size, mean, [model]))
    return groups


def routing_plot(routed: Sequence[tuple[str, Routes]]) -> str:
    """SVG: a heat map for each (task, routes) of one model: blocks down, experts across, mean weights from 0 to 1."""
    rows = -(-len(routed) // _COLUMNS)
    blocks = max(len(routes.blocks) for _, routes in routed)

    def draw(figure: "Figure") -> None:
        image: Any = None
        for place, (task, routes) in enumerate(routed):
            axes = figure.add_subplot(rows, min(len(routed), _COLUMNS), place + 1)
            image = axes.imshow(list(routes.blocks.values()), cmap="viridis", vmin=0, vmax=1, aspect="auto")
            axes.set_title(task, fontsize=10)
            axes.set_xticks(range(len(routes.experts)), routes.experts, rotation=45, ha="right", fontsize=8)
            names = [_short(name) for name in routes.blocks] if place % _COLUMNS == 0 else []
            every = -(-blocks // 24)
            axes.set_yticks(range(0, len(routes.blocks), every)[: len(names)], names[::every], fontsize=8)
        figure.colorbar(image, ax=figure.axes, label="mean weight", pad=0.01)

    return _svg(draw, height=rows * (1.2 + min(6.0, 0.2 * blocks)))


def _short(block: str) -> str:
    """``model.layers.3`` -> ``3``; what lies outside a block by its last part."""
    return block.rsplit(".", 1)[-1]


def _names(results: Sequence[Result], field: str) -> list[str]:
    return list(dict.fromkeys(getattr(result, field) for result in results))


def _svg(draw: Callable[["Figure"], None], height: float) -> str:
    """An ``<svg>`` element to stand in a page: texts as text, the same results as the same bytes, nothing fetched."""
    require_matplotlib("a plot")
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {"svg.fonttype": "none", "svg.hashsalt": "upscale", "font.family": "sans-serif"}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]  # without the XML declaration, which names a DTD
