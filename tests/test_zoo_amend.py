"""Changing a part of a checkpoint in place: the old state or the new one, whenever the process ends."""

import fcntl
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo import Checkpoint, OutputError
from zoo.reading.shards import INDEX
from zoo.writing.amend import amend, discard
from zoo.writing.part import content_key


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"table": torch.randn(5, 2, generator=generator), "bias": torch.randn(2, generator=generator)}


def part(seed):
    """Tensors of a part, under names that follow from them, and the ``config.json`` that names them."""
    names = f"router.{content_key(values(seed))}"
    return {f"{names}.{name}": t for name, t in values(seed).items()}, {"model_type": "x", "router": names}


def change(directory, seed, files=None):
    tensors, config = part(seed)
    amend(directory, "router", tensors, config, {"notes.txt": b"%d" % seed} if files is None else files)


@pytest.fixture(params=[False, True], ids=["single", "sharded"])
def checkpoint(request, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    if request.param:
        where = {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate(tensors, start=1)}
        for name, file in where.items():
            save_file({name: tensors[name]}, directory / file)
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": where}))
    else:
        save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def read(directory):
    """The tensors that ``config.json`` names, as a reader finds them: by the index, if there is one."""
    names = json.loads((directory / "config.json").read_text()).get("router")
    index = directory / INDEX
    files = {directory / f for f in json.loads(index.read_text())["weight_map"].values()} if index.is_file() else None
    found = {}
    for file in files or directory.glob("*.safetensors"):
        found |= load_file(file)
    assert {"a", "b"} <= found.keys()
    return {n.removeprefix(f"{names}."): t for n, t in found.items() if names and n.startswith(names)}


def every_file(directory: Path):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def assert_is(directory, seed):
    got, want = read(directory), values(seed)
    assert got.keys() == want.keys()
    assert all(torch.equal(t, want[name]) for name, t in got.items())


def test_only_the_part_the_config_and_what_is_asked_for_change(checkpoint):
    before = every_file(checkpoint)
    change(checkpoint, 1)
    assert_is(checkpoint, 1)
    after = every_file(checkpoint)
    (new,) = after.keys() - before.keys() - {"notes.txt"}
    assert new == f"router-{content_key(values(1))}.safetensors" and after["notes.txt"] == b"1"
    assert {n for n in before if before[n] != after[n]} == {"config.json"} | ({INDEX} & before.keys())
    assert Checkpoint.open(checkpoint).tensors.keys() >= {"a", "b"}
    change(checkpoint, 2)
    assert_is(checkpoint, 2)
    assert len(every_file(checkpoint)) == len(after)  # the first part is gone
    change(checkpoint, 1)
    assert every_file(checkpoint) == after
    change(checkpoint, 1)
    assert every_file(checkpoint) == after


def test_taking_the_part_away_leaves_none(checkpoint):
    before = every_file(checkpoint)
    change(checkpoint, 1)
    amend(checkpoint, "router", {}, {}, {})
    assert read(checkpoint) == {}
    assert every_file(checkpoint).keys() == before.keys() | {"notes.txt"}
    if INDEX in before:
        assert json.loads((checkpoint / INDEX).read_text()) == json.loads(before[INDEX])


def test_the_key_follows_from_the_values_and_their_order_alone():
    table, bias = values(1).values()
    key = content_key({"table": table, "bias": bias})
    assert content_key({"x": table, "y": bias}) == key
    assert content_key({"table": table.T.contiguous().T, "bias": bias.clone()}) == key
    others = [{"b": bias, "t": table}, {"t": table, "b": bias + 1e-7}, {"t": table.view(2, 5), "b": bias}, {"t": table}]
    assert len({key, *map(content_key, others)}) == 5
    assert len(key) == 8 and int(key, 16) >= 0


class Killed(BaseException):
    """Nothing catches it."""


def killed_after(monkeypatch, calls, function):
    """The n-th call of a function of ``os`` or ``Path`` that changes the directory ends the process."""
    count = 0

    def stop(name, original):
        def call(self, *args, **kwargs):
            nonlocal count
            count += 1
            if count > calls:
                raise Killed
            return original(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "unlink"):
            patch.setattr(Path, name, stop(name, getattr(Path, name)))
        try:
            function()
        except Killed:
            return True
        return False


def test_whenever_it_is_killed_the_old_state_or_the_new_one_is_there(checkpoint, monkeypatch):
    """At every rename and removal; and the next one leaves what an undisturbed one does."""
    change(checkpoint, 1)
    states, steps, config = [], 0, checkpoint / "config.json"
    while killed_after(monkeypatch, steps, lambda: change(checkpoint, 2)):
        is_new = json.loads(config.read_text())["router"] == part(2)[1]["router"]
        assert_is(checkpoint, 2 if is_new else 1)
        states.append(is_new)
        steps += 1
        change(checkpoint, 1)
        assert_is(checkpoint, 1)
        assert not list(checkpoint.glob(".router-*"))  # nothing is left of it
    assert states == sorted(states) and len(set(states)) == 2  # old, and from one step on new
    assert_is(checkpoint, 2)
    assert len(states) == (6 if (checkpoint / INDEX).is_file() else 4)
    disturbed = every_file(checkpoint)
    change(checkpoint, 1)
    change(checkpoint, 2)
    assert every_file(checkpoint) == disturbed


@pytest.mark.parametrize("name", ["router-", "config.json", "notes.txt"])
def test_a_real_kill_while_a_file_is_written(checkpoint, name):
    change(checkpoint, 1)
    child = os.fork()
    if not child:
        write = Path.open

        def kill(path, *args, **kwargs):
            file = write(path, *args, **kwargs)
            if path.name.startswith(f".{name}"):
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return file

        Path.open = kill
        change(checkpoint, 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert_is(checkpoint, 2 if name == "notes.txt" else 1)
    change(checkpoint, 2)
    assert_is(checkpoint, 2)


@pytest.mark.parametrize("breaks", ["truncated", "removed", "emptied"])
def test_a_damaged_part_is_discarded_and_nothing_else(checkpoint, breaks):
    change(checkpoint, 1)
    fine = every_file(checkpoint)
    discard(checkpoint, "router")
    assert every_file(checkpoint) == fine
    (file,) = checkpoint.glob("router-*")
    data = file.read_bytes()
    {
        "truncated": lambda: file.write_bytes(data[: len(data) // 2]),
        "removed": file.unlink,
        "emptied": lambda: file.write_bytes(b""),
    }[breaks]()
    discard(checkpoint, "router")
    assert read(checkpoint) == {}
    left = every_file(checkpoint)
    assert {n for n in fine if fine[n] != left.get(n)} == {file.name} | ({INDEX} & fine.keys())
    change(checkpoint, 1)
    assert every_file(checkpoint) == fine


def test_another_process_at_work_is_not_disturbed(checkpoint):
    change(checkpoint, 1)
    before = every_file(checkpoint)
    lock = os.open(checkpoint, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for action in (lambda: change(checkpoint, 2), lambda: discard(checkpoint, "router")):
        with pytest.raises(OutputError, match="model: another process is writing it; wait for it"):
            action()
    assert every_file(checkpoint) == before
    os.close(lock)
    change(checkpoint, 2)
    assert_is(checkpoint, 2)


def test_a_place_that_cannot_be_written_is_one_line(checkpoint, tmp_path):
    change(checkpoint, 1)
    (checkpoint / ".config.json.partial").mkdir()
    with pytest.raises(OutputError, match="model: cannot be written: Is a directory"):
        change(checkpoint, 2)
    assert_is(checkpoint, 1)
    with pytest.raises(OutputError, match="absent: cannot be written: No such file or directory"):
        change(tmp_path / "absent", 1)
