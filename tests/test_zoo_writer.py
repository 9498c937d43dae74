import json
import os
import shutil
import signal
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.architectures import TABLE
from tests.cli_runs import every_file
from zoo import Checkpoint, OutputError, TensorSpec, Writer

CONFIG = {"model_type": "llama", "hidden_size": 4}
FILES = {"README.md": b"text\n", "extra/notes.txt": b"", "tokenizer.json": Path(__file__)}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"w.{str(dtype).removeprefix('torch.')}": torch.randn(7, 5, generator=generator).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    }
    return made | {
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "strided": torch.randn(6, 4, generator=generator).T,
        "odd": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
    }


def specs(content: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}


def write(out: Path, content: dict[str, torch.Tensor], declared=None, config=CONFIG, **options) -> Path:
    with Writer(out, declared or specs(content), **options) as writer:
        for name, tensor in content.items():
            writer.write(name, tensor)
        writer.commit(config, FILES)
    return out


def loaded(out: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shard_size", [10**9, 100, 1])
def test_every_format_comes_back_bit_for_bit(tmp_path, shard_size):
    out = write(tmp_path / "out", tensors(), shard_size=shard_size)
    assert_same(loaded(out), tensors())
    checkpoint = Checkpoint.open(out)
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, tensors())
    assert checkpoint.config == CONFIG
    assert (out / "extra/notes.txt").read_bytes() == b""
    assert (out / "tokenizer.json").read_bytes() == Path(__file__).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nan_infinity_and_negative_zero_keep_their_bits(tmp_path):
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    out = write(tmp_path / "out", {"odd": odd})
    assert torch.equal(load_file(out / "model.safetensors")["odd"].view(torch.int32), odd.view(torch.int32))


def test_shards_hold_one_item_size_up_to_the_limit_and_an_index_tells_where(tmp_path):
    content = {f"a{n}": torch.full((10,), n, dtype=torch.float32) for n in range(5)}
    content |= {"h": torch.ones(3, dtype=torch.bfloat16), "large": torch.ones(50)}
    out = write(tmp_path / "out", content, shard_size=80)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = [f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)]
    assert sorted(file.name for file in out.glob("*.safetensors")) == names
    assert [sorted(load_file(out / name)) for name in names] == [["a0", "a1"], ["a2", "a3"], ["a4"], ["large"], ["h"]]
    assert index["weight_map"] == {tensor: name for name in names for tensor in load_file(out / name)}
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in content.values())}


@pytest.mark.parametrize("shard_size", [10**9, 100_000])
def test_transformers_loads_what_is_written(tmp_path, shard_size):
    model = TABLE[0].model(seed=0)
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    out = write(tmp_path / "out", dict(model.state_dict()), config=config, shard_size=shard_size)
    assert (out / "model.safetensors.index.json").exists() == (shard_size == 100_000)
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


def test_the_same_input_gives_the_same_bytes(tmp_path):
    first, second = (every_file(write(tmp_path / name, tensors(), shard_size=100)) for name in ("first", "second"))
    assert len(first) > 5
    assert first == second


