"""`upscale rebuild`: from the recipe and the same sources, every file of the checkpoint, byte for byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file, inline, upscale
from upscale import calibrate, router_file
from zoo import Group
from zoo.writing.part import content_key

LLAMA, GPT2, QWEN2 = (next(row for row in TABLE if row.name == name) for name in ("llama", "gpt2", "qwen2"))


@pytest.fixture
def checkpoint(groups, tmp_path) -> tuple[Group, Path]:
    """A group of its own, to change, and a checkpoint of it."""
    group = groups(LLAMA, 2)
    models = {name: str(source) for name, source in {"base": group.base, **group.experts}.items()}
    moved = {name: shutil.copytree(model, tmp_path / name) for name, model in models.items()}
    group = Group.of(moved.pop("base"), moved)
    options = ("--rank", "8", "--exclude", "*.k_proj", "--exclude", "*.v_proj", "--rest", "average")
    assert upscale("smile", tmp_path / "out", *inline(group), *options).exit_code == 0
    return group, tmp_path / "out"


def assert_rebuilt(out: Path, again: Path, *options: str, but: str = "") -> str:
    result = upscale("rebuild", out / "upscale.yaml", again, *options)
    assert result.exit_code == 0, result.output
    one, two = every_file(out), every_file(again)
    assert one.keys() == two.keys() and [name for name in one if one[name] != two[name]] == ([but] if but else [])
    return result.output


def test_sources_are_pinned_by_content_and_may_move(checkpoint, tmp_path, monkeypatch):
    _, out = checkpoint
    made = yaml.safe_load((out / "upscale.yaml").read_text())
    assert list(made["sha256"]) == ["base", "e1", "e2"] and len(set(made["sha256"].values())) == 3
    assert_rebuilt(out, tmp_path / "again")
    (tmp_path / "e2").rename(tmp_path / "moved")
    result = upscale("rebuild", out / "upscale.yaml", tmp_path / "third")
    assert result.exit_code == 1
    assert_one_message(result.output, "e2: ")
    assert "say where it is now by --source e2=PATH" in result.output and not (tmp_path / "third").exists()
    monkeypatch.chdir(tmp_path)
    assert "warning" not in assert_rebuilt(out, Path("third"), "--source", "e2=moved")


def test_another_machine_has_another_number_of_threads(groups, tmp_path):
    """Which decides how sums are rounded, so that the recipe's number is taken; by what grows a checkpoint too."""
    before = torch.get_num_threads()
    group = groups(QWEN2, 3)
    four = Group.of(
        group.base.location, {**{n: s.location for n, s in group.experts.items()}, "e4": group.base.location}
    )
    try:
        for count, name in ((1, "one"), (2, "two")):
            torch.set_num_threads(count)
            assert upscale("smile", tmp_path / name, *inline(group), "--rank", "24").exit_code == 0
        recipes = [yaml.safe_load((tmp_path / name / "upscale.yaml").read_text()) for name in ("one", "two")]
        assert [recipe.pop("threads") for recipe in recipes] == [1, 2] and recipes[0] == recipes[1]
        assert_rebuilt(tmp_path / "one", tmp_path / "again")
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert upscale("smile", tmp_path / "four", *inline(four), "--rank", "24").exit_code == 0
        torch.set_num_threads(2)
        assert upscale("add", tmp_path / "one", f"e4={group.base}").exit_code == 0
        assert every_file(tmp_path / "one") == every_file(tmp_path / "four")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_source_that_changed_is_named_before_work_starts(checkpoint, tmp_path, file):
    changed = tmp_path / ("e1" if file != "tokenizer.json" else "base") / file
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if file.endswith("safetensors") else content + b"\n")
    result = upscale("rebuild", tmp_path / "out/upscale.yaml", tmp_path / "again")
    assert result.exit_code == 1
    assert_one_message(result.output, f"{changed.parent.name}: {changed.parent} is not what the recipe was made from")
    assert f"--source {changed.parent.name}=PATH" in result.output
    assert not (tmp_path / "again").exists() and not (tmp_path / ".again.partial").exists()
    (tmp_path / "better").mkdir()
    changed.write_bytes(content)
    assert_rebuilt(tmp_path / "out", tmp_path / "again")


