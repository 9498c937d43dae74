"""Kill -9 at any moment of a build: nothing half-built loads, and the same command goes on to the same bytes."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.architectures import SHAPE, Architecture
from tests.cli_runs import every_file, inline
from tests.conftest import perturbed, save_model
from upscale.cli import main
from zoo import Checkpoint, CheckpointError, Group

WIDE = Architecture("wide", lambda: LlamaConfig(**{**SHAPE, "hidden_size": 128, "num_hidden_layers": 3}))
KILLS = 20


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> Group:
    root = tmp_path_factory.mktemp("wide")
    base = save_model(WIDE.model(seed=0), root / "base")
    return Group.of(base, {f"e{n}": save_model(perturbed(WIDE, n), root / f"e{n}") for n in (1, 2, 3)})


STEPS = 30  # of this group's build; each is a line of the journal


def lines(journal: Path) -> int:
    try:
        return journal.read_bytes().count(b"\n")
    except OSError:  # not there yet, or no more
        return 0


def build(group: Group, out: Path, kill_at: tuple[int, float] | None = None) -> int:
    """The exit status of `upscale smile`, in a fork, which need not import anything.

    ``kill_at``: it is killed so many seconds after its journal has so many lines.
    """
    if not (child := os.fork()):
        try:
            os.dup2(quiet := os.open(os.devnull, os.O_WRONLY), 1), os.dup2(quiet, 2)
            torch.set_num_threads(1)  # those of the other process are not here
            main(["smile", str(out), *inline(group), "--rank", "24"], standalone_mode=False)
            os._exit(0)
        finally:
            os._exit(1)
    if kill_at is not None:
        journal = out.with_name(f".{out.name}.partial") / "journal.jsonl"
        while lines(journal) < kill_at[0] and not out.exists():
            time.sleep(0.001)
        time.sleep(kill_at[1])
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_twenty_moments_it_goes_on_to_the_same_bytes(group, tmp_path):
    """Spread over all of its steps, and somewhere within each."""
    assert build(group, tmp_path / "undisturbed") == 0
    undisturbed, moments = every_file(tmp_path / "undisturbed"), random.Random(0)
    taken_up = killed = 0
    for number in range(KILLS):
        out, left = tmp_path / f"out{number}", tmp_path / f".out{number}.partial"
        moment = STEPS * number // KILLS, 0.03 * moments.random()
        status = build(group, out, kill_at=moment)
        killed += status == -signal.SIGKILL
        if out.exists():  # killed after it was put in its place
            assert every_file(out) == undisturbed
            continue
        assert not (left / "config.json").exists()
        with pytest.raises(CheckpointError, match="not a model directory"):
            Checkpoint.open(left)
        journal = left / "journal.jsonl"
        taken_up += lines(journal) > 2
        assert build(group, out) == 0
        assert every_file(out) == undisturbed
        assert not left.exists()
    assert killed >= KILLS / 2 and taken_up >= KILLS / 4
