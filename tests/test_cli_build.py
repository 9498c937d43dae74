"""The command line of `check` and `smile`: real processes for signals and whole builds, click's runner for the rest."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.architectures import SHAPE, TABLE, Architecture
from tests.conftest import perturbed, save_model
from upscale import load
from upscale.cli import main
from upscale.config import EvalConfig, SmileConfig
from zoo import Checkpoint, CheckpointError, Group

LLAMA, GPT2 = (next(row for row in TABLE if row.name == name) for name in ("llama", "gpt2"))
# Large enough for a build of seconds, so that a signal finds it at work.
LARGE = Architecture("large", lambda: LlamaConfig(**{**SHAPE, "hidden_size": 256, "num_hidden_layers": 6}))
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def upscale(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def command(*args: str | Path) -> list[str]:
    return [str(Path(sys.executable).with_name("upscale")), *map(str, args)]


def inline(group: Group) -> list[str]:
    experts = [f"--expert={name}={source}" for name, source in group.experts.items()]
    return ["--base", str(group.base), *experts]


def group_file(group: Group, file: Path) -> Path:
    """The group as YAML, with paths relative to the file."""
    base, *experts = (os.path.relpath(str(source), file.parent) for source in (group.base, *group.experts.values()))
    file.write_text(yaml.safe_dump({"base": base, "experts": dict(zip(group.experts, experts, strict=True))}))
    return file


def every_file(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def assert_one_message(output: str, message: str) -> None:
    assert message in output
    assert output.count("Error: ") == 1 and "Traceback" not in output


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
        "model-00002-of-00003.safetensors: truncated or damaged",
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


BAD_OPTIONS = {
    "--rank 0": (1, "--rank must be at least 1, not 0"),
    "--rank x": (2, "'x' is not a valid integer"),
    "--router-rank 9 --rank 8": (1, "--router-rank 9 is larger than --rank 8"),
    "--top-k 4": (1, "--top-k 4 is more than the group's 3 experts"),
    "--include nothing.*": (1, "--include and --exclude leave nothing to upscale; the model's linears are *.mlp.down"),
    "--exclude *": (1, "--include and --exclude leave nothing to upscale"),
    "--device nonsense": (1, "--device nonsense: "),
    "--device meta": (1, "--device meta: "),
    "--device hpu": (1, "--device hpu: "),
    "--dtype int8": (2, "'int8' is not one of 'auto', 'float32', 'float16', 'bfloat16'"),
    "--expert e4": (1, "--expert e4: write NAME=MODEL"),
    "--expert =gpt2": (1, "--expert =gpt2: write NAME=MODEL"),
    "--expert e1=gpt2": (1, "--expert e1: given twice; names must differ"),
    "--expert base=gpt2": (1, "expert name 'base' is reserved; choose another"),
    "--expert e4=./nowhere": (1, "expert e4: ./nowhere: no such directory"),
    "--nonsense": (2, "No such option: --nonsense"),
}


@pytest.mark.parametrize(("options", "wanted"), BAD_OPTIONS.items(), ids=list(BAD_OPTIONS))
def test_a_bad_option_is_one_message(llama, parent, options, wanted):
    result = upscale("smile", parent / "out", *inline(llama), *options.split())
    assert result.exit_code == wanted[0]
    assert_one_message(result.output, wanted[1])
    assert not list(parent.iterdir())


def test_a_group_is_a_file_or_inline_but_one_of_them(llama, parent, tmp_path):
    file, out = group_file(llama, tmp_path / "group.yaml"), parent / "out"
    for args in ([file, out, *inline(llama)], [out], [], [file, out, out]):
        result = upscale("smile", *args)
        assert result.exit_code == 2
        assert_one_message(result.output, "a group is either GROUP or --base and --expert")
    for args, message in (
        ([out, "--base", llama.base], "a group needs at least one expert"),
        ([out, "--expert", f"e={llama.base}"], "an inline group needs --base MODEL beside --expert"),
        ([tmp_path / "absent.yaml", out], "absent.yaml: cannot be read as a group file"),
    ):
        result = upscale("smile", *args)
        assert result.exit_code == 1
        assert_one_message(result.output, message)
    assert not list(parent.iterdir())


def test_check_shows_the_group_and_its_warnings(llama, tmp_path):
    result = upscale("check", group_file(llama, tmp_path / "group.yaml"))
    assert result.exit_code == 0
    assert "ok 3 expert(s) fit the base" in result.output and "warning" not in result.output
    other = Path(shutil.copytree(llama.experts["e1"].location, tmp_path / "a[/b]"))
    (other / "tokenizer.json").write_text("{}")
    result = upscale("check", *inline(llama), f"--expert=other={other}")
    assert result.exit_code == 0
    assert "warning expert other: tokenizer differs from the base's, which the result keeps" in result.output


def test_a_dry_run_shows_the_plan_and_writes_nothing(llama, parent):
    options = ["--rank", "32", "--rest", "average", "--exclude", "*.k_proj"]
    result = upscale("smile", parent / "new/out", *inline(llama), *options, "--dry-run")
    assert result.exit_code == 0
    for text in ("self_attn.q_proj", "128 x 64", "32", "experts    3: e1, e2, e3", "from: average", "memory     about"):
        assert text in result.output
    assert "k_proj" not in result.output
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
    assert (returncode, output.strip()) == (code, f"{word}; nothing was left behind.")
    assert not list(parent.iterdir())


def test_after_a_kill_nothing_loads_and_the_next_build_is_whole(large, parent):
    out, left = parent / "out", parent / ".out.partial"
    returncode, output = interrupted(large, out, signal.SIGKILL)
    assert returncode == -signal.SIGKILL and "Traceback" not in output
    assert [path.name for path in parent.iterdir()] == [left.name]
    with pytest.raises(CheckpointError, match="not a model directory"):
        Checkpoint.open(left)
    with pytest.raises(OSError, match=r"config\.json"):
        load(left)
    for target in (out, parent / "undisturbed"):
        assert upscale("smile", target, *inline(large), "--exact").exit_code == 0
    assert not left.exists()
    assert every_file(out) == every_file(parent / "undisturbed")


@pytest.mark.parametrize("name", [None, *sorted(main.list_commands(None))])
def test_every_command_explains_itself_and_every_setting(name):
    result = upscale(*([name] if name else []), "--help")
    assert result.exit_code == 0
    settings = {"smile": SmileConfig, "eval": EvalConfig}
    wanted = [f"--{f.name.replace('_', '-')}" for f in fields(settings[name])] if name in settings else []
    wanted += main.list_commands(None) if name is None else ["Usage: "]
    for text in wanted:
        assert f" {text}" in f" {result.output}"
