"""Results as two tables of texts, scores by task and all else by model, for the terminal, for HTML and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from upscale.evaluating.metrics import SHARES
from upscale.evaluating.results import Result, summarise

# How to read the tables; below each.
SCORES_NOTE = "Below each score, its 95 % bootstrap interval over the task's rows."
OVERALL_NOTE = (
    "mean: of the scores from 0 to 1. retention: mean of score / score of the task's own expert. routing: share of "
    "prompts that the router sent to the task's own expert. MB: of the checkpoint's tensors, and how often the base's. "
    "tokens/s: generated, all prompts of a batch together."
)


@dataclass(frozen=True)
class Cell:
    """A text, and one that is shown smaller below it."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Board:
    """A header and rows of as many cells, and how to read them."""

    title: str
    header: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    note: str


def scores_board(results: Sequence[Result]) -> Board:
    """Models down, tasks across."""
    tasks = {result.task: result for result in results}
    found = {(result.model, result.task): _score(result) for result in results}
    metrics = {r.metric for r in tasks.values()}
    named = len(metrics) > 1  # else the title says it
    header = [Cell("model"), *(Cell(t, f"{r.metric}\n" * named + f"n={r.n}") for t, r in tasks.items())]
    models = dict.fromkeys(result.model for result in results)
    rows = [[Cell(model), *(found.get((model, task), Cell("")) for task in tasks)] for model in models]
    return Board("Scores" if named else f"Scores: {metrics.pop()}", header, rows, SCORES_NOTE)


def overall_board(results: Sequence[Result]) -> Board:
    """Models down; what the tasks say together, and what each model costs."""
    columns = {
        "model": lambda s: s.model,
        "mean": lambda s: _text(s.mean, ".3f"),
        "retention": lambda s: _text(s.retention, ".3f"),
        "routing": lambda s: _text(s.routing, ".1%"),
        "MB": lambda s: _text(s.size and s.size / 1e6, ",.1f"),
        "of base": lambda s: _text(s.ratio, ".2f"),
        "seconds": lambda s: _text(s.seconds, ".1f"),
        "tokens/s": lambda s: _text(s.speed, ",.0f"),
    }
    cells = {name: [Cell(column(summary)) for summary in summarise(results)] for name, column in columns.items()}
    full = {name: column for name, column in cells.items() if any(cell.text for cell in column)}
    return Board("Overall", [Cell(name) for name in full], list(zip(*full.values(), strict=True)), OVERALL_NOTE)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _score(result: Result) -> Cell:
    if result.metric not in SHARES:
        return Cell(f"{result.score:.2f}", f"{result.low:.2f} to {result.high:.2f}")
    # Room is scarce: .85-1.00
    low, high = (f"{value:.2f}".removeprefix("0") for value in (result.low, result.high))
    return Cell(f"{result.score:.3f}", f"{low}-{high}")


def to_markdown(results: Sequence[Result]) -> str:
    """Both tables in GitHub's Markdown."""
    return "\n".join(map(_markdown, (scores_board(results), overall_board(results))))


def _markdown(board: Board) -> str:
    lines = [[_flat(cell) for cell in row] for row in (board.header, *board.rows)]
    lines.insert(1, ["---", *["---:"] * (len(board.header) - 1)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {board.title}\n\n{table}\n\n{board.note}\n"


def _flat(cell: Cell) -> str:
    text = f"{cell.text}\n{cell.small}" if cell.small else cell.text
    return text.replace("|", "\\|").replace("\n", "<br>")
