"""A killed writer's work is taken up where it ended; what is damaged in it is done again, to the same bytes."""

import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli_runs import every_file
from zoo import Checkpoint, CheckpointError, OutputError, TensorSpec, Writer
from zoo.writing import swap
from zoo.writing.amend import amend
from zoo.writing.journal import Journal, Step, Written
from zoo.writing.shard import Entry

CONFIG = {"model_type": "llama"}
STEPS = [f"s{n}" for n in range(4)]
DECLARED = {
    f"{step}.{name}": TensorSpec((20, 5), dtype)
    for step in STEPS
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16))
}


class Killed(BaseException):
    """Nothing catches it; forks end without a word."""


def tensor(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(20, 5, generator=generator).to(DECLARED[name].dtype)


def build(out: Path, steps=STEPS, *, commit=True, fingerprint: str | None = "f", shard_size=900, **options):
    """Write a checkpoint in steps; the names of those that were not found done."""
    made, records = [], []
    with Writer(out, DECLARED, shard_size=shard_size, fingerprint=fingerprint, **options) as writer:
        for step in steps:
            if (record := writer.done(step)) is None:
                record = {"third": 1 / 3, "of": step}
                for name in ("a", "b"):
                    writer.write(f"{step}.{name}", tensor(f"{step}.{name}"))
                writer.finish(step, record)
                made.append(step)
            records.append(record)
        if not commit:
            writer._note(wait=True)
            os.kill(os.getpid(), signal.SIGKILL)
        writer.commit(CONFIG, {"report.json": json.dumps(records).encode()})
    return made


def killed(action) -> None:
    """Run ``action`` in a fork, which it or ``Killed`` ends at once."""
    if not (child := os.fork()):
        try:
            action()
        except Killed:
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert build(out) == STEPS
    return every_file(out)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def last_line(change):
    def damage(work: Path) -> None:
        *lines, last = (work / "journal.jsonl").read_bytes().splitlines(keepends=True)
        (work / "journal.jsonl").write_bytes(b"".join([*lines, *change(last)]))

    return damage


DAMAGES = {
    "none": (lambda work: None, STEPS[:3]),
    "torn line": (last_line(lambda line: [line[:-20]]), STEPS[:2]),
    "line without its end": (last_line(lambda line: [line[:-1]]), STEPS[:2]),
    "no JSON after it": (last_line(lambda line: [line, b"\xff\x00garbage"]), STEPS[:3]),
    "another record": (last_line(lambda line: [line.replace(b"0.33", b"0.34")]), STEPS[:2]),
    "flipped bit of a tensor": (lambda work: flip(work / "0.safetensors", -10), STEPS[:1]),
    "truncated shard": (lambda work: os.truncate(work / "0.safetensors", 700), STEPS[:1]),
    "lost shard": (lambda work: (work / "0.safetensors").unlink(), []),
    "no journal": (lambda work: (work / "journal.jsonl").unlink(), []),
    "empty journal": (lambda work: os.truncate(work / "journal.jsonl", 0), []),
    "damaged key": (lambda work: flip(work / "journal.jsonl", 5), []),
    "strange files": (lambda work: (work / "whole/config.json").mkdir(parents=True), STEPS[:3]),
}


@pytest.mark.parametrize(("damage", "kept"), DAMAGES.values(), ids=list(DAMAGES))
def test_all_steps_up_to_the_first_damaged_one_are_taken_up(tmp_path, undisturbed, damage, kept):
    """Two tensors of 400 bytes fill a shard, so shard 0 has the first of s0 and s1."""
    out, work = tmp_path / "out", tmp_path / ".out.partial"
    killed(lambda: build(out, STEPS[:3], commit=False))
    assert len(list(work.glob("*.safetensors"))) == 3
    with pytest.raises(CheckpointError, match="not a model directory"):
        Checkpoint.open(work)
    damage(work)
    assert build(out) == STEPS[len(kept) :]
    assert every_file(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("other", [{"fingerprint": "g"}, {"fingerprint": None}, {"shard_size": 400}])
def test_other_work_clears_what_is_left(tmp_path, other):
    killed(lambda: build(tmp_path / "out", STEPS[:3], commit=False))
    assert build(tmp_path / "out", **other) == STEPS
    build(tmp_path / "undisturbed", **other)
    assert every_file(tmp_path / "out") == every_file(tmp_path / "undisturbed")


def test_work_without_a_fingerprint_is_never_taken_up(tmp_path):
    killed(lambda: build(tmp_path / "out", STEPS[:3], commit=False, fingerprint=None))
    assert build(tmp_path / "out", fingerprint=None) == STEPS


def test_a_taken_up_build_needs_the_space_of_what_is_missing(tmp_path, monkeypatch):
    killed(lambda: build(tmp_path / "out", STEPS[:3], commit=False))
    needed = []

    class Usage:
        @property
        def free(self):
            return 600  # of 2400 bytes, 1800 are written

    monkeypatch.setattr("shutil.disk_usage", lambda path: needed.append(path) or Usage())
    assert build(tmp_path / "out") == STEPS[3:] and needed
    with pytest.raises(OutputError, match="no space left"):
        build(tmp_path / "new")


def test_journal_gives_back_every_float_and_names_in_order(tmp_path):
    written = {"ü\n": Written(2, Entry("F32", (), 0, 4), "d"), "b": Written(0, Entry("BF16", (3, 0), 7, 7), "e")}
    steps = [Step(name, written, {"x": [0.1 + 0.2, 5e-324, None, "ü"]}) for name in ("one", "two")]
    journal = Journal(tmp_path / "j", "key")
    assert journal.found == []
    for step in steps:
        journal.append(step)
    found = Journal(tmp_path / "j", "key").found
    assert found == steps and list(found[0].tensors) == ["ü\n", "b"]
    Journal(tmp_path / "j", "key").keep(1)
    assert Journal(tmp_path / "j", "key").found == steps[:1]
    assert Journal(tmp_path / "j", "other").found == []
    assert Journal(tmp_path / "j", "key").found == []


def test_checksums_are_of_every_tensor_and_of_the_files_that_stay(tmp_path):
    with Writer(tmp_path / "out", DECLARED, shard_size=900) as writer:
        for name in DECLARED:
            writer.write(name, tensor(name))
        files = {name: name.encode() for name in ("report.json", "README.md", "upscale.yaml", "a/b.txt")}
        writer.commit(CONFIG, files, {"router": {"router.1.bias": torch.ones(3)}})
    found = json.loads((tmp_path / "out/checksums.json").read_text())
    assert found["files"] == {n: hashlib.sha256(n.encode()).hexdigest() for n in ("a/b.txt", "report.json")}
    shards = [load_file(file) for file in (tmp_path / "out").glob("model-*.safetensors")]
    data = {name: t.view(torch.uint8).numpy().tobytes() for shard in shards for name, t in shard.items()}
    assert found["tensors"] == {name: hashlib.sha256(data[name]).hexdigest() for name in DECLARED}
    amend(tmp_path / "out", "router", {}, CONFIG, {"report.json": b"new", "other": b"new"})
    found["files"]["report.json"] = hashlib.sha256(b"new").hexdigest()
    assert json.loads((tmp_path / "out/checksums.json").read_text()) == found


def old(out: Path) -> dict[str, bytes]:
    with Writer(out, {"old": TensorSpec((3,), torch.float32)}) as writer:
        writer.write("old", torch.arange(3.0))
        writer.commit({"model_type": "old"}, {"gone.txt": b"gone"})
    return every_file(out)


def test_replacing_leaves_nothing_of_the_old(tmp_path, undisturbed):
    with pytest.raises(OutputError, match="out: no checkpoint, so there is nothing to replace"):
        build(tmp_path / "out", replace=True)
    assert not list(tmp_path.iterdir())
    old(tmp_path / "out")
    assert build(tmp_path / "out", replace=True) == STEPS
    assert every_file(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_keeps_the_old(tmp_path):
    before = old(tmp_path / "out")
    with pytest.raises(ValueError, match="not declared"), Writer(tmp_path / "out", {}, replace=True) as writer:
        writer.write("x", torch.ones(1))
    assert every_file(tmp_path) == {f"out/{name}": content for name, content in before.items()}


def cut(monkeypatch, calls: int) -> None:
    """The n-th rename, directory, removal or exchange from now on ends the process."""
    left = [calls]

    def counted(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, name in ((Path, "rename"), (Path, "mkdir"), (os, "unlink"), (os, "rmdir"), (swap, "_exchange")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


def test_whenever_a_commit_is_killed_nothing_is_done_again(tmp_path, undisturbed, monkeypatch):
    calls, taken_up = 0, 0
    while True:
        out, left = tmp_path / f"out{calls}", tmp_path / f".out{calls}.partial"
        if not (child := os.fork()):
            with monkeypatch.context() as patch:
                cut(patch, calls)
                build(out)
                os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        assert not (left / "config.json").exists()
        if not out.exists():
            taken_up += build(out) == []
        assert every_file(out) == undisturbed
        calls += 1
    assert calls > 6 and taken_up > 4  # but for the first, which makes the hidden directory


def unable(*args) -> None:
    raise OSError(errno.EINVAL, "no such step")


@pytest.mark.parametrize("exchange", [True, False])
def test_whenever_a_replacement_is_killed_the_old_or_the_new_is_there(tmp_path, undisturbed, exchange, monkeypatch):
    """Where directories cannot be exchanged, the next writer puts the old one back."""
    if not exchange:
        monkeypatch.setattr(swap, "_exchange", unable)
    out, states, calls, ended = tmp_path / "out", [], 0, False
    before = old(out)

    def attempt() -> None:
        with monkeypatch.context() as patch:
            cut(patch, calls)
            build(out, replace=True)
            os._exit(0)

    while not ended:
        if not (child := os.fork()):
            attempt()
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        if not exchange and not out.exists():
            with pytest.raises(OutputError, match="exists already"):
                build(out)
        assert every_file(out) in (before, undisturbed)
        states.append(every_file(out) == undisturbed)
        calls += 1
        if states[-1] and not ended:  # start from the old one again, beside what the killed process left
            left = tmp_path / ".out.partial"
            left.rename(tmp_path / "kept")
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
            old(out)
            (tmp_path / "kept").rename(left)
    assert len(states) > 8 and states.index(True) > 4 and all(states[states.index(True) :])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_replaced_is_not_changed_by_another(tmp_path):
    old(tmp_path / "out")
    with Writer(tmp_path / "out", DECLARED, replace=True):
        with pytest.raises(OutputError, match="another process is writing it"):
            amend(tmp_path / "out", "router", {}, CONFIG, {})
        for replace in (True, False):
            with pytest.raises(OutputError, match="another process is building it"):
                Writer(tmp_path / "out", DECLARED, replace=replace)
