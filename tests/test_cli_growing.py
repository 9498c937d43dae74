"""The commands that change and show which experts a finished checkpoint has."""

import json
import math
import shutil

import pytest

import upscale
from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file
from tests.cli_runs import upscale as command
from tests.conftest import perturbed, save_model
from tests.test_upscale_growing import part_of, tensors
from upscale.errors import NonFiniteError

LLAMA, MISTRAL = (next(a for a in TABLE if a.name == name) for name in ("llama", "mistral"))


def test_what_others_put_there_stays_and_what_is_said_of_it(groups, tmp_path):
    group, out = groups(LLAMA, 3), tmp_path / "out"
    upscale.smile(part_of(group, "e1", "e2"), out, rank=8)
    (out / "notes").mkdir()
    (out / "notes/mine.txt").write_text("keep")
    (out / "README.md").write_text("my own card")
    (out / "eval.json").write_text("{}")
    result = command("remove", out, "e1")
    assert result.exit_code == 0 and "eval.json is of the model as it was" in result.output
    assert (out / "notes/mine.txt").read_text() == "keep" and (out / "README.md").read_text() == "my own card"
    assert not (out / "eval.json").exists()


def test_the_list_says_what_each_expert_takes(groups, tmp_path):
    group, out = groups(LLAMA, 3), tmp_path / "out"
    upscale.smile(part_of(group, "e1", "e2"), out, rank=8)
    assert (
        command("add", out, f"e3={group.experts['e3']}", "--rank", "4", "--allow-pickle").exit_code == 1
    )  # router rank
    assert command("add", out, f"e3={group.experts['e3']}", "--rank", "16").exit_code == 0
    found = json.loads(command("list", out, "--json").output)
    assert list(found["experts"]) == ["e1", "e2", "e3"] and found["router"] == "projection"
    assert [own["ranks"] for own in found["experts"].values()] == [[8, 8], [8, 8], [16, 16]]
    sizes = [own["nbytes"] for own in found["experts"].values()]
    assert sum(sizes) + found["base_bytes"] == found["nbytes"] == sum(t.nbytes for t in tensors(out).values())
    report = json.loads((out / "report.json").read_text())
    assert [own["energy"] for own in found["experts"].values()] == list(report["energy"].values())
    shown = command("list", out).output
    assert "e3" in shown and f"{sizes[2] / found['nbytes']:.1%}" in shown


def test_what_cannot_be_done_is_refused_in_one_line_and_changes_nothing(builds, groups, wemoes, tmp_path):
    group, out = groups(LLAMA, 3), tmp_path / "out"
    upscale.smile(part_of(group, "e1", "e2"), out, rank=4, router_rank=2, top_k=2)
    averaged, _ = builds(LLAMA, 2, rank=4, router_rank=2, rest="average")
    poisoned = perturbed(LLAMA, 9)
    poisoned.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    nan = save_model(poisoned, tmp_path / "nan")
    cached = tmp_path / "snapshots/abc"
    shutil.copytree(out, cached)
    before, there = every_file(out), set(tmp_path.iterdir())
    for args, message in (
        (("remove", out, "e1"), "a token is given to 2 experts, and 1 would be left"),
        (("remove", out, "e1", "e2"), "nothing would be left but the base"),
        (("remove", out, "e9"), "no expert e9 in this model; it has e1, e2"),
        (("remove", wemoes(LLAMA), "e1"), "a merge of all of them"),
        (("remove", averaged, "e1"), "a merge of all of them"),
        (("remove", "org/model", "e1"), "not a directory"),
        (("remove", cached, "e1"), "lies in the Hub's cache"),
        (("remove", group.base.location, "e1"), "a plain model"),
        (("add", out, f"e1={group.experts['e3']}"), "has an expert e1 already"),
        (("add", out, f"a={group.experts['e3']}", f"a={group.experts['e2']}"), "given twice"),
        (("add", out, "e3"), "write NAME=MODEL"),
        (("add", out, f"base={group.experts['e3']}"), "is reserved"),
        (("add", out, f"e3={tmp_path / 'nowhere'}"), "no such directory"),
        (("add", out, f"e3={groups(MISTRAL, 2).base}"), "architecture mistral is not the base's llama"),
        (("add", out, f"e3={out}"), "is an upscaled model already"),
        (("add", out, f"e3={group.experts['e3']}", "--rank", "2", "--energy", "0.5"), "exclude each other"),
        (("add", out, f"e3={group.experts['e3']}", "--rank", "1"), "--router-rank 2 is larger than --rank 1"),
        (("list", group.base.location), "a plain model"),
    ):
        result = command(*args)
        assert result.exit_code == 1, args
        assert_one_message(result.output, message)
    with pytest.raises(NonFiniteError, match=r"expert e3: tensor model.layers.1.mlp.up_proj.weight has NaN"):
        upscale.add(out, {"e3": nan})
    assert every_file(out) == before and set(tmp_path.iterdir()) == there
