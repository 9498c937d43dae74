"""`upscale smile`: what goes wrong is one message and leaves nothing; what goes well is the same bytes each time."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.architectures import SHAPE, TABLE, Architecture
from tests.cli_runs import assert_one_message, command, every_file, group_file, inline, upscale
from tests.conftest import perturbed, save_model
from upscale import load
from upscale.errors import LoadError
from zoo import Checkpoint, CheckpointError, Group

LLAMA, GPT2 = (next(row for row in TABLE if row.name == name) for name in ("llama", "gpt2"))
# Large enough for a build of seconds, so that a signal finds it at work.
LARGE = Architecture("large", lambda: LlamaConfig(**{**SHAPE, "hidden_size": 256, "num_hidden_layers": 6}))
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def llama(groups) -> Group:
    return groups(LLAMA)


@pytest.fixture
def parent(tmp_path) -> Path:
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent"


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    """A copy of an expert, in shards, to break."""
    model = load(llama.experts["e1"].location)
    model.save_pretrained(tmp_path / "broken", max_shard_size="150KB")
    return tmp_path / "broken"


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def change(model: Path, name: str, changed) -> None:
    file = Checkpoint.open(model).tensors[name].file
    state = load_file(file)
    save_file({**state, name: changed(state[name])}, file, {"format": "pt"})


def set_first(value: float):
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return changed


def only_pickles(model: Path) -> None:
    for file in [*shards(model), model / "model.safetensors.index.json"]:
        file.unlink()
    torch.save({}, model / "pytorch_model.bin")


def other_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))


def longer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:1]])


MISFITS = {
    "missing shard": (lambda m: shards(m)[0].unlink(), "shards missing: model-00001-of-"),
    "truncated shard": (
        lambda m: os.truncate(shards(m)[1], 5000),
        "model-00002-of-00004.safetensors: truncated or damaged",
    ),
    "no model": (lambda m: (m / "config.json").unlink(), "not a model directory (no config.json)"),
    "pickle": (only_pickles, "weights only as pickle (pytorch_model.bin)"),
    "architecture": (other_architecture, "architecture mistral is not the base's llama"),
    "shape": (lambda m: change(m, DOWN, longer), f"{DOWN} has shape [65, 96], the base's is [64, 96]"),
    "vocabulary": (
        lambda m: change(m, "model.embed_tokens.weight", longer),
        "vocabulary differs: 260 rows in model.embed_tokens.weight, the base has 259",
    ),
}


@pytest.mark.parametrize(("breaks", "message"), MISFITS.values(), ids=list(MISFITS))
def test_an_expert_that_does_not_fit_is_one_message_and_nothing_is_left(llama, broken, parent, breaks, message):
    breaks(broken)
    options = [*inline(llama), f"--expert=odd={broken}"]
    for result in (upscale("check", *options), upscale("smile", parent / "out", *options)):
        assert result.exit_code == 1
        assert_one_message(result.output, message)
        assert "expert odd: " in result.output
    assert not list(parent.iterdir())


@pytest.mark.parametrize("name", [DOWN, NORM])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("who", ["expert odd", "base"])
def test_nan_and_infinity_name_tensor_and_model(llama, broken, parent, name, value, who):
    change(broken, name, set_first(value))
    models = {"base": llama.base, "odd": broken} if who != "base" else {"base": broken, "odd": llama.base}
    result = upscale("smile", parent / "out", "--base", models["base"], f"--expert=odd={models['odd']}")
    assert result.exit_code == 1
    assert_one_message(result.output, f"{who}: tensor {name} has NaN or infinite values; is the download complete?")
    assert not list(parent.iterdir())


def test_nan_in_a_bias_names_the_bias(groups, tmp_path, parent):
    group, name = groups(GPT2), "transformer.h.1.mlp.c_fc.bias"
    broken = Path(shutil.copytree(group.experts["e1"].location, tmp_path / "broken"))
    change(broken, name, set_first(float("nan")))
    result = upscale("smile", parent / "out", *inline(group), f"--expert=odd={broken}")
    assert_one_message(result.output, f"expert odd: tensor {name} has NaN or infinite values")
    assert not list(parent.iterdir())


def test_an_output_that_exists_is_not_touched(llama, parent):
    (parent / "out").mkdir()
    (parent / "out/mine.txt").write_text("precious")
    result = upscale("smile", parent / "out", *inline(llama))
    assert result.exit_code == 1
    assert_one_message(result.output, "out: exists already; choose another directory or remove it")
    assert every_file(parent) == {"out/mine.txt": b"precious"}


def test_no_space_is_noticed_before_and_during_the_build(llama, parent, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        before = upscale("smile", parent / "new/out", *inline(llama))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        during = upscale("smile", parent / "new/out", *inline(llama))
    for result, message in ((before, "no space left: needs 0.00 GB"), (during, "no space left; free some or choose")):
        assert result.exit_code == 1
        assert_one_message(result.output, f"out: {message}")
    assert not list(parent.iterdir())


def test_inline_and_yaml_groups_give_the_same_bytes(groups, tmp_path):
    """Two processes, and two seeds of Python's hashes: no order of a set decides a byte."""
    group = groups(GPT2)
    file = group_file(group, tmp_path / "group.yaml")
    for seed, args in enumerate((["a[/b]", *inline(group)], [file, "new/out"])):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run(
            command("smile", *args), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr.strip()) == (0, "")
        assert f"wrote {('a[/b]', 'new/out')[seed]}" in done.stdout
    one, two = every_file(tmp_path / "a[/b]"), every_file(tmp_path / "new/out")
    recipes = [yaml.safe_load(files.pop("upscale.yaml")) for files in (one, two)]
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json", "README.md"} <= one.keys()
    assert one == two
    assert recipes[0].pop("base") and recipes[1].pop("base")
    assert [list(recipe.pop("experts")) for recipe in recipes] == [["e1", "e2", "e3"]] * 2
    assert recipes[0] == recipes[1]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Group:
    root = tmp_path_factory.mktemp("large")
    base = save_model(LARGE.model(seed=0), root / "base")
    return Group.of(base, {f"e{n}": save_model(perturbed(LARGE, n), root / f"e{n}") for n in (1, 2, 3)})


