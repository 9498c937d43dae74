"""``upscale demo``: the whole way, from a zoo trained on the spot to answers over HTTP."""

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from serving.compat import installed_version
from serving.server import require_vllm
from upscale.commands.display import console, progress_bar, quiet_libraries
from upscale.config import CalibrateConfig, EvalConfig, SmileConfig
from zoo import Group, ZooError

if TYPE_CHECKING:
    from upscale.evaluating.evaluation import Result
    from upscale.evaluating.tasks import Task

SMILE = SmileConfig(rank=32)
TEMPLATE = "{prompt}\\n"
# Its base has seen nothing but the style of these tasks: there is no text of no expert's domain to fall back for.
CALIBRATION = CalibrateConfig(no_base=True, prompt_template=TEMPLATE)
CALIBRATED, PROJECTION = "SMILE, calibrated", "SMILE, projection"
MAX_NEW_TOKENS = 48
# What the demo promises; a row that breaks it fails the demo.
EXPERT_AT_LEAST, BASE_BELOW, ARITHMETIC_BELOW, RETENTION_AT_LEAST = 0.85, 0.05, 0.5, 0.97


class DemoError(ZooError):
    """The demo's models do not do what the demo promises."""


@dataclass(frozen=True)
class _Exchange:
    task: str
    prompt: str
    expected: str
    answer: str
    here: str
    experts: str
    tokens_per_second: float


@click.command()
@click.option("--limit", default=100, show_default=True, metavar="N", help="Test rows of each task to score.")
@click.option("--record", metavar="DIR", help="Also write what was shown to DIR: demo.svg and demo.json.")
def demo(limit: int, record: str | None) -> None:
    """Train a small zoo, upscale it, calibrate its router, evaluate it, serve it with vLLM and ask it.

    The zoo (a base and its specialists on generated tasks) takes minutes the first time; later runs find it in the
    user's cache directory.

    \b
    Example:
      upscale demo
    """
    from upscale.evaluating.tasks import load_tasks
    from upscale.merging.merging import merge
    from zoo.demo import demo_zoo

    require_vllm()
    quiet_libraries()
    start = time.monotonic()
    if record is not None:
        Path(record).mkdir(parents=True, exist_ok=True)
        console.record, console.width = True, 100
    console.rule("1. the zoo: a base and its specialists")
    directory = demo_zoo()
    group = Group.load(directory / "group.yaml")
    tasks = load_tasks([directory / "tasks"], limit)
    console.print(f"base, {', '.join(group.experts)}", highlight=False, soft_wrap=True)
    for task in tasks:
        console.print(f"  {task.name:8} {task.rows[0].prompt!r} -> {task.rows[0].completion!r}", highlight=False)

    console.rule("2. upscale smile: one model of all, without data")
    made = directory.with_name(f"{directory.name}-models")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    _build(group, made / "projection")
    merge(group, made / "average", "average")
    merge(group, made / "task-arithmetic", "task-arithmetic", scaling=0.3)

    console.rule("3. upscale calibrate: a router from a few prompts of each expert")
    shutil.copytree(made / "projection", made / "smile")
    _calibrate(made / "smile", directory / "prompts", list(group.experts))

    console.rule("4. upscale eval: everyone on unseen rows")
    results = _evaluate(group, made, tasks)
    _check(results, list(group.experts))

    console.rule("5. upscale serve: vLLM, the openai client, one question a task")
    exchanges = _ask(made / "smile", tasks)
    _show(exchanges)
    if different := [e.task for e in exchanges if e.answer != e.here]:
        raise DemoError(f"vLLM and transformers answer differently on {', '.join(different)}")
    seconds = round(time.monotonic() - start)
    if record is not None:
        picture = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="make demo"), flags=re.DOTALL)
        Path(record, "demo.svg").write_text(picture)  # without its web fonts: a picture fetches nothing
        content = _record(results, exchanges, seconds)
        Path(record, "demo.json").write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"[green]done[/] in {seconds} s; the model is {made / 'smile'}", soft_wrap=True)


def _build(group: Group, out: Path) -> None:
    from upscale.building.build import smile
    from upscale.commands.building import show_report

    with progress_bar("upscaling") as progress:
        report = smile(group, out, SMILE, progress=progress)
    show_report(report)


def _calibrate(model: Path, prompts: Path, experts: Sequence[str]) -> None:
    from upscale.calibrating.calibration import calibrate
    from upscale.calibrating.prompts import load_prompts
    from upscale.commands.calibrate import show

    given = load_prompts({name: [prompts / f"{name}.jsonl"] for name in experts}, experts, "base")
    with progress_bar("calibrating") as progress:
        found = calibrate(model, given, CALIBRATION, progress=progress)
    show(found)


