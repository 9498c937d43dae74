"""Draw a trace: which expert served each token in each layer, and how sure the router was along the text."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from upscale.building.spectra_plots import check_drawing
from upscale.evaluating.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES_PER_TOKEN, _NARROWEST, _WIDEST = 0.22, 7.0, 24.0
_READABLE = 110  # tokens whose text fits under the picture


def draw_trace(trace: Trace, file: Path) -> None:
    """Write one picture, PNG or SVG by its suffix.

    Above, for a calibrated router, its confidence in each class along the text; below, a row a layer and a column a
    token, in the colour of the expert with the largest weight, paler the smaller the weight, white where the base is
    alone.

    Raises:
        ConfigError: see ``check_drawing``.
        OSError: the file cannot be written.
    """
    check_drawing(file)
    import matplotlib.style
    from matplotlib.figure import Figure

    tokens, rows = len(trace.tokens), {**trace.blocks, "overall": trace.overall}
    width = min(_WIDEST, max(_NARROWEST, 2.5 + _INCHES_PER_TOKEN * tokens))
    heights = ([2.2] if trace.confidence is not None else []) + [0.9 + 0.28 * len(rows)]
    with matplotlib.style.context(["default", {"svg.hashsalt": "upscale", "axes.titlesize": "medium"}]):
        figure = Figure(figsize=(width, sum(heights) + 0.6), layout="constrained")
        axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        if trace.confidence is not None:
            _confidence(axes[0], trace)
        _layers(axes[-1], trace, rows)
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)


def _colours(count: int) -> torch.Tensor:
    """[count, 3], the base's grey for what is beyond the experts."""
    from matplotlib import colormaps

    palette = colormaps["tab10" if count <= 10 else "tab20"]
    return torch.tensor([palette(n % palette.N)[:3] for n in range(count)])


def _confidence(axes: "Axes", trace: Trace) -> None:
    assert trace.confidence is not None
    colours = [*_colours(len(trace.experts)).tolist(), (0.5, 0.5, 0.5)]
    for number, name in enumerate(trace.classes):
        axes.plot(trace.confidence[:, number], label=name, color=colours[number], linewidth=2)
    axes.set(ylim=(-0.03, 1.03), ylabel="probability", title="Router's confidence, from the text up to each token")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _layers(axes: "Axes", trace: Trace, rows: dict[str, torch.Tensor]) -> None:
    from matplotlib.patches import Patch

    colours = _colours(len(trace.experts))
    weight, expert = torch.stack(list(rows.values())).max(dim=-1)  # [rows, T]
    shade = weight.clamp(0, 1).unsqueeze(-1)
    axes.imshow((shade * colours[expert] + (1 - shade)).numpy(), aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), [name.removeprefix("model.") for name in rows])
    if len(trace.tokens) <= _READABLE:
        texts = [token.replace("\n", "↵").replace(" ", "␣").replace("$", r"\$") or "·" for token in trace.tokens]
        axes.set_xticks(range(len(texts)), texts, rotation=90, fontsize="small")
    else:
        axes.set_xlabel("token")
    axes.set_title("Expert with the largest weight, by layer")
    if trace.confidence is None:
        names = [Patch(color=tuple(c), label=e) for c, e in zip(colours.tolist(), trace.experts, strict=True)]
        axes.legend(handles=names, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