def interrupted(group: Group, out: Path, number: int) -> tuple[int, str]:
    """Exit code and output of a build that gets a signal once it is at work on the linears."""
    args = command("smile", out, *inline(group), "--exact")
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as build:
        written = out.with_name(f".{out.name}.partial") / "0.safetensors"
        while not written.exists() and build.poll() is None:
            time.sleep(0.005)
        build.send_signal(number)
        output, _ = build.communicate(timeout=60)
    return build.returncode, output


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")]
)
def test_an_interrupted_build_leaves_nothing(large, parent, number, code, word):
    returncode, output = interrupted(large, parent / "out", number)
    assert (returncode, output.strip()) == (code, f"{word}; nothing unfinished was left behind.")
    assert not list(parent.iterdir())


def test_after_a_kill_nothing_loads_and_the_next_build_is_whole(large, parent):
    out, left = parent / "out", parent / ".out.partial"
    returncode, output = interrupted(large, out, signal.SIGKILL)
    assert returncode == -signal.SIGKILL and "Traceback" not in output
    assert [path.name for path in parent.iterdir()] == [left.name]
    with pytest.raises(CheckpointError, match="not a model directory"):
        Checkpoint.open(left)
    with pytest.raises(LoadError, match="not a model directory"):
        load(left)
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(left)
    for target in (out, parent / "undisturbed"):
        assert upscale("smile", target, *inline(large), "--exact").exit_code == 0
    assert not left.exists()
    assert every_file(out) == every_file(parent / "undisturbed")
