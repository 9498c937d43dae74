"""Build a group of LoRA adapters: against reading the base twice, copying it once, and merging the adapters by PEFT.

The base is Llama-shaped with random bfloat16 weights (hidden 2048, MLP 5632, 12 layers, 32000 tokens), the three
adapters have rank 16 in every linear of the blocks. Each time is a process of its own, once with the models' files read
from the disk and once from the page cache. A build writes the base's bytes once more, so that copying them onto the
disk is the least that it can take.

    python benchmarks/lora_speed.py WORK [--repeat N]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from group import Spec, build, write_adapters

HERE = Path(__file__).parent
BASE = Spec(layers=12, vocab=32000, experts=0)
RANK, ADAPTERS = 16, ("a", "b", "c")
READ = """
import os, sys, time, zoo
from pathlib import Path
start = time.perf_counter()
for turn in range(2):
    if turn and sys.argv[3] == "cold":
        passed = time.perf_counter()
        for file in Path(sys.argv[1] + "/base").glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        start += time.perf_counter() - passed
    base = zoo.Checkpoint.open(sys.argv[1] + "/base")
    for name in base.tensors:
        base.read(name).clone()
print(time.perf_counter() - start)
"""
BUILD = """
import sys, time, upscale, zoo
from upscale.building.build import smile
work, out = sys.argv[1:3]
start = time.perf_counter()
smile(zoo.Group.of(work + "/base", {name: f"{work}/{name}" for name in "abc"}), out, rank=16)
print(time.perf_counter() - start)
"""
COPY = """
import os, shutil, sys, time
from pathlib import Path
start = time.perf_counter()
for file in shutil.copytree(sys.argv[1] + "/base", sys.argv[2]) and Path(sys.argv[2]).iterdir():
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
print(time.perf_counter() - start)
"""
MERGE = """
import sys, time
from peft import PeftModel
from transformers import AutoModelForCausalLM
work, out = sys.argv[1:3]
start = time.perf_counter()
for name in "abc":
    base = AutoModelForCausalLM.from_pretrained(work + "/base", dtype="auto")
    PeftModel.from_pretrained(base, f"{work}/{name}").merge_and_unload().save_pretrained(f"{out}/{name}")
print(time.perf_counter() - start)
"""
SIDES = {"read the base twice": READ, "copy the base": COPY, "build": BUILD, "PEFT merges the adapters": MERGE}


def forget(work: Path) -> None:
    """Take the models' files out of the page cache."""
    for file in work.glob("*/*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(code: str, work: Path, cold: bool) -> float:
    """Of one side, in a process of its own."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    if cold:
        forget(work)
    done = subprocess.run(
        [sys.executable, "-c", code, work, out, "cold" if cold else "warm"], check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    build(work, BASE)
    write_adapters(work, BASE, ADAPTERS, RANK)
    runs: dict[str, dict[str, list[float]]] = {}
    for state in ("from the disk", "from the page cache"):
        runs[state] = {side: [] for side in SIDES}
        for turn in range(args.repeat):
            for side, code in SIDES.items():
                if turn == 0 or code is not MERGE:  # which takes long
                    runs[state][side].append(seconds(code, work, state == "from the disk"))
                    print(f"{state}, {side}: {runs[state][side][-1]:.2f} s", flush=True)
    ratios = {}
    for state, times in runs.items():
        medians = {side: statistics.median(taken) for side, taken in times.items()}
        ratios[state] = {
            "build / reading the base twice": medians["build"] / medians["read the base twice"],
            "build / copying the base": medians["build"] / medians["copy the base"],
            "PEFT's merges / build": medians["PEFT merges the adapters"] / medians["build"],
        }
    packages = ("upscale-zoo", "torch", "transformers", "peft", "safetensors")
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "group": {**asdict(BASE), "rank": RANK, "adapters": len(ADAPTERS)},
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads(), "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in packages},
        "seconds": runs,
        "ratios": ratios,
    }
    (HERE / "lora_speed.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["ratios"], indent=1))


if __name__ == "__main__":
    main()
