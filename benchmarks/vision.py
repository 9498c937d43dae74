"""The papers' own kind of experiment on real images: one small ViT fine-tuned per set, upscaled and merged.

    python benchmarks/train_vits.py --data DATA OUT     # a base and its fine-tunes; see there
    python benchmarks/vision.py OUT                     # writes benchmarks/vision.json

Every model is asked for each set's test images with that set's own head, as in the papers. Routing is per image; the
figure that batch averaging gives (as published code evaluates) stands beside it, named so. Adaptation sees images
without labels that no test has. Interrupted, it starts anew.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import upscale
from upscale.commands.display import console, quiet_libraries
from zoo import Group

HERE = Path(__file__).resolve().parent
BATCH = 100
DRAWS = 2000  # of the bootstrap
STEPS, RATE = 200, 1e-3


class _Bench:
    def __init__(self, directory: Path):
        self.directory, self.work = directory, HERE / "work" / "vision"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.group = Group.load(directory / "group.yaml")
        self.sets = list(self.group.experts)
        self.tests = {name: load_file(directory / "tests" / f"{name}.safetensors") for name in self.sets}
        self.inputs = {name: load_file(directory / "adapt" / f"{name}.safetensors") for name in self.sets}
        self.experts = {name: upscale.load(self.group.experts[name].location).eval() for name in self.sets}
        self.rows: list[dict] = []
        self.own: dict[str, float] = {}

    def score(self, label: str, model: Any, *, data: str, average: bool = False, **facts: Any) -> None:
        """Accuracy on every set, and what the model is."""
        scores, right = {}, []
        for name, test in self.tests.items():
            found = self._right(model, name, test, average)
            scores[name], right = float(found.mean()), [*right, found]
        mean = sum(scores.values()) / len(scores)
        row = {
            "model": label,
            "accuracy": scores,
            "mean": mean,
            "interval": _interval(right),
            "retention": sum(scores[n] / self.own.get(n, scores[n]) for n in scores) / len(scores),
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": data,
            **facts,
        }
        self.rows.append(row)
        console.print(f"{label}: {mean:.4f}, retention {row['retention']:.4f}", highlight=False)

    @torch.no_grad()
    def _right(self, model: Any, name: str, test: Mapping[str, Tensor], average: bool) -> Tensor:
        found = []
        plain = not hasattr(model, "heads")
        if plain:  # a merge has no heads: it is given the set's
            model.classifier = self.experts[name].classifier
        with _batch_average(model) if average else nullcontext():
            for start in range(0, len(test["labels"]), BATCH):
                rows = slice(start, start + BATCH)
                with nullcontext() if plain else model.heads.use(name):
                    logits = model(pixel_values=test["pixel_values"][rows]).logits
                found.append((logits.argmax(dim=-1) == test["labels"][rows]).float())
        return torch.cat(found)

    def upscaled(self, label: str, build: Callable[..., Any], adapted: str | None, **options: Any) -> None:
        """Build, perhaps adapt, and score."""
        out = self.work / label.replace(" ", "-").replace(",", "")
        start = time.perf_counter()
        build(self.group, out, **options)
        facts: dict[str, Any] = {"build seconds": round(time.perf_counter() - start, 1)}
        data = "none"
        if adapted:
            start = time.perf_counter()
            given = {"objective": adapted, "steps": STEPS, "lr": RATE, "batch_size": 16, "judge_every": 50}
            found = upscale.adapt(out, self.inputs, **given)
            data = f"{sum(len(x['pixel_values']) for x in self.inputs.values())} images without labels"
            facts |= {"adaptation seconds": round(time.perf_counter() - start, 1), "stopped": found.stopped}
            facts["seconds a step"] = round((time.perf_counter() - start) / max(found.steps, 1), 4)
        model = upscale.load(out).eval()
        facts["trainable"] = sum(p.numel() for p in model.router.parameters())
        facts["bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        self.score(label, model, data=data, **facts)
        if adapted:
            self.score(f"{label}, batch-averaged", model, data=data, average=True)


def _batch_average(model: Any):
    """Average routing over the batch, all of one set here, as published code does when it evaluates."""
    router = model.router
    weights = router._weights

    class Averaged:
        def __enter__(self):
            router._weights = lambda *args: weights(*args).mean(dim=0, keepdim=True).expand_as(weights(*args))

        def __exit__(self, *_):
            del router._weights

    return Averaged()


def _interval(right: list[Tensor]) -> tuple[float, float]:
    """95 % of the mean over sets, by bootstrap within each."""
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(DRAWS)
    for rows in right:
        drawn = torch.randint(len(rows), (DRAWS, len(rows)), generator=generator)
        means += rows[drawn].mean(dim=1) / len(right)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _show(rows: list[dict]) -> None:
    table = Table(title="Accuracy with each set's own head", title_justify="left")
    sets = list(rows[0]["accuracy"])
    for column in ("model", *sets, "mean", "95 %", "retention", "parameters", "trainable", "data", "adapted in"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        low, high = row["interval"]
        cells = [f"{row['accuracy'][name]:.3f}" for name in sets]
        cells += [f"{row['mean']:.4f}", f"{low:.3f}-{high:.3f}", f"{row['retention']:.4f}", f"{row['parameters']:,}"]
        seconds = row.get("adaptation seconds")
        cells += [f"{row.get('trainable', 0):,}", row["data"], f"{seconds} s" if seconds else ""]
        table.add_row(row["model"], *cells)
    console.print(table)


@click.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
def main(directory: Path) -> None:
    """Compare upscalers and merges on the group of DIRECTORY."""
    quiet_libraries()
    bench = _Bench(directory)
    for name, model in bench.experts.items():
        bench.own[name] = float(bench._right(model, name, bench.tests[name], average=False).mean())
    own = [bench._right(bench.experts[n], n, test, average=False) for n, test in bench.tests.items()]
    size = sum(p.numel() for p in bench.experts[bench.sets[0]].parameters())
    means = {"accuracy": bench.own, "mean": sum(bench.own.values()) / len(bench.own), "interval": _interval(own)}
    bench.rows.append(
        {"model": "individual", **means, "retention": 1.0, "parameters": size * len(own), "data": "labels of all sets"}
    )
    bench.score("base", upscale.load(bench.group.base.location).eval(), data="none")
    for method in ("average", "task-arithmetic", "ties"):
        upscale.merge(bench.group, bench.work / method, method, **({"scaling": 0.3} if method != "average" else {}))
        bench.score(method, upscale.load(bench.work / method).eval(), data="none")
    for rank in (8, 32):
        options = {"rank": rank, "router_rank": 4, "rest": "average"}
        bench.upscaled(f"SMILE rank {rank}", upscale.smile, None, **options)
    bench.upscaled("WEMoE before adaptation", upscale.wemoe, None, vectors="dense")
    for adapted in ("entropy", "distil"):
        bench.upscaled(f"WEMoE dense, {adapted}", upscale.wemoe, adapted, vectors="dense")
        bench.upscaled(f"WEMoE rank 32, {adapted}", upscale.wemoe, adapted, rank=32)
        sparse = {"vectors": "sparse", "density": 0.1, "shared_router": True}
        bench.upscaled(f"E-WEMoE 90 %, {adapted}", upscale.wemoe, adapted, **sparse)
        everything = {"rank": 32, "mlp_pattern": ("*",)}  # attention too: beyond the paper
        bench.upscaled(f"WEMoE of all linears, {adapted}", upscale.wemoe, adapted, **everything)
        bench.upscaled(
            f"rank-one WEMoE 16, {adapted}", upscale.wemoe, adapted, vectors="rank-one", rank=16, router_depth=1
        )
    _show(bench.rows)
    content = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {p: version(p) for p in ("upscale-zoo", "torch", "transformers")},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "adaptation": {"steps": STEPS, "rate": RATE, "batch": 16},
        "tests": {name: len(test["labels"]) for name, test in bench.tests.items()},
        "models": bench.rows,
    }
    (HERE / "vision.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
