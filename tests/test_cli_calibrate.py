"""`upscale calibrate`: prompts from files, and what goes wrong in one line."""

import json

import pytest

from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file, upscale
from tests.routers import copied
from upscale import load
from upscale.calibrating.prompts import load_prompts
from upscale.commands.calibrate import calibrate as command
from upscale.errors import TaskError

LLAMA = TABLE[0]
LINES = {"e1": ["123 45", "777", "90 1234 5", "31415"], "e2": ["abc de", "cafe", "bad fed", "dead beef"]}


@pytest.fixture
def out(builds, tmp_path):
    return copied(builds(LLAMA, 2, rank=8)[0], tmp_path / "out")


@pytest.fixture
def files(tmp_path):
    """A text file and a JSON Lines file."""
    (tmp_path / "e1.txt").write_text("\n".join(LINES["e1"]) + "\n\n")
    rows = [
        {"prompt": LINES["e2"][0], "completion": "x"},
        {"text": LINES["e2"][1]},
        LINES["e2"][2],
        {"prompt": LINES["e2"][3]},
    ]
    (tmp_path / "e2.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n \n")
    return {name: tmp_path / file for name, file in (("e1", "e1.txt"), ("e2", "e2.jsonl"))}


def test_prompts_are_read_in_the_order_of_the_experts(files, tmp_path):
    (tmp_path / "more.txt").write_text("é 6\n")
    given = {"base": [files["e1"]], "e2": [files["e2"]], "e1": [files["e1"], tmp_path / "more.txt"]}
    prompts = load_prompts(given, ["e1", "e2"], "base")
    assert prompts == {"e1": [*LINES["e1"], "é 6"], "e2": LINES["e2"], "base": LINES["e1"]}
    assert list(prompts) == ["e1", "e2", "base"]


def test_calibrating_by_command_is_calibrating(out, files, builds, tmp_path):
    from upscale.calibrating.calibration import calibrate

    args = ["--prompts", f"e1={files['e1']}", f"e2={files['e2']}", "--samples", "8", "--half-life", "9.5"]
    result = upscale("calibrate", out, *args)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    for name in LINES:
        assert any(line[:1] == ["│"] and line[1] == name and "4" in line for line in lines), result.output
    same = copied(builds(LLAMA, 2, rank=8)[0], tmp_path / "same")
    calibrate(same, LINES, samples=8, half_life=9.5)
    assert every_file(out) == every_file(same)
    assert load(out).layout.router["half_life"] == 9.5
    again = upscale("calibrate", out, *[f"--prompts={n}={f}" for n, f in files.items()], *args[3:])
    assert again.exit_code == 0 and every_file(out) == every_file(same)


def test_few_prompts_are_a_warning(out, files, tmp_path):
    (tmp_path / "two.txt").write_text("123\n45\n")
    result = upscale("calibrate", out, "--prompts", f"e1={tmp_path}/two.txt", f"e2={files['e2']}", "--samples", "8")
    assert result.exit_code == 0, result.output
    assert "warning fewer than 4 prompts for e1 (2)" in result.output


def test_experts_write_their_own_by_self(out):
    result = upscale("calibrate", out, "--self", "--samples", "8")
    assert result.exit_code == 0, result.output
    assert "held out" in result.output and "give --prompts" in result.output


