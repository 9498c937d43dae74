"""What a calibrated router costs: time to calibrate, and time it adds to a forward pass, on one checkpoint.

    export OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000
    taskset -c 0 python benchmarks/routing_cost.py GROUP PROMPTS       # writes benchmarks/routing_cost.json

GROUP is a group file, PROMPTS a directory of NAME.jsonl. The same experts run in both arms: once chosen by the router,
once forced, pass by pass in turn. Run it on an idle machine; with an allocator that gives memory back to the system
between passes, the time of the page faults depends on chance in the order of requests and drowns what is measured.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import click
import torch

import upscale
from upscale.calibrating.calibration import calibrate
from upscale.calibrating.prompts import load_prompts
from upscale.commands.display import console, quiet_libraries
from zoo import Group

HERE = Path(__file__).resolve().parent
SHAPES = ((1, 128), (8, 128), (1, 512))  # sequences, tokens
PASSES = 60


def _forward(model, ids: torch.Tensor, expert: str) -> dict:
    """Median seconds of a pass, routed and forced to the expert that the router chooses, in turn.

    What routing adds is the median over pairs of passes that follow each other: the machine's speed drifts.
    """
    arms: dict[str, list[float]] = {"routed": [], "forced": []}
    with torch.no_grad():
        for n in range(PASSES + 5):
            for arm, forced in (("routed", None), ("forced", expert)):
                start = time.perf_counter()
                with model.force(forced):
                    model(input_ids=ids, use_cache=False)
                if n >= 5:
                    arms[arm].append(time.perf_counter() - start)
    medians = {arm: statistics.median(times) for arm, times in arms.items()}
    added = statistics.median(a / b for a, b in zip(arms["routed"], arms["forced"], strict=True)) - 1
    return {**medians, "added": added}


@click.command()
@click.argument("group", type=click.Path(exists=True, path_type=Path))
@click.argument("prompts", type=click.Path(exists=True, path_type=Path))
def main(group: Path, prompts: Path) -> None:
    """Measure calibration and routing on GROUP with PROMPTS."""
    quiet_libraries()
    loaded = Group.load(group)
    experts = list(loaded.experts)
    given = {e: p[:8] for e, p in load_prompts({e: [prompts / f"{e}.jsonl"] for e in experts}, experts, "base").items()}
    found: dict = {"experts": len(experts), "prompts": 8, "forward": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for granularity in ("prompt", "prefix"):
            out = Path(scratch) / granularity
            upscale.smile(loaded, out, rank=32)
            start = time.perf_counter()
            calibrate(out, given, granularity=granularity, depth=0 if granularity == "prefix" else None)
            found[f"calibration, {granularity}, seconds"] = round(time.perf_counter() - start, 2)
            model = upscale.load(out)
            found["parameters"] = sum(p.numel() for p in upscale.load(loaded.base.location).parameters())
            # One token again and again: the router chooses the same expert for all of them, as the other arm is forced.
            first = upscale.loading.load_tokenizer(out)(given[experts[0]][0]).input_ids
            for sequences, tokens in SHAPES:
                ids = torch.tensor([(first * tokens)[:tokens]] * sequences)
                cost = _forward(model, ids, experts[0])
                found["forward"][f"{granularity}, {sequences} x {tokens} tokens"] = cost
                console.print(f"{granularity} {sequences} x {tokens}: {cost['added']:+.2%}")
    found["versions"] = {package: version(package) for package in ("upscale-zoo", "torch", "transformers")}
    found["machine"] = {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    found["environment"] = {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "MALLOC_"))}
    (HERE / "routing_cost.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
