"""Convert checkpoints that FusionBench itself built and saved, and set our logits beside its own.

    python benchmarks/fusionbench_import.py            # install the peer, build, convert, compare, write the JSON file

For each case FusionBench makes a small model of a random base and fine-tunes of it, float32, saves it, loads it again
and computes logits (fusionbench_checkpoint.py, in the peer's environment). Ours are those of the converted checkpoint
in transformers. In every case one linear is changed by no expert and one by the first alone. The reference that the
tests use, tests/reference/fusionbench.py, is held against the same files: the same tensors and the same `config.json`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from upscale_speed import ENVIRONMENT, PEER_PYTHON, install_peer, machine, versions

import upscale
from upscale.importing.fusionbench import import_fusionbench

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tests.reference import fusionbench  # noqa: E402

TOLERANCE = 1e-4
LOW_RANK = {"experts": 3, "rank": 8, "router-rank": 4, "top-k": 1}
CASES = {
    "low-rank": LOW_RANK,
    "two experts a token": {**LOW_RANK, "top-k": 2},
    "dense": {**LOW_RANK, "rank": -1},
    "one expert": {**LOW_RANK, "experts": 1},
    "router wider than experts": {**LOW_RANK, "rank": 4, "router-rank": 8},
}
ARCHITECTURES = {"llama": tuple(CASES), "llama-biased": ("low-rank", "dense"), "mistral": tuple(CASES)}
ARCHITECTURES["qwen2"] = tuple(CASES)
HISTORY = ("transformers_version", "_name_or_path")  # fields of config.json that say how it came to be


def same_as_reference(work: Path, options: dict[str, int]) -> dict[str, Any]:
    """The reference of the tests, from the same models, against what FusionBench saved."""
    names = ["base", *(f"e{n + 1}" for n in range(options["experts"]))]
    base, *experts = (AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32) for name in names)
    settings = {name.replace("-", "_"): options[name] for name in ("rank", "router-rank", "top-k")}
    ours = fusionbench.save(base, experts, work / "reference", **settings)
    found, wanted = (load_file(place / "model.safetensors") for place in (ours, work / "smile"))
    fields, expected = (json.loads((place / "config.json").read_text()) for place in (ours, work / "smile"))
    differing = {key for key in fields.keys() | expected.keys() if fields.get(key) != expected.get(key)}
    if found.keys() != wanted.keys() or differing - {*HISTORY}:
        sys.exit(f"{work}: the reference differs: {found.keys() ^ wanted.keys()}, {differing - {*HISTORY}}")
    return {"reference_tensors": max(float((found[name] - wanted[name]).abs().max()) for name in wanted)}


def compare(work: Path, architecture: str, options: dict[str, int]) -> dict[str, Any]:
    """Largest differences of one case."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    program = [PEER_PYTHON, HERE / "fusionbench_checkpoint.py", work, "--architecture", architecture]
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with (work / "peer.log").open("wb") as log:
        run = subprocess.run([*program, *words], stdout=log, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)
    if run.returncode:
        sys.exit(f"FusionBench ended with status {run.returncode}: see {work / 'peer.log'}")
    made = import_fusionbench(work / "smile", work / "ours")
    peer = load_file(work / "logits.safetensors")
    with torch.no_grad():
        ours = upscale.load(work / "ours")(input_ids=peer["tokens"]).logits
    return {
        "logits": float((ours - peer["logits"]).abs().max()),
        "logits_of_base": float((peer["base"] - peer["logits"]).abs().max()),
        "linears_with_experts": len(made.modules),
        "linears_without": len(made.plain),
        **same_as_reference(work, options),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work" / "import", help="where all checkpoints go")
    args = parser.parse_args()
    logging.disable_progress_bar()
    install_peer()
    results: dict[str, dict[str, Any]] = {}
    for architecture, cases in ARCHITECTURES.items():
        for case in cases:
            work = args.work.resolve() / architecture / case.replace(" ", "-")
            results.setdefault(architecture, {})[case] = compare(work, architecture, CASES[case])
            print(architecture, case, results[architecture][case], flush=True)
    table = Table(title="Largest difference of logits: converted checkpoint and FusionBench's own, float32")
    for column in ("", *CASES):
        table.add_column(column, justify="right" if column else "left")
    for architecture, found in results.items():
        table.add_row(architecture, *(f"{found[case]['logits']:.1e}" if case in found else "-" for case in CASES))
    Console().print(table)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/fusionbench_import.py",
        "cases": CASES,
        "machine": machine(),
        "versions": {
            "ours": {"upscale-zoo": metadata.version("upscale-zoo")} | versions(sys.executable, "rich"),
            "peer": versions(PEER_PYTHON, "fusion-bench"),
        },
        "results": results,  # largest absolute differences
    }
    (HERE / "fusionbench_import.json").write_text(json.dumps(report, indent=2) + "\n")
    worst = max(case["logits"] for found in results.values() for case in found.values())
    print(f"wrote fusionbench_import.json; largest difference {worst:.1e}")
    if worst > TOLERANCE:
        sys.exit(f"more than {TOLERANCE}")


if __name__ == "__main__":
    main()
