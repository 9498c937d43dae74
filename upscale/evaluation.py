"""Score models on tasks by greedy generation."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upscale.config import EvalConfig
from upscale.engines import is_server, open_engine
from upscale.errors import TaskError
from upscale.loading import locate, require_expert
from upscale.tasks import METRICS, Task, load_tasks

Progress = Callable[[int, int, str], None]  # rows done, rows in all, what is being done


@dataclass(frozen=True)
class Result:
    """One model's score on one task.

    Attributes:
        model: the name given to it.
        task: the task's name.
        metric: how answers were scored.
        score: mean over rows, 0 to 1.
        n: number of rows.
        expert: the expert that was forced, or None.
        engine: what ran the model.
        seconds: wall time of the answers.
    """

    model: str
    task: str
    metric: str
    score: float
    n: int
    expert: str | None
    engine: str
    seconds: float


def evaluate(
    models: Mapping[str, str | Path],
    tasks: Sequence[Task | str | Path],
    config: EvalConfig | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> list[Result]:
    """Score every model on every task, one model at a time.

    Args:
        models: by display name: directory, Hub id, or (with a server) the served name.
        tasks: Task objects, or files and directories for ``load_tasks``.
        config: settings; or give them as ``options``, e.g. ``chat=True``.
        progress: called with (rows done, rows in all, model and task).

    Returns:
        A Result for each model and task, in the order given.

    Raises:
        ZooError: anything that a user can cause, before the first model is loaded where possible.
    """
    config = config or EvalConfig(**options)
    loaded = [task for item in tasks for task in ([item] if isinstance(item, Task) else load_tasks([item]))]
    chosen = [Task(task.name, task.rows[: config.limit]) for task in loaded]
    if not models:
        raise TaskError("no model to evaluate: give at least one MODEL or NAME=MODEL")
    if not is_server(config):
        forced = [task.name if config.expert == "auto" else config.expert for task in chosen if config.expert]
        for model in models.values():  # before the first is loaded
            directory = locate(model)
            for expert in forced:
                require_expert(directory, expert)
    total, done = len(models) * sum(len(task.rows) for task in chosen), 0
    template = config.prompt_template.replace("\\n", "\n").replace("\\t", "\t")
    results = []
    for name, model in models.items():
        engine = open_engine(str(model), config)
        try:
            for task in chosen:

                def advance(rows: int, what: str = f"{name} on {task.name}") -> None:
                    nonlocal done
                    done += rows
                    if progress:
                        progress(done, total, what)

                expert = task.name if config.expert == "auto" else config.expert
                engine.force(expert)
                prompts = [template.replace("{prompt}", row.prompt) for row in task.rows]
                start = time.perf_counter()
                answers = engine.answer(prompts, advance)
                seconds = time.perf_counter() - start
                scores = [METRICS[config.metric](a, r.completion) for a, r in zip(answers, task.rows, strict=True)]
                score = sum(scores) / len(scores)
                results.append(
                    Result(name, task.name, config.metric, score, len(scores), expert, config.engine, round(seconds, 3))
                )
        finally:
            engine.close()
    return results


def to_json(results: Sequence[Result]) -> dict:
    """``{"results": [...]}``, one object for each model and task."""
    return {"results": [asdict(result) for result in results]}