BAD_FILES = {
    "empty.txt": ("", "empty.txt: no prompts; the file is empty"),
    "blank.jsonl": ("\n  \n", "blank.jsonl: no prompts; the file is empty"),
    "one.txt": ("single\n", "--prompts e1: 1 prompt(s) in "),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt": \n', 'broken.jsonl:2: not a row like {"prompt": "..."}'),
    "other.jsonl": ('{"prompt": "a"}\n\n{"question": "b"}\n', 'other.jsonl:3: not a row like {"prompt": "..."}'),
    "number.jsonl": ('{"prompt": 7}\n', 'number.jsonl:1: not a row like {"prompt": "..."}'),
    "list.jsonl": ("[1]\n", 'list.jsonl:1: not a row like {"prompt": "..."}'),
    "void.jsonl": ('{"prompt": " "}\n', 'void.jsonl:1: not a row like {"prompt": "..."}'),
    "long.txt": (
        "x" * 300 + "\nshort\n",
        "prompt 1 for e1 has 301 tokens, which does not fit the model's context of 256",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_of_prompts_that_cannot_be_used_is_one_line(out, files, tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_text(content)
    before = every_file(out)
    result = upscale("calibrate", out, "--prompts", f"e1={tmp_path / name}", f"e2={files['e2']}")
    assert result.exit_code == 1
    assert_one_message(result.output, message)
    assert every_file(out) == before


def test_bytes_that_are_no_text_and_absent_files_are_named(files, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name in ("bytes.txt", "absent.txt"):
        with pytest.raises(TaskError, match="cannot be read: ") as error:
            load_prompts({"e1": [tmp_path / name], "e2": [files["e2"]]}, ["e1", "e2"], "base")
        assert name in str(error.value) and "\n" not in str(error.value)


BAD_OPTIONS = {
    "": (1, "give either --prompts NAME=FILE for every expert, or --self"),
    "--self --prompts e1={e1}": (1, "give either --prompts NAME=FILE for every expert, or --self"),
    "--prompts e1": (1, "--prompts e1: write NAME=FILE"),
    "--prompts ={e1}": (1, "write NAME=FILE"),
    "--prompts e1=": (1, "--prompts e1=: write NAME=FILE"),
    "--prompts e1={e1}": (1, "no prompts for e2: every expert needs --prompts NAME=FILE"),
    "--prompts e1={e1} e2={e2} e9={e1}": (1, "--prompts e9: no such expert; the model has e1, e2 and base"),
    "--prompts e1={e1} e2={e2} --top-k 4": (1, "--top-k 4 is more than the router's 3 classes"),
    "--prompts e1={e1} e2={e2} --top-k -1": (1, "--top-k must be at least 0, not -1"),
    "--prompts e1={e1} e2={e2} --depth 1": (1, "--depth needs --granularity prefix"),
    "--prompts e1={e1} e2={e2} --granularity prefix --depth 7": (1, "--depth 7: the model has depths 0 to 1"),
    "--prompts e1={e1} e2={e2} --granularity token": (2, "'token' is not one of 'prompt', 'prefix'"),
    "--prompts e1={e1} e2={e2} --half-life 0": (1, "--half-life must be more than 0 tokens, not 0.0"),
    "--prompts e1={e1} e2={e2} --half-life nan": (1, "--half-life must be more than 0 tokens, not nan"),
    "--prompts e1={e1} e2={e2} --samples 3": (1, "--samples must be at least 4, not 3"),
    "--prompts e1={e1} e2={e2} --continuation -1": (1, "--continuation must be at least 0, not -1"),
    "--prompts e1={e1} e2={e2} --seed -1": (1, "--seed must be at least 0, not -1"),
    "--prompts e1={e1} e2={e2} --chat --prompt-template {{prompt}}!": (
        1,
        "--chat and --prompt-template exclude each other",
    ),
    "--prompts e1={e1} e2={e2} --prompt-template ?": (1, "--prompt-template '?' does not contain {prompt}"),
    "--prompts e1={e1} e2={e2} --device nonsense": (1, "--device nonsense: "),
    "--prompts e1={e1} e2={e2} --dtype int8": (2, "'int8' is not one of"),
}


@pytest.mark.parametrize(("options", "wanted"), BAD_OPTIONS.items(), ids=list(BAD_OPTIONS))
def test_a_bad_option_is_one_line(out, files, options, wanted):
    before = every_file(out)
    result = upscale("calibrate", out, *options.format(**files).split())
    assert result.exit_code == wanted[0], result.output
    assert_one_message(result.output, wanted[1])
    assert every_file(out) == before


def test_what_is_no_upscaled_directory_is_one_line(out, groups, files, tmp_path):
    prompts = [f"--prompts=e1={files['e1']}", f"--prompts=e2={files['e2']}"]
    (tmp_path / "empty").mkdir()
    (out / "config.json").write_text("{")
    for model, message in (
        ("org/model", "org/model: not a directory; a model of the Hub must be downloaded first, to change its router"),
        (tmp_path / "absent", "absent: not a directory"),
        (tmp_path / "empty", "not a model directory (no config.json)"),
        (groups(LLAMA, 2).base.resolve(), "a plain model, which has no router; give an upscaled one"),
        (out, "config.json cannot be read"),
    ):
        for options in (prompts, ["--self"]):
            result = upscale("calibrate", model, *options)
            assert result.exit_code == 1
            assert_one_message(result.output, message)


def test_every_setting_is_explained():
    help_text = upscale("calibrate", "--help").output
    for parameter in command.params:
        for flag in parameter.opts:
            assert flag in help_text or flag == "out"
