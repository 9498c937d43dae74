"""The command line of `check` and `smile`: options, groups, plans and help."""

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, command, group_file, inline, upscale
from upscale.cli import main
from upscale.config import EvalConfig, SmileConfig
from zoo import Group


@pytest.fixture
def llama(groups) -> Group:
    return groups(TABLE[0])


BAD_OPTIONS = {
    "--rank 0": (1, "--rank must be at least 1, not 0"),
    "--rank x": (2, "'x' is not a valid integer"),
    "--router-rank 9 --rank 8": (1, "--router-rank 9 is larger than --rank 8"),
    "--budget 1.5x --energy 0.9": (1, "--budget and --energy exclude each other: each decides all ranks"),
    "--budget lots": (1, "--budget lots: write the size as a multiple of the base's, e.g. 1.5x"),
    "--budget 1.01x": (1, "--budget 1.01x cannot be met: the smallest is 1.0"),
    "--energy 0": (1, "--energy must be above 0 and at most 1, not 0.0"),
    "--energy 1.01": (1, "--energy must be above 0 and at most 1, not 1.01"),
    "--energy nan": (1, "--energy must be above 0 and at most 1, not nan"),
    "--energy much": (2, "'much' is not a valid float"),
    "--scope head": (2, "'head' is not one of 'linear', 'block', 'model'"),
    "--granularity prompt": (2, "'prompt' is not one of 'token', 'prefix'"),
    "--rest mine": (2, "'mine' is not one of 'experts', 'base', 'average'"),
    "--top-k 4": (1, "--top-k 4 is more than the group's 3 experts"),
    "--include nothing.*": (
        1,
        "--include and --exclude leave nothing to upscale; the model's modules are *.mlp.down_proj",
    ),
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
    "--nonsense": (2, "No such option"),
}


@pytest.mark.parametrize(("options", "wanted"), BAD_OPTIONS.items(), ids=list(BAD_OPTIONS))
def test_a_bad_option_is_one_message(llama, tmp_path, options, wanted):
    result = upscale("smile", tmp_path / "out", *inline(llama), *options.split())
    assert result.exit_code == wanted[0]
    assert_one_message(result.output, wanted[1])
    assert not list(tmp_path.iterdir())


def test_a_group_is_a_file_or_inline_but_one_of_them(llama, tmp_path):
    file, out = group_file(llama, tmp_path / "group.yaml"), tmp_path / "out"
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
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("start", [command(), [sys.executable, "-m", "upscale.cli"]], ids=["script", "module"])
def test_a_process_says_what_is_wrong_on_stderr_alone(start):
    done = subprocess.run([*start, "check", "absent.yaml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert_one_message(done.stderr, "Error: absent.yaml: cannot be read as a group file")


def test_check_shows_the_group_and_its_warnings(llama, tmp_path):
    result = upscale("check", group_file(llama, tmp_path / "group.yaml"))
    assert result.exit_code == 0
    assert "ok 3 expert(s) fit the base" in result.output and "warning" not in result.output
    other = Path(shutil.copytree(llama.experts["e1"].location, tmp_path / "a[/b]"))
    (other / "tokenizer.json").write_text("{}")
    result = upscale("check", *inline(llama), f"--expert=other={other}")
    assert result.exit_code == 0
    assert "warning expert other: tokenizer differs from the base's, which the result keeps" in result.output


def test_a_dry_run_shows_the_plan_and_writes_nothing(llama, tmp_path):
    options = ["--rank", "32", "--rest", "average", "--exclude", "*.k_proj"]
    result = upscale("smile", tmp_path / "new/out", *inline(llama), *options, "--dry-run")
    assert result.exit_code == 0
    for text in ("self_attn.q_proj", "128 x 64", "32", "experts    3: e1, e2, e3", "from: average", "memory     about"):
        assert text in result.output
    assert "k_proj" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [None, *sorted(main.list_commands(None))])
def test_every_command_explains_itself_and_every_setting(name):
    result = upscale(*([name] if name else []), "--help")
    assert result.exit_code == 0
    settings = {"smile": SmileConfig, "eval": EvalConfig}
    wanted = [f"--{f.name.replace('_', '-')}" for f in fields(settings[name])] if name in settings else []
    wanted += main.list_commands(None) if name is None else ["Usage: "]
    for text in wanted:
        assert f" {text}" in f" {result.output}"
