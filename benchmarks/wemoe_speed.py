"""Time our WEMoE against FusionBench's for CLIP's vision model: the same models, the same routers, the same loop.

    python benchmarks/wemoe_speed.py                     # make the models, install the peer, run both, compare
    python benchmarks/wemoe_speed.py --rounds 5 --threads 1
    python benchmarks/wemoe_speed.py --size vit-b-32 --rounds 1 --passes 2 --steps 0   # forward passes alone

Each size has its part of wemoe_speed.json.

The base is a randomly initialised `CLIPVisionModel`, its experts are the base plus deltas with the spectrum that
fine-tuning leaves (group.py). Timed are a forward pass of a batch, and one step of adaptation: the entropy of a fixed
random linear head, and Adam on the routers. FusionBench routes each sample by itself, or with `batch_reduce`, its
configuration's default, all samples of the batch alike, which is less work and another function; ours always routes
each sample by itself. Ours starts from FusionBench's routers, so that the outputs and losses have to be the same.

Every measurement is a process of its own, and those of the two sides take turns. For times, the allocator keeps what it
has: else most of FusionBench's time per sample is the kernel's, which hands out the same pages again and again. For
memory there are runs of their own, in which the allocator returns everything at once. (In the former, glibc 2.36
takes some ten times the memory for FusionBench's step per sample: 7 GB at the small size, so try no larger one.)
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from fusionbench_wemoe import SCALING, WARM, Fixed, times
from group import Spec, make_delta
from safetensors.torch import load_file, save_file
from upscale_speed import ENVIRONMENT, PEER_PYTHON, busy_seconds, install_peer, machine, versions

import upscale
from upscale.commands.display import console, quiet_libraries
from zoo import Group

HERE = Path(__file__).resolve().parent
SIZES = {
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
    "vit-b-32": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
IMAGES = {"image_size": 224, "patch_size": 32}
EXPERTS = [f"e{n + 1}" for n in range(4)]
BATCH, CLASSES, SEED = 16, 10, 0
RANK = 32
OURS = {"ours, low-rank": {"vectors": "low-rank", "rank": RANK}, "ours, dense": {"vectors": "dense"}}
PEER = {"peer, per sample": [], "peer, batch_reduce": ["--batch-reduce"]}
KEEP = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TIMES = ("forward_seconds", "forward_cpu_seconds", "step_seconds", "step_cpu_seconds")


def make(root: Path, size: str) -> None:
    """Write the base, the experts, and what is fixed for both sides."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(SEED)
    rng = torch.Generator().manual_seed(SEED)
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES[size], **IMAGES))
    base = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in ("base", *EXPERTS):
        tensors = base
        if name != "base":
            tensors = {key: value + _delta(value, rng) for key, value in base.items()}
        (root / name).mkdir()
        model.config.architectures = ["CLIPVisionModel"]
        model.config.save_pretrained(root / name)
        # The names of checkpoints on the Hub; transformers 5 has others, which FusionBench's transformers 4 lacks.
        named = {f"vision_model.{key}": value.contiguous() for key, value in tensors.items()}
        save_file(named, root / name / "model.safetensors", metadata={"format": "pt"})
    pixels = torch.randn(BATCH, 3, IMAGES["image_size"], IMAGES["image_size"], generator=rng)
    head = torch.randn(CLASSES, SIZES[size]["hidden_size"], generator=rng) / 10
    save_file({"pixels": pixels, "head": head}, root / "fixed.safetensors")


