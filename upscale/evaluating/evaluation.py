"""Score many models on many tasks."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upscale.config import EvalConfig
from upscale.errors import TaskError
from upscale.evaluating.asking import answers, ask
from upscale.evaluating.encoding import framed
from upscale.evaluating.engines import Advance, Engine, is_server, open_engine
from upscale.evaluating.entrants import ORACLE, Entrant, entrants, tensor_bytes
from upscale.evaluating.metrics import GENERATED, METRICS, WAYS, interval, metric_of, score
from upscale.evaluating.results import Result, routes
from upscale.evaluating.results_file import VERSION, ResultsFile
from upscale.evaluating.tasks import Task, load_tasks, require_distinct
from zoo import Group

Progress = Callable[[int, int, str], None]  # answers done, answers in all, what is being done


@dataclass(frozen=True)
class _Pair:
    """A model and a task, and which expert is forced."""

    entrant: Entrant
    name: str
    task: Task
    metric: str
    expert: str | None
    key: str
    answers: int


def evaluate(
    models: Mapping[str, str | Path],
    tasks: Sequence[Task | str | Path],
    config: EvalConfig | None = None,
    *,
    group: Group | str | Path | None = None,
    file: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Result]:
    """Score every model on every task, one model at a time.

    Args:
        models: by display name: directory, Hub id, or (with a server) the served name.
        tasks: Task objects, or files and directories for ``load_tasks``.
        config: settings; or give them as ``options``, e.g. ``chat=True``.
        group: a Group, or the YAML file of one, whose base, experts, average, task arithmetic (arXiv 2212.04089) and
            TIES merge (arXiv 2306.01708) take part as baselines.
        file: results are kept in this file (``ResultsFile``); those that it has already are not computed again.
        progress: called with (answers done, answers in all, model and task).

    Returns:
        A Result for each model and task, in the order given, baselines first.

    Raises:
        ZooError: anything that a user can cause, before the first model is loaded where possible.
    """
    config = config or EvalConfig(**options)
    loaded = [task for item in tasks for task in ([item] if isinstance(item, Task) else load_tasks([item]))]
    require_distinct(loaded)
    chosen = [replace(task, rows=task.rows[: config.limit]) for task in loaded]
    if config.metric != "auto" and not any(config.metric in METRICS[task.kind] for task in chosen):
        kinds = ", ".join(sorted({task.kind for task in chosen}))
        raise TaskError(f"--metric {config.metric} applies to none of the tasks, which are of kind {kinds}")
    group = Group.load(group) if isinstance(group, str | Path) else group
    taking_part = entrants(models, group, chosen, config)
    pairs = [pair for entrant in taking_part for pair in _pairs(entrant, chosen, config)]
    kept = ResultsFile(file)
    finished = {n: replace(kept.known[p.key], model=p.name) for n, p in enumerate(pairs) if p.key in kept.known}
    total, done = sum(pair.answers for pair in pairs), sum(pairs[n].answers for n in finished)

    def tell(what: str, more: int = 0) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done, total, what)

    for entrant in taking_part:
        todo = [n for n, pair in enumerate(pairs) if pair.entrant is entrant and n not in finished]
        if not todo:
            continue
        tell(f"{'loading' if entrant.group is None else 'merging'} {entrant.name}")
        with entrant.opened() as model:
            engine = open_engine(model, config)
            try:
                size = None if is_server(config) else tensor_bytes(entrant.directory or model)
                for n in todo:
                    what = f"{pairs[n].name} on {pairs[n].task.name}"
                    finished[n] = _measure(engine, pairs[n], config, size, lambda more, what=what: tell(what, more))
                    kept.keep([finished[m] for m in sorted(finished)])
            finally:
                engine.close()
    results = [finished[n] for n in range(len(pairs))]
    kept.keep(results)
    return results


def _pairs(entrant: Entrant, tasks: Sequence[Task], config: EvalConfig) -> list[_Pair]:
    """What an entrant has to do: every task and, if it is upscaled and --oracle is on, again with the right expert."""
    runs = [(entrant.name, task, entrant.expert(task, config)) for task in tasks]
    if config.oracle:
        runs += [(entrant.name + ORACLE, task, task.name) for task in tasks if task.name in entrant.experts]
    stamp, pairs = entrant.stamp(), []
    for name, task, expert in runs:
        metric = metric_of(task.kind, config.metric)
        settings = [config.engine, config.prompt_template, config.chat, config.dtype, metric, expert]
        settings += [config.max_new_tokens] if metric in GENERATED else []
        content = json.dumps([VERSION, stamp, task.digest, settings])
        key = hashlib.sha256(content.encode()).hexdigest()
        pairs.append(_Pair(entrant, name, task, metric, expert, key, answers(task, metric)))
    return pairs


def _measure(engine: Engine, pair: _Pair, config: EvalConfig, size: int | None, advance: Advance) -> Result:
    task, bare = pair.task, pair.task.kind == "text"
    prompts = [framed(row.prompt, config.prompt_template) for row in task.rows]
    engine.force(pair.expert)
    before, start = engine.generated, time.perf_counter()
    marks = ask(engine, task, pair.metric, prompts, advance)
    seconds, after = time.perf_counter() - start, engine.generated
    found = None
    if pair.expert is None:
        read = [row.completion for row in task.rows] if bare else prompts
        if (trace := engine.route(read, chat=config.chat and not bare)) is not None:
            found, experts = routes(trace, task.name)
            marks = [{**mark, "expert": expert} for mark, expert in zip(marks, experts, strict=True)]
    low, high = interval(pair.metric, marks)
    way = next(way for way in WAYS if pair.metric in way)
    return Result(
        model=pair.name,
        task=task.name,
        metric=pair.metric,
        score=score(pair.metric, marks),
        n=len(marks),
        expert=pair.expert,
        engine=config.engine,
        seconds=round(seconds, 3),
        low=low,
        high=high,
        others={metric: score(metric, marks) for metric in way if metric != pair.metric},
        generated=after - before if way is GENERATED and before is not None and after is not None else None,
        size=size,
        routes=found,
        rows=marks,
        key=pair.key,
    )
