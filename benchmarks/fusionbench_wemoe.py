"""FusionBench's own WEMoE for CLIP's vision model, built by its own code; wemoe_speed.py runs it as the peer.

It runs in the peer's environment (peer-requirements.txt) and imports nothing of ours. It prints a JSON object.

    cd benchmarks
    .venv-peer/bin/python fusionbench_wemoe.py FIXED --base DIR --expert e1=DIR --expert e2=DIR --threads 1
    .venv-peer/bin/python fusionbench_wemoe.py FIXED --base DIR --expert e1=DIR --expert e2=DIR --batch-reduce

FIXED is a safetensors file of what is the same for both sides: `pixels` [B, 3, H, W] and `head` [classes, hidden].
`times` and `Fixed` are wemoe_speed.py's as well: one loop times both sides.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

SCALING = 0.3
LEARNING_RATE = 1e-4  # FusionBench's config/method/wemoe/weight_ensembling_moe.yaml
WARM = 2  # passes
MIB = 2**20


class Fixed(NamedTuple):
    """What both sides are given."""

    pixels: Tensor
    head: Tensor

    @classmethod
    def read(cls, file: str | Path) -> "Fixed":
        """Read it from FIXED."""
        return cls(**load_file(file))


def entropy(logits: Tensor) -> Tensor:
    """FusionBench's entropy_loss (method/we_moe/we_moe.py), for the side that cannot import it."""
    p = torch.softmax(logits, dim=-1)
    return -torch.sum(p * torch.log(p + 1e-8), dim=-1).mean()


def times(
    model: nn.Module, routers: Sequence[nn.Parameter], fixed: Fixed, passes: int, steps: int, entropy=entropy
) -> dict[str, Any]:
    """Median seconds of a forward pass and of an adaptation step, what they gave, and the memory they took.

    ``WARM`` of each before are not counted: the heap grows in them. The step is forward, entropy, backward, and Adam
    on the routers.
    """

    def forward() -> Tensor:
        return model(pixel_values=fixed.pixels).pooler_output

    def step() -> Tensor:
        loss = entropy(F.linear(forward(), fixed.head))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    found: dict[str, Any] = {"before_rss_mib": _peak_of(lambda: None)[1]}
    optimizer = torch.optim.Adam(routers, lr=LEARNING_RATE)
    for name, what, count in (("forward", torch.no_grad()(forward), passes), ("step", step, steps)):
        if count:
            runs, found[f"{name}_peak_rss_mib"] = _peak_of(lambda: [_clocked(what) for _ in range(WARM + count)])  # noqa: B023
            outputs, walls, cpus = zip(*runs, strict=True)
            found[f"{name}_seconds"] = statistics.median(walls[WARM:])
            found[f"{name}_cpu_seconds"] = statistics.median(cpus[WARM:])
            if name == "forward":
                found["output"] = outputs[-1]
            else:
                found["losses"] = [loss.item() for loss in outputs]
    return found


def _clocked(what: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """What it gives, its wall time and its CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    output = what()
    return output, time.perf_counter() - wall, time.process_time() - cpu


def _peak_of(what: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the most memory that this process had meanwhile, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    output = what()
    status = Path("/proc/self/status").read_text()
    return output, round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / MIB, 1)


def construct(base: str, experts: dict[str, str], batch_reduce: bool) -> nn.Module:
    """The model of CLIPWeightEnsemblingMoEAlgorithm, with the settings of its own configuration file."""
    from fusion_bench.method.we_moe import CLIPWeightEnsemblingMoEAlgorithm
    from fusion_bench.modelpool import CLIPVisionModelPool
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add
    from omegaconf import OmegaConf

    # As released, 0.2.33 cannot build it: its merge adds a plain tensor to a parameter, which this check refuses.
    merge = import_module("fusion_bench.method.task_arithmetic.task_arithmetic")
    merge.state_dict_add = partial(state_dict_add, strict=False)
    settings = {"init_lambda": SCALING, "router_hidden_layers": 2, "batch_reduce": batch_reduce}
    algorithm = CLIPWeightEnsemblingMoEAlgorithm(OmegaConf.create({"name": "clip_weight_ensembling_moe", **settings}))
    algorithm.modelpool = CLIPVisionModelPool(OmegaConf.create({"_pretrained_": base, **experts}))
    return algorithm.construct_moe_model()


def main() -> None:
    """Time the group given on the command line."""
    from fusion_bench.method.we_moe.we_moe import entropy_loss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fixed", metavar="FIXED")
    parser.add_argument("--base", required=True)
    parser.add_argument("--expert", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--batch-reduce", action="store_true", help="one routing for the batch, not one per sample")
    parser.add_argument("--passes", type=int, default=3, help="forward passes (default 3)")
    parser.add_argument("--steps", type=int, default=2, help="adaptation steps (default 2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the routers' first weights")
    parser.add_argument("--out", type=Path, help="directory for routers.safetensors and output.safetensors")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = construct(args.base, dict(expert.split("=", 1) for expert in args.expert), args.batch_reduce)
    routers = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = {name: parameter.detach().clone() for name, parameter in routers.items()}
    found = times(model, list(routers.values()), Fixed.read(args.fixed), args.passes, args.steps, entropy_loss)
    output = found.pop("output")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        save_file(first, args.out / "routers.safetensors")
        save_file({"output": output}, args.out / "output.safetensors")
    found["router_parameters"] = sum(parameter.numel() for parameter in routers.values())
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
