"""WEMoE and SMILE on language models, before and after adaptation, at the same size, in one table.

    python benchmarks/wemoe.py DIRECTORY NAME       # adds NAME to benchmarks/wemoe.json

DIRECTORY holds `group.yaml`, `tasks/` or `test/` (test rows) and `prompts/` (training prompts, NAME.jsonl each). Every
model is also asked with the right expert forced ("right expert"): what its router could reach at best.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

import upscale
from upscale.calibrating.prompts import load_prompts
from upscale.commands.display import console, progress_bar, quiet_libraries
from upscale.commands.eval import show
from upscale.config import EvalConfig
from upscale.evaluating.evaluation import evaluate
from upscale.evaluating.results import summarise, to_json
from zoo import Group

HERE = Path(__file__).resolve().parent
TEMPLATE = "{prompt}\\n"
BUDGET = "2x"
ADAPTED = 32  # prompts of each expert
STEPS = 200


class _Bench:
    def __init__(self, directory: Path, name: str):
        self.group = Group.load(directory / "group.yaml")
        self.experts = list(self.group.experts)
        files = {e: [directory / "prompts" / f"{e}.jsonl"] for e in self.experts}
        self.prompts = {e: p[:ADAPTED] for e, p in load_prompts(files, self.experts, None).items()}
        self.work = HERE / "work" / f"wemoe-{name}"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.models: dict[str, Path] = {}
        self.timing: dict[str, dict] = {}

    def add(self, name: str, build: Callable[..., Any], objective: str | None = None, **options: Any) -> None:
        """Build a model; SMILE gets a calibrated router; perhaps adapt it."""
        out = self.work / name.replace(", ", "-").replace(" ", "-")
        build(self.group, out, **options)
        if build is upscale.smile:
            given = {e: p[:8] for e, p in self.prompts.items()}
            upscale.calibrate(out, given, prompt_template=TEMPLATE, no_base=True)
        if objective:
            start = time.perf_counter()
            with progress_bar(name) as progress:
                given = {"objective": objective, "steps": STEPS, "prompt_template": TEMPLATE}
                found = upscale.adapt(out, self.prompts, progress=progress, **given)
            judged = found.training.judgements
            self.timing[name] = {
                "seconds": round(time.perf_counter() - start, 1),
                "steps": found.steps,
                "stopped": found.stopped,
                "held out": [judged[0].loss, found.training.best.loss],
            }
        self.models[name] = out


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@click.argument("name")
@click.option("--limit", default=100, show_default=True, help="Test rows of each task.")
def main(directory: Path, name: str, limit: int) -> None:
    """Compare on the group of DIRECTORY."""
    quiet_libraries()
    bench = _Bench(directory, name)
    everything = {"budget": BUDGET, "mlp_pattern": ("*",)}  # attention too: beyond the paper
    bench.add("WEMoE", upscale.wemoe, budget=BUDGET)
    bench.add("WEMoE, entropy", upscale.wemoe, "entropy", budget=BUDGET)
    bench.add("WEMoE, distilled", upscale.wemoe, "distil", budget=BUDGET)
    bench.add("WEMoE of all linears", upscale.wemoe, **everything)
    bench.add("WEMoE of all linears, distilled", upscale.wemoe, "distil", **everything)
    bench.add("SMILE, calibrated", upscale.smile, budget=BUDGET)
    bench.add("SMILE, calibrated and distilled", upscale.smile, "distil", budget=BUDGET)
    tests = next(path for path in (directory / "tasks", directory / "test") if path.is_dir())
    tasks = [tests / f"{e}.jsonl" for e in bench.experts]
    config = EvalConfig(prompt_template=TEMPLATE, max_new_tokens=64, batch_size=50, limit=limit)
    with progress_bar(name) as progress:
        results = evaluate(bench.models, tasks, config, group=bench.group, progress=progress)
        best = {f"{n}, right expert": p for n, p in bench.models.items() if "," not in n or n.endswith("calibrated")}
        results += evaluate(best, tasks, replace(config, expert="auto"), progress=progress)
    show(results)
    output = HERE / "wemoe.json"
    content = json.loads(output.read_text()) if output.is_file() else {}
    content[name] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {p: version(p) for p in ("upscale-zoo", "torch", "transformers")},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "rows": limit,
        "budget": BUDGET,
        "adaptation": bench.timing,
        "prompts": min(len(p) for p in bench.prompts.values()),
        **to_json(results, rows=False),
        "summary": [s.__dict__ for s in summarise(results)],
    }
    output.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"wrote {output}")


if __name__ == "__main__":
    main()
