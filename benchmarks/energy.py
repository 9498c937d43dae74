"""How much of the experts' deltas an upscaled checkpoint kept, measured from its files.

For one linear of one expert it is 1 - ||delta - up @ down||^2 / ||delta||^2, in float32. FusionBench truncates an exact
SVD, so its figure is the best that its rank allows (but for bfloat16 rounding of the factors, the same for both).
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # up [out, rank], down [rank, in]


class Checkpoint:
    """Every tensor of a directory of safetensors files, read when asked for."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.files = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            self.files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name).float()


def fusionbench_factors(checkpoint: Checkpoint, module: str, expert: int) -> Factors:
    """Read one expert's factors as FusionBench stores them: one pair of tensors each."""
    prefix = f"{module}.experts.{expert}"
    return checkpoint[f"{prefix}.u"], checkpoint[f"{prefix}.svh"]


def our_factors(checkpoint: Checkpoint, module: str, expert: int) -> Factors:
    """Read one expert's factors as we store them: all experts stacked along the rank, ranks in config.json."""
    ranks: list[int] = checkpoint.config["upscale"]["modules"][module]["ranks"]
    part = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
    return checkpoint[f"{module}.experts.up"][:, part], checkpoint[f"{module}.experts.down"][part]


def captured_energy(directory: Path, group: Path, names: list[str]) -> dict[str, float]:
    """Measure every expert of every linear; keys are `<module>:<expert>`."""
    with ExitStack() as stack:
        base = Checkpoint(group / "base", stack)
        experts = {name: Checkpoint(group / name, stack) for name in names}
        result = Checkpoint(directory, stack)
        order, factors = names, fusionbench_factors
        if "upscale" in result.config:
            listed = result.config["upscale"]["experts"]
            order, factors = [e["name"] if isinstance(e, dict) else e for e in listed], our_factors
        if sorted(order) != sorted(names):
            raise ValueError(f"the checkpoint holds experts {order}, the group {names}")
        energy = {}
        for weight in sorted(name for name in base.files if name.endswith("_proj.weight")):
            module = weight.removesuffix(".weight")
            for index, name in enumerate(order):
                delta = experts[name][weight] - base[weight]
                up, down = factors(result, module, index)
                rest = (delta - up @ down).square().sum() / delta.square().sum()
                energy[f"{module}:{name}"] = 1 - rest.item()
    return energy


def main() -> None:
    """Print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--group", type=Path, required=True)
    parser.add_argument("--experts", nargs="+", required=True)
    args = parser.parse_args()
    print(json.dumps(captured_energy(args.checkpoint, args.group, args.experts)))


if __name__ == "__main__":
    main()