def _evaluate(group: Group, made: Path, tasks: Sequence["Task"]) -> list["Result"]:
    from upscale.commands.eval import show
    from upscale.evaluating.evaluation import evaluate

    plain = {"base": group.base.location, **{name: source.location for name, source in group.experts.items()}}
    plain |= {"average": made / "average", "task arithmetic": made / "task-arithmetic"}
    plain |= {PROJECTION: made / "projection", CALIBRATED: made / "smile"}
    common = {"prompt_template": TEMPLATE, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 100}
    with progress_bar("evaluating") as progress:
        results = evaluate(plain, tasks, EvalConfig(**common), progress=progress)
        forced = {"SMILE, right expert forced": made / "smile"}
        results += evaluate(forced, tasks, EvalConfig(**common, expert="auto"), progress=progress)
    show(results)
    console.print(
        "projection: the zero-shot router as published, token by token; calibrated: once a prompt, by the "
        "gate of step 3; forced: the expert named like the task."
    )
    return results


def _check(results: Sequence["Result"], experts: Sequence[str]) -> None:
    """Raise DemoError for a row that breaks what the demo promises."""
    score = {(r.model, r.task): r.score for r in results}
    if weak := [e for e in experts if score[e, e] < EXPERT_AT_LEAST]:
        raise DemoError(f"experts below {EXPERT_AT_LEAST:.0%} on their own task: {', '.join(weak)}")
    if known := [e for e in experts if score["base", e] >= BASE_BELOW]:
        raise DemoError(f"the base solves {', '.join(known)} already ({BASE_BELOW:.0%} or more)")
    mean = sum(score["task arithmetic", e] for e in experts) / len(experts)
    if mean >= ARITHMETIC_BELOW:
        raise DemoError(f"task arithmetic scores {mean:.0%}; the demo means to show it failing")
    retention = sum(score[CALIBRATED, e] / score[e, e] for e in experts) / len(experts)
    if retention < RETENTION_AT_LEAST:
        raise DemoError(f"the calibrated model keeps {retention:.0%} of its experts' skill; it should keep 97%")


def _ask(model: Path, tasks: Sequence["Task"]) -> list[_Exchange]:
    """One chat question a task, over HTTP and again in transformers."""
    import openai

    from serving.running import running_server
    from upscale.evaluating.engines import TransformersEngine

    engine = TransformersEngine(str(model), EvalConfig(chat=True, max_new_tokens=MAX_NEW_TOKENS))
    exchanges = []
    with console.status("starting vLLM ..."), running_server(model, [], model.with_name("server.log")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        for task in tasks:
            row = task.rows[0]
            start = time.perf_counter()
            reply = client.chat.completions.create(
                model=model.name,
                messages=[{"role": "user", "content": row.prompt}],
                max_tokens=MAX_NEW_TOKENS,
                temperature=0.0,
            )
            speed = reply.usage.completion_tokens / (time.perf_counter() - start) if reply.usage else 0.0
            (here,) = engine.answer([row.prompt], lambda _: None)
            answer = reply.choices[0].message.content or ""
            exchanges.append(
                _Exchange(task.name, row.prompt, row.completion, answer, here, _experts(model, row.prompt), speed)
            )
    return exchanges


def _record(results: Sequence["Result"], exchanges: Sequence[_Exchange], seconds: int) -> dict:
    """What the demo measured, with versions and machine."""
    from upscale.evaluating.results import to_json

    packages = ("upscale-zoo", "torch", "transformers")
    versions = {"vllm": installed_version(), **{name: version(name) for name in packages}}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "seconds": seconds,
        **to_json(results, rows=False),
        "exchanges": [asdict(exchange) for exchange in exchanges],
    }


def _experts(model: Path, prompt: str) -> str:
    """The experts that served a question and its answer, by mean weight: the same routing, traced in transformers."""
    from upscale.evaluating.trace import trace

    traced = trace(model, prompt, chat=True, max_new_tokens=MAX_NEW_TOKENS)
    shares = dict(zip(traced.experts, traced.overall.mean(dim=0).tolist(), strict=True))
    return ", ".join(f"{e} {s:.0%}" for e, s in sorted(shares.items(), key=lambda item: -item[1])[:3])


def _show(exchanges: Sequence[_Exchange]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Answers over HTTP", title_justify="left")
    for column in ("question", "answer", "expected", "served by", "tokens/s", "as in transformers"):
        table.add_column(column)
    for e in exchanges:
        same = "[green]yes[/]" if e.answer == e.here else f"[red]no: {escape(repr(e.here))}[/]"
        right = "green" if e.answer.strip() == e.expected else "red"
        answer = f"[{right}]{escape(e.answer.strip())}[/]"
        table.add_row(escape(e.prompt), answer, escape(e.expected), e.experts, f"{e.tokens_per_second:.0f}", same)
    console.print(table)
