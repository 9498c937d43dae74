"""Time `upscale smile` against FusionBench's causal-LM SMILE upscaling: the same group, the same ranks, one run.

    python benchmarks/upscale_speed.py                 # build the group, install the peer, run both, compare
    python benchmarks/upscale_speed.py --repeat 3      # ours three times; runs of the two alternate
    python benchmarks/upscale_speed.py --only ours     # one side; energy is still set beside the other's last output

Each side is a whole process, from start to saved checkpoint, and its peak memory is what the kernel reports for that
process. Nothing here imports torch: a child's peak memory starts from its parent's, so the parent has to be small.

Wall times mean something only on a machine that is otherwise idle: with two threads on two busy cores, the SVD was seen
to take three times as long as with one thread. Each run therefore records how many cores others used meanwhile, and a
warning follows where that was much. On a machine that cannot be emptied, `--threads 1` and the CPU time say more.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
PEER = HERE / ".venv-peer"
PEER_PYTHON = PEER / "bin" / "python"
REQUIREMENTS = HERE / "peer-requirements.txt"
SIDES = {"ours": "upscale smile", "peer": "FusionBench"}
PACKAGES = ("torch", "transformers", "safetensors", "numpy")
OPTIONS = {"--rank": 32, "--router-rank": 16, "--top-k": 1}
# The same for both: no network and no accelerator.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
MEASURED = ("wall_seconds", "cpu_seconds", "peak_rss_mib")
QUIET = 0.1  # cores: the most that others may use before a wall time is doubted
MIB = 2**20


def install_peer() -> None:
    """Make FusionBench's virtual environment, once for each content of its requirements."""
    stamp = PEER / "installed.txt"
    if stamp.exists() and stamp.read_text() == REQUIREMENTS.read_text():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", PEER], check=True)
    subprocess.run([PEER_PYTHON, "-m", "pip", "install", "-q", "-r", REQUIREMENTS], check=True)
    stamp.write_text(REQUIREMENTS.read_text())


def command(side: str, out: Path, group: Path, names: list[str]) -> list[str]:
    """Spell one side's command line; both take the same options."""
    if side == "peer":
        program = [str(PEER_PYTHON), str(HERE / "fusionbench_smile.py")]
    else:
        upscale = shutil.which("upscale", path=str(Path(sys.executable).parent))
        if upscale is None:
            sys.exit("no `upscale` beside this Python: install the project first, or use --only peer")
        program = [upscale, "smile"]
    experts = [word for name in names for word in ("--expert", f"{name}={group / name}")]
    return [*program, str(out), "--base", str(group / "base"), *experts, *(str(w) for o in OPTIONS.items() for w in o)]


def warm(group: Path) -> None:
    """Read every input once, so that the first run does not pay for the disk alone."""
    with Path(os.devnull).open("wb") as sink:
        for path in sorted(group.rglob("*.safetensors")):
            with path.open("rb") as file:
                shutil.copyfileobj(file, sink, MIB)


def busy_seconds() -> float:
    """Read the CPU time that all processes together have used since the machine started."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(side: str, out: Path, group: Path, names: list[str]) -> dict[str, float]:
    """Run one side as a process and report its wall time and peak memory."""
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    with log.open("wb") as sink:
        start, busy = time.perf_counter(), busy_seconds()
        child = subprocess.Popen(
            command(side, out, group, names), stdout=sink, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall, busy = time.perf_counter() - start, busy_seconds() - busy
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{SIDES[side]} ended with status {child.returncode}:\n{log.read_text(errors='replace')[-4000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    run = {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "peak_rss_mib": usage.ru_maxrss * 1024 / MIB,  # Linux counts in KiB
        "cores_used_by_others": (busy - cpu) / wall,
    }
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("run_seconds "):  # the peer's own time, without Python's imports
            run["without_imports_seconds"] = float(line.split()[1])
    return {key: round(value, 2) for key, value in run.items()}


def summarise(runs: list[dict[str, float]], out: Path) -> dict[str, Any]:
    """Reduce one side's runs to their medians."""
    medians = {key: statistics.median(run[key] for run in runs) for key in MEASURED}
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return {**medians, "output_mib": round(size / MIB, 1), "runs": runs}


