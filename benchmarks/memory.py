"""Measure a build's peak memory against what the plan predicts.

Models have the widths and the vocabulary of the named ones, few layers (memory does not grow with their number) and
random weights; every fine-tune differs from the base in every tensor, every adapter in the blocks' linears. Each build
is a process of its own, whose peak resident size the kernel tells; the prediction is the plan's, in the same process,
before it begins.

    python benchmarks/memory.py WORK [--only NAME]
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from group import Spec, write_adapters, write_config
from safetensors.torch import save_file
from upscale_speed import machine

LLAMA_7B = Spec(hidden=4096, intermediate=11008, layers=2, heads=32, vocab=32000)
LLAMA_1B = Spec(hidden=2048, intermediate=8192, layers=2, heads=32, vocab=128256)
SHAPES = {"llama-7b": LLAMA_7B, "llama-1b-128k": LLAMA_1B}
ADAPTERS, RANK = ("a1", "a2", "a3"), 64
RUNS = {  # shape, method, settings, and what the experts' names begin with: e, fine-tunes; a, adapters
    "llama-7b": ("llama-7b", "smile", {"rank": 64, "max_memory": "4GiB"}, "e"),
    "llama-7b average": ("llama-7b", "smile", {"rank": 64, "rest": "average", "lm_head": True}, "e"),
    "llama-7b ties": ("llama-7b", "wemoe", {"vectors": "low-rank", "rank": 64, "merge": "ties"}, "e"),
    "llama-7b wemoe dense": ("llama-7b", "wemoe", {"vectors": "dense"}, "e"),
    "llama-7b wemoe sparse": ("llama-7b", "wemoe", {"vectors": "sparse"}, "e"),
    "llama-7b adapters": ("llama-7b", "smile", {"rank": 64}, "a"),
    "llama-7b adapters, other dtype": ("llama-7b", "smile", {"rank": 64, "dtype": "float32"}, "a"),
    "llama-7b adapters, float16": ("llama-7b", "smile", {"rank": 64, "dtype": "float16"}, "a"),
    "llama-1b-128k": ("llama-1b-128k", "smile", {"rank": 64}, "e"),
}
BUILD = """
import json, sys
import zoo
from upscale.building import build, plan
from upscale.building.methods import smile, wemoe
from upscale.config import SmileConfig, WemoeConfig
root, out, method, options, kind = *sys.argv[1:4], json.loads(sys.argv[4]), sys.argv[5]
group = zoo.Group.of(f"{root}/base", {f"{kind}{n}": f"{root}/{kind}{n}" for n in (1, 2, 3)})
module, settings = {"smile": (smile, SmileConfig), "wemoe": (wemoe, WemoeConfig)}[method]
verdict = zoo.check(group)
made = plan.make_plan(verdict, module, settings(**options))
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before, predicted = peak(), made.peak_bytes
with build.hashing(group, verdict) as hashes:
    build.build(made, group, out, hashes)
print(json.dumps({"libraries": before, "predicted": predicted, "measured": peak()}))
"""


def make_group(root: Path, spec: Spec) -> None:
    """Write `root`/base and experts e1, e2, ...: random weights, a shard a layer, one for each matrix of the rest."""
    if (root / "done").exists():
        return
    rng = torch.Generator().manual_seed(spec.seed)
    shards = [
        {f"model.layers.{n}.{name}.weight": shape for name, shape in spec.linears().items()}
        | {f"model.layers.{n}.{norm}_layernorm.weight": (spec.hidden,) for norm in ("input", "post_attention")}
        for n in range(spec.layers)
    ]
    shards += [{name: (spec.vocab, spec.hidden)} for name in ("model.embed_tokens.weight", "lm_head.weight")]
    shards += [{"model.norm.weight": (spec.hidden,)}]
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    weight_map = {name: file for shard, file in zip(shards, files, strict=True) for name in shard}
    for model in ("base", *spec.names):
        (root / model).mkdir(parents=True, exist_ok=True)
        write_config(root / model, spec)
        index = {"metadata": {}, "weight_map": weight_map}
        (root / model / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard, file in zip(shards, files, strict=True):
        base = {name: 0.02 * torch.randn(shape, generator=rng) for name, shape in shard.items()}
        for model in ("base", *spec.names):
            scale = 0.0 if model == "base" else 0.002
            changed = {n: (t + scale * torch.randn(t.shape, generator=rng)).bfloat16() for n, t in base.items()}
            save_file(changed, root / model / file, metadata={"format": "pt"})
    write_adapters(root, spec, ADAPTERS, RANK)
    (root / "done").touch()


def measure(work: Path, name: str) -> dict:
    """One build: what was predicted, what it took."""
    shape, method, options, kind = RUNS[name]
    root, out = work / shape, work / "out"
    make_group(root, SHAPES[shape])
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", BUILD, str(root), str(out), method, json.dumps(options), kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(out)
    found = json.loads(done.stdout.splitlines()[-1])
    megabytes = {key: round(value / 1e6) for key, value in found.items()}
    return {
        "method": method,
        "options": options,
        "experts": {"e": "fine-tunes", "a": f"adapters of rank {RANK}"}[kind],
        **megabytes,
        "ratio": round(found["predicted"] / found["measured"], 3),
    }


def main() -> None:
    """Measure all runs, or one, and keep the figures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only")
    args = parser.parse_args()
    runs = {}
    for name in RUNS if args.only is None else [args.only]:
        runs[name] = measure(args.work, name)
        print(name, runs[name], flush=True)
    if args.only is None:
        about = {
            "machine": machine(),
            "versions": {name: version(name) for name in ("upscale-zoo", "torch", "safetensors")},
            "unit": "MB of 10^6 bytes, resident; libraries: before the build begins",
            "models": {name: asdict(spec) for name, spec in SHAPES.items()},
            "runs": runs,
        }
        Path(__file__).with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