def test_a_calibrated_router_is_taken_from_its_file(checkpoint, tmp_path):
    _, out = checkpoint
    prompts = {"e1": ["one two", "two three", "three", "four"], "e2": ["ONE TWO", "TWO THREE", "THREE", "FOUR"]}
    calibrate(out, prompts, samples=4)
    assert_rebuilt(out, tmp_path / "again")
    (file,) = out.glob("router-*.safetensors")
    shutil.copytree(out, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("model*", "*.py", "tokenizer*"))
    upscale("rebuild", tmp_path / "elsewhere/upscale.yaml", tmp_path / "third")
    assert every_file(tmp_path / "third") == every_file(out)  # the router's file and config.json are enough
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    for damage, message in (
        (lambda: file.write_bytes(bytes(content)), "its tensors are not those that its name stands for"),
        (file.unlink, "not the router's file"),
        ((out / "config.json").unlink, "holds no finished model"),
    ):
        damage()
        result = upscale("rebuild", out / "upscale.yaml", tmp_path / "fourth")
        assert result.exit_code == 1
        assert_one_message(result.output, "upscale.yaml must lie in the checkpoint")
        assert message in result.output or message == "holds no finished model"
    assert not (tmp_path / "fourth").exists()


@pytest.mark.parametrize("adapted", [False, True])
def test_ensembling_routers_the_build_s_own_and_others(groups, tmp_path, adapted):
    out = tmp_path / "out"
    assert upscale("wemoe", out, *inline(groups(GPT2, 2)), "--rank", "4", "--router-depth", "1").exit_code == 0
    if adapted:
        directory, layout = router_file.opened(out)
        settings, values = router_file.stored(out)
        values = {name: value + 0.1 * torch.randn(value.shape) for name, value in values.items()}
        router_file.replace(directory, layout, settings, values, {"type": "ensembling", "steps": 3})
        assert json.loads((out / "config.json").read_text())["upscale"]["router"]["tensors"].endswith(
            content_key(values)
        )
    moved = shutil.copy(out / "upscale.yaml", tmp_path / "recipe.yaml")
    assert_rebuilt(out, tmp_path / "again")
    elsewhere = upscale("rebuild", moved, tmp_path / "third")
    assert elsewhere.exit_code == adapted
    if not adapted:
        assert every_file(tmp_path / "third") == every_file(out)


def test_another_version_is_a_warning(checkpoint, tmp_path):
    _, out = checkpoint
    made = yaml.safe_load((out / "upscale.yaml").read_text())
    (out / "upscale.yaml").write_text(yaml.safe_dump({**made, "upscale_zoo": "0.0.1"}, sort_keys=False))
    assert "built by upscale-zoo 0.0.1, this is" in assert_rebuilt(out, tmp_path / "again", but="README.md").replace(
        "\n", " "
    )


BAD = {
    "no YAML": ("a: [", "cannot be read as a recipe"),
    "no mapping": ("- 1", "no recipe; give the upscale.yaml of a checkpoint"),
    "a group": ("base: a\nexperts: {b: c}", "no recipe; give the upscale.yaml of a checkpoint"),
    "bytes": (b"\xff\xfe", "cannot be read as a recipe"),
    "hashes": ({"sha256": ["x"]}, "a damaged recipe"),
    "expert": ({"experts": {"e1": 3}}, "a damaged recipe"),
    "no experts": ({"experts": {}}, "a group needs at least one expert"),
    "name": ({"experts": {"../x": "y/z"}}, "expert name '../x'"),
    "method": ({"method": "soup"}, "method 'soup' is unknown; this version has smile, wemoe"),
    "setting": ({"config": {"colour": 1}}, "its config does not suit this version of upscale-zoo"),
    "value": ({"config": {"rank": 0}}, "--rank must be at least 1"),
    "kind of value": ({"config": {"rank": "many"}}, "its config does not suit this version of upscale-zoo"),
    "place": ({"base": "no such place"}, "--source base=PATH"),
    "commit": ({"sha256": {}}, "base: "),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=list(BAD))
def test_a_bad_recipe_is_one_message(groups, builds, tmp_path, content, message):
    out, _ = builds(LLAMA, 2, rank=8)
    file = tmp_path / "upscale.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump({**yaml.safe_load((out / "upscale.yaml").read_text()), **content}, sort_keys=False)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for source in ((), ("--source", "e9=x")) if message.startswith("base: ") else ((),):
        result = upscale("rebuild", file, tmp_path / "again", *source)
        assert result.exit_code == 1
        assert_one_message(result.output, "has no model e9; it has base, e1, e2" if source else message)
    for text in ("e1", "=x", "e1="):
        assert_one_message(upscale("rebuild", file, tmp_path / "o", "--source", text).output, "write NAME=MODEL")
    assert [path.name for path in tmp_path.iterdir()] == ["upscale.yaml"]