def test_less_than_declared_is_fine_and_leaves_no_trace(tmp_path):
    declared = specs(tensors()) | {"up": TensorSpec((100, 1000), torch.float32), "never": TensorSpec((9,), torch.int64)}
    content = tensors() | {"up": torch.randn(2, 999)}
    out = write(tmp_path / "out", content, declared)
    assert_same(loaded(out), content)
    assert "never" not in (out / "model.safetensors.index.json").read_text()
    only = write(tmp_path / "only", {"up": content["up"]}, declared)
    assert_same(load_file(only / "model.safetensors"), {"up": content["up"]})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("w", torch.zeros(4, 4), r"w: declared .*\(3, 4\).*got \(4, 4\)"),
        ("w", torch.zeros(3), r"w: declared .*got \(3,\)"),
        ("w", torch.zeros(3, 4, dtype=torch.bfloat16), r"w: declared .*float32.*got \(3, 4\) torch.bfloat16"),
        ("v", torch.zeros(3, 4), "v: not declared"),
        ("once", torch.zeros(3, 4), "once: written before"),
    ],
)
def test_a_tensor_that_breaks_its_declaration_is_a_bug_and_ends_the_build(tmp_path, name, tensor, message):
    declared = dict.fromkeys(["w", "once"], TensorSpec((3, 4), torch.float32))
    with pytest.raises(ValueError, match=message), Writer(tmp_path / "out", declared) as writer:
        writer.write("once", torch.zeros(3, 4))
        writer.write(name, tensor)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_exists_is_refused_and_not_touched(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
        (out / "mine.txt").write_text("precious")
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    with pytest.raises(OutputError, match=r"out: exists already; choose another directory or remove it"):
        Writer(out, specs(tensors()))
    assert [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


def test_what_comes_to_exist_meanwhile_is_not_touched_either(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"out: cannot be written: Directory not empty"), Writer(out, {}) as writer:
        out.mkdir()
        (out / "mine.txt").write_text("precious")
        writer.commit(CONFIG, {})
    assert every_file(tmp_path) == {"out/mine.txt": b"precious"}


@pytest.mark.parametrize("out", ["/", "file/out", "x" * 300, "new/" + "x" * 250])
def test_a_place_that_cannot_be_written_is_named(tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"exists already|cannot be written: (Not a directory|File name too long)"):
        Writer(tmp_path / out, specs(tensors()))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [None, RuntimeError("bug"), KeyboardInterrupt()])
def test_leaving_without_commit_leaves_nothing(tmp_path, error):
    def leave():
        with Writer(tmp_path / "new/parent/out", specs(tensors())) as writer:
            writer.write("w.float32", tensors()["w.float32"])
            assert (tmp_path / "new/parent/.out.partial").is_dir()
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            leave()
    else:
        leave()
    assert not list(tmp_path.iterdir())


@contextmanager
def forked(action):
    """Its process id, while ``action`` runs in a copy of this process."""
    if not (child := os.fork()):
        try:
            action()
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_two_do_not_build_the_same_and_a_killed_one_does_not_block(tmp_path):
    receive, send = os.pipe()

    def hold():
        writer = Writer(tmp_path / "out", {})
        os.write(send, b"held")
        signal.pause()
        writer.commit(CONFIG, {})

    with forked(hold):
        assert os.read(receive, 4) == b"held"
        with pytest.raises(OutputError, match="out: another process is building it; wait for it or choose another"):
            Writer(tmp_path / "out", {})
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert_same(loaded(write(tmp_path / "out", tensors())), tensors())


@pytest.mark.parametrize("files_written", [False, True])
def test_after_a_kill_nothing_loads_and_the_next_build_is_whole(tmp_path, files_written):
    receive, send = os.pipe()

    class Stop(dict):
        def items(self):
            os.write(send, b"stopped")
            signal.pause()
            return super().items()

    def build():
        with Writer(tmp_path / "out", specs(tensors()), shard_size=100) as writer:
            for name, tensor in tensors().items():
                writer.write(name, tensor)
            writer.commit(Stop(CONFIG) if files_written else CONFIG, FILES if files_written else Stop(FILES))

    with forked(build):
        assert os.read(receive, 7) == b"stopped"
    left = tmp_path / ".out.partial"
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    assert list(left.rglob("*.safetensors")) and not list(left.rglob("config.json"))
    assert bool(list(left.rglob("extra/notes.txt"))) == files_written
    (left / "leftover").mkdir()
    again = every_file(write(tmp_path / "out", tensors(), shard_size=100))
    assert not left.exists()
    assert again == every_file(write(tmp_path / "undisturbed", tensors(), shard_size=100))


def test_no_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    needs = {"w": TensorSpec((10**9,), torch.float32)}
    with pytest.raises(OutputError, match=r"out: no space left: needs 4.00 GB, 1.00 GB are free"):
        Writer(tmp_path / "out", needs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["0.safetensors", "2.safetensors", "README.md", "config.json"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, name):
    """The kernel's own ENOSPC, from /dev/full in the place of each file."""
    with (
        pytest.raises(OutputError, match="out: no space left; free some or choose another disk"),
        Writer(tmp_path / "out", specs(tensors())) as writer,
    ):
        (writer.work / "whole").mkdir()
        (writer.work / (name if name.endswith("safetensors") else f"whole/{name}")).symlink_to("/dev/full")
        for tensor, value in tensors().items():
            writer.write(tensor, value)
        writer.commit(CONFIG, FILES)
    assert not list(tmp_path.iterdir())
