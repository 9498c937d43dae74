"""Grades of routing on real groups: the published router, its options, the calibrated one, the right expert always.

    python benchmarks/train_groups.py ...                         # makes the groups; see there
    python benchmarks/routing.py GROUPS zoo-small lora hard       # evaluates them; writes benchmarks/routing.json

GROUPS holds for each group `group.yaml`, `tasks/`, `prompts/` and, for the group "hard", `tasks-instructed/` and
`prompts-instructed/`; and `books.jsonl`, text of no expert's domain, with `books-prompts.jsonl`.
Interrupted, it goes on where it was.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click

from upscale import smile
from upscale.calibrating.calibration import calibrate
from upscale.calibrating.prompts import load_prompts
from upscale.commands.display import console, progress_bar, quiet_libraries
from upscale.commands.eval import show
from upscale.config import EvalConfig
from upscale.evaluating.evaluation import evaluate
from upscale.evaluating.results import summarise, to_json
from zoo import Group

HERE = Path(__file__).resolve().parent
TEMPLATE = "{prompt}\\n"
PROMPTS = 8  # per expert
PUBLISHED = {"rank": 32, "router_rank": 4, "rest": "base", "lm_head": True}
OPTIONS = {
    "projection": {},
    "projection, standardised": {"standardise": True},
    "projection, prefix": {"granularity": "prefix"},
    "projection, block": {"scope": "block"},
    "projection, model": {"scope": "model"},
    "projection, model, prefix": {"scope": "model", "granularity": "prefix"},
}
PARTS = {  # what is left at the base
    "linears of the blocks": ["lm_head", "*embed*", "*norm*"],
    "and the head": ["*embed*", "*norm*"],
    "and the norms": ["*embed*"],
    "and the embeddings": ["*norm*"],
    "everything": [],
}


class _Bench:
    """One group: builds its models, evaluates them all on the same rows."""

    def __init__(self, groups: Path, name: str, variant: str, limit: int):
        self.name = f"{name}{variant}"
        self.group = Group.load(groups / name / "group.yaml")
        self.experts = list(self.group.experts)
        self.work = HERE / "work" / self.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.config = EvalConfig(prompt_template=TEMPLATE, max_new_tokens=64, batch_size=50, limit=limit)
        self.tasks = [groups / name / f"tasks{variant}" / f"{e}.jsonl" for e in self.experts] + [groups / "books.jsonl"]
        self.books = groups / "books-prompts.jsonl"
        self.files = groups / name / f"prompts{variant}"

    def _prompts(self, directory: Path, count: int, given: bool) -> dict:
        files = {e: [directory / f"{e}.jsonl"] for e in self.experts} | ({"base": [self.books]} if given else {})
        found = load_prompts(files, self.experts, "base")
        return {name: prompts if name == "base" else prompts[:count] for name, prompts in found.items()}

    def build(self, name: str, **options) -> Path:
        out = self.work / name.replace(", ", "-").replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        smile(self.group, out, **options)
        return out

    def calibrated(
        self, name: str, count: int = PROMPTS, build: Mapping | None = None, *, given: bool = False, **options
    ) -> tuple[Path, dict]:
        """With ``given``, the base class is learnt from other paragraphs of the books."""
        out = self.build(name, **(build or {}))
        start = time.perf_counter()
        found = calibrate(out, self._prompts(self.files, count, given), prompt_template=TEMPLATE, **options)
        return out, {"seconds": round(time.perf_counter() - start, 2), "left_out": dict(found.accuracy)}

    def run(self, models: Mapping[str, Path], *, oracle: tuple[str, ...] = (), baselines: bool = True) -> dict:
        file = self.work / "results.json"
        with progress_bar(self.name) as progress:
            group = self.group if baselines else None
            results = evaluate(models, self.tasks, self.config, group=group, file=file, progress=progress)
            if oracle:
                forced = {f"{name}, right expert": models[name] for name in oracle}
                tasks = self.tasks[:-1]
                config = EvalConfig(**{**self.config.__dict__, "expert": "auto"})
                results += evaluate(forced, tasks, config, file=file, progress=progress)
        show(results)
        return {**to_json(results, rows=False), "summary": [s.__dict__ for s in summarise(results)]}


def _zoo_small(bench: _Bench) -> dict:
    three, two = {"budget": "2.95x"}, {"budget": "2x"}
    models = {"SMILE as published, rank 32": bench.build("published", **PUBLISHED)}
    models |= {name: bench.build(name, router_rank=4, **three, **options) for name, options in OPTIONS.items()}
    timing = {}
    for name, settings in {
        "calibrated": (three, {}),
        "calibrated, prefix": (three, {"granularity": "prefix"}),
        "calibrated, 4 prompts": (three, {"count": 4}),
        "calibrated, 2x": (two, {}),
    }.items():
        models[name], timing[name] = bench.calibrated(name, build=settings[0], **settings[1])
    found = bench.run(models, oracle=("SMILE as published, rank 32", "calibrated", "calibrated, 2x"))
    parts = {name: bench.build(f"part-{name}", rank=56, exclude=tuple(out)) for name, out in PARTS.items()}
    forced = EvalConfig(**{**bench.config.__dict__, "expert": "auto"})
    with progress_bar("parts") as progress:
        results = evaluate(parts, bench.tasks[:-1], forced, file=bench.work / "parts.json", progress=progress)
    show(results)
    return {**found, "calibration": timing, "parts, right expert, rank 56": to_json(results, rows=False)["results"]}


def _lora(bench: _Bench) -> dict:
    model, timing = bench.calibrated("calibrated", build={"rank": 16})
    projection = bench.build("projection", rank=16, router_rank=4)
    return {**bench.run({"projection": projection, "calibrated": model}, oracle=("calibrated",)), "calibration": timing}


def _hard(bench: _Bench) -> dict:
    models, timing = {"projection": bench.build("projection", rank=64, router_rank=4)}, {}
    for count, given in ((8, False), (32, False), (8, True)):
        name = f"calibrated, {count} prompts{', base given' * given}"
        models[name], timing[name] = bench.calibrated(name, count, build={"rank": 64}, given=given)
    found = bench.run(models, oracle=("calibrated, 8 prompts",), baselines=True)
    return {**found, "calibration": timing}


_BENCHES = {"zoo-small": ("", _zoo_small), "lora": ("", _lora), "hard": ("", _hard)}
_BENCHES["hard-instructed"] = ("-instructed", _hard)


@click.command()
@click.argument("groups", type=click.Path(exists=True, path_type=Path))
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(_BENCHES)))
@click.option("--limit", default=100, show_default=True, help="Test rows of each task.")
def main(groups: Path, names: tuple[str, ...], limit: int) -> None:
    """Evaluate the groups NAMES of the directory GROUPS."""
    quiet_libraries()
    output = HERE / "routing.json"
    content = json.loads(output.read_text()) if output.is_file() else {}
    for name in names:
        variant, bench = _BENCHES[name]
        console.rule(name)
        found = bench(_Bench(groups, name.removesuffix(variant) if variant else name, variant, limit))
        packages = ("upscale-zoo", "torch", "transformers")
        content[name] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
            "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
            "rows": limit,
            "prompts": PROMPTS,
            **found,
        }
        output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
