"""Ask an engine the rows of a task, in the way that the metric wants."""

import math
from collections.abc import Sequence
from typing import Any

from upscale.errors import EngineError, TaskError
from upscale.evaluating.engines import Advance, Engine
from upscale.evaluating.metrics import GENERATED, RANKED, mark_generated, mark_ranked, mark_read
from upscale.evaluating.tasks import Task


def ask(engine: Engine, task: Task, metric: str, prompts: Sequence[str], advance: Advance) -> list[dict[str, Any]]:
    """What each row of ``task`` earns (see ``metrics``).

    Args:
        engine: has the model.
        task: its rows.
        metric: decides whether answers are generated, choices are ranked, or texts are read.
        prompts: of the rows, in their template.
        advance: called with so many more answers, see ``answers``.

    Raises:
        TaskError: a row has no token that could be scored.
        EngineError: the engine fails, or the model's likelihoods are no numbers.
    """
    if metric in GENERATED:
        answers = engine.answer(prompts, advance)
        return [mark_generated(row, answer) for row, answer in zip(task.rows, answers, strict=True)]
    if metric in RANKED:
        pairs = [(prompt, choice) for prompt, row in zip(prompts, task.rows, strict=True) for choice in row.choices]
        owners = [n for n, row in enumerate(task.rows) for _ in row.choices]
    else:
        pairs, owners = [("", row.completion) for row in task.rows], list(range(len(task.rows)))
    scores = engine.score(pairs, advance)
    for owner, (value, tokens) in zip(owners, scores, strict=True):
        if tokens == 0:
            raise TaskError(f"task {task.name}, row {owner + 1}: nothing to score: no token has another before it")
        if not math.isfinite(value):
            raise EngineError(
                f"task {task.name}, row {owner + 1}: the model's log-likelihood is {value}; is it broken?"
            )
    if metric in RANKED:
        values = iter(value for value, _ in scores)
        return [mark_ranked(row, [next(values) for _ in row.choices]) for row in task.rows]
    return [mark_read(row, value, tokens) for row, (value, tokens) in zip(task.rows, scores, strict=True)]


def answers(task: Task, metric: str) -> int:
    """How many answers ``ask`` wants of the engine: one a row, or one a choice."""
    return sum(len(row.choices) for row in task.rows) if metric in RANKED else len(task.rows)
