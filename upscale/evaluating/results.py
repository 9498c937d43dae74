"""Results of an evaluation: a model on a task, and a model over all tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from upscale.evaluating.metrics import SHARES
from upscale.evaluating.trace import Trace

BASE = "base"  # the model that sizes are compared with; and where a prompt goes that goes to no expert


@dataclass(frozen=True)
class Routes:
    """Where a model's router sent a task's prompts, seen at each prompt's last token.

    Attributes:
        experts: names, the columns of ``blocks``.
        blocks: mean weights over prompts and linears, by decoder block (or module outside one).
        shares: of the prompts, by the expert of the largest mean weight over all modules; "base" where all are 0.
        accuracy: the share of the expert that is named like the task; None if there is none.
    """

    experts: Sequence[str]
    blocks: Mapping[str, Sequence[float]]
    shares: Mapping[str, float]
    accuracy: float | None


@dataclass(frozen=True)
class Result:
    """One model's score on one task.

    Attributes:
        model: the name given to it.
        task: the task's name.
        metric: how answers were scored.
        score: a mean over rows, or a perplexity; see ``metrics``.
        n: number of rows.
        expert: the expert that was forced, or None.
        engine: what ran the model.
        seconds: wall time of the answers.
        low, high: the score's 95 % bootstrap interval.
        others: what else the same answers score, by metric.
        generated: tokens generated; None where none were, or the engine does not say.
        size: bytes of the checkpoint's tensors; None for a served model.
        routes: where the router sent the prompts; None without a router, or where the engine does not say.
        rows: what each row earned, and how it was answered: enough to compute everything above anew.
        key: of the model, the task and the settings, for resuming.
    """

    model: str
    task: str
    metric: str
    score: float
    n: int
    expert: str | None
    engine: str
    seconds: float
    low: float
    high: float
    others: Mapping[str, float]
    generated: int | None
    size: int | None
    routes: Routes | None
    rows: Sequence[Mapping[str, Any]]
    key: str

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Result":
        """The result that ``asdict`` made ``entry`` of. Raises TypeError for other fields."""
        routes = entry.get("routes")
        return cls(**{**entry, "routes": routes and Routes(**routes)})


@dataclass(frozen=True)
class Summary:
    """One model over all tasks; None is what is not known.

    Attributes:
        model: its name.
        mean: of the scores from 0 to 1; None if one of the tasks is missing.
        retention: mean of score / own expert's score, over the tasks with a score from 0 to 1 of which the run has the
            own expert: the model named like the task, with nothing forced. Perplexities have no part in it.
        routing: mean routing accuracy.
        size: bytes of the checkpoint's tensors.
        ratio: size / size of the model named "base".
        seconds: of all answers.
        speed: tokens generated a second, all prompts of a batch together.
    """

    model: str
    mean: float | None
    retention: float | None
    routing: float | None
    size: int | None
    ratio: float | None
    seconds: float
    speed: float | None


def routes(trace: Trace, task: str) -> tuple[Routes, list[str]]:
    """Where prompts (the rows of ``trace``) went: all together, and the expert of each."""
    most = zip(*(values.tolist() for values in trace.overall.max(dim=1)), strict=True)
    chosen = [str(trace.experts[column]) if weight > 0 else BASE for weight, column in most]
    shares = {name: chosen.count(name) / len(chosen) for name in (*trace.experts, BASE) if name in chosen}
    blocks = {block: weights.mean(dim=0).tolist() for block, weights in trace.blocks.items()}
    accuracy = shares.get(task, 0.0) if task in trace.experts else None
    return Routes(list(trace.experts), blocks, shares, accuracy), chosen


def summarise(results: Sequence[Result]) -> list[Summary]:
    """A Summary for each model, in the order of ``results``."""
    tasks = {r.task for r in results if r.metric in SHARES}
    plain = [r for r in results if r.model == r.task and r.task in tasks and r.expert is None]
    own = {r.task: r.score for r in plain if r.score > 0}
    base = next((r.size for r in results if r.model == BASE and r.size), None)
    return [_summary([r for r in results if r.model == name], tasks, own, base) for name in _models(results)]


def _models(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.model for result in results))


def _summary(of_model: Sequence[Result], tasks: set[str], own: Mapping[str, float], base: int | None) -> Summary:
    scores = {r.task: r.score for r in of_model if r.task in tasks}
    kept = [scores[task] / best for task, best in own.items() if task in scores]
    speeds = [(r.generated, r.seconds) for r in of_model if r.generated]
    seconds = sum(seconds for _, seconds in speeds)
    size = of_model[0].size
    return Summary(
        model=of_model[0].model,
        mean=_mean(list(scores.values())) if len(scores) == len(tasks) else None,
        retention=_mean(kept) if len(kept) == len(own) else None,
        routing=_mean([r.routes.accuracy for r in of_model if r.routes and r.routes.accuracy is not None]),
        size=size,
        ratio=size / base if size and base else None,
        seconds=sum(r.seconds for r in of_model),
        speed=sum(tokens for tokens, _ in speeds) / seconds if seconds else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def to_json(results: Sequence[Result], *, rows: bool = True) -> dict:
    """``{"results": [...], "models": [...]}``: an object for each model and task, and one for each model.

    Args:
        results: of an evaluation.
        rows: with what each row earned, which is most of it.
    """
    entries = [asdict(result) for result in results]
    if not rows:
        entries = [{key: value for key, value in entry.items() if key != "rows"} for entry in entries]
    return {"results": entries, "models": [asdict(summary) for summary in summarise(results)]}
