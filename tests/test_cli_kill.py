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

WIDE = Architecture("wide", lambda: LlamaConfig(**{**SHAPE, "hidden_size": 192, "num_hidden_layers": 5}))
KILLS = 20


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> Group:
    root = tmp_path_factory.mktemp("wide")
    base = save_model(WIDE.model(seed=0), root / "base")
    return Group.of(base, {f"e{n}": save_model(perturbed(WIDE, n), root / f"e{n}") for n in (1, 2, 3)})


def build(group: Group, out: Path, kill_after: float | None = None) -> int:
    """The exit status of `upscale smile`, killed after so many seconds; a fork, which need not import anything."""
    if not (child := os.fork()):
        try:
            os.dup2(quiet := os.open(os.devnull, os.O_WRONLY), 1), os.dup2(quiet, 2)
            torch.set_num_threads(1)  # those of the other process are not here
            main(["smile", str(out), *inline(group), "--rank", "24"], standalone_mode=False)
            os._exit(0)
        finally:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_twenty_moments_it_goes_on_to_the_same_bytes(group, tmp_path):
    started = time.monotonic()
    assert build(group, tmp_path / "undisturbed") == 0
    duration = time.monotonic() - started
    undisturbed, moments = every_file(tmp_path / "undisturbed"), random.Random(0)
    taken_up = killed = 0
    for number in range(KILLS):
        out, left = tmp_path / f"out{number}", tmp_path / f".out{number}.partial"
        status = build(group, out, kill_after=duration * (number + moments.random()) / KILLS)
        killed += status == -signal.SIGKILL
        if out.exists():  # killed after it was put in its place
            assert every_file(out) == undisturbed
            continue
        assert not (left / "config.json").exists()
        with pytest.raises(CheckpointError, match="not a model directory"):
            Checkpoint.open(left)
        journal = left / "journal.jsonl"
        taken_up += journal.is_file() and journal.read_bytes().count(b"\n") > 2
        assert build(group, out) == 0
        assert every_file(out) == undisturbed
        assert not left.exists()
    assert killed >= KILLS / 2 and taken_up >= KILLS / 4