def energies(out: Path, group: Path, names: list[str]) -> dict[str, float]:
    """Measure what one output kept, in a process of its own."""
    words = [sys.executable, HERE / "energy.py", out, "--group", group, "--experts", *names]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def versions(python: str | Path, extra: str) -> dict[str, str]:
    """Ask one environment for its versions."""
    code = (
        "import importlib.metadata as m, json, platform, sys; "
        "print(json.dumps({'python': platform.python_version()} | {p: m.version(p) for p in sys.argv[1:]}))"
    )
    answer = subprocess.run([python, "-c", code, extra, *PACKAGES], check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def machine() -> dict[str, Any]:
    """Describe the machine, but not its name."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cores": len(os.sched_getaffinity(0)), "cpu": model, "memory_gib": round(memory / 2**30, 1)}


def show(results: dict[str, Any], ratios: dict[str, float]) -> None:
    """Print the comparison."""
    table = Table(title="SMILE upscaling of one group: a whole process, from start to saved checkpoint")
    table.add_column("")
    for side in results:
        table.add_column(SIDES[side], justify="right")
    table.add_column("ratio", justify="right")
    rows = {
        "wall time, s": ("wall_seconds", "{:.1f}", "{:.1f}x less"),
        "CPU time, s": ("cpu_seconds", "{:.1f}", "{:.1f}x less"),
        "peak memory, MiB": ("peak_rss_mib", "{:.0f}", "{:.2f}x less"),
        "output, MiB": ("output_mib", "{:.0f}", "{:.2f}x less"),
        "captured energy": ("captured_energy", "{:.5f}", "{:.5f} of the exact SVD's"),
    }
    for label, (key, form, ratio) in rows.items():
        cells = [form.format(side[key]) if key in side else "-" for side in results.values()]
        table.add_row(label, *cells, ratio.format(ratios[key]) if key in ratios else "")
    Console().print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where the group and the outputs go")
    parser.add_argument("--repeat", type=int, default=1, help="runs of ours (default 1)")
    parser.add_argument("--peer-repeat", type=int, default=1, help="runs of FusionBench (default 1)")
    parser.add_argument("--threads", type=int, help="CPU threads of both (default: as each chooses)")
    parser.add_argument("--only", choices=SIDES, help="run one side; results then go to the work folder")
    args = parser.parse_args()
    if min(args.repeat, args.peer_repeat) < 1:
        parser.error("--repeat and --peer-repeat must be at least 1")

    if args.threads:
        ENVIRONMENT.update({f"{library}_NUM_THREADS": str(args.threads) for library in ("OMP", "MKL", "OPENBLAS")})

    work: Path = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    group = work / "group"
    outs = {side: work / side for side in SIDES}
    subprocess.run([sys.executable, HERE / "group.py", group], check=True)
    spec = json.loads((group / "group.json").read_text())
    names = [f"e{i + 1}" for i in range(spec["experts"])]
    if args.only != "ours":
        install_peer()
    warm(group)

    counts = {"ours": args.repeat, "peer": args.peer_repeat}
    turns = zip_longest(*([side] * count for side, count in counts.items() if args.only in (None, side)))
    runs: dict[str, list[dict[str, float]]] = {}
    for side in (side for turn in turns for side in turn if side):
        runs.setdefault(side, []).append(measure(side, outs[side], group, names))
        print(f"{SIDES[side]}: {runs[side][-1]}", flush=True)

    results = {side: summarise(runs[side], outs[side]) for side in SIDES if side in runs}
    built = (group / "group.json").stat().st_mtime
    current = {
        side: out for side, out in outs.items() if any(f.stat().st_mtime > built for f in out.glob("config.json"))
    }
    energy = {side: energies(out, group, names) for side, out in current.items()}
    for side, values in energy.items():
        results.setdefault(side, {})["captured_energy"] = statistics.fmean(values.values())
    ratios: dict[str, float] = {}
    if len(runs) == 2:
        keys = (*MEASURED, "output_mib")
        ratios = {key: results["peer"][key] / results["ours"][key] for key in keys}
    if len(energy) == 2:
        ratios["captured_energy"] = results["ours"]["captured_energy"] / results["peer"]["captured_energy"]
        ratios["captured_energy_worst"] = min(energy["ours"][key] / energy["peer"][key] for key in energy["peer"])
    show(results, ratios)
    others = max(run["cores_used_by_others"] for side in runs.values() for run in side)
    if others > QUIET:
        print(f"warning: other processes used up to {others:.1f} cores meanwhile; do not quote these wall times")

    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/" + Path(__file__).name, *(Path(a).name for a in sys.argv[1:])]),
        "group": spec,
        "options": {option.lstrip("-"): value for option, value in OPTIONS.items()} | {"threads": args.threads},
        "machine": machine(),
        "versions": {"ours": {"upscale-zoo": metadata.version("upscale-zoo")} | versions(sys.executable, "rich")}
        | ({"peer": versions(PEER_PYTHON, "fusion-bench")} if "peer" in results else {}),
        "results": results,
        "ratios": ratios,  # times and sizes: peer / ours; energy: ours / exact
    }
    target = (work if args.only else HERE) / "upscale_speed.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {target.name}")


if __name__ == "__main__":
    main()