def _delta(base: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    spec = Spec()
    if base.ndim == 2 and min(base.shape) > spec.signal_rank:
        return make_delta(base, spec, rng)
    return 0.01 * torch.randn(base.shape, generator=rng)


def load_routers(model: torch.nn.Module, file: Path) -> list[torch.nn.Parameter]:
    """Give our routers FusionBench's values, and let them train."""
    theirs = load_file(file)
    ours = dict(model.router.requires_grad_(True).named_parameters())
    with torch.no_grad():
        for name, parameter in ours.items():
            _, block, layer, kind = name.split(".")  # networks.3.2.bias: block 3, and a ReLU lies between 0 and 2
            fc = f"fc{int(layer) // 2 + 1}"
            parameter.copy_(theirs.pop(f"vision_model.encoder.layers.{block}.mlp.gate.{fc}.{kind}"))
    if theirs:
        sys.exit(f"routers that ours lacks: {', '.join(theirs)}")
    return list(ours.values())


def run(arm: str, root: Path, passes: int, steps: int, threads: int, memory: bool) -> dict[str, Any]:
    """Measure one arm in a process of its own."""
    if arm in PEER:
        experts = [word for name in EXPERTS for word in ("--expert", f"{name}={root / name}")]
        words = [PEER_PYTHON, HERE / "fusionbench_wemoe.py", root / "fixed.safetensors", "--base", root / "base"]
        words += [*experts, *PEER[arm], "--out", root / f"{arm} out"]
    else:
        words = [sys.executable, __file__, "ours", root, arm]
    words += ["--passes", passes, "--steps", steps, "--threads", threads]
    threading = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    environment = os.environ | ENVIRONMENT | threading | (RETURN if memory else KEEP)
    answer = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment)
    if answer.returncode:
        sys.exit(f"{arm} ended with status {answer.returncode}:\n{answer.stderr[-4000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def agreement(root: Path, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """How far our outputs and losses are from FusionBench's per sample, and so is its own with batch_reduce."""
    output = {arm: load_file(root / f"{arm} out" / "output.safetensors")["output"] for arm in runs}
    theirs = output["peer, per sample"]
    found: dict[str, Any] = {}
    for arm in runs:
        if arm != "peer, per sample":
            found[arm] = {"output_relative": float((output[arm] - theirs).norm() / theirs.norm())}
            losses = zip(runs[arm][0].get("losses", ()), runs["peer, per sample"][0].get("losses", ()), strict=False)
            found[arm]["loss_at_most"] = max((abs(a - b) for a, b in losses), default=None)
    return found


def ratios(results: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """FusionBench / ours: of the medians, and the least and most of the pairs of runs that took turns."""
    found: dict[str, dict[str, float]] = {}
    for ours in OURS:
        for peer in PEER:
            ratio = found[f"{peer} / {ours}"] = {}
            for key in (*TIMES, "step_added_mib"):
                if key in results[peer]:
                    ratio[key] = results[peer][key] / results[ours][key]
                if key in runs[peer][0]:
                    each = [a[key] / b[key] for a, b in zip(runs[peer], runs[ours], strict=True)]
                    ratio |= {f"{key}, least": min(each), f"{key}, most": max(each)}
    return {pair: {key: round(value, 2) for key, value in ratio.items()} for pair, ratio in found.items()}


@click.group(invoke_without_command=True)
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Processes of each arm, in turn.")
@click.option("--passes", default=5, show_default=True, help="Forward passes timed in each process.")
@click.option("--steps", default=3, show_default=True, help="Adaptation steps timed in each process.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of both.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "wemoe_speed.json", help="The file to write.")
@click.pass_context
def main(context: click.Context, size: str, rounds: int, passes: int, steps: int, threads: int, out: Path) -> None:
    """Run the benchmark."""
    if context.invoked_subcommand:
        return
    quiet_libraries()
    install_peer()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        torch.set_num_threads(threads)
        make(root, size)
        group = Group.of(root / "base", {name: root / name for name in EXPERTS})
        for arm, options in OURS.items():
            upscale.wemoe(group, root / arm, scaling=SCALING, **options)
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (*PEER, *OURS)}
        busy, load = busy_seconds(), os.getloadavg()[0]
        start = datetime.now(UTC)
        for _ in range(rounds):
            for arm, found in runs.items():
                found.append(run(arm, root, passes, steps, threads, memory=False))
                console.print(f"{arm}: {found[-1]}")
        seconds = (datetime.now(UTC) - start).total_seconds()
        busy = busy_seconds() - busy
        results: dict[str, dict[str, Any]] = {}
        for arm, found in runs.items():
            results[arm] = {key: statistics.median(one[key] for one in found) for key in TIMES if key in found[0]}
            memory = run(arm, root, 1, min(steps, 1), threads, memory=True)
            before = memory["before_rss_mib"]
            results[arm] |= {
                f"{what}_added_mib": round(memory[f"{what}_peak_rss_mib"] - before, 1)
                for what in ("forward", "step")
                if f"{what}_peak_rss_mib" in memory
            }
            results[arm] |= {key: found[0][key] for key in ("parameters", "router_parameters")}
        agreed = agreement(root, runs)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/" + Path(__file__).name, *sys.argv[1:]]),
        "models": {**SIZES[size], **IMAGES, "experts": len(EXPERTS), "seed": SEED},
        "options": {
            **{"batch": BATCH, "scaling": SCALING, "rank": RANK, "router_depth": 2, "threads": threads},
            **{"rounds": rounds, "passes": passes, "steps": steps, "uncounted": WARM},
        },
        "environment": {"times": KEEP, "memory": RETURN},
        "machine": machine() | {"load_before": round(load, 2), "cores_used_by_all": round(busy / seconds, 2)},
        "versions": {
            "ours": {"upscale-zoo": metadata.version("upscale-zoo")} | versions(sys.executable, "click"),
            "peer": versions(PEER_PYTHON, "fusion-bench"),
        },
        "agreement": agreed,  # with the peer per sample
        "results": results,
        "ratios": ratios(results, runs),
        "runs": runs,
    }
    before = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(before | {size: report}, indent=1) + "\n")
    for pair, ratio in report["ratios"].items():
        console.print(f"{pair}: {ratio}")


@main.command(hidden=True)
@click.argument("root", type=click.Path(exists=True, path_type=Path))
@click.argument("arm", type=click.Choice(list(OURS)))
@click.option("--passes", type=int, required=True)
@click.option("--steps", type=int, required=True)
@click.option("--threads", type=int, required=True)
def ours(root: Path, arm: str, passes: int, steps: int, threads: int) -> None:
    """Time one of ours, as fusionbench_wemoe.py does FusionBench's; prints the same JSON object."""
    quiet_libraries()
    torch.set_num_threads(threads)
    model = upscale.load(root / arm)
    model.requires_grad_(False)
    routers = load_routers(model, root / "peer, per sample out" / "routers.safetensors")
    found = times(model, routers, Fixed.read(root / "fixed.safetensors"), passes, steps)
    (root / f"{arm} out").mkdir(exist_ok=True)
    save_file({"output": found.pop("output")}, root / f"{arm} out" / "output.safetensors")
    found["router_parameters"] = sum(parameter.numel() for parameter in routers)
    found["parameters"] = sum(t.numel() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
