"""Results as one self-contained HTML page: the table, the plots, the settings. It fetches nothing."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape

from upscale.config import EvalConfig
from upscale.evaluating.results import Result
from upscale.evaluating.score_plots import require_matplotlib, routing_plot, scores_plot, size_plot
from upscale.evaluating.scoreboard import Board, Cell, overall_board, scores_board

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } small { color: #777; display: block; font-weight: normal; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; } p { color: #555; }
"""


def to_html(results: Sequence[Result], config: EvalConfig) -> str:
    """The page. Raises ConfigError if matplotlib is not installed."""
    require_matplotlib("--html")
    parts = [
        "<h1>Evaluation</h1>",
        _table(scores_board(results)),
        _table(overall_board(results)),
        "<h2>Scores by task and model</h2>",
        scores_plot(results),
    ]
    if (sizes := size_plot(results)) is not None:
        parts += ["<h2>Quality against size</h2>", sizes]
    for model in dict.fromkeys(result.model for result in results if result.routes is not None):
        routed = [(r.task, r.routes) for r in results if r.model == model and r.routes is not None]
        parts += [f"<h2>Routing of {escape(model)}</h2>", "<p>Mean weights at the last token of each prompt.</p>"]
        parts += [routing_plot(routed)]
    settings = json.dumps(asdict(config), indent=1)
    parts += ["<h2>Settings</h2>", f"<pre>{escape(settings)}</pre>"]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _table(board: Board) -> str:
    rows = _row("th", board.header) + "".join(_row("td", row) for row in board.rows)
    return f'<h2>{escape(board.title)}</h2><div class="wide"><table>{rows}</table></div><p>{escape(board.note)}</p>'


def _row(tag: str, cells: Sequence[Cell]) -> str:
    small = [f"<small>{escape(c.small)}</small>".replace("\n", "<br>") if c.small else "" for c in cells]
    shown = (escape(cell.text) + below for cell, below in zip(cells, small, strict=True))
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in shown) + "</tr>\n"
